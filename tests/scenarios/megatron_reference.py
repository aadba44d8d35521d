"""The reference of a Megatron-core run: a GPT in plain torch, and what Megatron-core does differently from DeepSpeed.

A fused QKV projection is two parameters here: the rows of queries and keys, and the rows of values. They belong to two
module groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.engines.megatron.building import Setup, tokens
from tests.engines.megatron.weights import logical
from tests.scenarios.reference import DTYPES, GUARDED_STEPS, ReferenceRun
from tests.scenarios.reference_mols import ReferenceMols
from tests.scenarios.reference_optimizer import FP16_WINDOW, ReferenceOptimizer, Scale
from tests.scenarios.scenario import Action, Attach, Evaluate, RunSettings, Save, Section, Step
from tests.scenarios.snapshot import Snapshot

FIRST_SCALE, WARMUP = 2.0**10, 4
QKV = "self_attention.linear_qkv.weight"
ENDINGS = {
    "word_embeddings.weight": "embedding",
    "output_layer.weight": "head",
    ":qk": "qk",
    ":vo": "vo",
    "linear_proj.weight": "vo",
    "linear_fc1.weight": "mlp",
    "linear_fc2.weight": "mlp",
}


def setup_of(settings: RunSettings) -> Setup:
    """Grid, model and batches of the Megatron-core run."""
    grid = settings.grid
    return Setup(
        tp=grid.get("tp", 1),
        pp=grid.get("pp", 1),
        distributed=grid["distributed"],
        position="none",
        dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[settings.precision],
        clip=settings.clip,
        lr=settings.lr,
        weight_decay=settings.decay,
        micro_batches=settings.micros * settings.replicas,
        vocab=48,
        hidden=16,
        seq=8,
    )


def megatron_group(name: str, by_layer: bool) -> str:
    """The module group of a parameter of the reference."""
    group = next((group for ending, group in ENDINGS.items() if name.endswith(ending)), "other")
    if by_layer and name.startswith("decoder.layers.") and group != "other":
        return f"{group}.{name.split('.')[2]}"
    return group


class ReferenceGPT(nn.Module):
    """Grouped-query attention without positions, RMSNorm, gated SiLU. Parameters by Megatron's logical names."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.queries = setup.heads // setup.kv_groups
        self.channels = setup.hidden // setup.heads
        rows = torch.arange((self.queries + 2) * setup.kv_groups * self.channels)
        place = rows // self.channels % (self.queries + 2)  # in each KV group: queries, key, value
        self.rows = {"qk": rows[place <= self.queries], "vo": rows[place > self.queries]}
        self.values = nn.ParameterDict()
        for name, shape in self._shapes().items():
            whole = logical(name, shape)
            parts = {f"{name}:{g}": whole[r] for g, r in self.rows.items()} if name.endswith(QKV) else {name: whole}
            self.values.update({key.replace(".", "/"): nn.Parameter(value) for key, value in parts.items()})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        setup = self.setup
        shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (setup.vocab, setup.hidden)}
        for number in range(setup.n_layers):
            layer = f"decoder.layers.{number}."
            shapes |= {
                f"{layer}input_layernorm.weight": (setup.hidden,),
                f"{layer}{QKV}": (sum(len(rows) for rows in self.rows.values()), setup.hidden),
                f"{layer}self_attention.linear_proj.weight": (setup.hidden, setup.hidden),
                f"{layer}pre_mlp_layernorm.weight": (setup.hidden,),
                f"{layer}mlp.linear_fc1.weight": (4 * setup.hidden, setup.hidden),
                f"{layer}mlp.linear_fc2.weight": (setup.hidden, 2 * setup.hidden),
            }
        last = {"decoder.final_layernorm.weight": (setup.hidden,), "output_layer.weight": (setup.vocab, setup.hidden)}
        return shapes | last

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((key.replace("/", "."), value) for key, value in self.values.items())

    def get_parameter(self, target: str) -> nn.Parameter:
        return self.values[target.replace(".", "/")]

    def whole(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, with the two parts of each fused projection merged."""
        result = {name: value for name, value in named.items() if ":" not in name}
        for name in (name.removesuffix(":qk") for name in named if name.endswith(":qk")):
            order = torch.cat([self.rows["qk"], self.rows["vo"]]).argsort()
            result[name] = torch.cat([named[f"{name}:qk"], named[f"{name}:vo"]])[order]
        return result

    def forward(self, ids: Tensor, unused: Collection[int] = ()) -> Tensor:
        """Mean next-token cross entropy of tokens (batch, length); the last label is the first token."""
        w = self.whole(dict(self.named_parameters()))
        x = w["embedding.word_embeddings.weight"][ids]
        for number in range(self.setup.n_layers):
            layer = f"decoder.layers.{number}."
            x = x + self._attention(_norm(x, w[f"{layer}input_layernorm.weight"]), w, layer)
            if number not in unused:
                h = _norm(x, w[f"{layer}pre_mlp_layernorm.weight"]) @ w[f"{layer}mlp.linear_fc1.weight"].T
                gate, up = h.chunk(2, -1)
                x = x + (nn.functional.silu(gate) * up) @ w[f"{layer}mlp.linear_fc2.weight"].T
        logits = _norm(x, w["decoder.final_layernorm.weight"]) @ w["output_layer.weight"].T
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.roll(-1, 1).flatten())

    def _attention(self, x: Tensor, w: Mapping[str, Tensor], layer: str) -> Tensor:
        setup, (batch, length, _) = self.setup, x.shape
        fused = (x @ w[f"{layer}{QKV}"].T).view(batch, length, setup.kv_groups, self.queries + 2, self.channels)
        q, k, v = fused.split([self.queries, 1, 1], 3)
        q = q.flatten(2, 3).transpose(1, 2)
        k, v = (part.expand(-1, -1, -1, self.queries, -1).flatten(2, 3).transpose(1, 2) for part in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() / self.channels**0.5
        scores = scores.masked_fill(torch.triu(torch.ones(length, length, dtype=torch.bool), 1), -1e4)
        mixed = scores.softmax(-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2) @ w[f"{layer}self_attention.linear_proj.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    high = x.float()
    return (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


class MegatronScale(Scale):
    """Megatron-core's dynamic loss scale: it grows after FP16_WINDOW consecutive good steps."""

    def update(self, overflow: bool) -> None:
        if not self.dynamic:
            return
        self.iteration = 0 if overflow else self.iteration + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.iteration == FP16_WINDOW:
            self.value, self.iteration = self.value * 2, 0


class MegatronReferenceRun(ReferenceRun):
    """Counts updates only (not skipped steps). Gradients of unused parameters are 0. One base rate."""

    embedding = "embedding.word_embeddings.weight"

    def _build(self) -> None:
        settings = self.settings
        self.model: Any = ReferenceGPT(setup_of(settings)).to(DTYPES[settings.precision])
        named = dict(self.model.named_parameters())
        self.buffers = [{} for _ in range(settings.ranks)]
        self.group = dict.fromkeys(named, 0)
        decays = {name: settings.decay if p.ndim >= 2 else 0.0 for name, p in named.items()}
        self.optimizer = ReferenceOptimizer(
            settings.optimizer, {n: p.detach().double() for n, p in named.items()}, decays
        )
        self.model_weights = {name: w.clone() for name, w in self.optimizer.weights.items()}
        self.base = [settings.lr]
        self.steps = self.skipped = self.scheduled = 0
        self.lrs = self._scheduled(0)
        half = settings.precision == "fp16"
        self.scale = MegatronScale(half, FIRST_SCALE if half else 1.0)
        self.stale_gradients = {}
        self.broken = False

    def _disable_mols(self) -> None:
        """A Megatron-core run without a section has no MoLS object."""

    def _scheduled(self, step: int) -> list[float]:
        return [lr * (min(1.0, 0.5 + 0.5 * step / WARMUP) if self.settings.scheduled else 1.0) for lr in self.base]

    def _attach(self, section: Section, steps: int) -> None:
        layers = section.get("granularity") == "layer_type"
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.mols = ReferenceMols(section, {name: megatron_group(name, layers) for name in trained})
        self.guarded_steps, self.reported_weights = GUARDED_STEPS, set()
        self.mols.advance(self.steps)

    # ------------------------------------------------------------------ valid actions

    def apply(self, action: Action) -> tuple[Action, Snapshot] | None:
        """Megatron-core's distributed optimizer cannot be saved before its first step."""
        early = isinstance(action, Save) and not self.optimizer.states
        return None if early or isinstance(action, Evaluate) else super().apply(action)

    def _valid_step(self, step: Step) -> Step:
        discards = self.mols is not None and self.mols.discards
        unchecked = self.settings.precision != "fp16" and not discards  # Megatron would step with NaN
        return dataclasses.replace(step, bad=None) if unchecked else step

    def _valid_attach(self, attach: Attach) -> Attach:
        """With Megatron-core MoLS refuses a `start` in the past."""
        start = max(self.steps, attach.section["start"])
        end = max(start, attach.section["ramp_end"])
        return Attach({**attach.section, "start": start, "ramp_end": end})

    @property
    def _loss_scale(self) -> float:
        return self.scale.value

    # ------------------------------------------------------------------ step

    def _gradient(self, step: Step) -> dict[str, Tensor]:
        settings, total = self.settings, dict[str, Tensor]()
        setup, replicas = setup_of(settings), settings.replicas
        self.batch_tokens = torch.zeros(self._rows, dtype=torch.bool)
        self._load_weights()
        for number in range(setup.micro_batches):
            rank = number % replicas
            self.model.zero_grad()
            unused = step.unused if step.on is None or rank in step.on else ()
            ids = tokens(setup, self.batches, number)
            self.batch_tokens[ids] = True
            loss = self.model(ids, unused)
            loss = loss * float("nan") if step.bad == rank else loss
            (loss * self._loss_scale / setup.micro_batches).backward()
            for name, p in self.model.named_parameters():
                if p.grad is not None and p.requires_grad:
                    total[name] = total.get(name, torch.zeros(p.shape)) + p.grad.float()
        self.batches += 1
        return total

    def _probe_step(self, mols: ReferenceMols, gradients: Mapping[str, Tensor], finite: bool) -> None:
        whole = self._with_zeros(gradients, self._loss_scale) if finite else None
        mols.sample(self.steps, whole, self.batch_tokens)
        if not finite:
            self.scale.update(True)
        if not mols.discards:
            mols.window_rng = None
        mols.advance(self.steps)

    def _optimizer_gradients(self, new_gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._with_zeros({}) | dict(new_gradients)

    def _unscaling(self, before: float) -> float:
        return before

    def _count_step(self, updated: bool) -> None:
        self.steps += updated

    def snapshot(self, eval_losses: list[float], error: str) -> Snapshot:
        snapshot = super().snapshot(eval_losses, error)
        snapshot.weights = self.model.whole(snapshot.weights)
        return snapshot
