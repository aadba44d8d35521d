"""Base class of config sections, and one-line messages for pydantic's errors."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

MAX_SHOWN = 200
"""Characters of a wrong value in a message."""
SHOULD_BE = "Input should be "
"""Start of pydantic's message for a wrong type or value."""


class Frozen(BaseModel):
    """An immutable section. Unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def validation_message(error: ValidationError, kind: object = None, prefix: str = "") -> str:
    """Format all errors of a pydantic exception in one line, such as `"mols.samples": Input should be ... (got 1)`.

    Args:
        error: pydantic's exception.
        kind: the validated model class or annotation. Without it an unknown key gets no suggestion, and keys include
            pydantic's names for the members of a union.
        prefix: key of the validated value in its file, such as "mols".

    Returns:
        Key, value and what is allowed for each error, joined by "; ".
    """
    lines: dict[tuple[str, str], str] = {}
    for item in error.errors(include_url=False):
        path, known = _place(item["loc"], kind)
        key = ".".join([*([prefix] if prefix else []), *path])
        quoted = f'"{key}"' if key else ""
        if item["type"] == "missing":
            lines[key, "missing"] = f"{quoted} is missing"
            continue
        where = f"{quoted}: " if quoted else ""
        if item["type"] == "extra_forbidden":
            hint = f"; {suggestion(path[-1], known)}" if known else ""
            lines[key, "unknown"] = f"{where}unknown key{hint}"
        elif item["type"] == "value_error":
            lines[key, str(item["ctx"]["error"])] = f"{where}{item['ctx']['error']}"
        else:
            value = _short(item["input"])
            before = lines.get((key, value), "").removesuffix(f" (got {value})")
            what = _what(item)
            what = f"{before} or {what.removeprefix(SHOULD_BE)}" if before else f"{where}{what}"
            lines[key, value] = f"{what} (got {value})"
    return "; ".join(lines.values())


def _short(value: object) -> str:
    """repr() of any value; shortened in the middle if long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"


def suggestion(key: str, known: Sequence[str]) -> str:
    """Return the known key most similar to an unknown one, or all known keys, as a hint."""
    close = difflib.get_close_matches(key, known, n=1)
    return f'did you mean "{close[0]}"?' if close else f"allowed: {', '.join(known)}"


def _what(item: ErrorDetails) -> str:
    """Return pydantic's message without the names of our classes."""
    return f"{SHOULD_BE}an object of keys and values" if item["type"] == "model_type" else item["msg"]


def _place(loc: Iterable[int | str], kind: object) -> tuple[list[str], list[str]]:
    """Return (path of an error, known keys at its last part).

    `loc` also has a part for each union on the path, which names a member of it.
    """
    path: list[str] = []
    known: list[str] = []
    for part in loc:
        kind = _bare(kind)
        if _is_union(kind):
            kind = next((member for member in get_args(kind) if _has_name(member, str(part))), None)
            continue
        path.append(str(part))
        known = _keys(kind)
        kind = _inside(kind, part)
    return path, known


def _bare(kind: object) -> object:
    """Return an annotation without metadata and without `| None`, which `loc` does not contain."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if _is_union(kind):
        members = [member for member in get_args(kind) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else Union[tuple(members)]  # noqa: UP007  (made at run time)
    return kind


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _has_name(member: object, name: str) -> bool:
    """Whether pydantic uses `name` for a union member: a model by its class, a dict as "dict[str,any]"."""
    bare = _bare(member)
    origin = get_origin(bare) or bare
    return isinstance(origin, type) and name.split("[", 1)[0] == origin.__name__


def _keys(kind: object) -> list[str]:
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return []
    return [field.alias or name for name, field in kind.model_fields.items()]


def _inside(kind: object, part: int | str) -> object:
    """Return the annotation of the value at `part`; None if unknown."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields.items()
        return next((field.annotation for name, field in fields if part in (name, field.alias)), None)
    origin, inner = get_origin(kind), get_args(kind)
    if not isinstance(origin, type) or not inner:
        return None
    if issubclass(origin, Mapping):
        return inner[1]
    if origin is tuple and isinstance(part, int) and inner[-1] is not Ellipsis:
        return inner[part] if part < len(inner) else None
    return inner[0]
