"""Whether what is there now can be used as what was there before: data of surface.py in, lines of complaint out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.contracts.surface import REQUIRED

Data = Mapping[str, Any]
WIDER = {None: ("?", "*", "+"), "+": ("*", "..."), "?": ("*",)}
"""nargs of argparse -> others that take the same words and more."""


def _signature(parameters: Sequence[Data]) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                p["name"],
                getattr(inspect.Parameter, p["kind"]),
                default=inspect.Parameter.empty if p["default"] == REQUIRED else p["default"],
            )
            for p in parameters
        ]
    )


def _calls(parameters: Sequence[Data]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Ways to call a function: with all arguments, by position and by name, and with the required ones alone."""
    for chosen in (parameters, [p for p in parameters if p["default"] == REQUIRED]):
        for first in (("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD"), ("POSITIONAL_ONLY",)):
            positional = [p["name"] for p in chosen if p["kind"] in first]
            named = [p["name"] for p in chosen if p["kind"] in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
            yield positional, {name: name for name in named if name not in positional}


def parameters(before: Sequence[Data], now: Sequence[Data], where: str) -> Iterator[str]:
    """Calls that worked and do not work any more, arguments that changed places, and defaults that changed."""
    signature = _signature(now)
    for positional, named in _calls(before):
        try:
            bound = signature.bind(*positional, **named).arguments
        except TypeError as error:
            yield f"{where}({', '.join([*positional, *(f'{name}=' for name in named)])}): {error}"
            continue
        flat = {name: value for name, value in bound.items() if isinstance(value, str)}
        yield from (f"{where}: {value} is now taken as {name}" for name, value in flat.items() if name != value)
    defaults = {p["name"]: p["default"] for p in now}
    for p in before:
        default = defaults.get(p["name"], REQUIRED)
        if default not in (p["default"], REQUIRED) and p["default"] != REQUIRED:
            yield f"{where}: the default of {p['name']} was {p['default']} and is {default}"


def thing(before: Data, now: Data | None, where: str) -> Iterator[str]:
    """A function, class, error, method or attribute."""
    if now is None:
        yield f"{where} is gone"
        return
    if before["kind"] != now["kind"]:
        yield f"{where} was of kind {before['kind']} and is of kind {now['kind']}"
        return
    if missing := set(before.get("bases", ())) - set(now.get("bases", ())):
        yield f"{where} is no {', '.join(sorted(missing))} any more"
    if "parameters" in before:
        yield from parameters(before["parameters"], now["parameters"], where)
    for name, former in before.get("members", {}).items():
        yield from thing(former, now["members"].get(name), f"{where}.{name}")


def command(before: Data, now: Data, where: str, *, optional: frozenset[str] = frozenset()) -> Iterator[str]:
    """A command and its subcommands. `optional`: option strings that may be gone."""
    for option, former in before["options"].items():
        found = now["options"].get(option)
        if found is None:
            if option not in optional:
                yield f"{where} has no {option} any more"
        else:
            yield from _argument(former, found, f"{where} {option}")
    for option in now["options"].keys() - before["options"].keys():
        if now["options"][option]["required"]:
            yield f"{where}: {option} is new and required"
    formers, founds = before["positionals"], now["positionals"]
    if len(founds) < len(formers):
        yield f"{where} takes {len(founds)} positionals, and took {len(formers)}"
    for former, found in zip(formers, founds, strict=False):
        yield from _argument(former, found, f"{where} {former['name'].upper()}")
    for found in founds[len(formers) :]:
        if found["nargs"] not in ("?", "*", "..."):
            yield f"{where}: {found['name'].upper()} is new and required"
    for name, former in before["subcommands"].items():
        if name in now["subcommands"]:
            yield from command(former, now["subcommands"][name], f"{where} {name}")
        else:
            yield f"{where} has no {name} any more"


def _argument(before: Data, now: Data, where: str) -> Iterator[str]:
    if now["nargs"] != before["nargs"] and now["nargs"] not in WIDER.get(before["nargs"], ()):
        yield f"{where} took {before['nargs']!r} values and takes {now['nargs']!r}"
    if now["choices"] is not None and (gone := set(before["choices"] or ["anything"]) - set(now["choices"])):
        yield f"{where} does not take {', '.join(sorted(gone))} any more"
    if now["required"] and not before["required"]:
        yield f"{where} is required now"
