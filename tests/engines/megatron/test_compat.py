"""The names of megatron.core in compat.py: each exists, and a release without one is refused in one line. No ranks."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest

import megatron_patches
from megatron_patches import compat
from megatron_patches.checks import check_supported
from megatron_patches.cpu.emulation import cpu_megatron
from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsUnsupportedError
from tests.engines.megatron.building import newest

TABLES = {
    name: getattr(compat, name) for name in ("ATTACHED", "UNDER_DEEPSPEED", "APPLIED", "EMULATED", "EMULATED_ADAM")
}
ROOTS = [Path(megatron.core.__file__).parent, *([newest() / "megatron/core"] if newest() else [])]  # type: ignore[operator]


def chained() -> Any:
    """A ChainedOptimizer of one optimizer of each class, all with every name and nothing else."""
    members = [type(kind, (), dict.fromkeys(names, 0))() for kind, (_, names) in compat.WRAPPERS.items()]
    kind = type("ChainedOptimizer", (), dict.fromkeys(compat.CHAINED, 0))
    optimizer = kind()
    optimizer.chained_optimizers = members
    return optimizer


def refusal(check: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(MolsUnsupportedError) as caught:
        check(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert f"megatron-core {metadata.version('megatron-core')}" in text
    assert f"({compat.tested()})" in text
    return text


def names_in(root: Path, file: str) -> set[str]:
    return set(re.findall(r"\w+", (root / file).read_text("utf-8")))


# ---------------------------------------------------------------------- the tables against the tested releases


@pytest.mark.parametrize("table", TABLES)
def test_the_installed_release_has_every_name(table: str) -> None:
    with cpu_megatron():
        compat.check_modules(TABLES[table])


@pytest.mark.parametrize("root", ROOTS, ids=["installed", "newest"][: len(ROOTS)])
def test_every_name_is_in_the_file_that_the_table_says(root: Path) -> None:
    for file, names in [*compat.WRAPPERS.values(), *compat.FLAGS.items(), ("optimizer/optimizer.py", compat.CHAINED)]:
        assert set(names) <= names_in(root, file), file
    for module, names in (row for table in TABLES.values() for row in table.items()):
        path = root.joinpath(*module.split(".")[2:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert set(names) <= names_in(file.parent, file.name), module


# ---------------------------------------------------------------------- a megatron-core without one of them


@pytest.mark.parametrize("name", compat.CHAINED)
def test_an_optimizer_without_a_name_is_refused(name: str) -> None:
    compat.check_optimizer(chained())
    without = chained()
    delattr(type(without), name)
    text = refusal(check_supported, without, None, MolsConfig(), fused=False)
    assert f"ChainedOptimizer has no {name}; " in text


@pytest.mark.parametrize("kind", compat.WRAPPERS)
def test_a_chained_optimizer_without_a_name_is_refused(kind: str) -> None:
    file, names = compat.WRAPPERS[kind]
    for name in names:
        without = chained()
        (member,) = (member for member in without.chained_optimizers if type(member).__name__ == kind)
        delattr(type(member), name)
        assert f"{kind} ({file}) has no {name}; " in refusal(compat.check_optimizer, without)
        member.is_stub_optimizer = True  # holds nothing, and Megatron leaves it unfinished
        compat.check_optimizer(without)


@pytest.mark.parametrize("module", compat.ATTACHED)
def test_a_module_without_a_name_is_refused_at_attach(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = compat.ATTACHED[module][0]
    monkeypatch.delattr(importlib.import_module(module), name)
    text = refusal(megatron_patches.attach, [], SimpleNamespace(), None, {})
    assert f"{module} has no {name}; " in text


@pytest.mark.parametrize("module", compat.APPLIED)
def test_a_module_without_a_name_is_refused_by_apply(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = compat.APPLIED[module][0]
    monkeypatch.delattr(importlib.import_module(module), name)
    assert f"{module} has no {name}; " in refusal(megatron_patches.apply, {})


def test_a_module_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.ATTACHED, "megatron.core.gone.away", ())
    assert "there is no module megatron.core.gone; " in refusal(
        megatron_patches.attach, [], SimpleNamespace(), None, {}
    )


def test_the_emulation_refuses_a_release_without_a_name_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    stock = torch.cuda.current_device
    monkeypatch.setitem(compat.EMULATED, "megatron.core.tensor_parallel.random", ("_gone",))
    text = refusal(cpu_megatron().__enter__)
    assert "megatron.core.tensor_parallel.random has no _gone; " in text
    assert torch.cuda.current_device is stock
