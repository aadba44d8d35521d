"""One name, one thing: no two classes of the product have the same name, and the sections are built on one base."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mols_ds", "megatron_patches")
ONE_A_CLIENT = {"MolsCallback"}
"""Each client's users import theirs by this name, from that client's module of `mols_ds.integrations`."""


def classes() -> dict[str, list[str]]:
    """Class name -> the places where it is defined, nested classes too."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_class_name_exists_once() -> None:
    found = classes()
    assert len(found) > 150 and "MolsConfig" in found  # the search found the product
    twice = {name: places for name, places in found.items() if len(places) > 1 and name not in ONE_A_CLIENT}
    assert not twice, "give each thing a name of its own: " + "; ".join(f"{n} {p}" for n, p in twice.items())


def test_one_parser_and_one_place_for_exit_statuses() -> None:
    """`argparse.ArgumentParser` prints a usage of many lines; `cli_utils.Parser` raises MolsConfigError."""
    made, statuses = [], []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "cli_utils.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                    made.append(f"{path.relative_to(ROOT)}:{node.lineno}")
                if isinstance(node, ast.Assign) and "USER_MISTAKE" in ast.unparse(node.targets[0]):
                    statuses.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not made and not statuses
