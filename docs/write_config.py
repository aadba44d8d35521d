"""Writes the descriptions of keys in docs/config.md from mols_ds/core/config.py.

    make docs-config         (or: python docs/write_config.py)

Types, bounds and defaults come from the pydantic models, descriptions from the docstrings under their fields. The text
before and after is written by hand and is kept.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from mols_ds.core.config import PRESETS, MolsConfig

PAGE = Path(__file__).parent / "config.md"
BEGIN = "<!-- keys: written by `make docs-config` from mols_ds/core/config.py, do not edit -->"
END = "<!-- end of the keys -->"
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def fill(text: str, indent: str = "") -> str:
    """`text` in lines of at most 120 characters; `indent`: before all but the first."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def kind(schema: dict[str, Any]) -> str:
    """The type of a value in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "object"
    if schema["type"] == "object":
        return f"object of string: {kind(schema['additionalProperties'])}"
    if schema["type"] == "array":
        items = schema["items"].get("prefixItems")
        return f"list of [{', '.join(map(kind, items))}]" if items else f"list of {kind(schema['items'])}"
    name = {"boolean": "bool", "null": "`null`", "number": "float"}.get(schema["type"], schema["type"])
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([name, ", ".join(bounds)]).strip()


def facts(key: str, schema: dict[str, Any]) -> tuple[str, str]:
    """(type and default, meaning) of a key."""
    if "description" not in schema:
        raise SystemExit(f'docs/config.md: "{key}" has no docstring under its field in mols_ds/core/config.py')
    default = f"default `{json.dumps(schema['default'])}`" if "default" in schema else "required"
    return f"{kind(schema)}; {default}", " ".join(schema["description"].split())


def inner(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The keys of the object that is a key's value; empty where it is none of ours."""
    names = [part["$ref"].rsplit("/", 1)[1] for part in [schema, *schema.get("anyOf", [])] if "$ref" in part]
    return definitions[names[0]]["properties"] if names else {}


def keys() -> str:
    """One heading a key with its type, default and meaning, then the presets."""
    schema = MolsConfig.model_json_schema()
    blocks = []
    for key, value in schema["properties"].items():
        first, meaning = facts(key, value)
        blocks += [f"### {key}", fill(first), fill(meaning)]
        items = [(name, *facts(f"{key}.{name}", part)) for name, part in inner(value, schema["$defs"]).items()]
        texts = [f"- `{name}` ({first}): {meaning}" for name, first, meaning in items]
        blocks += ["\n".join(fill(text, "  ") for text in texts)] if texts else []
    blocks.append("## Presets")
    for name, values in PRESETS.items():
        sets = ", ".join(f"`{key}` `{json.dumps(value)}`" for key, value in values.items()) or "the defaults above"
        blocks.append(fill(f'- `"{name}"`: {sets}.', "  "))
    return "\n\n".join(blocks)


def page(text: str) -> str:
    """`text` of the page with its keys written again."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"docs/config.md: the lines {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n\n{keys()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
