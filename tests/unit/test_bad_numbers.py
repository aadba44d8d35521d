"""Numbers that are not finite and files that are nested too deeply: one line that names the key or the file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mols_ds.apps.plan.cluster import read_cluster
from mols_ds.apps.study.spec import load_study
from mols_ds.core.config import MolsConfig
from mols_ds.core.json_text import parse_json
from mols_ds.core.state_check import check_saved
from mols_ds.errors import MolsCheckpointError, MolsConfigError
from mols_ds.optim.adam_mini import ShardedAdamMini
from mols_ds.optim.apollo import Apollo
from mols_ds.optim.build import settings_of
from mols_ds.optim.catalog import OPTIMIZERS
from mols_ds.optim.lamb import ShardedLamb
from mols_ds.optim.limits import LIMITS
from mols_ds.optim.sgg import SGG
from mols_ds.report.files import load_report
from mols_ds.training import cli_utils
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
    check_saved(saved, {"vo": 8}, state, lambda groups: "")
    state[key] = {"vo": alpha}
    with pytest.raises(MolsCheckpointError, match=rf"damaged: .*{key}\.vo"):
        check_saved(saved, {"vo": 8}, state, lambda groups: "")


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


# ---------------------------------------------------------------------- property: keys x values

NUMBERS_THAT_ARE_NONE = [
    *(math.nan, math.inf, -math.inf, True, "1e-3", "", b"x", 1j, [1], {"a": 1}, 10**400, -(10**400), 2**63, -1, -0.5),
    *(1e300, 5e-324),
]
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "enabled": lambda v: isinstance(v, bool),
    "noise_floor_correction": lambda v: isinstance(v, bool),
    "start": lambda v: v == 5e-324,
    "alpha_rtol": lambda v: v in (1e300, 5e-324, 2**63),
    "reference": lambda v: v == "1e-3",
    "fixed_alphas": lambda v: v == {"a": 1},
    "factors": lambda v: v == {"a": 1},
    "report_dir": lambda v: v == "1e-3",
}
"""Key -> which of them are valid anyway: a name, a tiny share, a loose tolerance."""
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{key: (lambda v, key=key: {key: v}) for key in MolsConfig.model_fields},
    "fixed_alphas.vo": lambda v: {"fixed_alphas": {"vo": v}},
    "factors.vo": lambda v: {"factors": {"vo": v}},
    "recalibrate.every": lambda v: {"recalibrate": {"every": v}},
    "accumulators.device": lambda v: {"accumulators": {"device": v}},
}


@given(st.sampled_from(sorted(PLACES)), st.sampled_from(NUMBERS_THAT_ARE_NONE))
@settings(max_examples=len(PLACES) * len(NUMBERS_THAT_ARE_NONE), deadline=None)
def test_no_bad_value_passes_the_section(place: str, value: Any) -> None:
    try:
        MolsConfig.parse(PLACES[place](value))
    except MolsConfigError as error:
        assert place in str(error) and "\n" not in str(error)
    else:
        assert ALLOWED.get(place, lambda v: False)(value), (place, value)


@pytest.mark.parametrize("alpha", [1e-12, 1e12, 1, 2.5])
def test_multipliers_within_bounds_pass(alpha: float) -> None:
    assert MolsConfig.parse({"fixed_alphas": {"vo": alpha}}).fixed_alphas == {"vo": float(alpha)}


BAD_SETTINGS = NUMBERS_THAT_ARE_NONE
PASS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("eps", "eps1", "eps2", "lr", "weight_decay", "adam_lr", "scale", "clamp", "clip_threshold",
                     "momentum_decay", "beta3", "momentum"), lambda v: v == 5e-324 or (v == 2**63 and v is not True)),
    **dict.fromkeys(("amsgrad", "nesterov", "use_adjusted_lr", "bias_correction", "scale_parameter"),
                    lambda v: v is True),
    "shampoo_beta": lambda v: v in (5e-324, -1, -0.5),
    "decay_rate": lambda v: v in (-1, -0.5),
    "projection_type": lambda v: isinstance(v, str),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_bad_value_passes_a_setting_of_an_optimizer_by_name(name: str) -> None:
    entry = OPTIMIZERS[name]
    for key in entry.settings:
        assert key in LIMITS, "a setting without limits"
        for value in BAD_SETTINGS:
            try:
                settings_of(entry, {key: value})
            except MolsConfigError as error:
                assert f'"optimizer.params.{key}" of {name} is ' in str(error) and "\n" not in str(error)
            else:
                assert PASS.get(key, lambda v: False)(value) and value is not False, (key, value)


OWN: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "ShardedLamb": (ShardedLamb, ("clamp", "bias_correction")),
    "ShardedAdamMini": (ShardedAdamMini, ("head_dim",)),
    "SGG": (SGG, ("clusters", "interval", "beta3", "bounds")),
    "APOLLO": (Apollo, ()),
}


@pytest.mark.parametrize("name", OWN)
def test_no_bad_value_passes_a_constructor_of_ours(name: str) -> None:
    """By argument, by parameter group, and in a group that is added later; complex weights neither."""
    make, more = OWN[name]
    values = [v for v in BAD_SETTINGS if v not in (5e-324, 2**63)] + [torch.tensor(1j), torch.tensor(math.nan)]

    def weight(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))

    for key in ("lr", "eps", "weight_decay", "betas", *more):
        for value in values:
            if key == "bias_correction" and value is True:
                continue
            with pytest.raises(ValueError, match=f"{name}: {key}=") as caught:
                make([weight()], **{key: value})
            assert "\n" not in str(caught.value)
            if key in more:
                continue
            with pytest.raises(ValueError, match=f"{name}: {key}="):
                make([{"params": [weight()], key: value}])
            optimizer = make([weight()])
            with pytest.raises(ValueError, match=f"{name}: {key}="):
                optimizer.add_param_group({"params": [weight()], key: value})
    with pytest.raises(ValueError, match="complex weights"):
        make([weight(torch.complex64)])
    assert make([weight()], lr=torch.tensor(1e-3)).param_groups[0]["lr"] == torch.tensor(1e-3)


@pytest.mark.parametrize("key", ["rank", "update_proj_gap", "scale", "scale_type"])
def test_no_bad_value_passes_a_matrix_group_of_apollo(key: str) -> None:
    group = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "scale_type": "channel"}
    for value in [*(v for v in BAD_SETTINGS if v not in (5e-324, 2**63)), 0, None]:
        with pytest.raises(ValueError, match=f"APOLLO: {key}="):
            Apollo([{"params": [torch.nn.Parameter(torch.ones(4, 4))], **group, key: value}])


ARGUMENTS = ["nan", "inf", "-inf", "-1", "0", "", "x", "1e999", "9" * 30, "9" * 5000]


@pytest.mark.parametrize("text", ARGUMENTS)
@pytest.mark.parametrize("kind", [cli_utils.positive, cli_utils.not_negative, cli_utils.above_zero, cli_utils.share])
def test_numbers_on_command_lines(kind: Callable[[str], float], text: str) -> None:
    fits = {
        cli_utils.not_negative: text == "0",
        cli_utils.share: text == "0",
        cli_utils.above_zero: text == "9" * 30,
    }
    if fits.get(kind, False):
        assert 0 <= kind(text) < math.inf
        return
    with pytest.raises((argparse.ArgumentTypeError, ValueError)) as caught:
        kind(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "x", -1, 0, [1], 10**400])
@pytest.mark.parametrize(
    "key", ["lr", "clip", "seeds", "batch.sequences", "budget.steps", "budget.tokens", "data.eval_share"]
)
def test_numbers_of_a_study(key: str, value: object, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "name": "s", "models": {"m": "model.json"}, "batch": {"sequences": 2, "length": 8}, "budget": {"steps": 4},
        "lr": [1e-3], "seeds": [1], "arms": {"adam": {}},
    }  # fmt: skip
    first, _, second = key.partition(".")
    if key == "budget.tokens":
        content["budget"] = {"tokens": value}
    elif second:
        content[first] = {**content.get(first, {}), second: value}
    else:
        content[first] = value if first == "clip" else [value]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    if (key, value) in (("clip", 0), ("seeds", -1), ("seeds", 0), ("seeds", 10**400)):
        return
    with pytest.raises(MolsConfigError, match=r"study\.yaml") as caught:
        load_study(str(path))
    assert "\n" not in str(caught.value) and key.split(".")[-1] in str(caught.value)
