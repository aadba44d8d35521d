"""Module groups of Megatron-core models: ordered name rules and row layouts for logical (unsharded) parameters.

"Rows" are dimension 0, the output features. Megatron shards rows over tensor-parallel ranks in contiguous blocks, so a
shard is a range of the logical parameter. Sources: megatron/core/transformer/attention.py, multi_latent_attention.py,
moe/experts.py, ssm/gated_delta_net of megatron-core 0.15 to 0.19.

Decisions:
- Biases are `other`, also those of fused projections (linear_qkv).
- The latent rows of MLA's down projection feed keys and values and are `vo`. The rotary rows feed only the keys and
  are `qk` (as for Hugging Face models, see `mols_ds.core.group_rules`).
- The output gates of attention and of GatedDeltaNet (z) scale the values: `vo`. GatedDeltaNet's decay and write
  strength (alpha, beta) and its convolution are `other`. So are Mamba mixers, routers and indexers as a whole.
- Everything outside the paper's groups is `other` (measured, not scaled): routers, the gate of shared experts, the
  projection of hidden state and embedding in multi-token prediction (eh_proj), the indexer of DeepSeek's sparse
  attention (it has its own loss), T5's relative position bias, BERT's transform before the output layer and its
  pooler. A user's rule can assign another group.
- Towers of other modalities, and projectors between them, have their own groups: `mols_ds.core.towers`.
  Unknown weights in a tower (convolutions, modules of transformers) are `other`.
- The rows of a fused projection follow the config of its module: a tower, or a layer of a heterogeneous model, has its
  own config.

Two projections are stored in *local* order: GatedDeltaNet's in_proj and MLA's fused down projection. Each
tensor-parallel rank has a block of every part, so the logical parameter repeats the blocks tensor_model_parallel_size
times (from the config). Adapters of Megatron-Bridge have the group of the adapted weight (`canonical_name`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from mols_ds.core.group_rules import Fused, Pattern, Rule, config_value, strip_wrappers
from mols_ds.core.groups import Granularity, GroupTable, build_layouts
from mols_ds.core.layout import ElementLayout, base_group
from mols_ds.core.param_names import kind_of
from mols_ds.core.towers import tower_of
from mols_ds.errors import MolsConfigError

__all__ = ["MEGATRON_RULES", "tag_layouts", "tag_table"]

RowPattern = Callable[[str, int, object | None], Pattern]
_MTP_LAYER = re.compile(r"(?:^|\.)mtp\.layers\.(\d+)\.")
_DECODER_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")
CONFIG_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "attention_output_gate",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_value_head_dim",
    "linear_num_value_heads",
    "tensor_model_parallel_size",
)
"""Keys of a TransformerConfig that determine the rows of fused projections."""
_PARALLEL = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")

# ---------------------------------------------------------------------------------------------------- config access


def _need(name: str, config: object | None, key: str) -> int:
    """Return a positive integer of the TransformerConfig. Raises MolsConfigError with the parameter and the key."""
    value = config_value(config, key)
    if value is None or int(value) < 1:
        state = "no TransformerConfig was given" if config is None else f"the TransformerConfig says {key}={value}"
        raise MolsConfigError(
            f"parameter {name!r} is a fused projection whose rows are read from {key!r}, but {state}; "
            "give the config that the model was built with or add a rule for this parameter"
        )
    return int(value)


class _Configs:
    """Configs of the model and of its modules: towers, and layers of a heterogeneous model, have their own."""

    def __init__(self, model: object | None, modules: Mapping[str, object]) -> None:
        self.model, self.modules = model, modules

    def of(self, name: str) -> object | None:
        """Return the config of the module with parameter `name`. Raises MolsConfigError for a tower without one."""
        module = strip_wrappers(name)
        tower = tower_of(module)
        while module:
            module = module.rpartition(".")[0]
            if module in self.modules:
                return self.modules[module]
        if tower is not None:
            raise MolsConfigError(
                f"parameter {name!r} is in a tower ({tower}) of its own config, which was not given: pass "
                "`modules` (module name -> its config) or add a rule for this parameter"
            )
        per_layer, match = getattr(self.model, "get_config_for_layer", None), _DECODER_LAYER.search(name)
        if match is None or not callable(per_layer):
            return self.model
        layer_config: object = per_layer(int(match[1]) + 1)  # Megatron counts layers from 1
        return layer_config


def module_configs(model: nn.Module) -> dict[str, dict[str, int]]:
    """Return the configs of modules whose config differs from the enclosing module's.

    Returns:
        Module name without wrapper prefixes ("" for the model) -> key in CONFIG_KEYS that is set -> value.
    """
    found: dict[str, dict[str, int]] = {}
    around: dict[str, dict[str, int] | None] = {}
    for raw, module in model.named_modules():
        name = strip_wrappers(raw + ".").rstrip(".")
        parent = around.get(name.rpartition(".")[0]) if name else None
        config = getattr(module, "config", None)
        mine = parent
        if config_value(config, "num_attention_heads") is not None:
            mine = {key: value for key in CONFIG_KEYS if isinstance(value := config_value(config, key), int)}
        around[name] = mine
        if mine is not None and mine != parent:
            found[name] = mine
    return found


def _tensor_parallel(name: str, config: object | None, **parts: int) -> int:
    """Return tensor_model_parallel_size (default 1). Raises MolsConfigError unless it divides the rows of each part."""
    size = int(config_value(config, "tensor_model_parallel_size") or 1)
    for part, rows in parts.items():
        if rows % size:
            raise MolsConfigError(
                f"parameter {name!r}: tensor_model_parallel_size={size} does not divide {part}={rows}; "
                "choose another size"
            )
    return size


def _head_size(name: str, config: object | None) -> int:
    """Return the features per attention head (kv_channels; TransformerConfig has a default for it)."""
    if config_value(config, "kv_channels") is not None:
        return _need(name, config, "kv_channels")
    return _need(name, config, "hidden_size") // _need(name, config, "num_attention_heads")


def _checked(name: str, rows: int, periods: int, pattern: Pattern, formula: str) -> Pattern:
    """Return the pattern. Raises MolsConfigError unless `periods` repetitions fill the parameter's rows exactly."""
    expected = periods * sum(length for length, _ in pattern)
    if rows != expected:
        raise MolsConfigError(
            f"parameter {name!r} has {rows} rows, but the TransformerConfig gives {expected} = {formula}; "
            "give the config that the model was built with and the unsharded shape, or add a rule for this parameter"
        )
    return pattern


# ------------------------------------------------------------------------------------------------- fused projections


def _linear_qkv(name: str, rows: int, config: object | None) -> Pattern:
    """SelfAttention.linear_qkv: per query group [queries | (output gates) | key | value]."""
    heads, size = _need(name, config, "num_attention_heads"), _head_size(name, config)
    groups = heads if config_value(config, "num_query_groups") is None else _need(name, config, "num_query_groups")
    if heads % groups:
        raise MolsConfigError(
            f"parameter {name!r}: num_query_groups={groups} does not divide num_attention_heads={heads}; "
            "correct the TransformerConfig"
        )
    queries = heads // groups * size
    if config_value(config, "attention_output_gate"):
        pattern: Pattern = ((queries, "qk"), (queries, "vo"), (size, "qk"), (size, "vo"))
        formula = f"{groups} query groups x (2 x {heads // groups} + 2) x {size} (queries and gates, key, value)"
    else:
        pattern = ((queries + size, "qk"), (size, "vo"))
        formula = f"{groups} query groups x ({heads // groups} + 2) x {size} (queries, key, value)"
    return _checked(name, rows, groups, pattern, formula)


def _linear_kv(name: str, rows: int, config: object | None) -> Pattern:
    """CrossAttention.linear_kv: per head [key | value], without grouped queries."""
    heads, size = _need(name, config, "num_attention_heads"), _head_size(name, config)
    return _checked(name, rows, heads, ((size, "qk"), (size, "vo")), f"{heads} heads x 2 x {size} (key, value)")


def _mla_kv_down(name: str, rows: int, config: object | None) -> Pattern:
    """MLA linear_kv_down_proj: [latent of keys and values | rotary part of the key]."""
    latent, rope = _need(name, config, "kv_lora_rank"), _need(name, config, "qk_pos_emb_head_dim")
    formula = f"kv_lora_rank {latent} + qk_pos_emb_head_dim {rope}"
    return _checked(name, rows, 1, ((latent, "vo"), (rope, "qk")), formula)


def _mla_kv_up(name: str, rows: int, config: object | None) -> Pattern:
    """MLA linear_kv_up_proj: per head [key without rotary part | value]."""
    heads = _need(name, config, "num_attention_heads")
    key, value = _need(name, config, "qk_head_dim"), _need(name, config, "v_head_dim")
    formula = f"{heads} heads x (qk_head_dim {key} + v_head_dim {value})"
    return _checked(name, rows, heads, ((key, "qk"), (value, "vo")), formula)


def _mla_qkv_down(name: str, rows: int, config: object | None) -> Pattern:
    """FusedMLASelfAttention.linear_qkv_down_proj (from 0.17 on, sharded from 0.19 on).

    Per tensor-parallel rank: [query latents | its part of (latent of keys and values | rotary key)].
    """
    query, latent = _need(name, config, "q_lora_rank"), _need(name, config, "kv_lora_rank")
    rope = _need(name, config, "qk_pos_emb_head_dim")
    both = latent + rope
    ranks = _tensor_parallel(name, config, q_lora_rank=query, kv_lora_rank_and_qk_pos_emb_head_dim=both)
    local, pattern = both // ranks, []
    for rank in range(ranks):
        latents = min(max(latent - rank * local, 0), local)
        pattern += [(query // ranks, "qk"), (latents, "vo"), (local - latents, "qk")]
    formula = f"q_lora_rank {query} + kv_lora_rank {latent} + qk_pos_emb_head_dim {rope}"
    return _checked(name, rows, 1, tuple(part for part in pattern if part[0]), formula)


def _delta_net(name: str, rows: int, config: object | None) -> Pattern:
    """GatedDeltaNet.in_proj: per tensor-parallel rank [query | key | value | gate z | beta | alpha]."""
    keys = _need(name, config, "linear_key_head_dim") * _need(name, config, "linear_num_key_heads")
    heads = _need(name, config, "linear_num_value_heads")
    values = _need(name, config, "linear_value_head_dim") * heads
    ranks = _tensor_parallel(name, config, linear_keys=keys, linear_num_value_heads=heads)
    pattern = ((2 * keys // ranks, "qk"), (2 * values // ranks, "vo"), (2 * heads // ranks, "other"))
    formula = f"2 x {keys} (query, key) + 2 x {values} (value, gate) + 2 x {heads} (beta, alpha)"
    return _checked(name, rows, ranks, pattern, formula)


# -------------------------------------------------------------------------------------------------- the ordered rules


def _fused(pattern: RowPattern) -> Fused:
    """Make the target of a fused projection from `pattern` and the config of the parameter's module."""

    def rows_of(name: str, rows: int, config: object | None) -> Pattern:
        return pattern(name, rows, config.of(name) if isinstance(config, _Configs) else config)

    return Fused(rows_of)


def _rule(names: str, target: str | RowPattern, leaf: str = r"\.weight") -> Rule:
    """Make a rule on the last components of a name."""
    return Rule(re.compile(rf"(?:^|\.)(?:{names}){leaf}$"), target if isinstance(target, str) else _fused(target))


MEGATRON_RULES: tuple[Rule, ...] = (
    # As a whole: a Mamba mixer has its own in_proj, out_proj and convolutions.
    Rule(re.compile(r"(?:^|\.)(?:\w*mixer|indexer|router)\."), "other"),
    # Biases. Grouped experts have `bias0`, `bias1`... or one 2-D `bias`.
    Rule(re.compile(r"(?:^|[._])bias\d*$"), "other"),
    # Fused projections.
    _rule("linear_qkv", _linear_qkv),
    _rule("linear_kv", _linear_kv),
    _rule("linear_kv_down_proj", _mla_kv_down),
    _rule("linear_kv_up_proj", _mla_kv_up),
    _rule("linear_qkv_down_proj", _mla_qkv_down),
    _rule(r"self_attention\.in_proj", _delta_net),
    _rule(r"embedding\.(?:word|position|tokentype)_embeddings", "embedding"),
    # Patches, positions and frames of a vision tower.
    _rule(r"conv1|patch_embed\.proj|pos_embed|position_embeddings|(?:video_)?embedder", "embedding", r"(?:\.weight)?"),
    _rule("output_layer|binary_head", "head"),
    # Weights outside the paper's groups.
    _rule(r"eh_proj|conv1d|relative_attention_bias", "other"),
    _rule("shared_experts", "other", r"\.gate_weight"),
    _rule(r"lm_head\.dense|pooler\.dense", "other"),
    # Separate projections: cross-attention, MLA, GatedDeltaNet, adapters of linear_qkv.
    _rule(r"linear_[qk]|linear_q_proj|linear_q_down_proj|linear_q_up_proj", "qk"),
    _rule(r"linear_v|linear_proj|self_attention\.out_proj", "vo"),
    # Dense, shared and routed MLPs. Grouped experts: weight0, weight1... or one `weight` (linear_fc1 of Transformer
    # Engine), weight1 and weight2 (GroupedMLP, up to 0.16).
    _rule("linear_fc1|linear_fc2", "mlp", r"\.weight\d*"),
    _rule("experts", "mlp", r"\.weight[12]"),
    _rule("fc1_latent_proj|fc2_latent_proj", "mlp"),
    # Heterogeneous models can replace an attention or MLP by one linear layer.
    _rule("self_attention", "vo"),
    _rule("mlp", "mlp"),
)
"""The first match wins. Without a match, a 1-D parameter (norm) is `other` and a weight matrix raises."""


def _mtp_suffix(layer: int) -> Callable[[str], str]:
    """Return the map from a key of granularity "layer_type" to the key with this layer number."""
    return lambda key: key if (base := base_group(key)) == key else f"{base}.{layer}"


def tag_layouts(
    shapes: Mapping[str, Sequence[int]],
    config: object | None,
    rules: Sequence[Sequence[str]] | None = None,
    granularity: Granularity = "type",
    modules: Mapping[str, object] | None = None,
    frozen: Iterable[str] = (),
) -> dict[str, ElementLayout]:
    """Assign the elements of each logical parameter of a Megatron-core model to module groups.

    Args:
        shapes: logical name (global layer and expert numbers, `module.` prefixes allowed) -> unsharded shape. All names
            of the model, not of one pipeline stage: a user's rule that decides nothing raises.
        config: TransformerConfig or MLATransformerConfig of the model, or a mapping with the same keys.
        rules: the user's (regular expression, group), tried before MEGATRON_RULES.
        granularity: "type", or "layer_type", which numbers the decoder's layers from 0 ("qk.3") and the layers of
            multi-token prediction after them ("qk.<num_layers>" is the first), as in DeepSeek-V3's checkpoints.
        modules: module name -> its config, for modules with another config than the model's (`module_configs`).
        frozen: names of frozen parameters. They help to find towers next to a language model.

    Returns:
        Logical name -> layout, in the order of `shapes`.

    Raises:
        MolsConfigError: as `mols_ds.core.groups.build_layouts`; and where a fused projection's rows do not fit the
            config, with the parameter and both numbers.
    """
    names = [*shapes, *frozen]
    configs = _Configs(config, modules or {})
    layouts = build_layouts(shapes, configs, rules, granularity, presets=MEGATRON_RULES, names=names)
    if granularity == "layer_type":
        for name, layout in layouts.items():
            if match := _MTP_LAYER.search(strip_wrappers(name)):
                first = _need(name, config, "num_layers")
                layouts[name] = layout.relabel(_mtp_suffix(first + int(match[1])))
    return layouts


def tag_table(
    model: nn.Module | Sequence[nn.Module],
    config: object | None = None,
    rules: Sequence[Sequence[str]] | None = None,
    granularity: Granularity = "type",
) -> GroupTable:
    """Build the group table of an unsharded Megatron-core model. Tied parameters count once, under the first name.

    Args:
        model: the model, or the list of its only chunk; wrapped or not; on any device, also the meta device.
        config: the model's TransformerConfig. None: read it from the model.
        rules: as in `tag_layouts`.
        granularity: as in `tag_layouts`.

    Returns:
        One row per group: parameters, elements, share of all trainable elements.

    Raises:
        MolsConfigError: several chunks, a parallel size above 1 in the config (for sharded models use
            `megatron_patches.attach(...).report()`), or no trainable parameters; and as `tag_layouts`.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    if len(chunks) != 1:
        raise MolsConfigError(
            f"tag_table takes a whole model, not {len(chunks)} chunks of one; build the model without pipelining"
        )
    modules: dict[str, object] = {**module_configs(chunks[0])}
    if config is None:
        config = _find_config(chunks[0])
    else:
        modules[""] = config
    for key in (f"{ranks}_parallel_size" for ranks in _PARALLEL):
        if int(config_value(config, key) or 1) > 1:
            raise MolsConfigError(
                f"tag_table takes a whole model, but its config has {key}={config_value(config, key)}; "
                "build the model with size 1 (the meta device is enough)"
            )
    shapes = {name: tuple(p.shape) for name, p in chunks[0].named_parameters() if p.requires_grad}
    layouts = tag_layouts(shapes, config, rules, granularity, modules, frozen_names(chunks[0]))
    return GroupTable(layouts, shapes)


def frozen_names(model: nn.Module) -> list[str]:
    """Return one name per kind (name without layer and expert numbers) of frozen parameter."""
    names = (strip_wrappers(name) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return list({kind_of(name): name for name in names}.values())


def _find_config(model: nn.Module) -> object | None:
    """Return the TransformerConfig of the outermost module that has one."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config_value(config, "num_attention_heads") is not None:
            return config
    return None
