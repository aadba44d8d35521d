"""Run a user's script with `mols_ds.patch()` in effect. `launch/deepspeed` and `mols-ds launch` start every rank so.

    python .../mols_ds/apps/launch/run_script.py [--local_rank=N] SCRIPT|-m MODULE ARGUMENTS ...

The patch is applied when the script imports DeepSpeed; nothing else is imported. DeepSpeed's launcher puts
`--local_rank` before the script; the script gets it as its first argument, as it would without this file.
"""

from __future__ import annotations

import contextlib
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
CONFIG = "--deepspeed_config"


class PatchOnImport(MetaPathFinder):
    """Import hook that calls `mols_ds.patch()` after the import of DeepSpeed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return DeepSpeed's spec from the other finders. A look-up (`is_deepspeed_available`) patches nothing."""
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
    if importlib.util.find_spec("mols_ds") is None:  # only the shim is used; the package is not installed
        sys.path.append(ROOT)
    sys.meta_path.insert(0, PatchOnImport())
    try:
        _run(rest, launcher)
    except SystemExit as end:
        if not end.code:
            _say_left_out(rest)
        raise
    _say_left_out(rest)


def _run(rest: list[str], launcher: list[str]) -> None:
    if rest[0] == "-m":
        sys.argv = [rest[1], *launcher, *rest[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = [rest[0], *launcher, *rest[1:]]
    sys.path[0] = os.path.dirname(os.path.realpath(rest[0]))
    runpy.run_path(rest[0], run_name="__main__")


def _say_left_out(arguments: Sequence[str]) -> None:
    """Print on rank 0 that the script did not pass the "mols" section of the launcher's config to an engine."""
    words = [word for argument in arguments for word in argument.split("=", argument.startswith(f"{CONFIG}="))]
    given = words[words.index(CONFIG) + 1 :] if CONFIG in words else []
    asked = {"-h", "--help"} & set(arguments)
    if not given or asked or os.environ.get("RANK", "0") != "0" or not os.path.isfile(given[0]):
        return
    api = sys.modules.get("mols_ds.engines.deepspeed.api")
    if (api is not None and api.sections_used) or b"mols" not in Path(given[0]).read_bytes():
        return
    from mols_ds.engines.deepspeed.config_reader import read_config
    from mols_ds.errors import MolsConfigError
    from mols_ds.training.cli_utils import print_line

    section = None
    with contextlib.suppress(MolsConfigError):  # the script did not read it either
        section = read_config(given[0]).get("mols")
    if isinstance(section, dict) and section.get("enabled", True):
        print_line(
            ENGINE, f'the "mols" section of {given[0]} was left out: the script gave it to no deepspeed.initialize'
        )


if __name__ == "__main__":
    main(sys.argv[1:])
