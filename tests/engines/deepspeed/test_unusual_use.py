"""Legal use that is not in every loop: copies of the module, detach twice, other betas, sparse embeddings."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

import mols_ds
from mols_ds.engines.deepspeed import loads
from mols_ds.errors import MolsError, MolsUnsupportedError, MolsWarning
from tests.engines.deepspeed.engines import config, engine_of
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import PlainLM
from tests.helpers.harness import run_ranks
from tests.helpers.oracle.models import batch

SECTION = {"start": 1, "ramp_end": 9, "samples": 4, "total_steps": 20}


def copies(stage: int) -> tuple[int, bool]:
    """A copy of the module runs, and its passes are no passes of the engine's."""
    torch.manual_seed(0)
    engine = engine_of(config(stage, SECTION, micros=1), PlainLM())
    for iteration in range(2):
        iterate(engine, iteration, 1)
    twin = copy.deepcopy(engine.module)
    twin.train()
    twin(batch(0, 0, 0), batch(0, 0, 0))
    samples, phase = engine.mols.samples, engine.mols.phase
    engine.destroy()
    return samples, phase == "calibrating"


@pytest.mark.parametrize("stage", [0, 2])
def test_the_module_can_be_copied(stage: int) -> None:
    assert run_ranks(copies, 1, stage) == [(1, True)]


def detached_twice() -> bool:
    engine = engine_of(config(1, SECTION), PlainLM())
    mols = engine.mols
    mols.detach()
    mols.detach()
    iterate(engine, 0)
    return hasattr(engine, "mols")


def test_detach_twice_is_once() -> None:
    assert run_ranks(detached_twice, 1) == [False]


def refused(mode: str, optimizer: Any, sparse: bool) -> str:
    model = PlainLM()
    if sparse:
        model.embed_tokens = nn.Embedding(97, model.embed_tokens.embedding_dim, sparse=True)
    with pytest.raises(MolsUnsupportedError) as error:
        engine_of(config(0, {**SECTION, "mode": mode}), model, optimizer)
    return str(error.value)


def two_betas(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first], "betas": (0.5, 0.9)}, {"params": others}])


def test_mode_moments_with_other_betas_in_a_group() -> None:
    (said,) = run_ranks(refused, 1, "moments", two_betas, False)
    assert 'mode "moments" with different betas in the parameter groups' in said


class Coupled(torch.optim.Optimizer):
    """A foreign Adam without bias correction that adds weight decay to the gradient."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.95), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                gradient, state = p.grad + group["weight_decay"] * p, self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(gradient, 1 - group["betas"][0])
                square = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(gradient**2, 1 - group["betas"][1])
                p.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))


DECAYS = {
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "Adam, 0": (torch.optim.Adam, {"weight_decay": 0.0}),
    "Adam, decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1}),
    "own": (Coupled, {"weight_decay": 0.1}),
    "own, 0": (Coupled, {"weight_decay": 0.0}),
}


def decayed() -> dict[str, str]:
    """Message of attach for each optimizer in mode "moments"."""
    said = {}
    for name, (kind, settings) in DECAYS.items():
        try:
            engine_of(config(0, {**SECTION, "mode": "moments"}), PlainLM(), lambda p, k=kind, s=settings: k(p, **s))
            said[name] = ""
        except MolsUnsupportedError as error:
            said[name] = str(error)
    return said


def test_mode_moments_with_decay_that_is_added_to_the_gradient() -> None:
    (said,) = run_ranks(decayed, 1)
    for name, line in said.items():
        refused_ = 'mode "moments" with the weight_decay of' in line
        assert refused_ if name in ("Adam", "NAdam", "own") else line == "", (name, line)


def cycled(ranks: tuple[int, ...]) -> str:
    """Message of a calibration in mode "moments" for betas that move on `ranks`, elsewhere long before."""
    engine = engine_of(config(1, {**SECTION, "mode": "moments", "start": 2}, micros=1), PlainLM(), two_rates)
    inner = engine.optimizer.optimizer
    try:
        for iteration in range(8):
            if iteration == 0 or torch.distributed.get_rank() in ranks:
                for group in inner.param_groups:
                    group["betas"] = (0.5 + 0.05 * iteration, 0.6)
            iterate(engine, iteration, 1)
    except MolsUnsupportedError as error:
        return str(error)
    return str(engine.mols.phase)


def two_rates(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 1e-4}])


def test_mode_moments_with_betas_that_move() -> None:
    assert run_ranks(cycled, 2, ()) == ["ramping"] * 2
    for said in (*run_ranks(cycled, 2, (0, 1)), *run_ranks(cycled, 2, (1,))):
        assert 'mode "moments" with betas that change' in said


def test_sparse_embeddings() -> None:
    (said,) = run_ranks(refused, 1, "probe", None, True)
    assert "sparse gradients (an embedding with sparse=True)" in said


def compiled() -> str:
    with pytest.raises(MolsUnsupportedError) as error:
        engine_of({**config(1, SECTION), "compile": {"deepcompile": True}}, PlainLM())
    return str(error.value)


def test_deepcompile_is_refused_by_name() -> None:
    (said,) = run_ranks(compiled, 1)
    assert said.startswith("MoLS does not support DeepCompile")


def hooked(stage: int) -> list[float]:
    """Rates after each step, where a step pre-hook that was registered after attach halves them."""
    fixed = {"fixed_alphas": {"embedding": 3.0}, "start": 0, "ramp_end": 0}
    engine = engine_of(config(stage, fixed, micros=1), PlainLM(), lambda p: torch.optim.SGD(p, lr=0.5))
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)

    def halve(optimizer: torch.optim.Optimizer, *_: object) -> None:
        optimizer.param_groups[0]["lr"] /= 2

    inner.register_step_pre_hook(halve)
    seen = []
    for iteration in range(3):
        iterate(engine, iteration, 1)
        seen.append(inner.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("stage", [0, 2])
def test_step_hooks_of_the_user_see_their_own_groups(stage: int) -> None:
    assert run_ranks(hooked, 1, stage) == [[0.25, 0.125, 0.0625]]


def wrapped(before: bool) -> list[str]:
    """Saves that a wrapper of the user's has seen: one with MoLS, one after detach."""
    engine = engine_of(config(1, None), PlainLM(), initialize=deepspeed.initialize)
    seen: list[str] = []

    def wrap() -> None:
        inner = engine.save_checkpoint

        def save(*args: Any, **kwargs: Any) -> Any:
            seen.append(args[1] if len(args) > 1 else kwargs["tag"])
            return inner(*args, **kwargs)

        engine.save_checkpoint = save

    if before:
        wrap()
    mols = mols_ds.attach(engine, SECTION)
    if not before:
        wrap()
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag="attached")
        held = (Path(folder) / "attached" / "mp_rank_00_model_states.pt").stat().st_size
        mols.detach()
        engine.save_checkpoint(folder, tag="detached")
        assert (
            Path(folder) / "detached" / "mp_rank_00_model_states.pt"
        ).stat().st_size < held  # stock: no state of ours
    return seen


@pytest.mark.parametrize("before", [True, False])
def test_wrappers_of_others_stay(before: bool) -> None:
    assert run_ranks(wrapped, 1, before) == [["attached", "detached"]]


LOADS = ("plain", "own argument", "subclass", "class")


def loaded(how: str, enabled: bool) -> tuple[list[Any], int]:
    """What loads give through somebody's replacement of `load_checkpoint`, and how often that was called."""
    kind, calls = deepspeed.DeepSpeedEngine, []
    stock = kind.load_checkpoint

    @functools.wraps(stock)
    def own(self: Any, *args: Any, note: str = "", **kwargs: Any) -> Any:
        calls.append(note)
        return stock(self, *args, **kwargs)

    def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if how == "subclass":
            patch.setattr(deepspeed, "DeepSpeedEngine", type("Mine", (kind,), {"load_checkpoint": plain}))
        elif how == "class":
            patch.setattr(kind, "load_checkpoint", own)
        engine = engine_of(config(1, None), PlainLM(), initialize=deepspeed.initialize)
        if how in ("plain", "own argument"):
            engine.load_checkpoint = functools.partial(plain if how == "plain" else own, engine)
        mols = mols_ds.attach(engine, {**SECTION, "start": 9, "enabled": enabled})
        more = {"note": "a"} if how in ("own argument", "class") else {}
        found = []
        with tempfile.TemporaryDirectory() as folder:
            iterate(engine, 0)
            engine.save_checkpoint(folder, tag="a", client_state={"mine": 7})
            iterate(engine, 1)
            for options in ({"load_module_only": True}, {"load_optimizer_states": False}, {}):
                path, state = engine.load_checkpoint(folder, "a", **options, **more)
                found.append((path is not None, state["mine"], "mols" in state, engine.global_steps))
        mols.detach()
    return found, len(calls)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("enabled", [True, False])
def test_loads_through_a_replacement_of_others(how: str, enabled: bool) -> None:
    (((weights, without, all_), calls),) = run_ranks(loaded, 1, how, enabled)
    assert weights == (True, 7, False, 2)
    assert without == all_ == (True, 7, False, 1)
    assert calls == 3


def test_what_a_replacement_of_others_returns_is_passed_on() -> None:
    """For engines that have no MoLS: their `load_checkpoint` is watched on the class."""
    (found,) = run_ranks(other_result, 1)
    assert found == [None, "only a path"]


def other_result() -> list[Any]:
    kind = deepspeed.DeepSpeedEngine
    found = []
    for result in (None, "only a path"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "load_checkpoint", lambda self, *args, _result=result, **kwargs: _result)
            loads.watch_loads()
            found.append(kind.load_checkpoint(engine_of(config(0, None), PlainLM(), initialize=deepspeed.initialize)))
    return found


def elsewhere(mode: str, device: str) -> tuple[dict[str, float], str, int]:
    """Alphas, phase and samples of a run whose calls into MoLS are made with a default device, after it is resumed."""
    torch.manual_seed(0)
    engine = engine_of(
        config(0, None, micros=1), PlainLM(), lambda p: torch.optim.SGD(p, lr=0.1), initialize=deepspeed.initialize
    )
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            mols = mols_ds.attach(engine, {**SECTION, "mode": mode, "samples": "auto", "max_samples": 16})
        for iteration in range(20):
            loss = engine(batch(iteration, 0, 0), batch(iteration, 0, 0)).loss
            engine.backward(loss)
            with torch.device(device):
                engine.step()
                if iteration == 4:
                    engine.save_checkpoint(folder, tag="a")
        alphas = mols.alphas
        with torch.device(device):
            engine.load_checkpoint(folder, "a")
    return alphas, mols.phase, mols.samples


@pytest.mark.parametrize("mode", ["probe", "online"])
def test_a_default_device_of_the_users(mode: str) -> None:
    """What MoLS adds up on the host stays there: the device "meta" keeps no numbers at all."""
    (ours,), (stock,) = run_ranks(elsewhere, 1, mode, "meta"), run_ranks(elsewhere, 1, mode, "cpu")
    assert ours == stock and ours[0] and ours[1:] == ("calibrating", 4)


def other_sections() -> list[str]:
    """What attach says of another section on a rank, and of a scheduler of another length."""
    rank, found = dist.get_rank(), []
    for section, total in (({**SECTION, "ramp_end": 9 + rank}, 20), ({**SECTION, "ramp_end": "auto"}, 9 + rank)):
        scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": total}}
        with pytest.raises(MolsError) as error:
            engine_of(config(0, {**section, "report_dir": f"report{rank}"}, scheduler=scheduler), PlainLM())
        found.append(str(error.value))
    return found


def test_a_section_that_differs_between_ranks() -> None:
    for said in run_ranks(other_sections, 2):
        assert all(line.startswith('the "mols" section is not the same on every rank') for line in said)


def weights_alone() -> tuple[int, int, list[str]]:
    """Samples before and after `load_module_only` in a window, and the messages."""
    engine = engine_of(config(2, SECTION, micros=1), PlainLM())
    with tempfile.TemporaryDirectory() as folder:
        iterate(engine, 0, 1)
        engine.save_checkpoint(folder, tag="a")
        for iteration in range(1, 3):
            iterate(engine, iteration, 1)
        before = engine.mols.samples
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine.load_checkpoint(folder, tag="a", load_module_only=True)
    return before, engine.mols.samples, [str(one.message) for one in said if one.category is MolsWarning]


def test_other_weights_in_a_window_start_it_over() -> None:
    ((before, after, said),) = run_ranks(weights_alone, 1)
    assert before == 2 and after == 0
    assert any("load_module_only changed the weights" in line for line in said)


def given_back() -> dict[str, float]:
    """The alphas of a run, all of them, given to another one."""
    alphas = {"embedding": 2.0, "head": 1.5, "other": 1.0}
    engine = engine_of(config(0, {**SECTION, "start": 0, "fixed_alphas": alphas}), PlainLM())
    found: dict[str, float] = engine.mols.alphas
    return found


def test_alphas_of_a_run_are_fixed_alphas_of_another() -> None:
    (found,) = run_ranks(given_back, 1)
    assert found["embedding"] == 2.0 and found.get("other", 1.0) == 1.0
