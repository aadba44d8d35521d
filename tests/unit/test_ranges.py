"""Ranges of parameters: parts, the split among replicas, and spans, against lists of single elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.ranges import (
    ParamRange,
    ShardRange,
    Span,
    merge_neighbours,
    pack,
    spans_to_accumulators,
    split_among_replicas,
)
from mols_ds.errors import MolsCheckpointError

Element = tuple[str, int, Any, int]
"""One element: parameter, index in it, tensor, index in that."""

POSITIONS = st.integers(-5, 25)


def elements(owned: list[tuple[Any, ShardRange]]) -> list[Element]:
    """The single elements of ranges, in order."""
    return [(item.name, item.start + i, key, item.offset + i) for key, item in owned for i in range(item.numel)]


@st.composite
def owned_ranges(draw: st.DrawFn) -> list[tuple[str, ShardRange]]:
    """Ranges, empty ones too, in up to three tensors; gaps between them are padding, or copies that others count."""
    ends = {"x": 0, "y": 0, "z": 0}
    owned = []
    for number, (start, gap, numel) in enumerate(
        draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 12)), max_size=8))
    ):
        key = draw(st.sampled_from(sorted(ends)))
        owned.append((key, ShardRange(f"p{number}", start, ends[key] + gap, numel)))
        ends[key] += gap + numel
    return owned


# ---------------------------------------------------------------------- parts


@given(st.integers(0, 9), st.integers(0, 20), POSITIONS, POSITIONS)
def test_a_part_is_the_intersection(start: int, numel: int, low: int, high: int) -> None:
    whole = ParamRange("p", start, numel)
    part = whole.part(low, high)
    kept = [start + i for i in range(numel) if low <= i < high]
    assert list(range(part.start, part.start + part.numel)) == kept and part.numel == len(kept)
    assert whole.part(0, numel) == whole
    assert part.part(0, part.numel) == part
    assert whole.at(3).part(low, high) == ShardRange("p", part.start, 3 + part.start - start, part.numel)


@given(st.integers(0, 20), POSITIONS, POSITIONS, POSITIONS, POSITIONS)
def test_parts_of_parts_and_their_order(numel: int, a: int, b: int, c: int, d: int) -> None:
    whole = ShardRange("p", 7, 2, numel)
    first, second = set(elements([(0, whole.part(a, b))])), set(elements([(0, whole.part(c, d))]))
    assert set(elements([(0, whole.part(max(a, c), min(b, d)))])) == first & second  # in either order
    offset = whole.part(a, b).start - whole.start
    inner = whole.part(a, b).part(c - offset, d - offset)
    assert set(elements([(0, inner)])) == first & second


def test_a_view_is_of_the_elements_and_no_copy() -> None:
    flat = torch.arange(10.0)
    ShardRange("p", 100, 3, 4).view(flat).zero_()
    assert flat.tolist() == [0, 1, 2, 0, 0, 0, 0, 7, 8, 9]
    assert ShardRange("p", 0, 10, 0).view(flat).numel() == 0


# ---------------------------------------------------------------------- the split among replicas


@settings(max_examples=200)
@given(owned_ranges(), st.integers(1, 9))
def test_replicas_have_each_element_once(owned: list[tuple[str, ShardRange]], replicas: int) -> None:
    """Each computes its share alone: together they are the whole, in order, for any sizes."""
    shares = [split_among_replicas(owned, rank, replicas) for rank in range(replicas)]
    assert [element for share in shares for element in elements(share)] == elements(owned)
    assert all(item.numel > 0 for share in shares for _, item in share)
    sizes = [sum(item.numel for _, item in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_shares_of_one_and_of_too_few_elements() -> None:
    one = [("x", ShardRange("p", 4, 2, 1))]
    assert [split_among_replicas(one, rank, 3) for rank in range(3)] == [[], [], one]
    assert split_among_replicas([], 1, 2) == []
    assert split_among_replicas([("x", ShardRange("p", 0, 0, 0))], 0, 2) == []


def test_a_share_keeps_the_places_in_the_tensors() -> None:
    """Elements 2 and 3 of tensor x are a copy that another rank counts: they are not in the list, but in the tensor."""
    owned = [("x", ShardRange("a", 0, 0, 2)), ("x", ShardRange("c", 10, 4, 4)), ("y", ShardRange("d", 0, 1, 2))]
    assert split_among_replicas(owned, 0, 2) == [
        ("x", ShardRange("a", 0, 0, 2)),
        ("x", ShardRange("c", 10, 4, 2)),
    ]
    assert split_among_replicas(owned, 1, 2) == [
        ("x", ShardRange("c", 12, 6, 2)),
        ("y", ShardRange("d", 0, 1, 2)),
    ]


# ---------------------------------------------------------------------- accumulators and spans


@given(owned_ranges())
def test_packed_ranges_follow_each_other(owned: list[tuple[str, ShardRange]]) -> None:
    packed = pack(item for _, item in owned)
    assert [(e[0], e[1]) for e in elements([(None, item) for item in packed])] == [
        (e[0], e[1]) for e in elements(owned)
    ]
    assert [e[3] for e in elements([(None, item) for item in packed])] == list(range(sum(i.numel for i in packed)))
    assert [item.numel for item in packed] == [item.numel for _, item in owned]


SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), max_size=12)


@given(SPANS)
def test_merged_spans_have_the_same_elements_and_no_neighbours(steps: list[tuple[int, int, int]]) -> None:
    spans, source, target = [], 0, 0
    for source_gap, target_gap, numel in steps:
        source, target = source + source_gap, target + target_gap
        spans.append(Span(source, target, numel))
        source, target = source + numel, target + numel
    merged = merge_neighbours(spans)

    def pairs(of: list[Span]) -> list[tuple[int, int]]:
        return [(span.source + i, span.target + i) for span in of for i in range(span.numel)]

    assert pairs(merged) == pairs(spans)
    assert merge_neighbours(merged) == merged
    apart = sum((source_gap, target_gap) != (0, 0) for source_gap, target_gap, _ in steps[1:])
    assert len(merged) == (1 + apart if steps else 0)


def test_neighbours_in_one_tensor_alone_are_not_merged() -> None:
    apart = [Span(0, 0, 2), Span(2, 3, 2), Span(5, 5, 1), Span(6, 6, 1)]
    assert merge_neighbours(apart) == [Span(0, 0, 2), Span(2, 3, 2), Span(5, 5, 2)]
    assert merge_neighbours([Span(2, 2, 2), Span(0, 0, 2)]) == [Span(2, 2, 2), Span(0, 0, 2)]


def test_neighbours_are_one_span_and_padding_parts_them() -> None:
    owned = [
        (0, ShardRange("a", 0, 0, 3)),
        (0, ShardRange("b", 5, 3, 2)),  # a neighbour, from the middle of its parameter
        (0, ShardRange("c", 0, 6, 2)),  # behind one element of padding
        (1, ShardRange("d", 0, 0, 4)),
        (1, ShardRange("e", 0, 4, 2)),
    ]
    assert spans_to_accumulators(owned) == {0: [Span(0, 0, 5), Span(6, 5, 2)], 1: [Span(0, 7, 6)]}


@given(owned_ranges())
def test_spans_put_each_element_in_its_place(owned: list[tuple[str, ShardRange]]) -> None:
    found = sorted(
        (span.target + i, key, span.source + i)
        for key, spans in spans_to_accumulators(owned).items()
        for span in spans
        for i in range(span.numel)
    )
    assert found == [(place, key, index) for place, (_, _, key, index) in enumerate(elements(owned))]


# ---------------------------------------------------------------------- saved ranges


def test_saved_ranges_are_the_plain_tuples_of_0_4_0() -> None:
    """Side files of partial calibrations: (name, start, offset, numel), no class of ours."""
    saved_by_0_4_0 = [("a", 4, 0, 3), ("b", 0, 3, 2)]
    layouts = {"a": ElementLayout.whole("qk"), "b": ElementLayout.whole("vo")}

    def fresh(ranges: list[ShardRange]) -> LocalStats:
        return LocalStats(ranges, layouts, ("qk", "vo"), torch.device("cpu"))

    stats = fresh([ParamRange("a", 4, 3).at(0), ParamRange("b", 0, 2).at(3)])
    for gradient in (torch.arange(5.0), torch.ones(5)):
        stats.open()
        stats.add(0, gradient, 1.0)
        stats.close()
    state = stats.state_dict()
    assert state is not None and state["owned"] == saved_by_0_4_0
    assert all(type(item) is tuple for item in state["owned"])
    for saved in (saved_by_0_4_0, [list(item) for item in saved_by_0_4_0]):
        again = fresh(stats.ranges)
        again.load_state_dict({"owned": saved, "moments": state["moments"]})
        assert again.accumulators is not None and stats.accumulators is not None
        assert torch.equal(again.accumulators.mean, stats.accumulators.mean)
        assert torch.equal(again.accumulators.m2, stats.accumulators.m2)
    other = fresh([ShardRange("a", 3, 0, 3), ShardRange("b", 0, 3, 2)])
    with pytest.raises(MolsCheckpointError, match="belong to other elements"):
        other.load_state_dict(state)
