"""What the unit tests import, followed through this repository, has no engine; and the guard of conftest.py works."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.harness import ROOT
from tests.unit.conftest import ENGINES, NotForUnitTests

OURS = ("mols_ds", "megatron_patches", "tests")


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that a module imports when it is imported: no functions, no `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not used here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for child in node.orelse for name in imported(child))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported(node)


def files_of(name: str) -> list[Path]:
    """The files of this repository that importing `name` runs: its packages, and itself unless it is no module."""
    parts = name.split(".")
    stems = [ROOT.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    files = [file for stem in stems for file in (stem / "__init__.py", stem.with_suffix(".py"))]
    return [file for file in files if file.is_file()]


def test_no_unit_test_leads_to_an_engine() -> None:
    reached: dict[Path, str] = {path: path.stem for path in sorted(Path(__file__).parent.glob("*.py"))}
    left = list(reached)
    while left:
        path = left.pop()
        for name in imported(ast.parse(path.read_text("utf-8"))):
            way = f"{reached[path]} > {name}"
            assert name.partition(".")[0] not in ENGINES, way
            for file in files_of(name) if name.startswith(OURS) else ():
                if file not in reached:
                    reached[file] = way
                    left.append(file)
    assert len(reached) > 60, "nothing was followed"


@pytest.mark.parametrize("name", ["transformers", "deepspeed.comm"])
def test_an_engine_is_refused(name: str) -> None:
    with pytest.raises(NotForUnitTests, match=name):
        exec(f"import {name}")
    if name not in sys.modules:  # else another test of this run has imported it
        with pytest.raises(NotForUnitTests, match=name.partition(".")[0]):
            importlib.import_module(name)


def test_a_process_is_refused() -> None:
    for start in (lambda: subprocess.run(["true"]), lambda: os.system("true"), os.fork):
        with pytest.raises(NotForUnitTests, match="starts a process"):
            start()
