"""The shape of the tree: files at the root of the package, their lengths, uses of DeepSpeed's names."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mols_ds.engines.deepspeed import compat

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("train.py", "finetune.py", "train_megatron.py")
PRODUCT = sorted(
    [*(ROOT / "mols_ds").rglob("*.py"), *(ROOT / "megatron_patches").rglob("*.py"), *(ROOT / name for name in PROGRAMS)]
)

AT_THE_ROOT = {"__init__", "cli", "errors"}
SHIMS = {"__main__", "health", "plan/__init__", "plan/simulate", "signals", "study"}
"""Documented `python -m` names, and nothing else."""
SHIM_LINES = 11
LAYERS = {"apps", "core", "engines", "integrations", "optim", "report", "training"}

LINES = 400
LONG: dict[str, int] = {}
"""Files of the product of more than LINES lines. A file may leave this list; none may join it."""

DEPTH = 12
"""Modules in the longest chain of imports, those inside functions and for type checkers left out. It may only fall."""
ANY_SHARE = 0.10
"""Functions with `Any` in their signature, of all."""


def at(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def lines(file: Path) -> int:
    return file.read_text("utf-8").count("\n")


# ---------------------------------------------------------------------- the root


def test_only_three_modules_and_shims_are_at_the_root_of_the_package() -> None:
    modules = {file.stem for file in (ROOT / "mols_ds").glob("*.py")}
    assert modules <= AT_THE_ROOT | SHIMS, "a new module belongs to a layer (docs/architecture.md)"
    assert modules >= AT_THE_ROOT


def test_only_layers_and_shims_are_packages_at_the_root() -> None:
    packages = {file.parent.name for file in (ROOT / "mols_ds").glob("*/__init__.py")}
    assert packages - {name.partition("/")[0] for name in SHIMS} <= LAYERS


@pytest.mark.parametrize("name", sorted(SHIMS))
def test_a_shim_is_a_few_lines(name: str) -> None:
    assert lines(ROOT / f"mols_ds/{name}.py") <= SHIM_LINES


# ---------------------------------------------------------------------- length


def test_no_file_is_longer_than_it_was() -> None:
    long = {at(file): lines(file) for file in PRODUCT if lines(file) > LINES}
    joined = {name: n for name, n in long.items() if n > LONG.get(name, 0)}
    assert not joined, f"split these files (limit {LINES} lines): {joined}"
    assert set(LONG) <= set(long), "these are short now; take them off the list"


# ---------------------------------------------------------------------- depth of imports, types of signatures


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(node)


def imports() -> dict[str, set[str]]:
    """Module -> modules of the product that it imports when it is imported."""
    files = {module_of(file): file for file in PRODUCT}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        named: set[str] = set()
        for node in statements(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            else:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {one if one in files else str(node.module) for one in whole}
        found[name] = (named & set(files)) - {name}
    return found


def test_imports_are_not_deeper_than_they_were() -> None:
    graph = imports()

    @functools.cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max(map(chain, graph[name]), key=len, default=()))

    longest = max(map(chain, graph), key=len)
    assert len(longest) <= DEPTH, " > ".join(longest)


def test_few_signatures_say_any() -> None:
    functions = [
        node
        for file in PRODUCT
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    with_any = 0
    for function in functions:
        arguments = function.args
        hints = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        words = [node for hint in (*hints, function.returns) if hint is not None for node in ast.walk(hint)]
        with_any += any(isinstance(word, ast.Name) and word.id == "Any" for word in words)
    assert with_any <= ANY_SHARE * len(functions), f"{with_any} of {len(functions)}: name the types"


# ---------------------------------------------------------------------- private names of DeepSpeed

PUBLIC = {"deepspeed", "deepspeed.comm", "deepspeed.accelerator", "deepspeed.utils.logger"}
COMPAT = "mols_ds/engines/deepspeed/compat.py"
ELSEWHERE = {"mols_ds/optim/catalog.py": {"deepspeed.runtime.config"}}
"""Below the layer of the engines, where compat.py cannot be imported."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of DeepSpeed's that a file imports, by statement; what only annotations need does not count."""
    annotations = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "deepspeed")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            whole = node.module in ("deepspeed", "deepspeed.utils")
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if whole else [str(node.module)]


@pytest.mark.parametrize("file", [pytest.param(f, id=at(f)) for f in PRODUCT if "deepspeed" in f.read_text("utf-8")])
def test_modules_of_deepspeed_are_imported_by_compat_alone(file: Path) -> None:
    if at(file) == COMPAT:
        return
    private = set(imported(ast.parse(file.read_text("utf-8")))) - PUBLIC - ELSEWHERE.get(at(file), set())
    assert not private, f"list them in {COMPAT} and take them from compat.module(...)"


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def our_names() -> set[str]:
    """Underscored names that this package defines: functions, classes, variables, attributes of self."""
    names: set[str] = set()
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("folder", ["mols_ds/engines/deepspeed", "megatron_patches"])
def test_private_attributes_of_an_engine_are_in_its_compat(folder: str) -> None:
    known, ours = set(re.findall(r"\w+", (ROOT / folder / "compat.py").read_text("utf-8"))), our_names()
    adapter = [file for file in PRODUCT if at(file).startswith(folder)]
    assert len(adapter) > 10
    missing = {
        (at(file), node.attr)
        for file in adapter
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in known | ours
    }
    assert not missing, f"private names that {folder}/compat.py does not list"


def test_the_tables_list_nothing_that_is_not_used() -> None:
    """Each name is one more reason to refuse a DeepSpeed: it must be used."""
    used: set[str] = set()
    for file in PRODUCT:
        if at(file) != COMPAT:
            used |= set(re.findall(r"\w+", file.read_text("utf-8")))
    own = (ROOT / COMPAT).read_text("utf-8").partition("# ---")[2]
    used |= set(re.findall(r"\w+", own))
    tables = [compat.ENGINE_NAMES, compat.ENGINE_FLAGS, compat.GRID_NAMES, compat.OPTIMIZER_FLAGS]
    tables += [row.names for row in compat.OPTIMIZERS.values()]
    tables += [*compat.ATTACHED.values(), *compat.PROGRAMS.values()]
    constants = set(compat.CONSTANTS)
    assert not {name for table in tables for name in table} - used - constants
