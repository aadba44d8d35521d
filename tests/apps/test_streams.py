"""Streamed data sets, which resume at the exact sequence, and mixtures of sources."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.training import streams
from mols_ds.training.batches import (
    MixedBatches,
    PackedBatches,
    RowBatches,
)
from mols_ds.training.sources import (
    DataSpec,
    document_hash,
    hash_threshold,
    open_stream,
    stream_texts,
)
from mols_ds.training.streams import StreamedBatches, build_batches, load_places, save_places
from mols_ds.training.tokens import TokenData, Tokenizer, prepare
from tests.apps.small_batches import letters, shape
from tests.helpers.harness import run_ranks


def hub(monkeypatch: pytest.MonkeyPatch, rows: Sequence[object], shards: int) -> list[object]:
    """Let the hub have one data set with these texts. Returns the arguments with which it is opened."""
    import datasets

    whole = datasets.Dataset.from_list([{"text": text} for text in rows]).to_iterable_dataset(num_shards=shards)
    asked: list[object] = []

    def load_dataset(*args: object, **kwargs: object) -> object:
        asked.extend([*args, kwargs])
        return copy.deepcopy(whole)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


SPEC = DataSpec("owner/name", eval_share=0.3, shuffle_buffer=8)
TEXTS = [chr(65 + n) * (5 + n % 4) for n in range(60)]
"""One letter each."""


def streamed(rank: int = 1, world: int = 2, spec: DataSpec = SPEC) -> StreamedBatches:
    return StreamedBatches(spec, Tokenizer(letters, 0, 200, "letters"), shape(rank, world), seed=0)


def steps_of(batches: RowBatches, *numbers: int) -> list[list[list[int]]]:
    return [torch.cat(list(batches.step("train", n))).tolist() for n in numbers]


@pytest.mark.parametrize(("world", "shards"), [(1, 3), (2, 3), (2, 4)])
def test_a_stream_resumes_at_the_exact_sequence_without_reading_again(
    world: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a block, at the end of a pass (15 steps), and in the second pass."""
    hub(monkeypatch, [*TEXTS, "  ", None], shards)
    whole = steps_of(streamed(world=world, rank=world - 1), *range(30))
    held = {ord(text[0]) for text in TEXTS if document_hash(text, 0) < hash_threshold(0.3)}
    seen = {token for step in whole for row in step for token in row} - {0}
    assert held and not held & seen and (world > 1 or seen == {ord(text[0]) for text in TEXTS} - held)
    assert len({str(step) for step in whole}) == 30
    read: list[str] = []
    stock = streams.stream_texts

    def count(spec: DataSpec, rows: Iterable[JsonObject]) -> Iterator[str]:
        for text in stock(spec, rows):
            read.append(text)
            yield text

    monkeypatch.setattr(streams, "stream_texts", count)
    for step in (0, 4, 9, 15, 21):
        first = streamed(world=world, rank=world - 1)
        steps_of(first, *range(step))
        save_places(first, tmp_path)
        resumed = streamed(world=world, rank=world - 1)
        list(resumed.step("probe", 0))
        resumed.check()
        read.clear()
        load_places(resumed, tmp_path)
        assert steps_of(resumed, step) == whole[step : step + 1]
        assert len(read) <= 4 * SPEC.shuffle_buffer, step  # the block of the place, and what the step itself needs
        assert steps_of(resumed, *range(step + 1, 30)) == whole[step + 1 :]


def test_a_stream_of_0_4_0_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints have no place: `datasets` shuffles. Later checkpoints of the same run too."""
    hub(monkeypatch, TEXTS, 3)
    order = []
    for epoch in range(3):
        rows = open_stream(SPEC, "train", shuffled=int(np.random.default_rng((0, 0, epoch)).integers(2**31)))
        order += [text for text in stream_texts(SPEC, rows) if document_hash(text, 0) >= hash_threshold(0.3)]
    flat = [token for text in order for token in (*map(ord, text), 0)]
    resumed = streamed(0, 1)
    load_places(resumed, tmp_path)
    assert steps_of(resumed, 3, 25) == [np.reshape(flat[16 * n : 16 * n + 16], (4, 4)).tolist() for n in (3, 25)]
    save_places(resumed, tmp_path)
    again = streamed(0, 1)
    load_places(again, tmp_path)
    assert steps_of(again, 26) == [np.reshape(flat[16 * 26 : 16 * 27], (4, 4)).tolist()]


def test_another_number_of_ranks_says_that_a_stream_is_divided_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, TEXTS, 3)
    first = streamed(0, 1)
    steps_of(first, 0)
    save_places(first, tmp_path)
    with pytest.warns(MolsWarning, match="divided anew among another number of ranks"):
        load_places(streamed(0, 2), tmp_path)


def test_a_hub_source_is_dealt_out_to_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {n}" for n in range(20)]
    asked = hub(monkeypatch, [*texts, "  "], 3)
    spec = DataSpec("owner/name", subset="en")
    assert list(stream_texts(spec, open_stream(spec, "train"))) == texts
    assert asked == ["owner/name", "en", {"split": "train", "streaming": True}]
    parts = [list(stream_texts(spec, open_stream(spec, "train", rank=rank, world=2))) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(texts)
    with pytest.raises(MolsConfigError, match="no text in column 'body'"):
        open_stream(DataSpec("owner/name", text_key="body"), "train")


def test_a_part_without_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ["only one"], 1)
    with pytest.raises(MolsConfigError, match="for rank 1 of 2 has no text: use fewer ranks or more data"):
        streamed(1, 2, DataSpec("owner/name", eval_split="test")).check()


def built_on_ranks() -> str:
    """On each rank: the error where rank 1 gets no text."""
    with pytest.MonkeyPatch.context() as patch:
        hub(patch, ["only one"], 1)
        spec, tokenizer = DataSpec("owner/name", eval_split="test"), Tokenizer(letters, 0, 200, "letters")
        try:
            build_batches(spec, tokenizer, TokenData((), np.zeros(0, "<u2")), shape(dist.get_rank(), 2), 0)
        except MolsConfigError as error:
            return str(error)
    return ""


def test_all_ranks_refuse_a_stream_that_gives_one_no_text() -> None:
    first, second = run_ranks(built_on_ranks, 2)
    assert first == second and "for rank 1 of 2 has no text: use fewer ranks or more data" in first


def mixture(folder: Path, *weights: float) -> Path:
    """A mixture of sources with one letter each, beginning with "a"."""
    for n in range(len(weights)):
        rows = [json.dumps({"text": chr(97 + n) * (40 + 10 * i)}) for i in range(40)]
        (folder / f"{n}.jsonl").write_text("\n".join(rows), "utf-8")
    parts = [{"source": str(folder / f"{n}.jsonl"), "weight": weight} for n, weight in enumerate(weights)]
    path = folder / "mix.json"
    path.write_text(json.dumps({"mixture": parts}), "utf-8")
    return path


def test_a_mixture_has_its_shares_and_does_not_depend_on_ranks(tmp_path: Path) -> None:
    spec = DataSpec.parse(str(mixture(tmp_path, 3, 1)), eval_share=0.2)
    tokenizer, tokens = prepare(spec, tmp_path / "cache", tokenizer=None, vocab_size=257, seed=0, held_out_tokens=400)
    a, b = (tokenizer.encode([letter])[0][0] for letter in "ab")
    assert int((tokens.held_out == a).sum()) + 6 >= 300 and 90 <= int((tokens.held_out == b).sum()) <= 100
    ranks = [build_batches(spec, tokenizer, tokens, shape(rank, 2), seed=1) for rank in range(2)]
    alone = build_batches(spec, tokenizer, tokens, shape(micro=4), seed=1)
    rows: list[tuple[int, ...]] = []
    for step in range(125):
        divided = [row for rank in ranks for batch in rank.step("train", step) for row in batch.tolist()]
        whole = torch.cat(list(alone.step("train", step))).tolist()
        assert sorted(divided) == sorted(whole)
        rows += map(tuple, whole)
    counts = Counter(a in row for row in rows)
    assert len(rows) == 1000 and abs(counts[True] - 750) <= 5  # a sequence of end tokens may have none
    parts = [PackedBatches(part, shape(), seed=1) for part in tokens.train]
    order = [tuple(row) for n in range(40) for row in torch.cat(list(parts[1].step("train", n))).tolist()]
    assert [row for row in rows if b in row][:100] == [row for row in order if b in row][:100]


def test_a_streamed_mixture_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, TEXTS, 3)
    first, second = (
        DataSpec("owner/name", eval_split="test", shuffle_buffer=8),
        DataSpec("owner/other", shuffle_buffer=4),
    )

    def build() -> MixedBatches:
        return MixedBatches([streamed(0, 1, first), streamed(0, 1, second)], (2.0, 1.0), shape(), seed=0)

    whole = steps_of(mixed := build(), *range(20))
    save_places(mixed, tmp_path)
    mixed = build()
    load_places(mixed, tmp_path)
    assert steps_of(mixed, 20, 21) == steps_of(build(), 20, 21)
    assert len({str(step) for step in whole}) == 20


def test_mistakes_in_a_mixture_are_named(tmp_path: Path) -> None:
    one = {"source": "stdlib", "weight": 1}
    cases: list[tuple[object, str]] = [
        ([one], "a list of two or more objects"),
        ([one, {"weight": 1}], "a list of two or more objects"),
        ([one, {"source": "stdlib", "weight": 0}], "weight of stdlib is 0: give a number above 0"),
        ([one, {"source": "stdlib", "wieght": 2}], "unknown key 'wieght'"),
        ([one, {"source": "owner/name"}], "local sources or data sets of the hub, not both"),
        ([one, {"source": "./none.txt"}], "no such file or folder"),
    ]
    for content, message in cases:
        path = tmp_path / "mix.json"
        path.write_text(json.dumps({"mixture": content}), "utf-8")
        with pytest.raises(MolsConfigError, match=message):
            DataSpec.parse(str(path))
    packed = PackedBatches(np.arange(40, dtype="<u2"), shape(), seed=0)
    with pytest.raises(MolsConfigError, match="below 1/1000 of all: leave it out"):
        MixedBatches([packed, packed], (1.0, 1e-4), shape(), seed=0)
