"""Write the snapshots of tests/contracts/0.4.0. Ran once, with release 0.4.0.

    python -m tests.contracts.write_snapshots [NAME ...]

They are NOT to be written again by later releases: test_surface.py asks whether what 0.4.0 offered is still there. A
later release that promises more adds a folder of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mols_ds
from tests.contracts.surface import SNAPSHOTS

RELEASE = "0.4.0"
FOLDER = Path(__file__).resolve().parent / RELEASE


def main(chosen: list[str]) -> None:
    if mols_ds.__version__ != RELEASE:
        raise SystemExit(f"these snapshots are of release {RELEASE}; this is {mols_ds.__version__}")
    FOLDER.mkdir(exist_ok=True)
    for name in chosen or list(SNAPSHOTS):
        content = json.dumps(SNAPSHOTS[name](), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / f"{name}.json").write_text(content, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
