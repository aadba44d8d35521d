"""Names for plain values as JSON and YAML files hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""A JSON object that may be changed: a config, a "mols" section, a report, a result file."""
JsonMapping = Mapping[str, Any]
"""A JSON object that is only read."""
