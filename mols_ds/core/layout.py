"""Map the elements of a parameter to module groups, without a mask of the parameter's size.

A fused projection has elements of several groups. The pattern is periodic in the flat (row-major) index, so a few
integers describe the parameter and each of its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

Key = TypeVar("Key")
GROUPS = ("embedding", "head", "qk", "vo", "mlp", "other")
"""The module groups of the paper (arXiv 2605.05794), and `other` for everything else (norms, biases, routers)."""

SCALED_GROUPS = GROUPS[:-1]
"""Groups with a scaled learning rate. `other` is only measured and reported."""

Granularity = Literal["type", "layer_type"]
"""One group per type of module ("qk"), or per type and layer ("qk.3")."""


def base_group(key: str) -> str:
    """Remove the layer number: "qk.3" (granularity "layer_type") -> "qk". "qk" and "vision.qk" do not change."""
    base, _, last = key.rpartition(".")
    return base if base and last.isdigit() else key


def is_scaled(key: str) -> bool:
    """Return whether MoLS scales this group's learning rate: not for `other`, `other_NAME` and groups of towers
    ("vision.qk")."""
    base = base_group(key)
    return base != "other" and not base.startswith("other_") and "." not in base


@dataclass(frozen=True, slots=True)
class ElementLayout:
    """A repeating pattern of groups over the flat index of one parameter.

    Element i belongs to the entry of `pattern` that contains `(i // inner) mod sum(lengths)`. Fused rows (output
    features of an `nn.Linear`): `inner` is the product of the trailing dimensions. Fused columns (output features of a
    `Conv1D`): `inner` is 1. One entry: the whole parameter is one group.

    inner: elements per step of the pattern, >= 1.
    pattern: (length in steps >= 1, group) in the order of the flat index.
    Raises ValueError for other values.
    """

    inner: int
    pattern: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        if self.inner < 1 or not self.pattern or any(length < 1 for length, _ in self.pattern):
            raise ValueError(f"a layout needs inner >= 1 and lengths >= 1, not inner={self.inner}, {self.pattern!r}")

    @classmethod
    def whole(cls, group: str) -> ElementLayout:
        """Return a layout with every element in `group`."""
        return cls(1, ((1, group),))

    @property
    def groups(self) -> tuple[str, ...]:
        """Distinct groups in order of appearance."""
        return tuple(dict.fromkeys(group for _, group in self.pattern))

    @property
    def period(self) -> int:
        """Elements in one repetition of the pattern."""
        return self.inner * sum(length for length, _ in self.pattern)

    def relabel(self, rename: Callable[[str], str]) -> ElementLayout:
        """Return the layout with every group name g replaced by rename(g)."""
        return ElementLayout(self.inner, tuple((length, rename(group)) for length, group in self.pattern))

    def counts(self, start: int, numel: int) -> dict[str, int]:
        """Count the elements [start, start + numel) of each group, exactly, in O(len(pattern)) and without a tensor.

        Returns:
            group -> elements, without empty groups.

        Raises:
            ValueError: an argument is negative.
        """
        _check_range(start, numel)
        period, result = self.period, dict[str, int]()
        for begin, end, group in self._segments():
            length = end - begin

            def before(index: int, begin: int = begin, length: int = length) -> int:
                periods, rest = divmod(index, period)
                return periods * length + min(max(rest - begin, 0), length)

            count = before(start + numel) - before(start)
            if count:
                result[group] = result.get(group, 0) + count
        return result

    def runs(self, start: int, numel: int) -> Iterator[tuple[str, int, int]]:
        """Yield the contiguous runs of the elements [start, start + numel), in order.

        A column layout has about two runs per row of the parameter: prefer `views` for arithmetic.

        Yields:
            (group, offset from start, length).

        Raises:
            ValueError: an argument is negative.
        """
        _check_range(start, numel)
        segments, period, stop = self._segments(), self.period, start + numel
        if len(segments) == 1:
            if numel:
                yield segments[0][2], 0, numel
            return
        held: tuple[str, int, int] | None = None  # the last run; the next piece may extend it
        for base in range(start // period * period, stop, period):
            for begin, end, group in segments:
                low, high = max(base + begin, start), min(base + end, stop)
                if low >= high:
                    continue
                if held is not None and held[0] == group:
                    held = (group, held[1], held[2] + high - low)
                    continue
                if held is not None:
                    yield held
                held = (group, low - start, high - low)
        if held is not None:
            yield held

    def views(self, flat: Tensor, start: int) -> list[tuple[str, Tensor]]:
        """Split a flat tensor into views by group, without a copy. Writing to a view writes to `flat`.

        Args:
            flat: elements [start, start + flat.numel()) of the parameter; 1-D, any dtype, device and stride.
            start: flat index of the first element.

        Returns:
            At most 3 * len(pattern) pairs (group, view) that cover `flat` exactly once. A view is 1-D, or 2-D (periods,
            elements of the entry) where the pattern repeats inside `flat`.

        Raises:
            ValueError: `flat` is not 1-D, or start is negative.
        """
        if flat.dim() != 1:
            raise ValueError(f"views() takes a 1-D tensor, not one of shape {tuple(flat.shape)}")
        _check_range(start, flat.numel())
        segments, period, stop = self._segments(), self.period, start + flat.numel()
        if not flat.numel():
            return []
        if len(segments) == 1:
            return [(segments[0][2], flat)]
        first, last = -(-start // period), stop // period  # the shard contains the full periods [first, last)
        if last > first:
            pieces = [(start, first * period), (last * period, stop)]
        else:
            # at most one period boundary is inside the shard
            boundary = min(first * period, stop)
            pieces = [(start, boundary), (boundary, stop)]
        middle = flat[first * period - start : last * period - start].view(-1, period) if last > first else None
        result = []
        for begin, end, group in segments:
            for low, high in pieces:
                base = low // period * period
                a, b = max(base + begin, low), min(base + end, high)
                if a < b:
                    result.append((group, flat[a - start : b - start]))
            if middle is not None:
                result.append((group, middle[:, begin:end]))
        return result

    def _segments(self) -> list[tuple[int, int, str]]:
        """Return (begin, end, group) of one period, in elements. Adjacent entries of one group are joined."""
        segments: list[tuple[int, int, str]] = []
        position = 0
        for length, group in self.pattern:
            end = position + length * self.inner
            if segments and segments[-1][2] == group:
                segments[-1] = (segments[-1][0], end, group)
            else:
                segments.append((position, end, group))
            position = end
        return segments


def _check_range(start: int, numel: int) -> None:
    if start < 0 or numel < 0:
        raise ValueError(f"start and numel must not be negative: start={start}, numel={numel}")


def largest_holder(layout_counts: Iterable[tuple[Key, Mapping[str, int]]], groups: Iterable[str]) -> dict[str, Key]:
    """Find the parameter group with most elements of each module group.

    Args:
        layout_counts: (parameter group, elements of each module group) per parameter.
        groups: module groups.

    Returns:
        module group -> parameter group; absent if no parameter has elements of it.
    """
    held: dict[str, dict[Key, int]] = {group: {} for group in groups}
    for key, counts in layout_counts:
        for group, count in counts.items():
            held[group][key] = held[group].get(key, 0) + count
    return {group: max(keys, key=lambda key: keys[key]) for group, keys in held.items() if keys}
