"""What benchmarks/scale.py measures, each in a process of its own: the code of a calibration on synthetic shards.

CPU seconds (`time.process_time`) are taken, not wall-clock time: more processes than cores share those. Counts do not
depend on the machine: operations and elements are what torch dispatches, calls are those of Python functions.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mols_ds.core.estimators import compute_alphas
from mols_ds.core.group_stats import GroupSums
from mols_ds.core.groups import GroupTable, build_layouts
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import Owned, OwnedElements
from mols_ds.core.lr_scaler import LRScaler, Piece, make_plan

BUFFER = 1 << 24  # gradient elements that exist at a time: more than the caches hold, however large the shard
RATES = {"embedding": 3.0, "head": 2.0, "qk": 1.3, "vo": 1.2, "mlp": 1.1}
LAYER = {
    "self_attn.q_proj.weight": 3,
    "self_attn.k_proj.weight": 1,
    "self_attn.v_proj.weight": 1,
    "self_attn.o_proj.weight": 3,
    "mlp.gate_proj.weight": 8,
    "mlp.up_proj.weight": 8,
    "mlp.down_proj.weight": 8,
    "input_layernorm.weight": 0,
    "post_attention_layernorm.weight": 0,
}
"""The parameters of one LLaMA layer and how the elements are shared among them; a norm has NORM elements."""
NORM = 16
FUSED = ElementLayout(1, ((768, "qk"), (256, "qk"), (256, "vo")))
"""A fused projection whose columns interleave two groups."""


class Counting(TorchDispatchMode):
    """Counts the operations that torch is asked for and the elements of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.elements += value.numel()
        return result


class Model:
    """Names, layouts and owned pieces of a decoder of about `elements` elements in `parameters` parameters.

    Args:
        low, high: the share of the concatenation of all parameters that this rank owns.
        fused: whether the attention's input projections are one interleaved parameter instead.
    """

    def __init__(self, elements: int, parameters: int, low: float = 0.0, high: float = 1.0, fused: bool = False):
        kinds = {"self_attn.q_proj.weight": 5, **dict(list(LAYER.items())[3:])} if fused else LAYER
        layers = max(1, (parameters - 1) // len(kinds))
        unit = max(1, elements // (layers * sum(kinds.values()) + layers))
        self.shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (unit * layers, 1)}
        for layer in range(layers):
            for name, share in kinds.items():
                shape = (share * unit, 1) if share else (NORM,)
                self.shapes[f"model.layers.{layer}.{name}"] = shape
        self.layouts = build_layouts(self.shapes, None, [(r"embed_tokens", "embedding")])
        if fused:
            self.layouts |= {name: FUSED for name in self.layouts if "q_proj" in name}
        self.table = GroupTable(self.layouts, self.shapes)
        self.groups = tuple(self.table.elements)
        self.total = sum(self.table.elements.values())
        self.first, last = int(self.total * low), int(self.total * high)
        self.pieces = list(self._pieces(self.first, last))
        self.numel = last - self.first

    def _pieces(self, low: int, high: int) -> Iterator[Owned]:
        at = 0
        for name, shape in self.shapes.items():
            numel = math.prod(shape)
            begin, end = max(low, at), min(high, at + numel)
            if begin < end:
                yield Owned(name, begin - at, begin - low, end - begin)
            at += numel

    def elements(self) -> OwnedElements:
        return OwnedElements(self.pieces, self.layouts, self.groups, torch.device("cpu"))


def gradient_source(seed: int = 0) -> Tensor:
    """What all gradients are cut from; its elements differ from sample to sample by where the cut begins."""
    return torch.randn(BUFFER, generator=torch.Generator().manual_seed(seed))


def cuts(source: Tensor, first: int, numel: int, sample: int) -> Iterator[tuple[int, Tensor]]:
    """(offset, gradient) of elements [first, first + numel) of the model in a sample, the same for any cut of it."""
    at = 0
    while at < numel:
        begin = (first + at + sample * 1_000_003) % BUFFER
        length = min(numel - at, BUFFER - begin)
        yield at, source[begin : begin + length]
        at += length


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process, all its threads."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def take_sample(elements: OwnedElements, source: Tensor, model: Model, sample: int, apart: bool = False) -> None:
    """One gradient sample; `apart`: a piece at a time, as engines with a tensor a parameter give it."""
    elements.open()
    if apart:
        for piece in elements.pieces:
            elements.add(piece.offset, source[piece.offset % (BUFFER // 2) :][: piece.numel], 1.0 + sample)
    else:
        for offset, gradient in cuts(source, model.first, model.numel, sample):
            elements.add(offset, gradient, 0.5)
    elements.close()


def alphas(sums: GroupSums) -> dict[str, float]:
    _, found = compute_alphas(
        sums, estimator="median", correction=False, reference="vo", alpha_min=None, alpha_max=None
    )
    return {group: alpha.alpha for group, alpha in found.items()}


def calibrate(model: Model, samples: int, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """A whole calibration of one rank: CPU seconds of its parts, memory, bytes of the all-reduce, alphas."""
    source = gradient_source()
    elements = model.elements()
    before = psutil.Process().memory_info().rss
    times = [seconds(partial(take_sample, elements, source, model, k)) for k in range(samples)]
    assert elements.moments is not None
    nbytes = elements.moments.nbytes
    held: list[GroupSums] = []
    end = seconds(lambda: held.append(elements.gradient_sums()))
    packed = held[0].pack()
    if reduce is not None:
        held[0].load_packed(reduce(packed))
    result = {
        "elements": model.numel,
        "pieces": len(model.pieces),
        "sample_s": statistics.median(times[1:]),
        "sums_s": end,
        "calibration_s": sum(times) + end,
        "accumulator_bytes": nbytes,
        "peak_growth_bytes": max(0, peak_bytes() - before),
        "message_bytes": packed.numel() * packed.element_size(),
        "alphas": alphas(held[0]),
        "counted": held[0].table[:, -1].sum().item(),
    }
    elements.free()
    return result


def count(model: Model, samples: int) -> dict[str, int]:
    """Operations and elements that torch is asked for in a whole calibration."""
    source = gradient_source()
    elements = model.elements()
    with Counting() as counting:
        for k in range(samples):
            take_sample(elements, source, model, k)
        elements.gradient_sums()
    return {"operations": counting.operations, "touched": counting.elements}


def python_calls(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, `work` calls."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


# ---------------------------------------------------------------------- jobs, one a process


def warm_up(samples: int) -> None:
    """A small calibration: what torch does once a process, a tenth of a second, is not a cost of the elements."""
    calibrate(Model(100_000, 74, fused=True), samples)


def size_job(elements: int, samples: int, counted: bool) -> dict[str, Any]:
    """A calibration of `elements` owned elements in about 74 parameters."""
    torch.set_num_threads(1)
    warm_up(samples)
    model = Model(elements, 74, fused=True)
    operations = count(model, samples) if counted else {}
    return calibrate(model, samples) | operations


def rank_job(rank: int, world: int, total: int, samples: int, store: str) -> dict[str, Any]:
    """One of `world` gloo ranks that share a model of `total` elements."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    warm_up(samples)
    model = Model(total, 74, rank / world, (rank + 1) / world, fused=True)
    calls: list[int] = []

    def reduce(values: Tensor) -> Tensor:
        calls.append(values.numel() * 8)
        dist.all_reduce(values)
        return values

    result = calibrate(model, samples, reduce)
    dist.barrier()
    dist.destroy_process_group()
    return result | {"all_reduces": len(calls), "total": model.total}


def parameter_job(elements: int, parameters: int, samples: int, steps: int) -> dict[str, Any]:
    """The same elements in so many parameters: attaching, samples, sums, and the step afterwards."""
    torch.set_num_threads(1)
    gc.disable()
    source = gradient_source()
    held: list[Model] = []
    result: dict[str, Any] = {}
    result["build_s"] = seconds(lambda: held.append(Model(elements, parameters)))
    model = held[0]
    result["build_calls"] = python_calls(lambda: Model(elements, parameters))
    pieces = [Piece(p.name, p.start, p.offset, p.numel) for p in model.pieces]
    result["plan_s"] = seconds(lambda: make_plan(model.numel, pieces, model.layouts))
    result["plan_calls"] = python_calls(lambda: make_plan(model.numel, pieces, model.layouts))
    plan = make_plan(model.numel, pieces, model.layouts)
    for key, apart in (("flat", False), ("apart", True)):
        owned = model.elements()
        times = [seconds(partial(take_sample, owned, source, model, k, apart)) for k in range(samples)]
        result[f"{key}_sample_s"] = statistics.median(times[1:])
        result[f"{key}_sample_calls"] = python_calls(partial(take_sample, owned, source, model, samples, apart))
    result["sums_s"] = seconds(owned.gradient_sums)
    result["sums_calls"] = python_calls(owned.gradient_sums)
    result |= {"parameters": len(model.shapes), "runs": len(plan.runs), "segments": len(owned.segments())}
    owned.free()
    flat = torch.nn.Parameter(torch.zeros(model.numel))
    flat.grad = source.repeat(-(-model.numel // BUFFER))[: model.numel]
    result |= _steps("flat", [flat], {id(flat): plan}, steps)
    apart_tensors = [torch.nn.Parameter(torch.zeros(piece.numel)) for piece in pieces]
    plans = {}
    for tensor, piece in zip(apart_tensors, pieces, strict=True):
        tensor.grad = flat.grad[piece.offset : piece.offset + piece.numel]
        plans[id(tensor)] = make_plan(piece.numel, [piece._replace(offset=0)], model.layouts)
    return result | _steps("apart", apart_tensors, plans, steps)


def _steps(key: str, tensors: list[Any], plans: dict[int, Any], steps: int) -> dict[str, Any]:
    """CPU seconds of torch's AdamW: stock, with the multipliers, and of the two hooks alone; their calls."""
    optimizer = torch.optim.AdamW(tensors, lr=1e-3)
    for _ in range(2):
        optimizer.step()
    stock = min(seconds(optimizer.step) for _ in range(steps))
    scaler = LRScaler(optimizer, plans, lambda: RATES, elementwise=True)

    def hooks() -> None:
        scaler._before(optimizer, (), {})
        scaler._after(optimizer, (), {})

    scaled = min(seconds(optimizer.step) for _ in range(steps))
    alone = min(seconds(hooks) for _ in range(steps))
    calls = python_calls(hooks)
    scaler.remove()
    return {
        f"{key}_stock_step_s": stock,
        f"{key}_scaled_step_s": scaled,
        f"{key}_hooks_s": alone,
        f"{key}_hooks_calls": calls,
    }
