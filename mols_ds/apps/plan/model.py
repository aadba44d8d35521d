"""The model of a plan: its real parameters on the meta device, and the activations that its forward pass keeps."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

from mols_ds.apps.plan.optimizers import Weight
from mols_ds.core.groups import Granularity, GroupTable, group_table
from mols_ds.errors import MolsConfigError
from mols_ds.training.models import load_model_config, meta_model
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "embd_dropout")


class Activations(NamedTuple):
    """Bytes that a forward pass of one micro-batch keeps for the backward pass.

    layer: each decoder layer; fixed: embedding, last norm, head and loss; boundary: the input of a layer, which
    activation checkpointing keeps; logits: temporary copies of the head's output around the loss.
    """

    layers: int
    layer: int
    fixed: int
    boundary: int
    logits: int

    def kept(self, checkpointing: bool) -> int:
        """Return the bytes kept. With checkpointing: the input of each layer, and one full layer that is recomputed."""
        if not checkpointing:
            return self.fixed + self.layers * self.layer
        return self.fixed + self.layers * self.boundary + self.layer


@dataclass(frozen=True)
class Decoder:
    """A causal language model of transformers.

    Attributes:
        weights: in the order of `model.parameters()`, which is that of ZeRO's flat buffers; tied ones once.
        table: its module groups.
        matmul: elements of the matrices that a token is multiplied with, with the head; of experts, the chosen ones.
        attention: layers x width of all query heads, for the products whose cost grows with the sequence length.
    """

    source: str
    config: PretrainedConfig
    weights: tuple[Weight, ...]
    table: GroupTable
    matmul: int
    attention: int

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    def flops(self, tokens: int, length: int, *, recompute: bool) -> float:
        """Count the operations of forward and backward for `tokens` tokens in sequences of `length`.

        6 per matrix element and token, and 12 per layer, feature and earlier position for the attention products
        (Korthikanti et al. 2205.05198, appendix A; Chowdhery et al. 2204.02311, appendix B). Recomputation adds one
        forward pass, a third of that.
        """
        plain = tokens * (6.0 * self.matmul + 12.0 * self.attention * length)
        return plain * (4 / 3 if recompute else 1.0)

    def activations(self, batch: int, length: int, dtype: torch.dtype) -> Activations:
        """Return the bytes of `batch` sequences of `length` tokens: linear in `batch`, so two traces suffice."""
        one, two = (_activations(self.source, n, length, dtype) for n in (1, 2))
        pairs = zip(one[1:], two[1:], strict=True)
        return Activations(one.layers, *(a + (batch - 1) * (b - a) for a, b in pairs))


def load(source: str, rules: tuple[tuple[str, str], ...] = (), granularity: Granularity = "type") -> Decoder:
    """Load a model file (configs/models/*.json) or checkpoint folder without its weights. Raises MolsConfigError."""
    config = load_model_config(source)
    with _quiet():
        model = meta_model(source)
    table = group_table(model, list(rules), granularity)
    share = _expert_share(config)
    weights = tuple(
        Weight(name, tuple(p.shape), table.layouts[name].groups[0], share if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = int(config.num_hidden_layers * config.num_attention_heads * width)
    return Decoder(source, config, weights, table, _matmul(model, weights), attention)


def _expert_share(config: PretrainedConfig) -> float:
    experts = next(
        (getattr(config, key) for key in ("num_local_experts", "n_routed_experts") if hasattr(config, key)), 0
    )
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0


def _matmul(model: PreTrainedModel, weights: tuple[Weight, ...]) -> int:
    """Count matrix elements. A tied embedding is also the head's matrix; an untied one is only a look-up."""
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    used = tables - ({id(head.weight)} if head is not None else set())
    skipped = {name for name, p in model.named_parameters() if id(p) in used}
    return int(sum(w.numel * w.active for w in weights if len(w.shape) >= 2 and w.name not in skipped))


@functools.lru_cache(maxsize=64)
def _activations(source: str, batch: int, length: int, dtype: torch.dtype) -> Activations:
    config = copy.deepcopy(load_model_config(source))
    layers = config.num_hidden_layers
    one, two = (_saved(config, n, batch, length, dtype) for n in (1, 2))
    size = torch.tensor([], dtype=dtype).element_size()
    boundary = batch * length * config.hidden_size * size
    logits = batch * length * config.vocab_size * (4 + (size if size < 4 else 0))
    return Activations(layers, two - one, one - (two - one), boundary, logits)


def _saved(config: PretrainedConfig, layers: int, batch: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of the distinct storages that autograd saves in a forward pass of the real model with `layers`
    layers, without parameters. Fake tensors have shapes and storages, but no memory.

    Attention runs as on the CPU. Its fused kernel saves the same tensors as flash attention on GPUs: query, key, value,
    output and one number per row and head. Dropout is off.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, masking_utils

    config = copy.deepcopy(config)
    config.num_hidden_layers, config.use_cache = layers, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if getattr(config, "max_position_embeddings", length) < length:
        raise MolsConfigError(
            f"--sequence {length}: the model has max_position_embeddings {config.max_position_embeddings}"
        )
    for key in DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    # For fake tensors transformers would build a mask and copy grouped keys and values.
    plain: dict[str, Any] = {"is_tracing": lambda *_: False, "find_packed_sequence_indices": lambda *_: None}
    try:
        with FakeTensorMode(), _quiet(), mock.patch.multiple(masking_utils, create=True, **plain):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            ids = torch.zeros(batch, length, dtype=torch.long)
            return saved_bytes(model, lambda: model(input_ids=ids, labels=ids))
    except Exception as error:  # any error of the model's code with fake tensors
        raise MolsConfigError(f"the activations of this model cannot be traced: {one_line(error)}") from error


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of the distinct storages that autograd saves in `forward()`, without the model's parameters."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # keep it, so that no other storage gets its address
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)
