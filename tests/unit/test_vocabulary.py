"""Rows of tokens that do not occur: which parameters have them, which tokens occurred, and sums without the others."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import OF_0_4_0, UNKNOWN, LocalStats
from mols_ds.core.ranges import ParamRange, pack
from mols_ds.core.vocabulary import (
    CHUNK,
    TokenIds,
    TokenRows,
    find_vocabulary,
    mark_ids,
    mark_rows,
    row_mask,
    seen_tokens,
)
from mols_ds.errors import MolsCheckpointError

ROWS, WIDTH, SAMPLES = 23, 5, 6
SHAPES = {"embed.weight": (ROWS, WIDTH), "q.weight": (4, 7), "lm_head.weight": (ROWS, WIDTH)}
GROUPS = ("embedding", "head", "qk")
LAYOUTS = {
    "embed.weight": ElementLayout.whole("embedding"),
    "q.weight": ElementLayout.whole("qk"),
    "lm_head.weight": ElementLayout.whole("head"),
}
TOKENS = torch.tensor([0, 1, 2, 5, 7, 11, 12, 22])


def alone(values: Tensor) -> Tensor:
    return values


# ---------------------------------------------------------------------- which parameters


def found(shapes: dict[str, Any], groups: dict[str, str], columns: dict[str, int] | None = None) -> TokenRows | None:
    layouts = {name: ElementLayout.whole(groups[name]) for name in shapes}
    return find_vocabulary(layouts, shapes, columns or {})


def test_embedding_and_head() -> None:
    shapes = {"wte": (50, 8), "wpe": (50, 8), "lm_head": (50, 8), "score": (3, 8), "norm": (8,)}
    groups = {"wte": "embedding", "wpe": "embedding", "lm_head": "head", "score": "head", "norm": "other"}
    one = found(shapes, groups)
    assert one == TokenRows(50, frozenset({"wte"}), frozenset({"lm_head"}), {"wte": 8, "lm_head": 8})
    cut = found(shapes, groups, {"lm_head": 4})
    assert cut is not None and cut.widths == {"wte": 8, "lm_head": 4}
    assert found(shapes, groups, {"lm_head": 0}) is None  # rows in an unknown order


@pytest.mark.parametrize(
    "name", ["embed_positions", "pos_embed", "position_embeddings", "wpe", "token_type_embeddings"]
)
def test_positions_and_segments_are_no_tokens(name: str) -> None:
    assert found({name: (50, 8)}, {name: "embedding"}) is None
    assert found({f"compositional.{name}": (50, 8)}, {f"compositional.{name}": "embedding"}) is None
    assert found({"composition_embed": (50, 8)}, {"composition_embed": "embedding"}) is not None


def test_tied_frozen_and_adapted() -> None:
    tied = found({"wte": (50, 8)}, {"wte": "embedding"})
    assert tied == TokenRows(50, frozenset({"wte"}), frozenset(), {"wte": 8})
    frozen = found({"lm_head": (50, 8)}, {"lm_head": "head"})
    assert frozen == TokenRows(50, frozenset(), frozenset({"lm_head"}), {"lm_head": 8})
    adapted = found({"h.lora_A": (4, 8), "h.lora_B": (50, 4)}, {"h.lora_A": "head", "h.lora_B": "head"})
    assert adapted == TokenRows(50, frozenset(), frozenset({"h.lora_B"}), {"h.lora_B": 4})
    assert found({"wte": (50, 8), "score": (3, 8)}, {"wte": "embedding", "score": "head"}) is None  # a classifier
    assert found({"q": (8, 8)}, {"q": "qk"}) is None


# ---------------------------------------------------------------------- rows of shards


def test_rows_of_any_range() -> None:
    """Ranges that begin and end within a row."""
    whole = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    whole[TOKENS, 3] = True
    seen = whole.any(1)
    for start in range(ROWS * WIDTH):
        for numel in (1, 2, WIDTH, 2 * WIDTH + 1, 40):
            part = whole.flatten()[start : start + numel]
            if part.numel() < numel:
                continue
            flags = torch.zeros(ROWS, dtype=torch.uint8)
            mark_rows(flags, start, part, WIDTH)
            rows = torch.arange(start, start + numel) // WIDTH
            wanted = torch.zeros(ROWS, dtype=torch.bool)
            wanted[rows[part]] = True
            assert torch.equal(flags.bool(), wanted)
            assert torch.equal(row_mask(seen, start, numel, WIDTH), seen[rows])


def test_ids_of_any_kind() -> None:
    flags = torch.zeros(ROWS + 1, dtype=torch.uint8)
    mark_ids(flags, torch.tensor([[3, 4], [4, -100]], dtype=torch.int32))
    mark_ids(flags, torch.tensor([ROWS, 10**9]))
    mark_ids(flags, torch.zeros(0, dtype=torch.int64))
    assert flags[:-1].nonzero().flatten().tolist() == [3, 4]


# ---------------------------------------------------------------------- which tokens


def test_sources_of_tokens() -> None:
    def flags(*ids: int) -> Tensor:
        result = torch.zeros(ROWS, dtype=torch.uint8)
        result[list(ids)] = 1
        return result

    every, none = flags(*range(ROWS)), flags()
    names, head = frozenset({"e"}), frozenset({"h"})
    untied, tied = TokenRows(ROWS, names, head, {}), TokenRows(ROWS, names, frozenset(), {})
    frozen = TokenRows(ROWS, frozenset(), head, {})

    def ids_of(vocabulary: TokenRows, by_ids: Tensor, moved: Tensor) -> list[int] | None:
        seen = seen_tokens(vocabulary, lambda: by_ids, lambda: moved, alone)
        return None if seen is None else seen.nonzero().flatten().tolist()

    assert ids_of(untied, flags(1), flags(2)) == [1, 2]
    assert ids_of(untied, none, flags(2)) == [2]  # a compiled model
    assert ids_of(untied, none, none) is None  # inputs_embeds
    assert ids_of(tied, flags(1), every) == [1]
    assert ids_of(tied, none, every) is None
    assert ids_of(tied, none, flags(2)) == [2]  # no softmax over the rows
    assert ids_of(frozen, flags(1), every) == [1]


def test_collectives_stay_below_256_kib() -> None:
    sizes: list[int] = []

    def record(values: Tensor) -> Tensor:
        sizes.append(values.numel() * values.element_size())
        return values

    for rows, calls in ((128_256, 1), (CHUNK, 1), (CHUNK + 1, 2)):
        flags = torch.ones(rows, dtype=torch.uint8)
        sizes.clear()
        seen_tokens(TokenRows(rows, frozenset(), frozenset({"h"}), {}), lambda f=flags: f, lambda f=flags: f, record)
        assert len(sizes) == calls and sum(sizes) == rows and max(sizes) <= 262_144


# ---------------------------------------------------------------------- sums of shards


def gradients() -> list[dict[str, Tensor]]:
    """Head: tokens that occur are noisy, all others are nearly constant. Embedding: the others never move."""
    generator = torch.Generator().manual_seed(1)

    def draw(name: str) -> Tensor:
        return torch.randn(*SHAPES[name], generator=generator)

    samples = []
    for _ in range(SAMPLES):
        embedding = torch.zeros(SHAPES["embed.weight"])
        embedding[TOKENS] = draw("embed.weight")[TOKENS]
        head = 1.0 + 1e-3 * draw("lm_head.weight")
        head[TOKENS] = 0.1 + draw("lm_head.weight")[TOKENS]
        samples.append({"embed.weight": embedding, "q.weight": draw("q.weight"), "lm_head.weight": head})
    return samples


def measured(cuts: list[int], vocabulary: TokenRows | None) -> list[LocalStats]:
    """One rank's statistics for each [cuts[r], cuts[r + 1]) of the parameters, laid end to end."""
    ranks = []
    for low, high in pairwise(cuts):
        ranges, at = [], 0
        for name, (rows, width) in SHAPES.items():
            part = ParamRange(name, 0, rows * width).part(low - at, high - at)
            at += rows * width
            if part.numel:
                ranges.append(part.at(0))
        ranks.append(LocalStats(pack(ranges), LAYOUTS, GROUPS, torch.device("cpu"), vocabulary))
    for sample in gradients():
        flat = torch.cat([sample[name].flatten() for name in SHAPES])
        for rank, (low, high) in zip(ranks, pairwise(cuts), strict=True):
            rank.open()
            rank.add(0, flat[low:high], 1.0)
            rank.close()
    return ranks


def total(ranks: list[LocalStats]) -> Any:
    """The summed statistics after the collective search for tokens."""
    flags = torch.stack([rank.rows_by_gradient() for rank in ranks]).amax(0)
    for rank in ranks:
        assert rank.find_seen(rank.rows_by_gradient, lambda values: torch.maximum(values, flags)) is None
    sums = [rank.gradient_sums() for rank in ranks]
    sums[0].load_packed(torch.stack([one.pack() for one in sums]).sum(0))
    return sums[0]


SIZE = sum(rows * width for rows, width in SHAPES.values())
EMBEDDING, HEAD = frozenset({"embed.weight"}), frozenset({"lm_head.weight"})
UNTIED = TokenRows(ROWS, EMBEDDING, HEAD, dict.fromkeys([*EMBEDDING, *HEAD], WIDTH))


@pytest.mark.parametrize(
    "cuts", [[0, SIZE], [0, 7, 118, 150, SIZE], [0, 0, 115, 143, SIZE - 1, SIZE], [0, 61, 61, SIZE]]
)
def test_sums_do_not_depend_on_the_shards(cuts: list[int]) -> None:
    """Shards that straddle a row, are empty or have no embedding; against the samples themselves."""
    sums = total(measured(cuts, UNTIED))
    head = torch.stack([sample["lm_head.weight"] for sample in gradients()])[:, TOKENS].double()
    mu2, s2 = head.mean(0) ** 2, head.var(0)
    assert sums.column("snr")["head"] == pytest.approx(float((mu2 / s2).sum()), rel=1e-5)
    assert sums.column("count")["head"] == sums.column("count")["embedding"] == len(TOKENS) * WIDTH
    unseen = (ROWS - len(TOKENS)) * WIDTH
    assert sums.column("unseen") == {"embedding": unseen, "head": unseen, "qk": 0}
    assert sums.column("never_moved") == {"embedding": unseen, "head": 0, "qk": 0}
    assert sums.column("total") == {"embedding": ROWS * WIDTH, "head": ROWS * WIDTH, "qk": 28}
    assert not any(sums.not_finite().values())


def test_without_a_vocabulary_every_row_counts() -> None:
    [rank] = measured([0, SIZE], None)
    assert rank.find_seen(rank.rows_by_gradient, alone) == UNKNOWN
    assert rank.gradient_sums().column("count")["head"] == ROWS * WIDTH


def test_a_checkpoint_keeps_the_ids() -> None:
    tied = TokenRows(ROWS, frozenset({"embed.weight"}), frozenset(), {"embed.weight": WIDTH})
    [rank] = measured([0, SIZE], tied)
    rank.see_ids(torch.tensor([3]))
    rank.drop_ids()  # its batch was no sample
    rank.see_ids(TOKENS)
    rank.open()
    rank.add(0, torch.ones(SIZE), 1.0)
    rank.close()
    saved = copy.deepcopy(rank.state_dict())
    assert saved is not None
    again = LocalStats(rank.ranges, LAYOUTS, GROUPS, torch.device("cpu"), tied)
    again.load_state_dict(saved)
    for one in (rank, again):
        assert one.find_seen(one.rows_by_gradient, alone) is None
    assert torch.equal(again.gradient_sums().pack(), rank.gradient_sums().pack())
    assert again.gradient_sums().column("unseen")["embedding"] == (ROWS - len(TOKENS)) * WIDTH
    with pytest.raises(MolsCheckpointError, match="not those of this vocabulary"):
        again.load_state_dict({**saved, "ids": torch.zeros(3)})


def test_a_calibration_that_0_4_0_began_counts_every_row() -> None:
    [rank] = measured([0, SIZE], UNTIED)
    saved = dict(rank.state_dict() or {})
    del saved["ids"]
    rank.load_state_dict(saved)
    assert rank.find_seen(rank.rows_by_gradient, alone) == OF_0_4_0
    assert rank.gradient_sums().column("count")["head"] == ROWS * WIDTH
    rank.free()
    assert not rank.of_0_4_0


# ---------------------------------------------------------------------- hooks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos_embed = nn.Embedding(ROWS, WIDTH), nn.Embedding(ROWS, WIDTH)

    def forward(self, ids: Tensor, *, by_name: bool = False) -> Tensor:
        looked = self.embed(input=ids) if by_name else self.embed(ids)
        return (looked + self.pos_embed(torch.arange(ids.shape[-1]))).sum()


def test_hooks_see_the_ids_until_they_are_removed() -> None:
    model, seen = Model(), []
    watch = TokenIds(seen.append)
    watch.follow(model, ROWS)
    watch.follow(model, ROWS)
    model(TOKENS)
    model(TOKENS, by_name=True)
    assert [ids.tolist() for ids in seen] == [TOKENS.tolist()] * 2  # once each, and none of the positions
    copy.deepcopy(model)(TOKENS)
    assert len(seen) == 2
    watch.remove()
    model(TOKENS)
    assert len(seen) == 2 and not model.embed._forward_pre_hooks


def test_a_model_that_was_compiled_before_tells_no_ids() -> None:
    model, seen = Model(), []
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    watch = TokenIds(seen.append)
    watch.follow(model, ROWS)
    compiled(TOKENS)
    assert seen == []  # so `seen_tokens` must do without them
