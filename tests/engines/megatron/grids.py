"""One fixed model and data on many grids of ranks: results of each rank's run, for several test files.

Imported by the ranks: nothing of the oracle, whose imports are slow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.megatron.building import Built, Setup, attach, build, optimizer, start, step
from tests.engines.megatron.state import everything
from tests.engines.megatron.weights import Part, logical_names, tensor_rank

REFERENCE = "vo"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class Plan(NamedTuple):
    """What a run does, hashable. In mode "probe" `samples` passes of the loop, from `start` on, do not update.

    eps: well above the float noise of the gradients, which Adam's first steps would turn into full steps.
    """

    mode: str = "probe"
    estimator: str = "mean"
    corrected: bool = False
    start: int = 2
    samples: int = 6
    ramp_end: int = 12
    updates: int = 20
    warmup: int = 4
    eps: float = 1e-5
    low: float = 0.1
    high: float = 10.0
    decay: str = "scaled"  # "weight_decay" of the section
    tilt: float = 1.0  # factor on the rate of `vo` in the reference alone

    @property
    def section(self) -> dict[str, Any]:
        """The "mols" section."""
        return {
            "mode": self.mode,
            "estimator": self.estimator,
            "noise_floor_correction": self.corrected,
            "start": self.start,
            "samples": self.samples,
            "ramp_end": self.ramp_end,
            "reference": REFERENCE,
            "alpha_min": self.low,
            "alpha_max": self.high,
            "weight_decay": self.decay,
        }

    @property
    def passes(self) -> int:
        """Iterations of the training loop."""
        return self.updates + (self.samples if self.mode == "probe" else 0)

    def measures(self, iteration: int) -> bool:
        """Whether this pass of the loop gives a sample."""
        return self.start <= iteration < self.start + self.samples


def tiny(**more: Any) -> Setup:
    """128 tokens, of which some never occur; the gradient norm is above 1, so that clipping acts throughout."""
    return Setup(**{"vocab": 128, "micro_batches": 2, "clip": 0.5, **more})


def run(setup: Setup, plan: Plan) -> dict[str, Any]:
    """On each rank: the user's loop over all phases; reports of MoLS, weights, owners of elements."""
    with cpu_megatron():
        start(setup)
        built = build(setup)
        chain, scheduler = optimizer(built, iterations=plan.updates, warmup=plan.warmup, adam_eps=plan.eps)
        mols = attach(built, chain, scheduler, plan.section)
        phases, multipliers, norms = [mols.phase], [], []
        for iteration in range(plan.passes):
            done = step(built, chain, scheduler, iteration)
            phases.append(mols.phase)
            if done.successful:
                multipliers.append(mols.multipliers)
                norms.append(done.grad_norm)
        return {
            "phases": phases,
            "steps": mols.steps,
            "report": mols.report(),
            "alphas": {group: alpha.hex() for group, alpha in mols.alphas.items()},
            "multipliers": multipliers,
            "norms": norms,
            "weights": weights(built),
            "owned": owned(built, mols),
            "parts": [type(part.outer).__name__ for part in mols.shards.parts],
        }


def count_latent(setup: Setup) -> dict[str, Any]:
    """On each rank: elements by group in the report, and the rank's norms."""
    with cpu_megatron():
        start(setup)
        built = build(setup)
        chain, scheduler = optimizer(built)
        mols = attach(built, chain, scheduler, {"fixed_alphas": {"mlp": 1.5}, "start": 0, "ramp_end": 4})
        named = {k: p.numel() for chunk in built.chunks for k, p in chunk.named_parameters()}
        return {
            "elements": {group: row["elements"] for group, row in mols.report()["groups"].items()},
            "norms": sum(n for k, n in named.items() if "norm" in k),
        }


OFF_WAYS = ("disabled", "detached at once", "detached while waiting", "detached while ramping")
OFF_UPDATES, DETACH_AT = 5, 3


def train_off(setup: Setup, way: str) -> list[dict[str, Any]]:
    """On each rank: fingerprints along a run with one way to have MoLS off; `stock` never touches it."""
    with cpu_megatron():
        start(setup)
        torch.manual_seed(0)
        built = build(setup)
        chain, scheduler = optimizer(built, iterations=OFF_UPDATES, warmup=2)
        begin = {"detached while waiting": DETACH_AT + 1, "detached while ramping": DETACH_AT}.get(way, 0)
        section = {"fixed_alphas": {"embedding": 3.0, "qk": 0.5}, "start": begin, "ramp_end": 20}
        mols = None
        if way != "stock":
            mols = attach(built, chain, scheduler, section | {"enabled": way != "disabled"})
            assert mols.phase == ("disabled" if way == "disabled" else "ramping" if begin == 0 else "waiting")
        if way == "detached at once":
            mols.detach()
        prints = []
        for iteration in range(OFF_UPDATES):
            if iteration == DETACH_AT and way.startswith("detached while"):
                assert mols.phase == way.split()[-1]
                mols.detach()
            step(built, chain, scheduler, iteration)
            prints.append(everything(built, chain, scheduler))
        return prints


def work(kind: str, *arguments: Any) -> Any:
    """One case of a launch."""
    return {"run": run, "latent": count_latent, "off": train_off}[kind](*arguments)


# --- weights --------------------------------------------------------------------------------------------------------


def weights(built: Built) -> dict[str, Part]:
    """This rank's parts, float32, by logical name; the tied copy of a last stage has its own name."""
    parts = {}
    for chunk in built.chunks:
        for name, parameter in logical_names(chunk, built.setup).items():
            rank, size = tensor_rank(name, parameter)
            values = parameter.detach().float().clone()
            parts[name] = Part(values, rank, size, getattr(parameter, "partition_dim", 0) if size > 1 else 0)
    return parts


def owned(built: Built, mols: Any) -> list[tuple[str, int, int]]:
    """(name, first, numel): the flat ranges of local parameters that this rank measures; names as in `weights`."""
    names = {id(p): name for chunk in built.chunks for name, p in logical_names(chunk, built.setup).items()}
    pieces = []
    for shard, item in mols.shards.owned:
        local = shard.local
        pieces.append((names[id(local.parameter)], item.start - local.range.start, item.numel))
    return pieces
