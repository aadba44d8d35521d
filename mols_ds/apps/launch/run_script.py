"""Runs a user's script with `mols_ds.patch()` in effect. `launch/deepspeed` and `mols-ds launch` start every rank so.

    python .../mols_ds/apps/launch/run_script.py [--local_rank=N] SCRIPT|-m MODULE ARGUMENTS ...

Nothing is imported that the script does not import: the patch waits for the import of DeepSpeed. DeepSpeed's launcher
puts `--local_rank` before the script here; the script gets it as its first argument, as without this file.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = str(Path(__file__).resolve().parents[3])
ENGINE = "deepspeed"


class PatchOnImport(MetaPathFinder):
    """Calls `mols_ds.patch()` as soon as DeepSpeed has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """DeepSpeed's spec as the other finders give it. Looking for it (`is_deepspeed_available`) is no import yet."""
        if fullname != ENGINE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            stock = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                stock(module)
                sys.meta_path.remove(self)
                import mols_ds

                mols_ds.patch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def main(argv: Sequence[str]) -> None:
    """Run the script or module that `argv` names, as `python` would."""
    rest = list(argv)
    launcher = []
    while rest and rest[0].startswith("--local_rank="):
        launcher.append(rest.pop(0))
    if importlib.util.find_spec("mols_ds") is None:  # the shim alone is used; the package is not installed
        sys.path.append(ROOT)
    sys.meta_path.insert(0, PatchOnImport())
    if rest[0] == "-m":
        sys.argv = [rest[1], *launcher, *rest[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = [rest[0], *launcher, *rest[1:]]
    sys.path[0] = os.path.dirname(os.path.realpath(rest[0]))
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
