"""DeepSpeed configs as DeepSpeed reads them: a dict, the path of a file, or the text of such a file in base64.

DeepSpeed's loader is `deepspeed.runtime.tensor_parallel.init_utils.load_ds_config`: files are HJSON, which is JSON with
comments, trailing commas and keys without quotes. This one reads the same, and refuses what is wrong in one line.
"""

from __future__ import annotations

import base64
import difflib
import os
from collections.abc import Mapping

from mols_ds.core.files import read_text
from mols_ds.core.json_text import parse_json
from mols_ds.core.json_types import JsonObject
from mols_ds.core.plain_data import check_plain
from mols_ds.errors import MolsConfigError

SHOWN = 120
"""Characters of a path, or of a base64 text, in messages."""


def config_name(given: object) -> str:
    """What messages call a config that was given as a dict, a path or a base64 text."""
    if isinstance(given, dict):
        return "DeepSpeed config"
    text = str(given)
    return f"DeepSpeed config {text if len(text) <= SHOWN else text[:SHOWN] + '...'}"


def read_config(given: object) -> JsonObject:
    """The content of a DeepSpeed config.

    Args:
        given: a dict, which is returned as it is; the path of an HJSON file; or such a text in url-safe base64. A key
            that occurs twice is refused in a file; in base64 the last one counts, as in DeepSpeed.

    Raises:
        MolsConfigError: there is no such file, it is not HJSON or no object, or `check_plain`; one line.
    """
    where = config_name(given)
    if isinstance(given, dict):
        check_plain(given, where)
        return given
    if not isinstance(given, str):
        raise MolsConfigError(
            f"{where}: give a dict, the path of a file as a str or a base64 text, not {type(given).__name__}"
        )
    if os.path.exists(given):
        return _parse(read_text(given, where), where, once=True)
    try:
        return _parse(base64.urlsafe_b64decode(given).decode("utf-8"), where, once=False)
    except ValueError as error:  # MolsConfigError is one
        why = str(error).removeprefix(f"{where}: ") if isinstance(error, MolsConfigError) else "it does not decode"
        raise MolsConfigError(f"{where}: no such file, and not a config in base64: {why}") from error


def _parse(text: str, where: str, once: bool) -> JsonObject:
    import hjson  # here, so that `mols-ds doctor` can start where packages are broken

    if not text.strip():
        raise MolsConfigError(f"{where}: the file is empty")
    content = parse_json(text, where, hjson.loads, once=once)
    if not isinstance(content, dict):
        raise MolsConfigError(f"{where}: a JSON object is needed, not {type(content).__name__}")
    if "mols" in content:
        kept = hjson.loads(text, parse_float=_Written, object_pairs_hook=lambda pairs: {k: _float(v) for k, v in pairs})
        content["mols"] = kept["mols"]
    return content


class _Written(float):
    """A number with a point or an exponent. hjson makes 1 of 1.0, where equal; in "mols" a share is not a step."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = float.__hash__


def _float(value: object) -> object:
    return float(value) if isinstance(value, _Written) else value


def misspelt_section(config: Mapping[str, object]) -> str:
    """A key that is nearly "mols", "" where there is none: DeepSpeed ignores keys that it does not know, so a misspelt
    section would silently train without MoLS."""
    keys = (key for key in map(str, config) if key != "mols")
    keys = (key for key in keys if difflib.get_close_matches(key.lower(), ["mols"], cutoff=0.75))
    return next(keys, "")
