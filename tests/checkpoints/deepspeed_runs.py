"""Train a tiny model on DeepSpeed from a `settings.json`: write a fixture, or continue from one.

Everything that a result depends on is in the settings or in this file, so that the fixtures outlive changes of defaults
and of the other tests' helpers. Only the public API of mols_ds is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import mols_ds
from tests.checkpoints.comparing import FIXTURES, read, weight_sums
from tests.helpers.harness import draw_nothing

CHECKPOINT, TAG = "checkpoint", "saved"
SEED_OF_WRITER, SEED_OF_READER = 5, 77

draw_nothing()


class Block(nn.Module):
    """A layer with the weights of a LLaMA layer under their names, and simpler arithmetic."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        square = {name: nn.Linear(width, width, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        self.input_layernorm = nn.LayerNorm(width, bias=False)
        self.self_attn = nn.ModuleDict(square)
        self.post_attention_layernorm = nn.LayerNorm(width, bias=False)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same shape."""
        attention, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        mixed = torch.tanh(attention["q_proj"](y)) * attention["k_proj"](y) + attention["v_proj"](y).cumsum(1) / 4
        x = x + attention["o_proj"](mixed)
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](torch.tanh(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class Tiny(nn.Module):
    """A language model. No biases and no dropout: the first change groups, the second differs between processors."""

    def __init__(self, tokens: int, width: int, inner: int, layers: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(tokens, width),
                "layers": nn.ModuleList([Block(width, inner) for _ in range(layers)]),
                "norm": nn.LayerNorm(width, bias=False),
            }
        )
        self.lm_head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token cross entropy of tokens (batch, length)."""
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        logits = self.lm_head(self.model["norm"](x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def numbers(seed: int, count: int, below: int) -> list[int]:
    """Whole numbers in [0, below), low ones more often. The same everywhere: no floats and no library."""
    found = []
    for _ in range(count):
        draws = []
        for _ in range(2):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            draws.append((seed >> 33) % below)
        found.append(min(draws))
    return found


def engine_of(settings: dict[str, Any]) -> Any:
    """A fresh engine of `mols_ds.initialize`."""
    model = Tiny(**settings["model"])
    params = {
        "matrices": [p for p in model.parameters() if p.ndim >= 2],
        "vectors": [p for p in model.parameters() if p.ndim < 2],
    }
    groups = [{**group, "params": params[group["params"]]} for group in settings["optimizer"]["groups"]]
    optimizer = torch.optim.AdamW(groups, **settings["optimizer"]["options"])
    warmup, decay = settings["schedule"]["warmup"], settings["schedule"]["decay"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / warmup, 1.0) * decay**t)
    return mols_ds.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings["ds_config"])[0]


def iterate(engine: Any, settings: dict[str, Any], iteration: int) -> float:
    """One pass of a user's loop; returns this rank's mean loss."""
    data, losses = settings["data"], []
    for micro in range(settings["ds_config"]["gradient_accumulation_steps"]):
        seed = 10_000 * iteration + 100 * micro + dist.get_rank() + 1
        count = data["sequences"] * data["length"]
        tokens = torch.tensor(numbers(seed, count, settings["model"]["tokens"])).view(data["sequences"], data["length"])
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return sum(losses) / len(losses)


def state_of(engine: Any) -> dict[str, Any]:
    """What a user sees of MoLS after an iteration."""
    mols = engine.mols
    return {
        "phase": mols.phase,
        "samples": mols.samples,
        "steps": engine.global_steps,
        "accumulators": mols.accumulator_bytes > 0,
        "alphas": mols.alphas,
        "multipliers": mols.multipliers,
        "applied_lrs": mols.applied_lrs,
    }


def weights_of(engine: Any) -> dict[str, dict[str, float]]:
    """Sums of every whole weight."""
    result = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            result[name] = weight_sums(p.data)
    return result


def written(folder: str, settings_json: str, points: tuple[tuple[str, int], ...]) -> dict[str, str]:
    """Train from the first step and save after each iteration that `points` names; returns the phase at each."""
    settings, phases = json.loads(settings_json), {}
    names = {iteration: name for name, iteration in points}
    torch.manual_seed(SEED_OF_WRITER)
    engine = engine_of(settings)
    torch.manual_seed(SEED_OF_WRITER)
    for iteration in range(max(names) + 1):
        iterate(engine, settings, iteration)
        if (name := names.get(iteration)) is not None:
            target = str(Path(folder, name, CHECKPOINT))
            engine.save_checkpoint(target, tag=TAG, client_state={"iteration": iteration})
            phases[name] = engine.mols.phase
    engine.destroy()
    return phases


def continued(name: str, folder: str | None = None) -> dict[str, Any]:
    """Load a fixture into a new engine and continue training; returns this rank's part of `expected.json`."""
    settings = read(name, "settings.json")
    torch.manual_seed(SEED_OF_READER)
    engine = engine_of(settings)
    path, client_state = engine.load_checkpoint(folder or str(FIXTURES / name / CHECKPOINT))
    assert path is not None and client_state["iteration"] == settings["saved_after_iteration"]
    loaded, trace = state_of(engine), []
    torch.manual_seed(
        SEED_OF_READER
    )  # a window of mode "probe" must put the writer's random state in the place of this
    for more in range(1, settings["iterations"] + 1):
        loss = iterate(engine, settings, settings["saved_after_iteration"] + more)
        trace.append({"loss": loss, **state_of(engine)})
    report, weights = engine.mols.report(), weights_of(engine)
    drawn = torch.rand(3).tolist()
    engine.destroy()
    return {"loaded": loaded, "trace": trace, "report": report, "weights": weights, "random": drawn}
