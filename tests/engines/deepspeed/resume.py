"""What the checkpoint tests share: a tiny model with dropout, its loop, and hashes of all that a run goes on with."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mols_ds
from mols_ds.errors import MolsWarning

STAGES = (0, 1, 2, 3)
MICROS = 2
TOKENS, WIDTH, INNER = 31, 12, 19  # odd sizes: shards straddle tensors, and are padded
SUB_GROUP = 400  # elements: several sub-groups at stage 3
PERSISTENT_BELOW = 20
DECAY = 0.1
SAMPLES = 10  # one sample block is full (8), the next is open
START = 2
RAMP_END = {"probe": 5, "online": 15, "moments": 15}  # a probe window ends at the step at which it began
EVERY = 4

if "RANK" in os.environ:  # a rank of the harness, not pytest's own process
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]  # no plots from here: seconds for each engine


class Tiny(nn.Module):
    """Two layers with parameters of every module group, named as in LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict(_layer()) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross entropy of tokens (batch, length)."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            mixed = torch.tanh(layer["q_proj"](x)) * layer["k_proj"](x) + layer["v_proj"](x)
            x = x + self.dropout(layer["down_proj"](torch.tanh(layer["up_proj"](mixed))))
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def _layer() -> dict[str, nn.Module]:
    square = {name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ("q_proj", "k_proj", "v_proj")}
    up, down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
    return {**square, "up_proj": up, "down_proj": down}


def section(mode: str = "probe", **more: Any) -> dict[str, Any]:
    """A "mols" section whose phases are over within 30 iterations."""
    return {
        "mode": mode,
        "start": START,
        "samples": SAMPLES,
        "ramp_end": RAMP_END[mode],
        "noise_floor_correction": False,  # of so few samples of so small a model most groups would be clamped
        "estimator": "mean",
        "report_dir": "report",
        **more,
    }


def engine_of(
    stage: int,
    mols: Mapping[str, Any] | None,
    *,
    dtype: str = "fp32",
    initialize: Callable[..., Any] = mols_ds.initialize,
    zero: Mapping[str, Any] | None = None,
    universal: bool = False,
) -> Any:
    """A fresh engine: AdamW with two parameter groups of different rate and decay, a scheduler that warms up."""
    torch.manual_seed(1)
    model = Tiny()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROS,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "bf16": {"enabled": dtype != "fp32"},
    }
    if stage == 3:
        config["zero_optimization"] |= {"sub_group_size": SUB_GROUP}
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": PERSISTENT_BELOW}
    if dtype == "bf16 fp32 gradients":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    if mols is not None:
        config["mols"] = dict(mols)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "lr": 2e-2, "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 5e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 4, 1.0) * 0.98**t)
    return initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def iterate(engine: Any, iteration: int, *, broken: bool = False) -> None:
    """One pass of a user's loop. `broken`: the loss of rank 0 is NaN."""
    for micro in range(MICROS):
        generator = torch.Generator().manual_seed(10_000 * iteration + 100 * micro + dist.get_rank())
        tokens = (torch.rand(2, 9, generator=generator) ** 3 * TOKENS).long()
        loss = engine(tokens)
        engine.backward(loss * float("nan") if broken and dist.get_rank() == 0 else loss)
        engine.step()


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def masters(engine: Any) -> list[Tensor]:
    """The tensors that the inner optimizer steps on this rank."""
    outer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(outer, name):
            return list(getattr(outer, name))
    return [p for group in inner_optimizer(engine).param_groups for p in group["params"]]


def fingerprint(engine: Any) -> dict[str, Any]:
    """Hashes and values of everything that a bit-for-bit resumed run must have in common with this one."""
    mols, inner = engine.mols, inner_optimizer(engine)
    found: dict[str, Any] = {
        f"weight {name}": digest(getattr(p, "ds_tensor", p)) for name, p in engine.module.named_parameters()
    }
    for i, tensor in enumerate(masters(engine)):
        found[f"master {i}"] = digest(tensor)
        for key, value in inner.state.get(tensor, {}).items():
            found[f"state {i} {key}"] = digest(value) if isinstance(value, Tensor) else value
    for i, group in enumerate(inner.param_groups):
        found[f"options {i}"] = repr({k: v for k, v in group.items() if k != "params"})
    found["scheduler"] = repr((engine.lr_scheduler.last_epoch, engine.lr_scheduler.get_last_lr()))
    found["counters"] = (engine.global_steps, engine.global_samples, engine.skipped_steps)
    found["random"] = digest(torch.get_rng_state())
    found["phase"] = (mols.phase, mols.samples, mols.accumulator_bytes)
    found["alphas"], found["report"] = mols.alphas, json.dumps(mols.report())
    found["applied"] = (mols.multipliers, mols.applied_lrs)
    return found


def differing(one: Mapping[str, Any], other: Mapping[str, Any], *leave_out: str) -> list[str]:
    """The keys under which two fingerprints differ."""
    return sorted(k for k in {*one, *other} if k not in leave_out and one.get(k) != other.get(k))


def digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def full_weights(engine: Any) -> dict[str, str]:
    """Hashes of the whole parameters, on every rank."""
    result = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            result[name] = digest(p.data)
    return result


@contextmanager
def caught() -> Iterator[list[str]]:
    """The texts of the MolsWarnings that are raised inside."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in found if issubclass(w.category, MolsWarning)]


def until(engine: Any, iteration: int, reached: Callable[[Any], bool], limit: int = 40) -> int:
    """Iterate until `reached(engine.mols)`; returns the number of the next iteration."""
    while not reached(engine.mols):
        assert iteration < limit, engine.mols.phase
        iterate(engine, iteration)
        iteration += 1
    return iteration


def side_files(folder: str | Path) -> list[str]:
    """Our files of one tag, after every rank has got here."""
    dist.barrier()
    names = sorted(path.name for path in Path(folder).glob("*mols*"))
    dist.barrier()
    return names
