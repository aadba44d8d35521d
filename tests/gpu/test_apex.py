"""NVIDIA apex's kernels alone, without Transformer Engine: FusedAdam, and weight gradients fused into the product.

Not run when it was written: there was no GPU with apex. Run it with one, before the rest of this folder, by
`DS_ACCELERATOR=cuda python -m pytest tests/gpu/test_apex.py`. apex is built from github.com/NVIDIA/apex: PyPI's `apex`
is another package.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patches.machine import probe_machine
from tests.apps.command import read_metrics, run
from tests.apps.megatron_job import TRAIN, write_job
from tests.gpu.apex_adam import check

pytestmark = [pytest.mark.jobs, pytest.mark.slow, pytest.mark.tier("all")]
RTOL = 1e-4
"""Weights after 8 steps, relative to the largest of their tensor; with torch's AdamW on both sides they are equal
(test_scripts.py). apex's rounds a handful of operations a step, 6e-8 each, in another order; a thousand times that is
room for what such differences do to later gradients. To be set from the first run."""
ALPHA_RTOL = 0.05
"""Fused products add into main_grad in fp32, the others round each micro-batch's gradient to bf16 first."""
MODEL = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 4}
MODEL |= {"vocab_size": 512, "vocab_multiple": 128}
RUN_STEPS = 40


def test_fused_adam_with_multipliers_is_torchs_with_scaled_rates() -> None:
    check("apex", RTOL)


def job(folder: Path, *, fused: bool) -> dict[str, Any]:
    """Train on one GPU with Megatron-core's own layers, the output layer among them. Returns the report."""
    folder.mkdir()
    path = write_job(
        folder,
        model=MODEL,
        precision={"dtype": "bf16", "transformer_engine": False, "gradient_accumulation_fusion": fused},
        optimizer={"lr": 2e-3},
        batch={"micro": 8, "global": 16},
        run={"steps": RUN_STEPS, "seq_len": 128, "eval_sequences": 8},
        mols={"start": 4, "samples": 16, "mode": "probe", "ramp_end": 12},
    )
    out = folder / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", TRAIN]
    done = run(*launch, "--config", path, "--out", out, cwd=folder)
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    lines = read_metrics(out)
    assert all(math.isfinite(line["loss"]) for line in lines[:-1])
    assert lines[-2]["loss"] < lines[0]["loss"] - 0.5 and lines[-2]["phase"] == "fixed"
    report: dict[str, Any] = json.loads((out / "mols_report" / "mols_report.json").read_text("utf-8"))
    return report


def test_fused_weight_gradients_are_the_same_samples(tmp_path: Path) -> None:
    machine = probe_machine()
    if not machine.wgrad_kernel:
        pytest.skip("apex was built without fused_weight_gradient_mlp_cuda (--cuda_ext)")
    plain, fused = job(tmp_path / "plain", fused=False), job(tmp_path / "fused", fused=True)
    # Megatron-core takes Transformer Engine's Adam first, where that is installed too
    assert fused["versions"]["optimizer"] == ("apex" if machine.engine is None else "transformer_engine")
    assert fused["groups"].keys() == plain["groups"].keys()
    for group, row in fused["groups"].items():
        assert row["elements"] == plain["groups"][group]["elements"]
        print(f"{group}: alpha {row['alpha']:.4f}, not fused {plain['groups'][group]['alpha']:.4f}")
    alphas = {group: row["alpha"] for group, row in fused["groups"].items()}
    assert alphas == pytest.approx({group: row["alpha"] for group, row in plain["groups"].items()}, rel=ALPHA_RTOL)
