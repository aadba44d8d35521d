"""What the tests of LAMB, Adam-mini and SGG do on the ranks of an engine, and their single-process references."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from tests.engines.deepspeed.engines import CLIP, OFFLOAD, config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.state import full_weights, inner_optimizer, owned, snapshot
from tests.helpers.oracle.adam_mini import Settings, SlowAdamMini
from tests.helpers.oracle.adamw import CLIP_EPSILON, multipliers, ramp
from tests.helpers.oracle.models import GROUPS, build, groups_of, masks
from tests.helpers.oracle.sgg import SlowSGG
from tests.helpers.oracle.statistics import gradient_sample

STEPS, MICROS = 5, 1
ALPHAS = {"embedding": 3.0, "qk": 0.5, "mlp": 1.5, "head": 2.0}
RAMP = (0, 2)
# eps well above the float noise of gradients that are exactly 0, which a small one would turn into full steps
SETTINGS = {"lamb": Settings(2e-2, 4e-2, 0.1), "adam_mini": Settings(2e-3, 4e-3, 0.1)}
SETTINGS["sgg"] = SETTINGS["adam_mini"]
SGG = {"clusters": 3, "interval": 2, "beta3": 0.5}
ODD: dict[str, tuple[int, str, dict[str, Any]]] = {  # stage, precision, further keys of zero_optimization
    "stage 0 bf16": (0, "bf16", {}),
    "stage 1 bf16 fp32 gradients": (1, "bf16 fp32 grads", {}),
    "stage 2 bf16 offload": (2, "bf16", OFFLOAD),
    "stage 3 bf16 offload": (3, "bf16", OFFLOAD),
    "stage 1 round robin": (1, "fp32", {"round_robin_gradients": True}),
    "stage 3 fp16": (3, "fp16", {}),
}
REFUSED = {  # what -> a part of the message
    "universal": "Adam's two moments only",
    "elastic": "elastic_checkpoint",
    "unbound": "bind_optimizer",
    "nvme": "NVMe",
    "ratio": "ratio < 1",
    "pipeline": "pipeline",  # the last: it leaves DeepSpeed with a process grid
}


# ------------------------------------------------------------------------------------------------------- the references


def make(kind: str, model: nn.Module) -> Any:
    """The product's optimizer."""
    from mols_ds.optim.adam_mini import ShardedAdamMini
    from mols_ds.optim.lamb import ShardedLamb
    from mols_ds.optim.sgg import SGG as Sgg

    s = SETTINGS[kind]
    options: dict[str, Any] = {"betas": (s.beta1, s.beta2), "eps": s.eps}
    cls: Any = {"lamb": ShardedLamb, "adam_mini": ShardedAdamMini, "sgg": functools.partial(Sgg, **SGG)}[kind]
    return cls(groups_of(model, s.lr, s.vector_lr, s.decay), **options)


def slow(kind: str, model: nn.Module) -> Callable[[Mapping[str, Tensor]], Any]:
    """A step of the reference, given gradients by name: LAMB is pytorch_optimizer's."""
    s = SETTINGS[kind]
    if kind == "adam_mini":
        return SlowAdamMini(model, s).step
    if kind == "sgg":
        return SlowSGG(model, s, **SGG).step
    options: dict[str, Any] = {"betas": (s.beta1, s.beta2), "eps": s.eps}
    groups = groups_of(model, s.lr, s.vector_lr, s.decay)
    lamb = pytorch_optimizer.Lamb(groups, weight_decouple=False, adam_debias=True, **options)

    def step(gradients: Mapping[str, Tensor]) -> None:
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        lamb.step()

    return step


@functools.cache
def truth(kind: str, name: str, world: int, mols: bool) -> dict[str, Tensor]:
    """Weights after STEPS steps; with rates per element w_old + rate (w_new - w_old), clipped as the engine does."""
    model = build(name)
    step, mask = slow(kind, model), masks(name, model)
    for t in range(STEPS):
        gradients = gradient_sample(model, t, world, MICROS)
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        assert norm > CLIP
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        step({n: g * (CLIP / (norm + CLIP_EPSILON)) for n, g in gradients.items()})
        rates = multipliers(ALPHAS, ramp(t, *RAMP, "linear")) if mols else {}
        factors = torch.tensor([rates.get(group, 1.0) for group in GROUPS])
        for n, p in model.named_parameters():
            p.data.copy_(old[n] + factors[mask[n]] * (p.data - old[n]))
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------- on the ranks


def section(name: str) -> dict[str, Any]:
    alphas = {group: alpha for group, alpha in ALPHAS.items() if group != "head" or name != "gpt2"}
    return {"fixed_alphas": alphas, "start": RAMP[0], "ramp_end": RAMP[1], "ramp": "linear"}


def start(kind: str, ds_config: Mapping[str, Any], name: str = "gpt2") -> Any:
    model = build(name)
    return engine_of(ds_config, model, make(kind, model))


def train(kind: str, name: str, stage: int, mols: bool) -> dict[str, Any]:
    from tests.helpers.recorder import Recorder

    engine = start(kind, config(stage, section(name) if mols else None, micros=MICROS), name)
    sent: list[dict[tuple[str, int], int]] = []
    recorder = Recorder()
    inner = inner_optimizer(engine)
    inner.register_step_pre_hook(lambda *_: recorder.__enter__() and None)
    inner.register_step_post_hook(lambda *_: recorder.__exit__())
    for step in range(STEPS):
        recorder.torch.clear()
        iterate(engine, step, MICROS)
        sent.append(dict(recorder.torch))
    result = {"weights": full_weights(engine), "sent": sent, "owned": owned(engine)}
    engine.destroy()
    return result


def whole(engine: Any, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Whole parameters put together from what `of` gives for each inner tensor, float32, on every rank."""
    import torch.distributed as dist

    from mols_ds.engines.deepspeed.shards import Replicated, find_shards

    shards = find_shards(engine)
    result = {}
    for parameter, name in engine.param_names.items():
        result[name] = torch.zeros(tuple(getattr(parameter, "ds_shape", parameter.shape)))
    for tensor, pieces in zip(shards.tensors, shards.ranges, strict=True):
        values = of(tensor).detach().view(-1)
        for p in pieces:
            result[p.name].view(-1)[p.start : p.start + p.numel] = values[p.offset : p.offset + p.numel]
    for tensor in result.values() if not isinstance(shards, Replicated) else ():
        dist.all_reduce(tensor)
    return result


def replay(kind: str, odd: str) -> dict[str, Any]:
    """Masters before and after, and the whole gradients that the inner optimizer was given in each step."""
    stage, precision, zero = ODD[odd]
    engine = start(kind, config(stage, precision=precision, zero=zero, micros=MICROS))
    inner = inner_optimizer(engine)
    seen: dict[int, Tensor] = {}

    def remember(optimizer: Any, *_: Any) -> None:
        seen.update({id(p): p.grad.clone() for group in optimizer.param_groups for p in group["params"]})

    inner.register_step_pre_hook(remember)
    before, gradients = whole(engine, lambda tensor: tensor), []
    for step in range(STEPS):
        iterate(engine, step, MICROS)
        gradients.append(whole(engine, lambda tensor: seen[id(tensor)]))
    after = whole(engine, lambda tensor: tensor)
    result = {"kind": type(engine.optimizer).__name__, "before": before, "gradients": gradients, "after": after}
    engine.destroy()
    return result


def resume(kind: str, stage: int, folder: str) -> dict[str, list[Any]]:
    """Snapshots of two steps after a checkpoint: of the run that saved it, and of one that loaded it."""
    prints: dict[str, list[Any]] = {}
    place = str(Path(folder, f"{kind}{stage}"))
    for run in ("saved", "loaded"):
        engine = start(kind, config(stage, section("gpt2"), micros=MICROS))
        if run == "saved":
            for step in range(3):
                iterate(engine, step, MICROS)
            engine.save_checkpoint(place, tag="t")
        else:
            engine.load_checkpoint(place, tag="t")
        prints[run] = [snapshot(engine)]
        for step in (3, 4):
            iterate(engine, step, MICROS)
            prints[run].append(snapshot(engine))
        engine.destroy()
    return prints


def moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    state = inner_optimizer(engine).state
    return {key: whole(engine, lambda t, key=key: state[t][key]) for key in ("exp_avg", "exp_avg_sq")}


def save_universal(kind: str, stage: int, folder: str) -> dict[str, Any]:
    from tests.engines.deepspeed.moves import convert

    engine = start(kind, config(stage, micros=MICROS))
    for step in range(3):
        iterate(engine, step, MICROS)
    place = str(Path(folder, f"{kind}{stage}-universal"))
    engine.save_checkpoint(place, tag="t")
    convert(place, "t")
    result = {"weights": full_weights(engine), **moments(engine)}
    engine.destroy()
    return result


def load_universal(kind: str, stage: int, folder: str) -> dict[str, Any]:
    engine = start(kind, config(stage, micros=MICROS, checkpoint={"load_universal": True}))
    place = str(Path(folder, f"{kind}{stage}-universal"))
    engine.load_checkpoint(place, tag="t_universal")
    result: dict[str, Any] = {"weights": full_weights(engine), **moments(engine)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iterate(engine, 3, MICROS)
    result["warned"] = [str(w.message) for w in caught if "factors start at 1" in str(w.message)]
    result["next"] = full_weights(engine)
    result["steps"] = {int(values["step"]) for values in inner_optimizer(engine).state.values()}
    engine.destroy()
    return result


def refuse(what: str) -> str:
    """The message of the refusal."""
    import deepspeed

    from mols_ds.engines.deepspeed.bind_optimizer import bind_optimizer
    from mols_ds.errors import MolsUnsupportedError

    with pytest.raises(MolsUnsupportedError) as refusal:
        if what == "universal":
            start("adam_mini", config(1, checkpoint={"load_universal": True}))
        elif what == "elastic":
            settings = config(1)
            settings["zero_optimization"]["elastic_checkpoint"] = True
            start("lamb", settings)
        elif what == "pipeline":
            from tests.engines.deepspeed.pipeline import SEED, WIDTH, loss_fn

            layers = [deepspeed.pipe.LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(2)]
            pipe = deepspeed.pipe.PipelineModule(layers=layers, num_stages=2, loss_fn=loss_fn, base_seed=SEED)
            deepspeed_engine = deepspeed.initialize(model=pipe, optimizer=make("lamb", pipe), config=config(0))[0]
            bind_optimizer(deepspeed_engine)
        elif what == "unbound":
            model = build("gpt2")
            unbound = deepspeed.initialize(model=model, optimizer=make("sgg", model), config=config(1, micros=MICROS))
            iterate(unbound[0], 0, MICROS)
        else:
            engine = start("lamb", config(3))
            setattr(engine.optimizer, *{"nvme": ("swap_optimizer", True), "ratio": ("partial_offload", 0.5)}[what])
            bind_optimizer(engine)
    return str(refusal.value)


def work(what: str, *arguments: Any) -> Any:
    """One launch of ranks for all of them."""
    functions: dict[str, Callable[..., Any]] = {
        "train": train,
        "replay": replay,
        "resume": resume,
        "save universal": save_universal,
        "load universal": load_universal,
        "refuse": refuse,
    }
    return functions[what](*arguments)
