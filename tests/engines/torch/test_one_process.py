"""One process: loops of every kind give the same alphas and weights, and a probe leaves no trace."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import mols_ds
from mols_ds.errors import MolsError
from tests.engines.torch.models import SAMPLES, SECTION, START, STEPS, adamw, halves, tiny, tokens
from tests.helpers.digests import differing, digest

CLIP = 0.05  # far below the norm


class Container:
    """As torchtitan's OptimizersContainer: several optimizers behind one `step`."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def train(
    mode: str = "probe",
    make: Callable[[nn.Module], Any] = lambda model: adamw(model.parameters()),
    *,
    compiled: str = "",
    closure: bool = False,
    clip: bool | Literal["before unscale"] = False,
    scaler: torch.amp.GradScaler | None = None,
    section: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> tuple[Any, dict[str, Tensor]]:
    """The handle and the weights after `steps` updates."""
    model = tiny()
    optimizer = make(model)
    run: nn.Module = model
    if compiled == "model":
        run = torch.compile(model, backend="aot_eager")
    elif compiled == "in place":
        model.compile(backend="aot_eager")
    elif compiled == "step":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    mols = mols_ds.attach(optimizer, run, {"mode": mode, **(section or SECTION)}, total_steps=steps, grad_scaler=scaler)
    for iteration in range(steps + (SAMPLES if mode == "probe" else 0)):

        def backward(iteration: int = iteration) -> Tensor:
            optimizer.zero_grad()
            loss = run(tokens(iteration))
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if closure:
            optimizer.step(backward)
            continue
        backward()
        if clip:
            if clip == "before unscale":
                mols.read_gradients()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip != "before unscale":
                mols.read_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    assert mols.phase == "fixed" and mols.steps == steps
    return mols, {name: p.detach().clone() for name, p in model.named_parameters()}


def check_alike(one: tuple[Any, Any], other: tuple[Any, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    assert max(one[0].alphas.values()) / min(one[0].alphas.values()) > 1.1
    assert other[0].alphas == pytest.approx(one[0].alphas, rel=rtol, abs=0)
    for name, weights in one[1].items():
        assert float((other[1][name] - weights).abs().max()) <= atol, name


# --- loops of every kind ---------------------------------------------------------------------------------------------

LOOPS: dict[str, dict[str, Any]] = {
    "foreach": {"make": lambda model: adamw(model.parameters(), foreach=True)},
    "fused": {"make": lambda model: adamw(model.parameters(), fused=True)},
    "lr as a tensor": {"make": lambda model: adamw(model.parameters(), lr=torch.tensor(1e-2))},
    "parameter groups": {"make": lambda model: adamw([{"params": half} for half in halves(model)])},
    "a list": {"make": lambda model: Container([adamw(half) for half in halves(model)])},
    "a closure": {"closure": True},
    "compiled": {"compiled": "model"},
    "compiled in place": {"compiled": "in place"},
    "a compiled step": {"compiled": "step"},
}


QUICK = {
    ("foreach", "probe"),
    ("fused", "online"),
    ("a list", "online"),
    ("a closure", "probe"),
    ("compiled", "moments"),
}
LOOP_CASES = [
    pytest.param(loop, mode, marks=() if (loop, mode) in QUICK else pytest.mark.tier("all"), id=f"{loop}-{mode}")
    for loop in LOOPS
    for mode in ("probe", "online", "moments")
]


def test_the_constant_preset_steps_the_embedding_at_8_times_the_rate() -> None:
    """As Adam with a parameter group of its own for the embedding."""
    weights = []
    for preset in (True, False):
        model = tiny()
        first, *others = model.parameters()
        assert first is model.embed_tokens.weight
        optimizer = adamw([{"params": [first], "lr": 1e-3 if preset else 8e-3}, {"params": others, "lr": 1e-3}])
        if preset:
            section = {"preset": "constant", "start": 0, "ramp_end": 0}
            mols = mols_ds.attach(optimizer, model, section, total_steps=STEPS)
        for iteration in range(3):
            model(tokens(iteration)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: digest(p) for name, p in model.named_parameters()})
    assert mols.samples == 0 and mols.alphas["embedding"] == 8.0
    assert not differing(*weights)


@pytest.mark.parametrize(("loop", "mode"), LOOP_CASES)
def test_every_loop_gives_the_same(loop: str, mode: str) -> None:
    """Kernels round differently; 1e-5 is far below what a wrong gradient or rate moves."""
    check_alike(train(mode), train(mode, **LOOPS[loop]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["probe", "online"])
def test_statistics_are_of_unclipped_gradients(mode: str) -> None:
    still = {**SECTION, "start": 0}
    make = lambda model: adamw(model.parameters(), lr=0.0)  # noqa: E731
    free, clipped = (train(mode, make, clip=clip, section=still)[0] for clip in (False, True))
    assert clipped.alphas == free.alphas


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True, "before unscale"])
@pytest.mark.parametrize("mode", ["probe", "online"])
def test_a_loss_scale_does_not_show(mode: str, clip: bool | Literal["before unscale"], fused: bool) -> None:
    """Powers of two: the scaled run has the same bits, but for gradients that the fused kernel unscales."""
    make = lambda model: adamw(model.parameters(), fused=fused)  # noqa: E731
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    check_alike(train(mode, make, clip=clip), train(mode, make, clip=clip, scaler=scaler), rtol=1e-5, atol=1e-6)
    updates = STEPS
    assert scaler.get_scale() == 2.0 ** (10 + updates // 3)  # discarded steps do not raise it


@pytest.mark.parametrize("mode", ["probe", "online"])
def test_steps_that_a_scaler_skips_are_no_samples(mode: str) -> None:
    for fused in (False, True):
        model = tiny()
        optimizer = adamw(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        mols = mols_ds.attach(optimizer, model, {**SECTION, "mode": mode}, total_steps=STEPS, grad_scaler=scaler)
        for iteration in range(20):
            scale = float("inf") if iteration == START + 1 else 1.0
            scaler.scale(model(tokens(iteration)) * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert mols.phase == "fixed" and mols.samples == SAMPLES and scaler.get_scale() == 2.0**3
        assert mols.steps == 20 - 1 - (SAMPLES if mode == "probe" else 0)


def test_an_optimizer_that_is_left_out_of_a_step() -> None:
    """A step ends when an optimizer is called again."""
    model = tiny()
    first, second = (adamw(half) for half in halves(model))
    mols = mols_ds.attach([first, second], model, {**SECTION, "mode": "online"}, total_steps=STEPS)
    for iteration in range(STEPS):
        model(tokens(iteration)).backward()
        first.step()
        if iteration % 2 == 0:
            second.step()
        model.zero_grad()
    assert mols.steps in (STEPS - 1, STEPS) and mols.phase == "fixed"
    mols.detach()
    assert not hasattr(first, "mols") and not hasattr(second, "mols")


# --- what a probe leaves behind --------------------------------------------------------------------------------------


def seen(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    found = {name: digest(value) for name, value in model.state_dict().items()}
    for i, state in enumerate(optimizer.state.values()):
        found |= {f"{i} {key}": digest(torch.as_tensor(value)) for key, value in state.items()}
    for i, group in enumerate(optimizer.param_groups):
        found[f"group {i}"] = repr({key: value for key, value in group.items() if key != "params"})
    return found | {"random": digest(torch.get_rng_state()), "python": repr(hash(random.getstate()))}


def run_of(section: dict[str, Any] | None) -> Iterator[dict[str, str]]:
    """What is visible after each update, of a model with BatchNorm and dropout."""
    model = tiny(dropout=0.2)
    optimizer = adamw(model.parameters())
    if section is not None:
        mols = mols_ds.attach(optimizer, model, section, total_steps=STEPS)
    torch.manual_seed(5)
    extra = 0
    for t in range(STEPS):
        while section is not None and mols.phase == "calibrating":
            model(tokens(100 + extra)).backward()
            optimizer.step()
            optimizer.zero_grad()
            extra += 1
        model(tokens(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield seen(model, optimizer)
    assert section is None or extra == SAMPLES


def test_a_probe_leaves_no_trace() -> None:
    """With alphas of 1: weights, BatchNorm's buffers, optimizer state and random numbers, bit for bit."""
    ones = {**SECTION, "mode": "probe", "alpha_min": 1.0, "alpha_max": 1.0}
    for step, (stock, probed) in enumerate(zip(list(run_of(None)), list(run_of(ones)), strict=True)):
        assert differing(stock, probed) == [], step


def test_a_schedule_of_the_loop_goes_on_and_the_log_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    optimizer = adamw(model.parameters())
    before = LambdaLR(optimizer, lambda t: 1.0)
    mols = mols_ds.attach(optimizer, model, {**SECTION, "mode": "probe"}, total_steps=STEPS)
    after = LambdaLR(optimizer, lambda t: 0.5**t)  # torch's schedulers wrap `step`, whenever they are made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for iteration in range(STEPS + SAMPLES):
            model(tokens(iteration)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after.step()
    said = capsys.readouterr().out
    assert "the next 4 steps of the training loop measure gradients and do not update" in said
    assert "advances by 4 steps meanwhile" in said
    assert (mols.steps, after.last_epoch, before.last_epoch) == (STEPS, STEPS + SAMPLES, 0)
    assert mols.applied_lrs["other"] == pytest.approx(1e-2 * 0.5 ** (STEPS + SAMPLES - 1))


def test_detached_it_is_stock() -> None:
    model = tiny()
    optimizer = adamw(model.parameters())
    stock = optimizer.step
    mols = mols_ds.attach(optimizer, model, {**SECTION, "mode": "probe"}, total_steps=STEPS)
    assert optimizer.mols is mols
    with pytest.raises(MolsError, match="has MoLS already"):
        mols_ds.attach(optimizer, model, SECTION, total_steps=STEPS)
    mols.detach()
    mols.detach()
    assert optimizer.step == stock and "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    again = mols_ds.attach(optimizer, model, {**SECTION, "enabled": False}, total_steps=STEPS)
    assert again.phase == "disabled" and "step" not in vars(optimizer)
