"""Lightning beside the table: where the section may be, `mols_ds.patch()` alone, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.harness import pictures_allowed

with pictures_allowed():
    pytest.importorskip("lightning")
    import lightning.pytorch as pl


import mols_ds
from mols_ds.integrations.lightning import MolsCallback
from tests.integrations.lightning_fit import Module, OnCpu, train
from tests.integrations.runner import Case, results, table
from tests.integrations.runs import ONLINE, Examples, Run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

HERE = "test_lightning"


def ways() -> dict[str, Any]:
    found = {way: train(Run(2, {}, way), way) for way in ("argument", "config")}
    return found | {f"{way} online": train(Run(2, ONLINE, f"{way}_online"), way) for way in ("patch", "config")}


def refusals() -> dict[str, str]:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=OnCpu(config={"zero_optimization": {}}), max_steps=1, logger=False,
        callbacks=[MolsCallback()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(mols_ds.MolsError) as raised:
        trainer.fit(Module(), torch.utils.data.DataLoader(Examples().rows, batch_size=2))
    return {"none": str(raised.value)}


WAYS: Case = (1, f"{HERE}:ways")
REFUSALS: Case = (1, f"{HERE}:refusals")
CASES = table([WAYS, REFUSALS])


@CASES.reads(WAYS)
def test_the_section_comes_from_the_config_or_an_argument_and_patch_serves_as_well() -> None:
    (seen,) = results(1)[WAYS[1:]]
    assert seen["argument"]["weights"] == seen["config"]["weights"]
    assert seen["patch online"]["weights"] == seen["config online"]["weights"]
    assert len(set(seen["patch online"]["alphas"].values())) > 2


@CASES.reads(REFUSALS)
def test_a_section_is_never_silently_ignored() -> None:
    (seen,) = results(1)[REFUSALS[1:]]
    assert 'no "mols" section' in seen["none"]
