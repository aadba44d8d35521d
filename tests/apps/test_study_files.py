"""The study files of studies/: every arm is one that DeepSpeed and the model accept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mols_ds.apps.study.runs import arm_config
from mols_ds.apps.study.spec import load_study
from mols_ds.core.config import MolsConfig
from mols_ds.core.groups import base_group, group_table
from mols_ds.training.ds_config import check_with_deepspeed, resolve
from tests.helpers.harness import ROOT

STUDIES = ROOT / "studies"


SHIPPED = sorted(file.stem for file in STUDIES.glob("*.yaml"))


def test_all_studies_are_shipped() -> None:
    wanted = "laptop gpu60m paper-130m paper-1b paper-7b gpt2-125m qwen-350m long-context extended-tokens"
    assert set(wanted.split()) | {"samples-ablation", "grouping-ablation", "smoke"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_are_what_train_can_start(name: str, tmp_path: Path) -> None:
    """Every arm's config is resolved and accepted by DeepSpeed; its groups exist in the model."""
    study = load_study(STUDIES / f"{name}.yaml")
    if name != "smoke":
        assert len(study.seeds) >= 5 and not set(study.seeds) & set(study.tune_seeds)
    for shape, settings in study.models.items():
        assert isinstance(settings, dict)
        config = AutoConfig.for_model(**settings)
        assert (getattr(config, "max_position_embeddings", None) or config.n_positions) >= study.batch.length
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        here = study.at(shape)
        for arm in here.arms_of(shape):
            spec = here.arms[arm]
            for values in (here.candidates(arm)[0], here.candidates(arm)[-1]):
                resolved = resolve(arm_config(here, arm, values), world=1, steps=here.steps, out=tmp_path)
                check_with_deepspeed(resolved, name)
            if spec.mols is None:
                continue
            section = MolsConfig.parse(resolved["mols"])
            table = group_table(model, section.rules, section.granularity)
            bases = {base_group(group) for group in table.elements}
            if section.fixed_alphas is not None:
                assert set(section.fixed_alphas) <= bases
            elif section.reference != "max":
                assert section.reference in bases
