"""Documents, the held-out split, packing, the order of batches."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from mols_ds.errors import MolsConfigError
from mols_ds.training import sources
from mols_ds.training.batches import (
    BatchShape,
    PackedBatches,
    SequenceOrder,
    held_out_batches,
)
from mols_ds.training.sources import (
    DataSpec,
    check_hub,
    cut,
    document_hash,
    hash_threshold,
    local_documents,
    local_files,
    local_threshold,
)
from mols_ds.training.streams import build_batches
from mols_ds.training.token_files import IndexedWriter, token_dtype
from mols_ds.training.tokens import TokenData, Tokenizer, load_tokenizer, prepare, train_tokenizer
from tests.apps.command import ROOT, write_text
from tests.apps.small_batches import shape
from tests.helpers.digests import caught


def test_default_is_the_standard_library_in_a_fixed_order() -> None:
    files = local_files(DataSpec())
    assert len(files) > 200
    assert files == sorted(files)
    assert not any("site-packages" in path.parts for path in files)


@pytest.mark.parametrize("name", ["stdlib", "c4", "openwebtext"])
def test_ready_data_settings_are_valid(name: str) -> None:
    spec = DataSpec.parse(str(ROOT / "configs" / "data" / f"{name}.json"))
    assert spec.streaming == (name != "stdlib")


def test_all_local_formats_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"text number {n}" for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts), "utf-8")
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert list(local_documents(DataSpec.parse(str(tmp_path / name), text_key="body"))) == texts
    folder = tmp_path / "folder"
    folder.mkdir()
    for n, text in enumerate(texts):
        (folder / f"{n}.txt").write_text(text, "utf-8")
    assert list(local_documents(DataSpec.parse(str(folder)))) == texts


def test_cut_loses_nothing_and_keeps_paragraphs_whole() -> None:
    text = "\n\n".join(f"paragraph {n} " * 5 for n in range(100))
    pieces = list(cut(text, limit=500))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(piece.startswith("paragraph") for piece in pieces)


def test_no_training_token_comes_from_a_held_out_document(tmp_path: Path) -> None:
    """Each document is one word many times over; the words of both sides must be disjoint, duplicates included."""
    names = [f"q{n:03d}x" for n in range(50)] * 2
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{name} " * 30}) for name in names), "utf-8")
    spec = DataSpec.parse(str(path), eval_share=0.2)
    _, tokens = prepare(spec, tmp_path / "cache", tokenizer=None, vocab_size=400, seed=3, held_out_tokens=0)
    (train,) = tokens.train
    (folder,) = (tmp_path / "cache").glob("tokenizer-*[!k]")
    from tokenizers import Tokenizer as Reader

    reader = Reader.from_file(str(folder / "tokenizer.json"))
    sides = [set(reader.decode(side.tolist()).split()) - {""} for side in (train, tokens.held_out)]
    assert sides[0] | sides[1] == set(names)
    assert not sides[0] & sides[1]
    assert len(sides[1]) >= 3


def test_small_sources_still_have_both_sides() -> None:
    for count in range(2, 6):
        texts = [f"document {n}" for n in range(count)]
        for share in (1e-9, 1 - 1e-9):
            threshold = local_threshold(texts, share, seed=0)
            held = [document_hash(text, 0) < threshold for text in texts]
            assert any(held) and not all(held)
    with pytest.raises(MolsConfigError, match="only one document"):
        local_threshold(["same", "same"], 0.1, seed=0)


def test_split_depends_on_seed_and_share_alone() -> None:
    texts = [f"document {n}" for n in range(2000)]
    assert local_threshold(texts, 0.1, seed=1) == hash_threshold(0.1)
    held = [{text for text in texts if document_hash(text, seed) < hash_threshold(0.1)} for seed in (1, 1, 2)]
    assert held[0] == held[1] != held[2]
    assert 150 < len(held[0]) < 250


def test_tokens_are_documents_each_closed_by_the_end(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.jsonl", documents=20)
    spec = DataSpec.parse(str(data), eval_share=0.2)
    tokenizer, tokens = prepare(spec, tmp_path / "cache", tokenizer=None, vocab_size=300, seed=0, held_out_tokens=0)
    (train,) = tokens.train
    assert int((train == tokenizer.end).sum() + (tokens.held_out == tokenizer.end).sum()) == 20
    assert train[-1] == tokens.held_out[-1] == tokenizer.end
    again = prepare(spec, tmp_path / "cache2", tokenizer=None, vocab_size=300, seed=0, held_out_tokens=0)[1]
    assert np.array_equal(train, again.train[0]) and np.array_equal(tokens.held_out, again.held_out)


def test_texts_are_encoded_as_transformers_encodes_them(tmp_path: Path) -> None:
    """Also by a tokenizer folder that cuts and pads."""
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    train_tokenizer(["some text, and more of it"] * 9, 270, tmp_path / "bpe")
    backend = Backend.from_file(str(tmp_path / "bpe" / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=40)
    backend.save(str(tmp_path / "bpe" / "tokenizer.json"))
    texts = ["", "some text, and more of it", "end <|endoftext|> of text", "\ud800 \n\n é 字"[1:]]
    stock = AutoTokenizer.from_pretrained(str(tmp_path / "bpe"))
    expected = stock(texts, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path / "bpe").encode(texts) == expected and max(map(len, expected)) > 5


def test_cache_is_used_and_changes_with_the_data(tmp_path: Path) -> None:
    data, cache = write_text(tmp_path / "text.jsonl", documents=20), tmp_path / "cache"

    def folders() -> set[str]:
        prepare(DataSpec.parse(str(data)), cache, tokenizer=None, vocab_size=300, seed=0, held_out_tokens=0)
        return {path.name for path in cache.iterdir() if path.is_dir()}

    first = folders()
    assert folders() == first
    write_text(data, documents=25)
    assert len(folders() - first) == 2


def test_batches_do_not_depend_on_the_number_of_ranks() -> None:
    tokens = np.arange(4 * 50, dtype="<u2")

    def batch(world: int, accumulation: int) -> list[int]:
        parts = []
        for rank in range(world):
            packed = PackedBatches(tokens, shape(rank, world, 2, accumulation), seed=5)
            parts += [row for micro in packed.step("train", 7) for row in micro[:, 0].tolist()]
        return sorted(parts)

    assert batch(1, 4) == batch(2, 2) == batch(4, 1)
    assert len(set(batch(1, 4))) == 8


def test_an_epoch_visits_each_sequence_once_and_the_next_in_another_order() -> None:
    order = SequenceOrder(30, seed=1, stream="train")
    epochs = [order.indices(30 * n, 30) for n in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(order.indices(20, 25), np.concatenate([epochs[0][20:], epochs[1][:15]]))
    assert np.array_equal(SequenceOrder(30, seed=1, stream="train").indices(0, 90), np.concatenate(epochs))
    assert not np.array_equal(SequenceOrder(30, seed=2, stream="train").indices(0, 30), epochs[0])


def test_the_probe_stream_is_another_order_and_moves_nothing() -> None:
    packed = PackedBatches(np.arange(4 * 50, dtype="<u2"), shape(), seed=0)
    before = torch.cat(list(packed.step("train", 3)))
    probe = torch.cat(list(packed.step("probe", 3)))
    assert torch.equal(torch.cat(list(packed.step("train", 3))), before)
    assert not torch.equal(probe, before)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_sequences_count_once_in_equally_many_batches(world: int) -> None:
    tokens = np.arange(4 * 11 + 3, dtype="<u2")
    ranks = [held_out_batches(tokens, shape(rank, world), None) for rank in range(world)]
    assert len({len(part) for part in ranks}) == 1
    counted = [row for part in ranks for batch, valid in part for row in batch[:valid, 0].tolist()]
    assert sorted(counted) == [4 * n for n in range(11)]
    assert sum(valid for batch, valid in held_out_batches(tokens, shape(), 5)) == 5


@pytest.mark.parametrize("key", [field.name for field in fields(DataSpec) if field.name != "mixture"])
def test_every_key_of_the_wrong_type_is_named(tmp_path: Path, key: str) -> None:
    for wrong in (True, 2.5, [1], {}, "x", 7):
        if isinstance(wrong, type(getattr(DataSpec(), key) or "")) or (key in ("weight", "eval_share") and wrong == 7):
            continue
        path = write(tmp_path / "data.json", json.dumps({"source": "owner/name", key: wrong}))
        with pytest.raises(MolsConfigError, match=f": {key} is .*, which is not"):
            DataSpec.parse(str(path))


def test_fewer_sequences_than_a_global_batch_are_a_warning() -> None:
    tokens = TokenData((np.zeros(8 * shape().length, dtype="<u2"),), np.zeros(0, dtype="<u2"))
    tokenizer = Tokenizer(lambda texts: [], 0, 300, "none")
    for length, warned in ((shape().length, False), (2 * shape().length, True)):
        with caught() as said:
            build_batches(DataSpec(), tokenizer, tokens, BatchShape(length, 4, 2, 0, 1), seed=0)
        assert any("data stdlib: 4 sequences of" in line for line in said) is warned


def test_too_little_text_is_named() -> None:
    with pytest.raises(MolsConfigError, match="shorter than one sequence"):
        PackedBatches(np.zeros(3, dtype="<u2"), shape(), seed=0)
    with pytest.raises(MolsConfigError, match="held-out text has 3 tokens"):
        held_out_batches(np.zeros(3, dtype="<u2"), shape(), None)


def test_token_files_are_megatron_s(tmp_path: Path) -> None:
    """Byte for byte what its builder writes, in both dtypes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    random = np.random.default_rng(0)
    documents = [random.integers(1, 300, length).tolist() for length in (3, 1, 700, 2)]
    for vocab_size in (65499, 65500):
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
        writer = IndexedWriter(tmp_path / "ours", token_dtype(vocab_size))
        assert writer.add(documents[:3], 0) + writer.add(documents[3:], 0) == 710
        writer.close()
        for document in documents:
            builder.add_document(torch.tensor([*document, 0]), [len(document) + 1])
        builder.finalize(str(tmp_path / "theirs.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_text_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are those of the whole text. Huge ones are skipped and counted, and are never in memory whole."""
    random = np.random.default_rng(0)
    text = "".join(("\n\n", "\n", "\n\n\n", "word")[k] * int(n) for k, n in random.integers(0, 4, (4000, 2)))
    path = write(tmp_path / "text.txt", text)
    for limit, block in ((10, 7), (100, 64), (1000, 4096)):
        monkeypatch.setattr(sources, "BLOCK_CHARACTERS", block)
        monkeypatch.setattr(sources.cut, "__defaults__", (limit,))
        assert list(sources._pieces(path)) == list(cut(text, limit))
    monkeypatch.setattr(sources, "HUGE_CHARACTERS", 2000)
    write(path, "a" * 1500 + "\n\n" + "b" * 50_000 + "\n\n" + "c" * 1500)
    skipped = Counter[str]()
    kept = list(local_documents(DataSpec(str(path)), skipped))
    assert [text[0] for text in kept] == ["a", "c"] and skipped == {"huge": 1}
    assert max(map(len, sources._pieces(path))) < 2000 + 2 * 4096


def test_a_hub_that_cannot_be_asked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    check_hub(DataSpec())
    with pytest.raises(MolsConfigError, match=r"data owner/name: neither .* ConnectionError: no route$"):
        check_hub(DataSpec("owner/name"))


def write(path: Path, content: str) -> Path:
    path.write_text(content, "utf-8")
    return path


def test_mistakes_in_the_data_are_named(tmp_path: Path) -> None:
    cases = {
        "no such file or folder": str(tmp_path / "missing.txt"),
        "it has no text": str(write(tmp_path / "blank.txt", " \n\n ")),
        "cannot be read as json": str(write(tmp_path / "broken.jsonl", '{"text": 1')),
        "columns are body": str(write(tmp_path / "body.jsonl", '{"body": "hello"}')),
        "no file with a suffix": str(tmp_path / "nothing"),
        "suffix '.bin'": str(write(tmp_path / "data.bin", "x")),
        "unknown key 'sourcee'": str(write(tmp_path / "typo.json", '{"source": "stdlib", "sourcee": 1}')),
        "eval_share is 2": str(write(tmp_path / "share.json", '{"source": "stdlib", "eval_share": 2}')),
        "column 'text' has int, not text": str(write(tmp_path / "numbers.jsonl", '{"text": 1}')),
        "the source is empty": str(write(tmp_path / "empty.json", '{"source": " "}')),
        "subset would do nothing": str(write(tmp_path / "hub.json", '{"source": "stdlib", "subset": "en"}')),
    }
    (tmp_path / "nothing").mkdir()
    for message, source in cases.items():
        with pytest.raises(MolsConfigError, match=message):
            list(local_documents(DataSpec.parse(source)))


def test_mistakes_in_the_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(MolsConfigError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(MolsConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(MolsConfigError, match="at least 257"):
        train_tokenizer(["text"], 100, tmp_path / "small")
