"""What every target shares: arbitrary JSON, mutations of good input, and the count of what came of each case."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from sortedcontainers import SortedSet

ACCEPTED, REFUSED = "accepted", "refused"

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([-(2**63), 2**31, 2**53 + 1, 10**30, -0.0, 0.5, 1.0, 1e-300, 1e308]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=6),
    st.sampled_from(
        [
            "auto",
            "qk",
            "vo",
            "max",
            "probe",
            "AdamW",
            "1e-3",
            "SGD",
            "Lion",
            "muon",
            "SOAP",
            "Adam8bit",
            "Lamb",
            "\x00",
            "\ud800",
            "a\nb",
            ".",
        ]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: as the table shows it.
        strategy: where cases come from.
        check: takes one case and returns ACCEPTED or REFUSED (by the documented error); raises for anything else.
        examples: of the short form.
    """

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], str]
    examples: int


@dataclass
class Outcome:
    """What came of a target: cases that were really run, by result; `failure` is the shrunk counter-example."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.counts[ACCEPTED] + self.counts[REFUSED] + self.counts["failed"]


def refused_by(call: Callable[[], object], *errors: type[Exception]) -> str:
    """ACCEPTED where `call` returns, REFUSED where it raises one of the documented errors with a message."""
    try:
        call()
    except errors as error:
        assert str(error).strip(), f"{type(error).__name__} without a message"
        return REFUSED
    return ACCEPTED


def fuzz(target: Target, examples: int, number: int | None = None) -> Outcome:
    """Runs `examples` cases; the same ones each time unless `number`, a seed, is given."""
    outcome = Outcome(target.name)
    started = time.monotonic()

    def check(value: Any) -> None:
        try:
            outcome.counts[target.check(value)] += 1
        except BaseException:
            outcome.counts["failed"] += 1
            raise

    chosen = settings(
        max_examples=examples,
        derandomize=number is None,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run = chosen(given(target.strategy)(check))
    try:
        with _same_constants():
            (run if number is None else seed(number)(run))()
    except Exception as error:
        outcome.failure = "\n".join(_described(error))
    outcome.seconds = time.monotonic() - started
    return outcome


@contextlib.contextmanager
def _same_constants() -> Iterator[None]:
    """Let hypothesis draw from its own constants alone.

    It also draws from those in the source of every local module that is loaded, so that the cases of a seed would
    depend on which other tests are run.
    """
    none = providers.Constants(**{kind: SortedSet() for kind in ("integers", "floats", "bytes", "strings")})
    providers.CONSTANTS_CACHE.cache.clear()
    with mock.patch.object(providers, "_get_local_constants", lambda: none):
        yield
    providers.CONSTANTS_CACHE.cache.clear()


def _described(error: Exception) -> list[str]:
    """Each distinct failure with its shrunk case and the line that raised it."""
    if isinstance(error, ExceptionGroup):
        return [line for one in error.exceptions for line in _described(one)]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    notes = " | ".join(" ".join(note.split()) for note in getattr(error, "__notes__", []))
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return [f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:300]} | {notes[:700]}"]


# ------------------------------------------------------------------ mutations


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found = [(*path, key) for key, _ in children]
    for key, child in children:
        found += _paths(child, (*path, key))
    return found


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, so that cases come past the first check."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 64)
    if isinstance(value, float):
        return st.floats(0, 2)
    return st.just(value) if isinstance(value, dict | list) else SCALARS


@st.composite
def mutated(draw: st.DrawFn, base: Any, most: int = 3) -> Any:
    """A copy of the JSON-like `base` in which up to `most` entries are removed, replaced, renamed or added;
    one in fifteen is something else."""
    value = copy.deepcopy(base)
    if draw(st.integers(0, 14)) == 14:
        return draw(JSON)
    for _ in range(min(most, draw(st.sampled_from([0, 0, 0, 1, 1, 1, 1, 2, 2, 3])))):
        paths = _paths(value)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        place = value
        for key in parents:
            place = place[key]
        kind = draw(st.sampled_from(["near", "near", "near", "near", "replace", "replace", "remove", "add", "rename"]))
        if kind == "near":
            place[last] = draw(_near(place[last]))
        elif kind == "replace":
            place[last] = draw(JSON)
        elif kind == "remove":
            del place[last]
        elif kind == "add" and isinstance(place, dict):
            place[draw(st.text(min_size=1, max_size=8))] = draw(JSON)
        elif kind == "rename" and isinstance(place, dict):
            place[str(last)[:-1] + draw(st.sampled_from("sx_"))] = place.pop(last)
    return value


@st.composite
def damaged(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """The bytes of a text: often unchanged, else truncated, with flipped bytes, or with an insertion."""
    content = draw(texts).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["whole"] * 16 + ["cut", "flip", "put", "random"]))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    if kind == "put":
        return content[:at] + draw(st.binary(max_size=4)) + content[at:]
    return draw(st.binary(max_size=30)) if kind == "random" else content
