"""Megatron-core's GPTModel sharded over tensor, pipeline and expert ranks: parameters and activations of each stage.

Shapes follow megatron-core 0.16.1 (core/models/gpt, core/transformer); a test compares them with the real model.
Pipeline stages have equal numbers of layers. The first has the embedding too, the last the final norm and the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mols_ds.apps.plan.optimizers import Weight
from mols_ds.apps.plan.parts import up
from mols_ds.errors import MolsUnsupportedError
from mols_ds.training.megatron_settings import Settings

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

REFUSED = (
    "multi_latent_attention",
    "mtp_num_layers",
    "attention_output_gate",
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "moe_layer_freq",
    "moe_latent_size",
)
"""Keys of `model` that change the parameters or stages in a way that this plan does not support."""


@dataclass(frozen=True, eq=False)
class Local:
    """Megatron's own layers, whose activations are traced (`local.activation_bytes`). position, tied: the arguments
    `position_embedding_type` and `share_embeddings_and_output_weights` of GPTModel."""

    config: TransformerConfig
    position: str = "rope"
    tied: bool = False


@dataclass(frozen=True)
class Gpt:
    """Sizes of a Megatron model and its grid. `kv`: query groups; `ffn`: MLP width, of one expert in a mixture."""

    layers: int
    hidden: int
    heads: int
    kv: int
    channels: int
    ffn: int
    vocab: int
    gated: bool
    bias: bool
    norm_bias: bool
    tied: bool
    positions: int
    qk_norm: bool
    experts: int
    topk: int
    shared_ffn: int
    tp: int
    pp: int
    vp: int
    ep: int
    etp: int
    cp: int
    sp: bool
    recompute: str
    flash: bool
    local: Local | None = None
    """Megatron's own layers, traced; None: Transformer Engine's, by formula."""

    @classmethod
    def of(cls, settings: Settings, *, flash: bool, local: Local | None) -> Gpt:
        """Read the settings of train_megatron.py. Raises MolsUnsupportedError for unsupported keys (`REFUSED`)."""
        model, parallel, more = settings.model, settings.parallel, settings.model.further
        for key in REFUSED:
            if more.get(key) not in (None, False, 0, 1):
                raise MolsUnsupportedError(f'plan: "model.{key}" is not supported by the plan; leave it out')
        experts = int(more.get("num_moe_experts") or 0)
        dense = model.ffn_hidden_size or 4 * model.hidden_size
        return cls(
            layers=model.num_layers,
            hidden=model.hidden_size,
            heads=model.num_attention_heads,
            kv=model.num_query_groups or model.num_attention_heads,
            channels=int(more.get("kv_channels") or model.hidden_size // model.num_attention_heads),
            ffn=int(more.get("moe_ffn_hidden_size") or dense) if experts else dense,
            vocab=up(model.vocab_size, model.vocab_multiple * parallel.tp),
            gated=model.activation in ("swiglu", "geglu"),
            bias=bool(more.get("add_bias_linear", False)),
            norm_bias=model.normalization == "LayerNorm",
            tied=model.tied_embeddings,
            positions=(model.max_sequence_length or settings.run.seq_len)
            if model.position_embedding == "learned_absolute"
            else 0,
            qk_norm=bool(more.get("qk_layernorm", False)),
            experts=experts,
            topk=int(more.get("moe_router_topk", 2)) if experts else 1,
            shared_ffn=int(more.get("moe_shared_expert_intermediate_size") or 0),
            tp=parallel.tp,
            pp=parallel.pp,
            vp=parallel.vp or 1,
            ep=parallel.ep,
            etp=parallel.etp or parallel.tp,
            cp=parallel.cp,
            sp=parallel.sp,
            recompute=str(more.get("recompute_granularity") or ""),
            flash=flash,
            local=local,
        )

    @property
    def chunk(self) -> int:
        """Layers per model chunk."""
        return self.layers // (self.pp * self.vp)

    # -------------------------------------------------------------- parameters

    def weights(self, stage: int) -> list[Weight]:
        """List the parameters of a rank, in the order of `parameters()`. Experts' names contain ".experts."."""
        found: list[Weight] = []
        for chunk in range(self.vp):
            first, last = stage == 0 and chunk == 0, stage == self.pp - 1 and chunk == self.vp - 1
            prefix = f"chunk.{chunk}." if self.vp > 1 else ""
            if first:
                found.append(Weight(f"{prefix}embedding.word_embeddings.weight", self._table, "embedding"))
                if self.positions:
                    shape = (self.positions, self.hidden)
                    found.append(Weight(f"{prefix}embedding.position_embeddings.weight", shape, "embedding"))
            for layer in range(self.chunk):
                found += self._layer(f"{prefix}decoder.layers.{layer}.")
            if last:
                found += self._norm(f"{prefix}decoder.final_layernorm")
                if not self.tied or self.pp > 1:
                    group = "embedding" if self.tied else "head"
                    found.append(Weight(f"{prefix}output_layer.weight", self._table, group))
        return found

    @property
    def _table(self) -> tuple[int, int]:
        return self.vocab // self.tp, self.hidden

    def _norm(self, name: str, width: int = 0) -> list[Weight]:
        shape = (width or self.hidden,)
        parts = ("weight", "bias") if self.norm_bias else ("weight",)
        return [Weight(f"{name}.{part}", shape, "other") for part in parts]

    def _linear(
        self, name: str, rows: int, columns: int, group: str, *, bias_rows: int, active: float = 1.0
    ) -> list[Weight]:
        found = [Weight(f"{name}.weight", (rows, columns), group, active)]
        return [*found, Weight(f"{name}.bias", (bias_rows,), "other")] if self.bias else found

    def _layer(self, name: str) -> list[Weight]:
        width, tp = self.heads * self.channels, self.tp
        qkv = (width + 2 * self.kv * self.channels) // tp
        found = self._norm(f"{name}input_layernorm")
        found += self._linear(
            f"{name}self_attention.linear_proj", self.hidden, width // tp, "vo", bias_rows=self.hidden
        )
        found += self._linear(f"{name}self_attention.linear_qkv", qkv, self.hidden, "qk", bias_rows=qkv)
        if self.qk_norm:
            for part in ("q_layernorm", "k_layernorm"):
                found += self._norm(f"{name}self_attention.{part}", self.channels)
        found += self._norm(f"{name}pre_mlp_layernorm")
        if not self.experts:
            return found + self._mlp(f"{name}mlp.", self.ffn, tp, 1.0)
        found.append(Weight(f"{name}mlp.router.weight", (self.experts, self.hidden), "other"))
        for expert in range(self.experts // self.ep):
            found += self._mlp(
                f"{name}mlp.experts.local_experts.{expert}.", self.ffn, self.etp, self.topk / self.experts
            )
        if self.shared_ffn:
            found += self._mlp(f"{name}mlp.shared_experts.", self.shared_ffn, tp, 1.0)
        return found

    def _mlp(self, name: str, ffn: int, ranks: int, active: float) -> list[Weight]:
        rows = ffn * (2 if self.gated else 1) // ranks
        found = self._linear(f"{name}linear_fc1", rows, self.hidden, "mlp", bias_rows=rows, active=active)
        return found + self._linear(
            f"{name}linear_fc2", self.hidden, ffn // ranks, "mlp", bias_rows=self.hidden, active=active
        )

    # -------------------------------------------------------------- operations

    def flops(self, sequences: int, length: int) -> float:
        """Count forward and backward operations of `sequences` sequences in the whole model; see `Decoder.flops`."""
        dense = self.layers * (self.heads + self.kv) * 2 * self.channels * self.hidden
        mlp = (3 if self.gated else 2) * self.hidden
        dense += self.layers * mlp * (self.ffn * self.topk + self.shared_ffn) + self.vocab * self.hidden
        attention = self.layers * self.heads * self.channels
        plain = sequences * length * (6.0 * dense + 12.0 * attention * length)
        return plain * (4 / 3 if self.recompute == "full" else 1.0)

    # -------------------------------------------------------------- activations

    def layer_bytes(self, tokens: int, length: int, size: int) -> int:
        """Return the bytes that one layer keeps for backward, for a micro-batch of `tokens` tokens (before cp).

        Korthikanti et al. 2205.05198, section 4, count the same tensors for LayerNorm, GELU and dropout (34 sbh with
        16-bit elements, and 5 as^2b of scores). Here without dropout, elements per token: the input and output of both
        norms 4h (over tp with sequence parallelism); queries, keys, values and attention output 2(a + k)d / tp; inside
        of the MLP 3f / tp (2f without a gate). Fused attention keeps no scores, but one fp32 per row; otherwise scores
        are kept in fp32 and 16 bits, unless attention is recomputed. length: tokens per sequence.
        """
        local, tp = tokens // self.cp, self.tp
        rows = local // tp if self.sp else local
        kept = rows * 4 * self.hidden * size + 2 * 4 * rows
        kept += local * 2 * (self.heads + self.kv) * self.channels // tp * size
        if self.flash:
            kept += local * self.heads // tp * 4
        elif self.recompute != "selective":
            kept += local * length * self.heads // tp * (4 + (size if size < 4 else 0))
        return kept + self._mlp_bytes(local, rows, size)

    def _mlp_bytes(self, local: int, rows: int, size: int) -> int:
        inside = 3 if self.gated else 2
        if not self.experts:
            return local * inside * self.ffn // self.tp * size
        # Assumes that the router spreads tokens evenly over the experts.
        routed = (local // self.tp) * self.topk * (self.etp * self.hidden * 2 + inside * self.ffn) * size
        return routed + rows * self.experts * 4 + local * inside * self.shared_ffn // self.tp * size

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Return the largest number of micro-batch chunks whose activations a stage keeps at the same time: 1F1B, or
        interleaved (core/pipeline_parallel/schedules.py)."""
        if self.pp == 1:
            return 1
        if self.vp == 1:
            return min(micro_batches, self.pp - stage)
        return min(micro_batches * self.vp, 2 * (self.pp - stage - 1) + (self.vp - 1) * self.pp + 1)

    def activation_bytes(self, stage: int, tokens: int, length: int, size: int, micro_batches: int) -> int:
        """Return the activation bytes of one rank with Transformer Engine's layers, by formula."""
        layer = self.layer_bytes(tokens, length, size)
        rows = tokens // self.cp // (self.tp if self.sp else 1)
        if self.recompute == "full":
            held = self.in_flight(stage, micro_batches) * self.chunk * rows * self.hidden * size + layer
        else:
            held = self.in_flight(stage, micro_batches) * self.chunk * layer
        if stage == self.pp - 1:
            held += 2 * rows * self.hidden * size + tokens // self.cp * self.vocab // self.tp * 4
        return held

    def head_bytes(self, stage: int, tokens: int, size: int) -> int:
        """Return the bytes of temporary copies of the logits around the loss."""
        return tokens // self.cp * self.vocab // self.tp * (4 + size) if stage == self.pp - 1 else 0

    def total(self) -> int:
        """Count the elements of the whole model, each once."""
        whole = [weight for stage in range(self.pp) for weight in self.weights(stage)]
        count = 0
        for weight in whole:
            if ".experts." in weight.name:
                count += weight.numel * self.ep * self.etp
            elif weight.group == "other" and not (self.bias and ("linear_qkv" in weight.name or "fc1" in weight.name)):
                count += weight.numel
            else:
                count += weight.numel * self.tp
        return count - (math.prod(self._table) * self.tp if self.tied and self.pp > 1 else 0)
