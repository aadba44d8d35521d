"""Layouts, name rules and shard boundaries, against slow oracles that go element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from mols_ds.core.groups import build_layouts, is_scaled, order_groups
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats, group_index
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.core.sample_blocks import STRIDE
from mols_ds.errors import MolsConfigError
from tests.tools.fuzz.common import ACCEPTED, JSON, REFUSED, Target, refused_by

GROUPS = ("embedding", "head", "qk", "vo", "mlp", "other")
RATES = {"embedding": 4.0, "head": 0.25, "qk": 2.0, "vo": 1.0, "mlp": 0.5, "other": 1.0}
"""Powers of two: a scaled step of SGD on small integers is then exact in fp32, in any order."""

PATTERNS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(GROUPS)), min_size=1, max_size=4).map(tuple)
LAYOUTS = st.builds(ElementLayout, st.integers(1, 6), PATTERNS)


def group_of(layout: ElementLayout, index: int) -> str:
    """The definition in `ElementLayout`: the entry that (i // inner) mod sum(lengths) falls in."""
    position = (index // layout.inner) % sum(length for length, _ in layout.pattern)
    for length, group in layout.pattern:
        if position < length:
            return group
        position -= length
    raise AssertionError("outside of the pattern")


# ------------------------------------------------------------------ layouts


def check_layout(case: tuple[int, Any, int, int]) -> str:
    inner, pattern, start, numel = case
    if inner < 1 or any(length < 1 for length, _ in pattern) or not pattern:
        return refused_by(lambda: ElementLayout(inner, pattern), ValueError)
    layout = ElementLayout(inner, pattern)
    flat = torch.arange(max(numel, 0))
    if start < 0 or numel < 0:
        refused_by(lambda: layout.views(flat, start), ValueError)
        results = [
            refused_by(lambda: layout.counts(start, numel), ValueError),
            refused_by(lambda: list(layout.runs(start, numel)), ValueError),
        ]
        assert results == [REFUSED, REFUSED]
        return REFUSED
    expected = [group_of(layout, start + i) for i in range(numel)]
    assert layout.counts(start, numel) == {group: expected.count(group) for group in expected}
    runs = list(layout.runs(start, numel))
    assert [group for group, _, length in runs for _ in range(length)] == expected
    assert all(a[0] != b[0] and a[1] + a[2] == b[1] for a, b in pairwise(runs))
    seen: dict[int, str] = {}
    for group, view in layout.views(flat, start):
        for index in view.reshape(-1).tolist():
            assert index not in seen, "an element is in two views"
            seen[index] = group
    assert [seen[i] for i in range(numel)] == expected
    return ACCEPTED


LAYOUT_CASES = st.tuples(
    st.sampled_from([*range(1, 7)] * 4 + [0]),
    st.one_of(PATTERNS, PATTERNS.map(lambda p: p[1:]), st.tuples(st.tuples(st.integers(0, 1), st.just("qk")))),
    st.integers(0, 90) | st.integers(-1, 90),
    st.integers(0, 60) | st.integers(-1, 60),
)


# ------------------------------------------------------------------ name rules

PARTS = st.sampled_from(
    [
        "model",
        "layers",
        "h",
        "0",
        "17",
        "self_attn",
        "attn",
        "mlp",
        "experts",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "c_attn",
        "c_proj",
        "qkv_proj",
        "query_key_value",
        "W_pack",
        "gate_up_proj",
        "kv_b_proj",
        "kv_a_proj_with_mqa",
        "embed_tokens",
        "wte",
        "lm_head",
        "input_layernorm",
        "router",
        "weight",
        "bias",
        "module",
        "base_layer",
        "lora_A",
    ]
)
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join) | st.text(min_size=1, max_size=8)
PATTERN_TEXTS = st.one_of(
    PARTS,
    st.text(max_size=6),
    st.sampled_from(["q_proj|k_proj", "^h\\.", "(", "[a", "weight$", ".*", "", "\\d+", "(?P<x>a", "*", "a{2,1}"]),
)
GROUP_NAMES = st.sampled_from([*GROUPS, "other_moe", "mine", "max", "a b", "", "qk.3", "class"]) | st.text(max_size=4)
RULES = st.lists(st.tuples(PATTERN_TEXTS, GROUP_NAMES).map(list) | JSON, max_size=3)
CONFIG_KEYS = st.sampled_from(
    [
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "head_dim",
        "n_head",
        "n_embd",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "multi_query",
        "new_decoder_architecture",
    ]
)
CONFIG_VALUES = st.sampled_from(["llama", "gpt2", "falcon", "phi3", "deepseek_v3", True, False, None, -1, 2.5, "8"])
CONFIGS = st.none() | st.dictionaries(CONFIG_KEYS, st.integers(0, 16) | CONFIG_VALUES, max_size=6)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 12, 16, 24, 48]), max_size=3).map(tuple)
RULE_CASES = st.tuples(
    st.dictionaries(NAMES, SHAPES, max_size=5), CONFIGS, RULES, st.sampled_from(["type", "layer_type", "layer"])
)


def check_rules(case: tuple[dict[str, tuple[int, ...]], Any, Any, str]) -> str:
    shapes, config, rules, granularity = case
    layouts: dict[str, ElementLayout] = {}

    def build() -> None:
        layouts.update(build_layouts(shapes, config, rules, granularity))  # type: ignore[arg-type]

    result = refused_by(build, MolsConfigError)
    if result == ACCEPTED:
        assert list(layouts) == list(shapes)
        for name, layout in layouts.items():
            counts = layout.counts(0, math.prod(shapes[name]))
            assert sum(counts.values()) == math.prod(shapes[name])
            assert set(counts) <= set(layout.groups)
            assert all(isinstance(is_scaled(group), bool) for group in counts)
        groups = {group for layout in layouts.values() for group in layout.groups}
        assert set(order_groups(groups)) == groups
    return result


# ------------------------------------------------------------------ shards


class Shard(NamedTuple):
    """One rank's flat tensor: its size and the pieces in it; what they leave is padding."""

    numel: int
    pieces: list[ShardRange]


def flat_shards(sizes: dict[str, int], world: int, pad: int) -> Iterator[Shard]:
    """ZeRO-1/2: all parameters one after the other, cut into equal parts; the last ones may be padding only."""
    total = sum(sizes.values())
    share = -(-max(total, 1) // world)
    share += -share % pad
    for rank in range(world):
        low, at, pieces = rank * share, 0, []
        for name, size in sizes.items():
            begin, end = max(at, low), min(at + size, low + share)
            if begin < end:
                pieces.append(ShardRange(name, begin - at, begin - low, end - begin))
            at += size
        yield Shard(share, pieces)


def part_shards(sizes: dict[str, int], world: int, pad: int) -> Iterator[Shard]:
    """ZeRO-3: every parameter cut into equal parts, each padded."""
    for rank in range(world):
        at, pieces = 0, []
        for name, size in sizes.items():
            share = -(-size // world)
            share += -share % pad
            count = min(share, size - rank * share)
            if count > 0:
                pieces.append(ShardRange(name, rank * share, at, count))
            at += share
        yield Shard(at, pieces)


SHARD_CASES = st.tuples(
    st.lists(st.tuples(LAYOUTS, st.integers(0, 150) | st.integers(0, 12)), min_size=1, max_size=5),
    st.integers(1, 8),
    st.sampled_from([1, 2, 4, 7]),
    st.booleans(),
    st.permutations(range(5)),
)


def check_shards(case: tuple[list[tuple[ElementLayout, int]], int, int, bool, list[int]]) -> str:
    """Every element is owned once, is counted in its own group and gets its own group's multiplier, on every rank."""
    given, world, pad, by_part, order = case
    sizes = {f"p{i}": size for i, (_, size) in enumerate(given)}
    layouts = {f"p{i}": layout for i, (layout, _) in enumerate(given)}
    expected = {f"p{i}": [group_of(layout, j) for j in range(size)] for i, (layout, size) in enumerate(given)}
    groups = [group for group in GROUPS if any(group in layout.groups for layout in layouts.values())]
    owners = {name: [0] * size for name, size in sizes.items()}
    counted = dict.fromkeys(groups, 0)
    for shard in (part_shards if by_part else flat_shards)(sizes, world, pad):
        pieces = [shard.pieces[i] for i in order if i < len(shard.pieces)]  # in any order
        owned, at = [], 0
        for piece in pieces:
            owned.append(ShardRange(piece.name, piece.start, at, piece.numel))
            at += piece.numel
            for j in range(piece.start, piece.start + piece.numel):
                owners[piece.name][j] += 1
        mine = [group for piece in pieces for group in expected[piece.name][piece.start : piece.start + piece.numel]]
        assert [groups[i] for i in group_index(owned, layouts, groups).tolist()] == mine[::STRIDE]
        elements = LocalStats(owned, layouts, groups, torch.device("cpu"))
        segmented = [g for lay, s, _, n, _ in elements.segments() for g in (group_of(lay, i) for i in range(s, s + n))]
        assert segmented == mine
        for piece in owned:
            for group, count in layouts[piece.name].counts(piece.start, piece.numel).items():
                counted[group] += count
        _check_step(shard._replace(pieces=pieces), layouts, expected)
    assert all(count == 1 for counts in owners.values() for count in counts), "an element is owned twice, or by nobody"
    every = [group for names in expected.values() for group in names]
    assert counted == {group: every.count(group) for group in groups}
    return ACCEPTED


def _check_step(shard: Shard, layouts: dict[str, ElementLayout], expected: dict[str, list[str]]) -> None:
    plan = make_plan(shard.numel, shard.pieces, layouts)
    assert sum(segment.hi - segment.lo for segment in plan.segments) == shard.numel
    assert all(a.hi == b.lo for a, b in pairwise(plan.segments))
    flat = torch.nn.Parameter(torch.zeros(shard.numel))
    optimizer = torch.optim.SGD([flat], lr=1.0)
    scaler = LRScaler(optimizer, {id(flat): plan}, lambda: RATES, elementwise=True)
    gradient = torch.arange(shard.numel, dtype=torch.float32) % 17 + 1
    flat.grad = gradient.clone()
    optimizer.step()
    scaler.remove()
    rates = torch.ones(shard.numel)
    for piece in shard.pieces:
        names = expected[piece.name][piece.start : piece.start + piece.numel]
        rates[piece.offset : piece.offset + piece.numel] = torch.tensor([RATES[group] for group in names])
    assert torch.equal(flat.detach(), -gradient * rates)
    assert optimizer.param_groups[0]["lr"] == 1.0 and not optimizer.state, "the user's group and state are back"


TARGETS = [
    Target("layout slices (layout.py)", LAYOUT_CASES, check_layout, 2500),
    Target("name rules (groups.py, group_rules.py)", RULE_CASES, check_rules, 1500),
    Target("shards and rates (lr_scaler.py, local_stats.py)", SHARD_CASES, check_shards, 600),
]
