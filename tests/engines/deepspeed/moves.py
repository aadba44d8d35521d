"""Universal checkpoints on the move: what the ranks of `test_checkpoint_moves` do, and the oracle in plain torch.

The global batch is the same on any number of ranks, so that a run may be compared with itself on others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import mols_ds
from mols_ds.engines.deepspeed.shards import find_shards
from mols_ds.errors import MolsError
from tests.engines.deepspeed.engines import CLIP, MICROS, OFFLOAD, OFFLOAD_ALL, config, engine_of
from tests.engines.deepspeed.models import TOKENS, Tiny
from tests.engines.deepspeed.resume import DECAY, RATES, SAMPLES, SIZES, START, rate, section
from tests.helpers.digests import caught
from tests.helpers.oracle.models import groups_of

SEQUENCES = 12  # of a micro-batch over all ranks; dealt evenly over 1, 2, 3 and 4
HALF, FOLLOWED, RAMP_END = 3, 3, 8
TAGS = {"waiting": 0, "half": HALF, "ramping": SAMPLES, "fixed": SAMPLES}  # tag -> samples
STATES = ("fp32", "exp_avg", "exp_avg_sq")
GROUPS = {"embed_tokens": "embedding", "q_proj": "qk", "k_proj": "qk", "v_proj": "vo", "lm_head": "head"}
GROUPS |= {"up_proj": "mlp", "down_proj": "mlp", "norm": "other"}


class Run(NamedTuple):
    """An engine. `way`: by `mols_ds.initialize`, `mols_ds.attach`, or "stock" without MoLS."""

    stage: int
    dtype: str = "fp32"
    offload: str = ""  # "optimizer", "all"
    granularity: str = "type"
    way: str = "initialize"
    mode: str = "probe"

    @property
    def folder(self) -> str:
        return "-".join(str(part) for part in self).replace(" ", "-")


class WithGain(Tiny):
    """A third parameter group of one element, which only one rank can hold; a frozen weight and a buffer."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.embed_tokens.weight.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.gain


def run_engine(run: Run, *, universal: bool = False, model: type[Tiny] = Tiny, **zero: Any) -> Any:
    """An engine for `run`, without dropout; `zero`: further keys of "zero_optimization"."""
    torch.manual_seed(1)
    module = model(0.0)
    ramp_end = RAMP_END if run.mode == "probe" else RAMP_END + SAMPLES
    mols = section(run.mode, ramp_end=ramp_end, granularity=run.granularity)
    zero |= {"": {}, "optimizer": OFFLOAD, "all": OFFLOAD_ALL}[run.offload] | (SIZES if run.stage == 3 else {})
    settings = config(
        run.stage,
        mols if run.way == "initialize" else None,
        precision=run.dtype,
        zero=zero,
        train_micro_batch_size_per_gpu=SEQUENCES // dist.get_world_size(),
        checkpoint={"load_universal": universal},
    )
    # A gain has a group of its own.
    groups = groups_of(module, *RATES, DECAY)
    gains = [p for p in groups[1]["params"] if p.numel() == 1]  # type: ignore[attr-defined]
    groups[1]["params"] = [p for p in groups[1]["params"] if p.numel() > 1]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(groups + [{**groups[1], "params": gains}] * bool(gains))
    initialize = None if run.way == "initialize" else deepspeed.initialize
    engine = engine_of(settings, module, optimizer, initialize=initialize, schedule=rate)
    if run.way == "attach":
        mols_ds.attach(engine, mols)
    return engine


def whole_batch(iteration: int, micro: int) -> Tensor:
    """The whole micro-batch: int64 (SEQUENCES, 9)."""
    generator = torch.Generator().manual_seed(10_000 * iteration + 100 * micro)
    return (torch.rand(SEQUENCES, 9, generator=generator) ** 3 * TOKENS).long()


def iterate_whole(engine: Any, iteration: int) -> None:
    """One pass of a user's loop over a global batch that is the same on any number of ranks."""
    for micro in range(MICROS):
        engine.backward(engine(whole_batch(iteration, micro).chunk(dist.get_world_size())[dist.get_rank()]))
        engine.step()


def state_of(engine: Any) -> dict[str, Any]:
    """Every weight and moment, whole, the parameter groups' options and the optimizer's step counters. Collective."""
    shards = find_shards(engine)
    mine: list[tuple[str, str, int, Tensor]] = []
    for tensor, pieces in zip(shards.tensors, shards.ranges, strict=True):
        held = {"fp32": tensor, **shards.inner.state.get(tensor, {})}
        for piece in pieces:
            for key in STATES:
                if key in held:
                    values = held[key].detach().view(-1)[piece.offset : piece.offset + piece.numel].clone()
                    mine.append((piece.name, key, piece.start, values))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, key, start, values in (piece for pieces in everyone for piece in pieces):
        found.setdefault((name, key), {})[start] = values
    counters = [values["step"] for values in shards.inner.state.values() if "step" in values]
    return {
        "tensors": {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()},
        "options": [{k: v for k, v in group.items() if k != "params"} for group in shards.inner.param_groups],
        "counters": {int(counter) for counter in counters},
        "apart": len({id(c) for c in counters}) == len(counters) or all(isinstance(c, int) for c in counters),
        "step": engine.global_steps,
    }


def follow(engine: Any, iteration: int) -> dict[str, Any]:
    """The next FOLLOWED iterations: (multipliers, applied rates, phase) of each step, and the state after them."""
    trace = {}
    for later in range(iteration, iteration + FOLLOWED):
        iterate_whole(engine, later)
        trace[engine.global_steps] = (engine.mols.multipliers, engine.mols.applied_lrs, engine.mols.phase)
    return {"trace": trace, "after": state_of(engine)["tensors"]}


def to_alphas(engine: Any, iteration: int) -> dict[str, Any]:
    """On to the end of the calibration."""
    while not engine.mols.alphas:
        assert iteration < 40, engine.mols.phase
        iterate_whole(engine, iteration)
        iteration += 1
    return {"alphas": engine.mols.alphas, "samples": engine.mols.samples, "held": engine.mols.accumulator_bytes}


def convert(folder: str, tag: str) -> None:
    """DeepSpeed's converter, as its command line calls it; on rank 0."""
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        arguments = {
            "input_folder": str(Path(folder, tag)),
            "output_folder": str(Path(folder, f"{tag}_universal")),
            "num_extract_workers": 1,
            "num_merge_workers": 1,
            "keep_temp_folder": False,
            "strict": True,
            "inject_missing_state": True,
        }
        ds_to_universal.main(argparse.Namespace(**arguments))
    dist.barrier()


# ------------------------------------------------------------------------------------------------------- the oracle


def oracle(tensors: dict[tuple[str, str], Tensor], alphas: dict[str, float], step: int, iteration: int) -> Any:
    """FOLLOWED steps of torch's AdamW in one process from a gathered state; name -> flat weight.

    Each parameter has its own group, at the base rate times 1 + (alpha - 1) f(t); f goes from 0 at the step of the
    calibration to 1 at RAMP_END.
    """
    model = Tiny(0.0)
    groups = []
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name, "fp32"].view_as(parameter))
        groups.append({"params": [parameter], "weight_decay": DECAY if parameter.ndim >= 2 else 0.0})
    optimizer = torch.optim.AdamW(groups)
    for name, parameter in model.named_parameters():
        moments = {key: tensors[name, key].clone().view_as(parameter) for key in STATES[1:]}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    for t in range(step, step + FOLLOWED):
        optimizer.zero_grad()
        for micro in range(MICROS):
            (model(whole_batch(iteration + t - step, micro)) / MICROS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        ramp = min(1.0, (t - START) / (RAMP_END - START))
        for (name, parameter), group in zip(model.named_parameters(), optimizer.param_groups, strict=True):
            factor = 1.0 + (alphas.get(key_of(name, alphas), 1.0) - 1.0) * ramp
            group["lr"] = RATES[parameter.ndim < 2] * rate(t) * factor
        optimizer.step()
    return {name: parameter.detach().flatten().clone() for name, parameter in model.named_parameters()}


def key_of(name: str, alphas: dict[str, float]) -> str:
    """The key of a parameter's alpha: its group, with the layer's number where alphas are by layer."""
    parts = name.split(".")
    group = GROUPS[parts[-2]]
    return f"{group}.{parts[1]}" if parts[0] == "layers" and f"{group}.{parts[1]}" in alphas else group


# ---------------------------------------------------------------------------------------------------- save and load


def save(base: str, run: Run, tags: tuple[str, ...]) -> dict[str, Any]:
    """On each rank of the saving run: tag -> state, and what the uninterrupted run and the oracle do next."""
    folder, found = str(Path(base, run.folder)), {}
    engine = run_engine(run)
    iteration = 0
    for tag in tags:
        while not _reached(engine, tag):
            iterate_whole(engine, iteration)
            iteration += 1
        engine.save_checkpoint(folder, tag=tag, client_state={"iteration": iteration})
        if run.stage > 0:
            convert(folder, tag)
        found[tag] = state_of(engine)
        if run.way == "stock":
            continue
        found[tag]["alphas"] = alphas = dict(engine.mols.alphas)
        if alphas:
            if run.dtype == "fp32" and dist.get_rank() == 0:
                found[tag]["oracle"] = oracle(found[tag]["tensors"], alphas, engine.global_steps, iteration)
            found[tag]["next"] = follow(engine, iteration)
            iteration += FOLLOWED
    engine.destroy()
    return found if dist.get_rank() == 0 else {}


def _reached(engine: Any, tag: str) -> bool:
    if not hasattr(engine, "mols"):
        return bool(engine.global_steps == START + 1)
    mols, phase = engine.mols, {"half": "calibrating"}.get(tag, tag)
    ahead = {"waiting": 1, "ramping": START + 1}.get(tag, 0)
    return bool(mols.phase == phase and mols.samples == TAGS[tag] and engine.global_steps >= ahead)


def load(base: str, source: Run, target: Run, tags: tuple[str, ...]) -> dict[str, Any]:
    """On each rank of a resumed run: tag -> state, warnings and later steps."""
    folder, found = str(Path(base, source.folder)), {}
    for tag in tags:
        engine = run_engine(target, universal=source.stage > 0)
        with caught() as warned:
            path, client_state = engine.load_checkpoint(folder, tag=f"{tag}_universal" if source.stage else tag)
        assert path is not None and (target.way == "stock") == ("mols" in client_state and source.way != "stock")
        found[tag] = state_of(engine) | {"warned": warned}
        iteration = client_state["iteration"]
        if target.way == "stock":
            iterate_whole(engine, iteration)
        else:
            found[tag] |= {"alphas": engine.mols.alphas, "now": (engine.mols.phase, engine.mols.samples)}
            more = follow if engine.mols.alphas else to_alphas
            found[tag]["next"] = more(engine, iteration)
        engine.destroy()
    return found


# ----------------------------------------------------------------------------------------------------- what is refused


def refusal(base: str, run: Run, folder: str, tag: str, universal: bool, how: str) -> str:
    """Message of a load: a MolsError's text, or the warnings. `how`: "", "gain", "robin", "nvme", "weights"."""
    robin = {"round_robin_gradients": True} if how == "robin" else {}
    engine = run_engine(run, universal=universal, model=WithGain if how == "gain" else Tiny, **robin)
    if how == "nvme":
        engine.zero_nvme_offload_optimizer = lambda: True
    with caught() as warned:
        try:
            engine.load_checkpoint(str(Path(base, folder)), tag=tag, load_module_only=how == "weights")
        except MolsError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            engine.destroy()
    return "; ".join(warned)


def save_odd(base: str, run: Run, how: str) -> None:
    """A checkpoint, and a universal one of it, of a run with something odd about it."""
    robin = {"round_robin_gradients": True} if how == "robin" else {}
    engine = run_engine(run, model=WithGain if how == "gain" else Tiny, **robin)
    iterate_whole(engine, 0)
    folder = str(Path(base, how))
    engine.save_checkpoint(folder, tag="odd", client_state={"iteration": 1})
    convert(folder, "odd")
    engine.destroy()


def work(kind: str, *arguments: Any) -> Any:
    """One case of a launch."""
    return {"save": save, "load": load, "refusal": refusal, "save_odd": save_odd}[kind](*arguments)
