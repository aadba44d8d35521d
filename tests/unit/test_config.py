"""The "mols" section: defaults, presets, and one line for each mistake that names the key and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsConfigError

WRONG: list[tuple[Any, str]] = [
    ({"estimater": "mean"}, r'"mols.estimater": unknown key; did you mean "estimator"\?'),
    ({"zzz": 1}, r'"mols.zzz": unknown key; allowed: enabled, preset'),
    ({"accumulators": {"divice": "cpu"}}, r'"mols.accumulators.divice": unknown key'),
    ({"estimator": "average"}, r'"mols.estimator": .*median.*average'),
    ({"preset": "papers"}, r'"mols.preset": .*papers'),
    ({"mode": "offline"}, r'"mols.mode": .*probe.*offline'),
    ({"samples": "many"}, r'"mols.samples": .*many'),
    ({"samples": 8.0}, r'"mols.samples"'),
    ({"samples": True}, r'"mols.samples"'),
    ({"samples": 1}, r'"mols.samples"'),
    ({"samples": 3}, r"samples: 3 is too few for noise_floor_correction \(needs K >= 4\).*correction\": false"),
    ({"samples": "auto", "mode": "moments"}, r'"auto" needs gradient samples'),
    ({"max_samples": 8}, r'"mols.max_samples"'),
    ({"start": -1}, r"start: a step must be >= 0, got -1"),
    ({"start": 1.5}, r"start: a float is a share of all steps in \[0, 1\].*1.5"),
    ({"start": "soon"}, r'"mols.start'),
    ({"start": 100, "ramp_end": 50}, r"start \(100\) is after ramp_end \(50\)"),
    ({"start": 0.2}, r"start \(0.2\) is after ramp_end \(0.1\)"),
    ({"ramp_end": -0.5}, r"ramp_end: a float is a share"),
    ({"ramp": "square"}, r'"mols.ramp": .*square'),
    ({"alpha_min": 2.0}, r'"mols.alpha_min": .*2.0'),
    ({"alpha_min": 0}, r'"mols.alpha_min"'),
    ({"alpha_max": 0.5}, r'"mols.alpha_max": .*0.5'),
    *[
        ({key: v}, rf'"mols.{key}": .*finite number \(got {v}\)')
        for key in ("alpha_min", "alpha_max", "alpha_rtol")
        for v in (float("inf"), float("-inf"), float("nan"))
    ],
    *[({key: v}, rf'"mols.{key}.*{v}') for key in ("start", "ramp_end") for v in (float("inf"), float("nan"))],
    ({"alpha_max": 10**400}, r'"mols.alpha_max"'),
    ({"alpha_rtol": 0}, r'"mols.alpha_rtol"'),
    ({"fixed_alphas": {"qk": float("inf")}}, r"fixed_alphas.qk.*finite number.*inf"),
    ({"fixed_alphas": {"qk": 0.0}}, r"fixed_alphas.qk: must be a finite number > 0, got 0"),
    ({"enabled": "yes"}, r'"mols.enabled": .*yes'),
    ({"noise_floor_correction": 1}, r'"mols.noise_floor_correction"'),
    ({"granularity": "layer"}, r'"mols.granularity"'),
    ({"rules": [["a"]]}, r'"mols.rules'),
    ({"recalibrate": {"every": 0}}, r'"mols.recalibrate.every"'),
    ({"recalibrate": {}}, r'"mols.recalibrate.every" is missing'),
    ({"fixed_alphas": {}}, r"fixed_alphas: is empty"),
    ({"factors": {}}, r"factors: is empty"),
    ({"factors": {"qk": 0.0}}, r"factors.qk: must be a finite number > 0, got 0"),
    ({"factors": {"qk": 1e13}}, r"factors.qk: must be from 1e-12 to 1e\+12"),
    ({"factors": {"qk": 2.0}, "fixed_alphas": {"qk": 2.0}}, r"factors: cannot go with fixed_alphas.*products"),
    ({"factors": {"qk": 2.0}, "preset": "constant"}, r"factors: cannot go with fixed_alphas"),
    ({"fixed_alphas": {"qk": -1.0}}, r"fixed_alphas.qk: must be a finite number > 0, got -1"),
    ({"fixed_alphas": {"qk": float("nan")}}, r"fixed_alphas.qk.*finite number.*nan"),
    ({"fixed_alphas": {"qk": 2.0}, "recalibrate": {"every": 5}}, r"recalibrate: cannot go with fixed_alphas"),
    ({"accumulators": {"dtype": "bfloat16"}}, r'"mols.accumulators.dtype"'),
    ({"total_steps": 0}, r'"mols.total_steps"'),
    (None, r'"mols": must be an object .*NoneType'),
    ([1], r'"mols": must be an object .*list'),
    ("robust", r'"mols": must be an object .*str'),
]


@pytest.mark.parametrize(("section", "message"), WRONG, ids=[str(section)[:40] for section, _ in WRONG])
def test_mistakes_in_one_line(section: Any, message: str) -> None:
    with pytest.raises(MolsConfigError, match=message) as caught:
        MolsConfig.parse(section)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # no pydantic traceback above it


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(MolsConfigError) as caught:
        MolsConfig.parse({"estimater": "mean", "samples": 0, "start": -1})
    assert "estimater" in str(caught.value) and "samples" in str(caught.value)


def test_defaults() -> None:
    config = MolsConfig.parse({})
    assert config.enabled and config.mode == "probe" and config.samples == 32
    assert (config.start, config.ramp_end, config.ramp) == (0.01, 0.10, "linear")
    assert (config.alpha_min, config.alpha_max, config.reference) == (0.1, 10.0, "vo")
    assert config.noise_floor_correction and config.fixed_alphas is None and config.rules == ()
    assert MolsConfig.parse(config) is config


def test_paper_preset_to_the_letter_and_overridable() -> None:
    """Plain mean, no correction, no bounds, reference = the largest SNR, K = 32 probes."""
    config = MolsConfig.parse({"preset": "paper"})
    chosen = (config.estimator, config.noise_floor_correction, config.reference, config.alpha_min, config.alpha_max)
    assert chosen == ("mean", False, "max", None, None)
    assert (config.mode, config.samples) == ("probe", 32)
    assert MolsConfig.parse({"preset": "paper", "reference": "vo"}).reference == "vo"
    assert MolsConfig.parse({"preset": "paper", "samples": 2}).samples == 2  # no correction: two are enough


def test_constant_preset_measures_nothing_and_is_overridable() -> None:
    config = MolsConfig.parse({"preset": "constant"})
    assert config.fixed_alphas == {"embedding": 8.0} and config.measures is None
    assert not list(config.without_effect())
    assert MolsConfig.parse({"preset": "constant", "fixed_alphas": {"embedding": 32}}).fixed_alphas == {"embedding": 32}
    (remark,) = MolsConfig.parse({"preset": "constant", "samples": 8}).without_effect()
    assert remark.startswith('"mols.samples": no effect beside "fixed_alphas"')


def test_accepted_forms() -> None:
    """JSON has lists and integers; both kinds of `start` may be mixed with "auto"."""
    config = MolsConfig.parse({"rules": [["a.*", "mlp"]], "fixed_alphas": {"qk": 2}, "alpha_max": 5, "start": 3})
    assert config.rules == (("a.*", "mlp"),) and config.fixed_alphas == {"qk": 2.0}
    assert isinstance(config.start, int) and isinstance(config.ramp_end, float)
    assert MolsConfig.parse({"start": 0, "ramp_end": "auto"}).ramp_end == "auto"
    assert MolsConfig.parse({"samples": "auto"}).samples == "auto"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, []),
        ({"samples": "auto", "max_samples": 64, "alpha_rtol": 0.2}, []),
        ({"preset": "paper", "fixed_alphas": {"qk": 2.0}, "start": 0.1, "ramp_end": 0.2}, []),
        ({"samples": 40, "alpha_rtol": 0.2}, ['"mols.alpha_rtol": no effect without "samples": "auto"']),
        ({"mode": "moments", "accumulators": {}}, ['"mols.accumulators": no effect in mode "moments": there are none']),
        (
            {"preset": "paper", "fixed_alphas": {"qk": 2.0}, "samples": 4, "mode": "online", "alpha_rtol": 0.2},
            ['"mols.samples", "mols.alpha_rtol", "mols.mode": no effect beside "fixed_alphas": nothing is measured'],
        ),
        (
            {"fixed_alphas": {"qk": 2.0}, "mode": "online", "max_samples": 20, "reference": "max"},
            ['"mols.max_samples", "mols.mode", "mols.reference": no effect beside "fixed_alphas": nothing is measured'],
        ),
    ],
)
def test_written_keys_without_effect(section: dict[str, Any], expected: list[str]) -> None:
    assert list(MolsConfig.parse(section).without_effect()) == expected


def test_frozen() -> None:
    config = MolsConfig.parse({})
    with pytest.raises(ValidationError):
        config.samples = 5  # type: ignore[misc]
