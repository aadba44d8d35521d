"""ElementLayout against a naive mask with the group of every element."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mols_ds.core.layout import ElementLayout

LAYOUTS = {
    "whole": (ElementLayout.whole("mlp"), 60),
    "rows, once": (ElementLayout(5, ((8, "qk"), (4, "vo"))), 60),
    "columns of every row": (ElementLayout(1, ((4, "qk"), (2, "vo"))), 60),
    "per head": (ElementLayout(5, ((2, "qk"), (1, "vo"))), 60),
    "a group that comes back": (ElementLayout(2, ((1, "vo"), (2, "qk"), (1, "vo"))), 64),
    "neighbours of one group": (ElementLayout(3, ((1, "qk"), (1, "qk"), (2, "vo"))), 60),
    "one group in two entries": (ElementLayout(3, ((1, "qk"), (1, "qk"))), 60),
}


def mask(layout: ElementLayout, numel: int) -> list[str]:
    """The definition, element by element."""
    total = sum(length for length, _ in layout.pattern)
    result = []
    for index in range(numel):
        position = (index // layout.inner) % total
        for length, group in layout.pattern:
            if position < length:
                result.append(group)
                break
            position -= length
    return result


def check_shard(layout: ElementLayout, start: int, numel: int) -> None:
    expected = mask(layout, start + numel)[start:]
    counts = layout.counts(start, numel)
    assert counts == {group: expected.count(group) for group in set(expected)}
    assert sum(counts.values()) == numel

    runs = list(layout.runs(start, numel))
    assert [group for group, _, length in runs for _ in range(length)] == expected
    assert [offset for _, offset, _ in runs] == [sum(run[2] for run in runs[:i]) for i in range(len(runs))]
    assert all(left[0] != right[0] for left, right in pairwise(runs)), "a run is not maximal"

    flat = torch.arange(numel)
    views = layout.views(flat, start)
    assert len(views) <= 3 * len(layout.pattern)
    seen = {int(index): group for group, view in views for index in view.reshape(-1)}
    assert sum(view.numel() for _, view in views) == numel, "an element is in no view or in two"
    assert [seen[index] for index in range(numel)] == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_shard_of_a_parameter(name: str) -> None:
    layout, numel = LAYOUTS[name]
    for start in range(numel + 1):
        for length in range(numel - start + 1):
            check_shard(layout, start, length)


@settings(max_examples=150)
@given(
    inner=st.integers(1, 7),
    pattern=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["qk", "vo", "mlp"])), min_size=1, max_size=5),
    start=st.integers(0, 300),
    numel=st.integers(0, 200),
)
def test_arbitrary_layouts_and_shards(inner: int, pattern: list[tuple[int, str]], start: int, numel: int) -> None:
    check_shard(ElementLayout(inner, tuple(pattern)), start, numel)


def test_counts_of_shards_add_up_beyond_32_bits() -> None:
    layout = ElementLayout(14336, ((128, "qk"), (64, "vo")))
    whole = 192 * 14336 * 5000
    cuts = [0, 1, 14335, 2**31 - 3, 2**33 + 11, whole]
    parts = [layout.counts(a, b - a) for a, b in pairwise(cuts)]
    assert layout.counts(0, whole) == {"qk": 128 * 14336 * 5000, "vo": 64 * 14336 * 5000}
    for group in ("qk", "vo"):
        assert sum(part.get(group, 0) for part in parts) == layout.counts(0, whole)[group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_write_through_and_take_strided_input(dtype: torch.dtype) -> None:
    layout = ElementLayout(1, ((4, "qk"), (2, "vo")))
    storage = torch.zeros(2 * 47, dtype=dtype)
    flat = storage[::2]  # 1-D with stride 2
    for group, view in layout.views(flat, 3):
        assert view.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
        view.fill_(1.0 if group == "qk" else 2.0)
    assert flat.tolist() == [1.0 if group == "qk" else 2.0 for group in mask(layout, 50)[3:]]
    assert not storage[1::2].any()


def test_views_of_an_empty_shard() -> None:
    for layout, _ in LAYOUTS.values():
        assert layout.views(torch.empty(0), 17) == []
        assert layout.counts(17, 0) == {}
        assert list(layout.runs(17, 0)) == []


def test_groups_period_and_relabel() -> None:
    layout = ElementLayout(3, ((1, "vo"), (2, "qk"), (1, "vo")))
    assert layout.groups == ("vo", "qk")
    assert layout.period == 12
    assert layout.relabel(lambda group: f"{group}.7") == ElementLayout(3, ((1, "vo.7"), (2, "qk.7"), (1, "vo.7")))
    assert ElementLayout.whole("head").groups == ("head",)


@pytest.mark.parametrize(
    ("inner", "pattern"), [(0, ((1, "qk"),)), (1, ()), (1, ((0, "qk"),)), (2, ((1, "qk"), (-1, "vo")))]
)
def test_a_layout_refuses_nonsense(inner: int, pattern: tuple[tuple[int, str], ...]) -> None:
    with pytest.raises(ValueError, match="inner >= 1"):
        ElementLayout(inner, pattern)


def test_ranges_are_checked() -> None:
    layout = ElementLayout(2, ((1, "qk"), (1, "vo")))
    with pytest.raises(ValueError, match="negative"):
        layout.counts(-1, 4)
    with pytest.raises(ValueError, match="negative"):
        list(layout.runs(0, -4))
    with pytest.raises(ValueError, match="negative"):
        layout.views(torch.zeros(4), -1)
    with pytest.raises(ValueError, match="1-D"):
        layout.views(torch.zeros(2, 2), 0)
