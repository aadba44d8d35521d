"""Read users' YAML as plain values."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable

import yaml

from mols_ds.core.files import read_text
from mols_ds.core.plain_data import check_plain
from mols_ds.errors import MolsConfigError

MERGED = "tag:yaml.org,2002:merge"
"""Tag of the key <<."""
MAX_VALUES = 100_000
"""Largest number of values in a file; aliases can multiply them."""
MOST_MERGED = 100
"""Largest number of mappings in one <<; each is copied."""


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error and 1e-3 is a number (YAML 1.1 needs 1.0e-3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGED]
        known: set[Hashable] = set()
        for key in filter(lambda key: isinstance(key, Hashable), keys):
            if key in known:
                raise MolsConfigError(f"key {key!r} is there twice")
            known.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge each key once: nested << would multiply them without end."""
        for key, value in node.value:
            if key.tag == MERGED and isinstance(value, yaml.SequenceNode) and len(value.value) > MOST_MERGED:
                raise MolsConfigError(f"<< names more than {MOST_MERGED} mappings")
        super().flatten_mapping(node)
        names = ((key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)) for key, _ in node.value)
        node.value = list(dict(zip(names, node.value, strict=True)).values())


_StrictLoader.add_constructor("!exponent", lambda _, node: float(node.value))
_StrictLoader.add_implicit_resolver(
    "!exponent", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> object:
    """Parse YAML as plain values. Raises MolsConfigError: one line that starts with `where`."""
    try:
        content: object = yaml.load(text, _StrictLoader)
    except MolsConfigError as error:
        raise MolsConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" in line {place.line + 1}" if place is not None else ""
        what = getattr(error, "problem", None) or error
        raise MolsConfigError(f"{where}: not YAML{line}: {what}") from error
    except RecursionError as error:
        raise MolsConfigError(f"{where}: not YAML: nested too deeply") from error
    except (ValueError, TypeError, OverflowError) as error:  # a tag with a value of another kind
        raise MolsConfigError(f"{where}: not YAML: {type(error).__name__}: {error}") from error
    check_plain(content, where, MAX_VALUES)
    return content


def read_yaml(path: str | os.PathLike[str], where: str) -> object:
    """Read a YAML file. Raises MolsConfigError: one line that starts with `where`."""
    return parse_yaml(read_text(path, where), where)
