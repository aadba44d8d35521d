"""pydantic's errors in one line: the key, the value, what is allowed, and a suggestion for a misspelt key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, StrictInt, TypeAdapter, ValidationError, model_validator

from mols_ds.core.validation import Frozen, suggestion, validation_message


class Inner(Frozen):
    size: Annotated[int, Field(ge=1)] = 1
    name: str = ""


class Outer(Frozen):
    inner: Inner | None = None
    many: dict[str, Inner] = Field(default_factory=dict)
    pairs: tuple[tuple[str, StrictInt], ...] = ()
    count: Annotated[StrictInt, Field(ge=2)] | Literal["auto"] = 2
    model: str | dict[str, Any] = ""
    either: Inner | list[Inner] | None = None
    total: int = Field(default=1, alias="global")

    @model_validator(mode="after")
    def _check(self) -> Outer:
        if self.count == 99:
            raise ValueError("count: 99 is not liked")
        return self


CASES: list[tuple[dict[str, Any], str]] = [
    ({"innr": {}}, '"top.innr": unknown key; did you mean "inner"?'),
    ({"zzz": 1}, '"top.zzz": unknown key; allowed: inner, many, pairs, count, model, either, global'),
    ({"inner": {"sise": 1}}, '"top.inner.sise": unknown key; did you mean "size"?'),
    ({"many": {"a": {"sise": 1}}}, '"top.many.a.sise": unknown key; did you mean "size"?'),
    ({"inner": {"size": 0}}, '"top.inner.size": Input should be greater than or equal to 1 (got 0)'),
    ({"inner": 3}, '"top.inner": Input should be an object of keys and values (got 3)'),
    ({"pairs": [["a", "b"]]}, "\"top.pairs.0.1\": Input should be a valid integer (got 'b')"),
    ({"pairs": [["a"]]}, '"top.pairs.0.1" is missing'),
    ({"count": "x"}, "\"top.count\": Input should be a valid integer or 'auto' (got 'x')"),
    ({"model": 3}, '"top.model": Input should be a valid string or a valid dictionary (got 3)'),
    (
        {"either": [{"sise": 1}]},
        "\"top.either\": Input should be an object of keys and values (got [{'sise': 1}]); "
        '"top.either.0.sise": unknown key; did you mean "size"?',
    ),
    (
        {"global": "x"},
        "\"top.global\": Input should be a valid integer, unable to parse string as an integer (got 'x')",
    ),
    ({"count": 99}, '"top": count: 99 is not liked'),
]


@pytest.mark.parametrize(("value", "expected"), CASES, ids=[str(value) for value, _ in CASES])
def test_a_mistake_names_key_value_and_what_is_allowed(value: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    assert validation_message(caught.value, Outer, "top") == expected


def test_every_mistake_is_in_the_line() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"zz": 1, "inner": {"size": 0, "name": 3}})
    assert validation_message(caught.value, Outer) == (
        '"inner.size": Input should be greater than or equal to 1 (got 0); '
        '"inner.name": Input should be a valid string (got 3); '
        '"zz": unknown key; allowed: inner, many, pairs, count, model, either, global'
    )


def test_without_the_class_the_key_is_pydantics_own() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"count": "x", "zz": 1})
    said = validation_message(caught.value)
    assert '"count.constrained-int"' in said and '"zz": unknown key' in said and "allowed" not in said


def test_an_annotation_serves_as_well_as_a_class() -> None:
    kind = int | Literal["auto"]
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python("x")
    assert validation_message(caught.value, kind, "model.layers").startswith('"model.layers": Input should be')


def test_a_root_mistake_without_a_prefix_has_no_empty_quotes() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"count": 99})
    assert validation_message(caught.value, Outer) == "count: 99 is not liked"


def test_frozen_sections_cannot_be_changed() -> None:
    section = Inner()
    with pytest.raises(ValidationError, match="frozen"):
        section.size = 3  # type: ignore[misc]


def test_a_key_like_none_that_is_known_gets_all_of_them() -> None:
    assert suggestion("qqq", ["one", "two"]) == "allowed: one, two"
    assert suggestion("onne", ["one", "two"]) == 'did you mean "one"?'
