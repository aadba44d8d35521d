"""Numbers that are not finite and files that are nested too deeply: one line that names the key or the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mols_ds.apps.plan.cluster import read_cluster
from mols_ds.apps.study.spec import load_study
from mols_ds.core.json_text import parse_json
from mols_ds.core.state_check import check_saved
from mols_ds.errors import MolsCheckpointError, MolsConfigError
from mols_ds.optim.build import settings_of
from mols_ds.optim.catalog import OPTIMIZERS
from mols_ds.report.files import load_report
from mols_ds.training.ds_config import read_config
from mols_ds.training.megatron_settings import validate
from mols_ds.training.models import load_model_config
from mols_ds.training.yaml_text import parse_yaml

NONE_FINITE = [math.inf, -math.inf, math.nan]


def megatron(section: str, key: str, value: object) -> dict[str, Any]:
    content: dict[str, Any] = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2},
        "optimizer": {"lr": 1e-3},
        "batch": {"micro": 1, "global": 1},
        "run": {"steps": 2, "seq_len": 4},
    }
    content.setdefault(section, {})[key] = value
    return content


@pytest.mark.parametrize("value", NONE_FINITE)
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("model", "rotary_percent"),
        ("model", "layernorm_epsilon"),  # a field of TransformerConfig
        ("optimizer", "lr"),
        ("optimizer", "eps"),
        ("optimizer", "weight_decay"),
        ("optimizer", "clip_grad"),
        ("scheduler", "warmup"),
        ("data", "eval_share"),
        ("mols", "alpha_max"),
    ],
)
def test_a_megatron_file(section: str, key: str, value: float) -> None:
    with pytest.raises(MolsConfigError, match=rf"here: .*{key}.*finite number.*{value}") as caught:
        validate(megatron(section, key, value), "here")
    assert "\n" not in str(caught.value)


def test_a_megatron_file_is_else_accepted() -> None:
    assert validate(megatron("optimizer", "clip_grad", 0.0), "here").optimizer.clip_grad == 0.0


@pytest.mark.parametrize("value", [*NONE_FINITE, 1j])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_of_every_optimizer(name: str, value: object) -> None:
    entry = OPTIMIZERS[name]
    for key, default in entry.settings.items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            with pytest.raises(MolsConfigError, match=rf'"optimizer.params.{key}" of {entry.name} is'):
                settings_of(entry, {key: value})
        if isinstance(default, tuple):
            with pytest.raises(MolsConfigError, match=rf'"optimizer.params.{key}" of {entry.name} is'):
                settings_of(entry, {key: [value, *default[1:]]})


@pytest.mark.parametrize("alpha", [math.inf, math.nan, 0.0, -1.0])
@pytest.mark.parametrize("key", ["alphas", "old"])
def test_multipliers_of_a_checkpoint(key: str, alpha: float) -> None:
    state: dict[str, Any] = {
        **{"phase": "fixed", "samples": 4, "attempts": 4, "skipped": 0, "begun_at": 0, "ended_at": 4},
        **{"ramp_until": 9, "old": {}, "alphas": {"vo": 1.0}},
    }
    saved = {"version": 1, "groups": {"vo": 8}, "state": state, "report": {}}
    check_saved(saved, {"vo": 8}, state)
    state[key] = {"vo": alpha}
    with pytest.raises(MolsCheckpointError, match=rf"damaged: .*{key}\.vo"):
        check_saved(saved, {"vo": 8}, state)


DEEP = "[" * 100_000 + "]" * 100_000
READERS: dict[str, Callable[[str], object]] = {
    "report": load_report,
    "config": read_config,
    "model": load_model_config,
    "cluster": read_cluster,
    "study": load_study,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_nested_too_deeply(name: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text(DEEP if name in ("report", "config", "model") else "[" * 3000 + "]" * 3000)
    with pytest.raises(MolsConfigError, match=r"deep\.json") as caught:
        READERS[name](str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "!exponent abc", "!exponent [1]", "2026-13-45"])
def test_yaml_that_python_cannot_read(text: str) -> None:
    with pytest.raises(MolsConfigError, match="here: ") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_an_example_that_is_nested_too_deeply() -> None:
    with pytest.raises(MolsConfigError, match="line 3: not JSON"):
        parse_json(DEEP, "line 3")
