"""python -m tests.gpu.apex_adam OPTIMIZER PORT: MoLS with apex's Adam, against torch's AdamW on a reference.

OPTIMIZER: "apex" (needs a CUDA device), or "torch", which checks this file itself anywhere. Prints one line of JSON:
the largest differences of weights after STEPS steps, relative to the largest weight of each tensor.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tests.apps.command import ROOT, run
from tests.helpers.ports import free_port

STEPS, LR, DECAY, BETAS = 8, 1e-2, 0.1, (0.9, 0.95)
EPS = 1e-3
"""Large: gradients are about 0.04, and with Adam's 1e-8 the sign of one that rounds to about 0 is a step of lr."""
ALPHAS = {"qk": 3.0, "mlp": 0.25}
SECTION = {"fixed_alphas": ALPHAS, "start": 0, "ramp_end": 4, "total_steps": STEPS}


def optimizer_of(kind: str, params: Any) -> torch.optim.Optimizer:
    """The engine's optimizer; both decay the weights as AdamW."""
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    if kind == "torch":
        return torch.optim.AdamW(params, **options)
    from apex.optimizers import FusedAdam  # type: ignore[import-not-found]

    found: torch.optim.Optimizer = FusedAdam(params, adam_w_mode=True, **options)
    return found


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


def train(kind: str) -> dict[str, Any]:
    """The largest differences from the references with and without multipliers; the multipliers at the end."""
    import mols_ds
    from mols_ds.core.groups import group_table
    from tests.helpers.oracle.models import batch, build, loss_of

    model = build("llama")
    device = torch.device("cuda" if kind == "apex" else "cpu")
    references = [copy.deepcopy(model).to(device) for _ in range(2)]
    layouts = group_table(model).layouts
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, "mols": SECTION}
    trained = model.to(device)
    engine, *_ = mols_ds.initialize(
        model=trained, optimizer=optimizer_of(kind, list(trained.parameters())), config=config
    )
    adams = [
        torch.optim.AdamW(
            [{"params": [p], "name": name} for name, p in reference.named_parameters()],
            lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY,
        )
        for reference in references
    ]  # fmt: skip
    for step in range(STEPS):
        ids: Tensor = batch(step, 0, 0).to(device)
        engine.backward(loss_of(engine, ids))
        engine.step()
        for scaled, (reference, adam) in enumerate(zip(references, adams, strict=True)):
            adam.zero_grad()
            loss_of(reference, ids).backward()
            for group in adam.param_groups:
                (of,) = layouts[group["name"]].groups
                group["lr"] = LR * (engine.mols.multipliers[of] if scaled else 1.0)
            adam.step()
    plain, scaled_reference = references
    return {
        "steps": engine.global_steps,
        "multipliers": engine.mols.multipliers,
        "scaled": largest_difference(engine.module, scaled_reference),
        "plain": largest_difference(engine.module, plain),
    }


def check(kind: str, rtol: float) -> None:
    """Run this file in a process of its own. The engine must be within `rtol` of its reference, far from one without
    multipliers: the comparison sees them."""
    done = run(sys.executable, "-m", "tests.gpu.apex_adam", kind, str(free_port()), cwd=ROOT)
    assert done.status == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == STEPS
    assert {group: value for group, value in found["multipliers"].items() if value != 1.0} == ALPHAS
    assert found["scaled"] <= rtol
    assert found["plain"] > 0.1


def main() -> None:
    kind = sys.argv[1]
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if kind == "apex" else "cpu")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=sys.argv[2])
    print(json.dumps(train(kind)), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
