"""Type names for plain values of JSON and YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""A mutable JSON object: a config, a "mols" section, a report, a result file."""
JsonMapping = Mapping[str, Any]
"""A read-only JSON object."""
