"""Measure the memory and messages of a rank of a Megatron grid, for tests/apps/test_plan_measured.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from tests.engines.megatron.building import SEQUENCES, Setup, transformer_config

WORLD, MICROS = 4, 4
COMMON: dict[str, Any] = dict(
    dtype="bfloat16", hidden=96, layers=4, heads=4, kv_groups=2, vocab=1024, seq=64, micro_batches=MICROS
)
GRIDS: dict[str, Setup] = {
    "tp2 pp2 sp": Setup(**COMMON, tp=2, pp=2, sp=True),
    "tp2 dp2": Setup(**COMMON, tp=2),
    "pp2 dp2 recomputed": Setup(**COMMON, pp=2, recompute="full"),
    "tp2 dp2 sp attention recomputed": Setup(**COMMON, tp=2, sp=True, recompute="core_attn"),
    "tp2 ep2 dp2 sp experts": Setup(**COMMON, tp=2, ep=2, sp=True, experts=4, etp=1),
    "pp2 dp2 plain fp32": Setup(**(COMMON | {"dtype": "float32"}), pp=2, distributed=False),
}
BUCKET = 4000
"""Elements of a gradient bucket in `tests.engines.megatron.building`."""


class Saved:
    """Most bytes of saved tensors alive at a time, parameters left out."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.peak = own, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {address: item for address, item in self.alive.items() if not item[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return tensor


def _bytes(tensors: Any) -> int:
    return sum(dict(_storages(tensors)).values())


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _storages(item)


def measure(name: str) -> dict[str, Any]:
    """On each rank: bytes by kind, payload of a step's messages, and the parameters in order."""
    from megatron.core import parallel_state

    from megatron_patches.cpu.emulation import cpu_megatron
    from tests.engines.megatron import building
    from tests.helpers.recorder import Recorder

    setup = GRIDS[name]
    with cpu_megatron():
        building.start(setup)
        built = building.build(setup)
        chain, scheduler = building.optimizer(built)
        section = {"mode": "online", "start": 1, "samples": 8, "ramp_end": 20, "estimator": "damping"}
        mols = building.attach(built, chain, scheduler, section)
        for iteration in range(2):
            building.step(built, chain, scheduler, iteration)
        parameters = [p for chunk in built.chunks for p in chunk.parameters()]
        inner = [o.optimizer for o in chain.chained_optimizers]
        saved = Saved(set(dict(_storages([p.data for p in parameters]))))
        with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            building.step(built, chain, scheduler, 2)
        weights = dict(_storages([p.data for p in parameters]))
        state = dict(_storages([[g["params"] for o in inner for g in o.param_groups], [dict(o.state) for o in inner]]))
        gradients = _bytes([p.main_grad for p in parameters])
        return {
            "held": {
                "weights": sum(weights.values()),
                "gradients": gradients,
                "optimizer": sum(size for address, size in state.items() if address not in weights),
                "accumulators": _bytes(list(vars(mols.controller.elements.accumulators).values())),
                "activations": saved.peak,
            },
            "sent": _payload(recorder.torch, setup, {2 * sum(weights.values()), 2 * gradients}),
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "names": [(_plain(n), tuple(p.shape)) for chunk in built.chunks for n, p in chunk.named_parameters()],
            "rank": dist.get_rank(),
        }


def _plain(name: str) -> str:
    return name.replace("module.", "")


def _payload(recorded: Counter[tuple[str, int]], setup: Setup, alone: set[int]) -> dict[str, int]:
    """Operation -> bytes of whole tensors; messages of a few bytes (norms, flags) are left out."""
    result: Counter[str] = Counter()
    ranks = setup.tp if setup.tp > 1 and setup.sp else WORLD // (setup.tp * setup.pp)
    for (name, size), count in recorded.items():
        plain = name.replace("_", "")
        if setup.tp * setup.pp == WORLD and size in alone:  # "data-parallel" groups of one rank
            continue
        if "gather" in plain or "reducescatter" in plain:
            kind = "all-gather" if "gather" in plain else "reduce-scatter"
            result[kind] += count * size * ranks // (ranks + 1)
        elif plain.startswith("allreduce") and size > 64:
            result["all-reduce"] += count * size
        elif plain.startswith("alltoall") and size > 1024:  # input and output; below that, counts of tokens
            result["all-to-all"] += count * size // 2
        elif plain in ("send", "recv"):
            result["send and receive"] += count * size if plain == "send" else 0
    return dict(result)


def planned(name: str, stage: int) -> dict[str, Any]:
    """Plan of a rank of a stage."""
    from megatron_patches.cpu.emulation import cpu_megatron
    from mols_ds.apps.plan import grid
    from mols_ds.apps.plan.calibration import accumulators
    from mols_ds.apps.plan.gpt import Gpt, Local

    setup = GRIDS[name]
    with cpu_megatron():
        local = Local(transformer_config(setup))
    size = 4 if setup.dtype == "float32" else 2
    gpt = Gpt(
        layers=setup.n_layers, hidden=setup.hidden, heads=setup.heads, kv=setup.kv_groups,
        channels=setup.hidden // setup.heads, ffn=2 * setup.hidden, vocab=setup.vocab, gated=True, bias=False,
        norm_bias=False, tied=False, positions=0, qk_norm=False, experts=setup.experts, topk=2 if setup.experts else 1,
        shared_ffn=0, tp=setup.tp, pp=setup.pp, vp=1, ep=setup.ep, etp=setup.etp or setup.tp, cp=1, sp=setup.sp,
        recompute=_granularity(setup), flash=False, local=local,
    )  # fmt: skip
    data = WORLD // (setup.tp * setup.pp)
    plan = grid.MegatronPlan(
        gpt=gpt, ranks=WORLD, weight_bytes=size, gradient_bytes=4, distributed=setup.distributed, overlap=False,
        optimizer="adam", settings={}, micro_batch=SEQUENCES, micro_batches=MICROS // data, length=setup.seq,
        gathers=2 if setup.experts else 1,
    )  # fmt: skip
    footprint = grid.footprint(plan, stage)
    sent: Counter[str] = Counter()
    for message in grid.messages(plan, stage, WORLD):
        sent[message.operation] += message.bytes
    held = dict(footprint.resident) | {"activations": footprint.moments["backward"]["activations"]}
    own = accumulators(footprint.measured, "cpu")
    held["accumulators"] = own.kept + own.scratch  # tests/apps/test_plan.py has the kept samples
    return {"held": held, "sent": dict(sent), "names": [(w.name, w.shape) for w in gpt.weights(stage)]}


def _granularity(setup: Setup) -> str:
    return "selective" if setup.recompute not in ("", "full") else setup.recompute
