"""Which settings of a run apply when it resumes with others."""

from __future__ import annotations

import pytest

from mols_ds.errors import MolsCheckpointError
from mols_ds.training.resume_settings import Rule, compare, flatten, rule_of

EXPECTED: dict[str, Rule] = {
    "--steps": "longer",
    "--seed": "refused",
    "--save-every": "free",
    "--eval-every": "applies",
    "--lora-rank": "refused",
    "--lora-dropout": "applies",
    "model.hidden_size": "refused",
    "model.attention_dropout": "applies",
    "model.bias_dropout_fusion": "applies",
    "model.recompute_granularity": "free",
    "text.train": "refused",
    "optimizer.type": "refused",
    "optimizer.params.lr": "applies",
    "optimizer.params.rank": "refused",
    "optimizer.params.torch_adam": "free",
    "optimizer.betas": "applies",
    "optimizer.name": "refused",
    "scheduler.params.warmup_num_steps": "applies",
    "gradient_clipping": "applies",
    "train_batch_size": "refused",
    "gradient_accumulation_steps": "free",
    "fp16.enabled": "refused",
    "fp16.initial_scale_power": "checkpoint",
    "zero_optimization.stage": "free",
    "tensorboard.enabled": "free",
    "run.steps": "longer",
    "run.log_every": "free",
    "parallel.tp": "free",
    "mols.samples": "free",
    "processes": "free",
}


@pytest.mark.parametrize("setting", EXPECTED)
def test_the_rule_of_a_setting(setting: str) -> None:
    assert rule_of(setting)[0] == EXPECTED[setting]


def test_equal_settings_are_no_line() -> None:
    assert compare({"--seed": 1, "gradient_clipping": 1.0}, {"gradient_clipping": 1.0, "--seed": 1}) == []


def test_what_applies_is_a_line_each() -> None:
    saved = {"--steps": 10, "gradient_clipping": 1.0, "zero_optimization.stage": 1, "fp16.initial_scale_power": 16}
    now = {"--steps": 20, "scheduler.type": "WarmupLR", "zero_optimization.stage": 2, "fp16.initial_scale_power": 8}
    assert compare(saved, now) == [
        "--steps is 20 and was 10: this run's value applies",
        "gradient_clipping is not set and was 1.0: this run's value applies",
        "fp16.initial_scale_power is 8 and was 16: no effect, the checkpoint has a loss scale",
        "scheduler.type is WarmupLR and was not set: this run's value applies",
    ]


def test_all_that_is_refused_is_one_line() -> None:
    with pytest.raises(MolsCheckpointError) as caught:
        compare({"--seed": 1, "--steps": 10, "--eval-every": 2}, {"--seed": 2, "--steps": 9, "--eval-every": 3})
    assert str(caught.value) == (
        "--resume: --seed is 2 and was 1 (the order of the data depends on it); "
        "--steps is 9 and was 10 (a run can be extended, not cut)"
    )


def test_nested_settings_are_flat() -> None:
    nested = {"a": {"b": {"c": 1}, "d": (0.9, 0.95)}, "e": []}
    assert flatten(nested, "x.") == {"x.a.b.c": 1, "x.a.d": [0.9, 0.95], "x.e": []}
