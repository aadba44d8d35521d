"""The names of DeepSpeed's in compat.py: each exists, and a DeepSpeed without one is refused in one line. No ranks."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import deepspeed
import pytest

from mols_ds.apps.launch import deepspeed_cli
from mols_ds.core.config import MolsConfig
from mols_ds.engines.deepspeed import compat
from mols_ds.engines.deepspeed.checks import check_supported
from mols_ds.engines.deepspeed.shards import find_shards
from mols_ds.errors import MolsUnsupportedError

SOURCE = Path(deepspeed.__file__).parent
MODULES = {**compat.ATTACHED, **compat.PROGRAMS}


def engine(**attributes: Any) -> Any:
    """Has every name of an engine's and nothing else."""
    return SimpleNamespace(**{**dict.fromkeys(compat.ENGINE_NAMES, 0), **attributes})


def optimizer(kind: str) -> Any:
    """Has every name that is read of this class, and a parameter with every attribute."""
    row = compat.OPTIMIZERS[kind]
    made = type(kind, (), dict.fromkeys(row.names, 0))()
    if row.parameters is not None:
        setattr(made, row.parameters[0], [[], [SimpleNamespace(**dict.fromkeys(row.parameters[1], 0))]])
    return made


def refusal(check: Any, *arguments: Any) -> str:
    with pytest.raises(MolsUnsupportedError) as caught:
        check(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert f"DeepSpeed {metadata.version('deepspeed')}" in text
    assert compat.TESTED in text
    return text


def names_in(file: str) -> set[str]:
    return set(re.findall(r"\w+", (SOURCE / file).read_text("utf-8")))


# ---------------------------------------------------------------------- the tables against the installed DeepSpeed


def test_the_tested_version_is_the_pinned_one() -> None:
    pinned = (Path(__file__).parents[3] / "constraints.txt").read_text("utf-8")
    assert f"deepspeed=={compat.TESTED}\n" in pinned


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_its_names(name: str) -> None:
    assert isinstance(compat.module(name), ModuleType)


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("runtime/engine.py", (*compat.ENGINE_NAMES, *compat.ENGINE_FLAGS)),
        ("runtime/pipe/topology.py", compat.GRID_NAMES),
        *((row.file, row.names) for row in compat.OPTIMIZERS.values()),
    ],
)
def test_every_name_is_in_the_file_that_the_table_says(file: str, names: tuple[str, ...]) -> None:
    inherited = names_in("runtime/base_optimizer.py") if "ptimizer" in file or "stage" in file else set()
    assert set(names) <= names_in(file) | inherited


def test_the_arguments_of_load_checkpoint() -> None:
    stock = inspect.signature(inspect.unwrap(deepspeed.DeepSpeedEngine.load_checkpoint)).parameters
    wanted = {name: None if item.default is item.empty else item.default for name, item in stock.items()}
    assert wanted == {"self": None, **compat.LOAD_CHECKPOINT}
    assert [*compat.LOAD_CHECKPOINT] == [*wanted][1:]


def test_flags_still_exist() -> None:
    """They are read with a default: where DeepSpeed renames one, MoLS would not refuse what it cannot do."""
    optimizers = set().union(*(names_in(row.file) for row in compat.OPTIMIZERS.values()))
    assert set(compat.OPTIMIZER_FLAGS) <= optimizers
    files = ("module_inject/layers.py", "runtime/pipe/module.py", "runtime/zero/partition_parameters.py")
    parameters = set().union(*map(names_in, (*files, "utils/tensor_fragment.py", "runtime/base_optimizer.py")))
    assert set(compat.PARAMETER_FLAGS) - {compat.AUTOTP} <= parameters


# ---------------------------------------------------------------------- a DeepSpeed without one of them


@pytest.mark.parametrize("name", compat.ENGINE_NAMES)
def test_an_engine_without_a_name_is_refused(name: str) -> None:
    compat.check(engine())
    without = engine()
    delattr(without, name)
    text = refusal(check_supported, without, MolsConfig())
    assert f"(runtime/engine.py) has no {name}; " in text


def test_a_pipeline_engine_without_its_grid_is_refused() -> None:
    grid = SimpleNamespace(**dict.fromkeys(compat.GRID_NAMES, 0))
    compat.check(engine(pipeline_parallelism=True, grid=grid))
    del grid.get_pipe_parallel_group
    text = refusal(compat.check, engine(pipeline_parallelism=True, grid=grid))
    assert "grid (runtime/pipe/topology.py) has no get_pipe_parallel_group; " in text


@pytest.mark.parametrize("kind", sorted(compat.OPTIMIZERS))
def test_an_optimizer_without_a_name_is_refused(kind: str) -> None:
    row = compat.OPTIMIZERS[kind]
    compat.check_optimizer(optimizer(kind))
    for name in row.names:
        if row.parameters is not None and name == row.parameters[0]:
            continue
        without = optimizer(kind)
        delattr(type(without), name)
        text = refusal(find_shards, SimpleNamespace(optimizer=without, param_names={}, seq_data_parallel_group=None))
        assert f"{kind} ({row.file}) has no {name}; " in text
    for name in row.parameters[1] if row.parameters is not None else ():
        without = optimizer(kind)
        delattr(getattr(without, row.parameters[0])[1][0], name)  # type: ignore[index]
        assert f"a parameter of {kind} ({row.file}) has no {name}; " in refusal(compat.check_optimizer, without)


@pytest.mark.parametrize("name", sorted(compat.ATTACHED))
def test_a_module_without_a_name_is_refused_at_attach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(name), compat.ATTACHED[name][0])
    assert f"{name} has no {compat.ATTACHED[name][0]}; " in refusal(compat.check, engine())


def test_a_module_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat.ATTACHED, "deepspeed.runtime.gone.away", ())
    assert "there is no module deepspeed.runtime.gone; " in refusal(compat.check, engine())


def test_a_constant_of_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.checkpoint.constants.PARAM", "weight")
    assert "PARAM = 'weight', not 'param'; " in refusal(compat.check, engine())


def test_a_launcher_without_a_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("deepspeed.launcher.runner.encode_world_info")
    assert deepspeed_cli.main(["train.py"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deepspeed: MoLS does not support DeepSpeed")
    assert "deepspeed.launcher.runner has no encode_world_info; " in line
