"""Adam-mini (Zhang et al. 2025, arXiv 2406.16793), correct on ZeRO's flat shards.

Adam with one second moment per block instead of one per element: v_b is the running average of the mean of g^2 over
block b. Blocks of a Transformer (the paper's algorithm 3, and the authors' package adam-mini 1.1.1): one per head for
query and key weights; one per output neuron or token for value, output, MLP, embedding and output-layer weights; one
per element for biases (plain Adam); one for a norm or any other 1-D parameter. Parts of a fused projection have the
blocks of their kind. The authors' package matches words in names, needs the hidden size, and averages over the part of
a row or head on one rank, which is wrong on flat shards.

Where paper and package say nothing: position embeddings have one block per position; other weights (routers) one per
row; query or key weights that do not divide into heads (LoRA's A) one per row.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from mols_ds.core.group_rules import canonical_name, config_value, text_config
from mols_ds.core.groups import base_group, group_table
from mols_ds.core.layout import ElementLayout
from mols_ds.errors import MolsConfigError, MolsUnsupportedError, MolsWarning
from mols_ds.optim.limits import check_options
from mols_ds.optim.param_blocks import Blocks
from mols_ds.optim.param_shards import ParamShard
from mols_ds.optim.sharded import Group, ShardedOptimizer, State, StateParts, update_moment

KEY = "block_avg_sq"


def block_factor(square: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Return lr / (1 - beta1^t) / (sqrt(v_b / (1 - beta2^t)) + eps), the factor of m (2406.16793, algorithm 2)."""
    root = square.sqrt() / math.sqrt(1 - betas[1] ** step)
    return (lr / (1 - betas[0] ** step)) / root.add_(eps)


def parameter_blocks(
    name: str, shape: Sequence[int], layout: ElementLayout, head: int | None, transposed: bool = False
) -> Blocks:
    """Return the blocks of one parameter (see the module docstring).

    Args:
        shape: of the whole parameter.
        layout: its module groups.
        head: features per attention head; None: query and key weights have one block per row.
        transposed: the weight has shape (in, out), as transformers' `Conv1D` stores it.
    """
    canonical = canonical_name(name)
    if canonical.name.endswith("bias"):
        return Blocks.elements(shape)
    if len(shape) < 2:
        return Blocks.whole(shape)
    fused = len(layout.groups) > 1
    if fused:
        transposed = layout.inner < math.prod(shape[1:])
    inner = math.prod(shape[2:]) if transposed else shape[-1]
    features = shape[1] if transposed else math.prod(shape) // max(inner, 1)
    pattern: Sequence[tuple[int, str]] = ((features, layout.groups[0]),)
    if fused:
        pattern = layout.pattern * (features // sum(length for length, _ in layout.pattern))
    per_head = head if canonical.adapter != "shared" else None
    return Blocks(max(inner, 1), tuple(_join(_split(length, group, per_head) for length, group in pattern)))


def _split(length: int, group: str, head: int | None) -> tuple[int, int]:
    """Return (features per block, number of blocks) for `length` output features of a group."""
    if base_group(group) == "qk" and head and length % head == 0:
        return head, length // head
    return 1, max(1, length)


def _join(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    alike = itertools.groupby(runs, key=lambda run: run[0])
    return [(width, sum(count for _, count in same)) for width, same in alike]


def head_size(model: nn.Module) -> int | None:
    """Return the features per attention head from the model's transformers config; None without one."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    config = next((c for c in configs if config_value(c, "model_type") is not None), getattr(model, "config", None))
    config = text_config(config)
    size, heads = config_value(config, "head_dim"), config_value(config, "num_attention_heads", "n_head")
    hidden = config_value(config, "hidden_size", "n_embd")
    if size is None and heads and hidden:
        size = int(hidden) // int(heads)
    return None if size is None else int(size)


class ShardedAdamMini(ShardedOptimizer):
    """Adam-mini; see the module docstring.

    Universal checkpoints only know Adam's moments: `block_avg_sq`, one number per block, cannot move to another number
    of ranks. Binding to an engine that loads one is refused.

    Args:
        params: parameters or groups, as for any torch optimizer; float32. `bind` tells which parameter is what. Without
            it, a parameter with two or more dimensions has one block per row, any other one block.
        lr, betas, eps, weight_decay: as for AdamW; also per group.
        head_dim: features per attention head; None: from the model's config.
    """

    kinds = 1
    moves = False
    settings = ("head_dim",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        head_dim: int | None = None,
    ) -> None:
        check_options("ShardedAdamMini", {"head_dim": head_dim})
        self.head_dim = head_dim
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def default_blocks(self, shape: Sequence[int]) -> Blocks:
        return Blocks.rows(shape) if len(shape) > 1 else Blocks.whole(shape)

    def model_blocks(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[Sequence[str]]
    ) -> dict[str, Blocks]:
        """Return the blocks by module group. Raises MolsConfigError for a weight without one, as `group_table` does."""
        try:
            layouts = group_table(model, list(rules)).layouts
        except MolsConfigError as error:
            raise MolsConfigError(
                f'Adam-mini uses the module groups (and "rules" of the "mols" section) for its blocks: {error}'
            ) from error
        head = self.head_dim or head_size(model)
        if head is None and any("qk" in layout.groups for layout in layouts.values()):
            warnings.warn(
                "Adam-mini: the model's config has no number of attention heads: query and key weights have one block "
                'per row instead of one per head; give "head_dim"',
                MolsWarning,
                stacklevel=2,
            )
        transposed = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
        return {
            name: parameter_blocks(name, shape, layouts[name], head, name in transposed)
            if name in layouts
            else self.default_blocks(shape)  # frozen
            for name, shape in shapes.items()
        }

    def _parts(self, tensor: Tensor, shards: Sequence[ParamShard]) -> StateParts:
        count = sum(shard.touched[1] for shard in shards)
        self._check_blocks(tensor, count)
        return {"exp_avg": lambda: torch.zeros_like(tensor), KEY: lambda: tensor.new_zeros(count)}

    def _check_blocks(self, tensor: Tensor, count: int) -> None:
        """Reset the blocks of steps before `bind`: DeepSpeed's stage 0 steps once with zero gradients."""
        saved = self.state[tensor].get(KEY)
        if saved is None or saved.numel() == count:
            return
        if bool(saved.any()):
            raise MolsUnsupportedError(
                f"Adam-mini's state has {saved.numel()} blocks where this run's parameters have {count}: its state "
                "cannot move to another number of ranks or other blocks; resume with the same, or bind before training"
            )
        del self.state[tensor][KEY]

    def _measure(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, out: Tensor) -> None:
        gradient = self._gradient(tensor, shard)
        update_moment(shard.of(state["exp_avg"].view(-1)), gradient, group["betas"][0])
        shard.add_squares(gradient, out[0])

    def _apply(self, group: Group, state: State, tensor: Tensor, shard: ParamShard, sums: Tensor) -> None:
        beta2 = group["betas"][1]
        square = state[KEY][shard.at : shard.at + shard.touched[1]]
        square.mul_(beta2).add_((sums[0] / shard.sizes).to(square.dtype), alpha=1 - beta2)
        factor = block_factor(square, state["step"], group["lr"], group["betas"], group["eps"])
        weight, mean = shard.of(tensor.view(-1)), state["exp_avg"].view(-1)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        for scale, (part, average) in shard.parts(factor, tensor.view(-1), mean):
            part.addcmul_(average, scale, value=-1.0)
