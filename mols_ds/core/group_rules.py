"""Rules that map the weights of a transformers model (or a plain nanoGPT-like one) to module groups.

A rule matches the full path of a parameter, without wrapper prefixes and adapters (`canonical_name`). The first match
wins. In a module that no rule matches, queries, keys and values are recognized by each other (`_sibling_group` in
groups.py). Without a match a vector (norm, bias) is `other` and a weight matrix raises: a leaf name such as `out_proj`
does not identify a module.

To add a family, add one entry below and one row in tests/engines/transformers/placements.py. `_rule(names, target)`
matches the last components of the path, `inside=` the modules before them. `_under(names)` matches everything inside a
module. `families=` restricts an entry to a model_type.

Decisions: biases are `other`, because the paper's groups are weight matrices. Output gates of attention scale the
values: `vo`. Linear attention (GatedDeltaNet, KDA, lightning attention) has queries, keys and values; its decay and
write strength are `other`. Everything outside the paper's groups is `other` (measured, not scaled): state-space mixers
(Mamba, RG-LRU, mLSTM, RWKV's time mixing, gated short convolutions) as a whole, convolutions, routers, indexers of
sparse attention (they have their own loss), relative positions, hyper-connections, the dense layer before an output
layer, poolers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mols_ds.core import group_layouts as fused
from mols_ds.core.group_layouts import LayoutError, Pattern, PatternOf, config_value, text_config, whole
from mols_ds.core.layout import ElementLayout
from mols_ds.core.param_names import CanonicalName, canonical_name, strip_wrappers
from mols_ds.errors import MolsConfigError

__all__ = [
    "PRESETS",
    "CanonicalName",
    "Fused",
    "Pattern",
    "Rule",
    "canonical_name",
    "config_value",
    "strip_wrappers",
    "text_config",
]


class Fused(NamedTuple):
    """Layout of a parameter whose output features belong to several groups.

    pattern: maps the output features to groups, see `group_layouts`.
    long_axis: the output features are the longer of two dimensions (`Conv1D` stores them last, `nn.Linear` first).
    False: they are dimension 0.
    by_heads: the number of key and value heads must be in the config, unless there are three output features for each
    input feature.
    """

    pattern: PatternOf
    long_axis: bool = False
    by_heads: bool = False

    def layout(self, name: str, shape: tuple[int, ...], config: object | None, adapter: bool = False) -> ElementLayout:
        """Return the layout of parameter `name`. With `adapter` (lora_B, DoRA magnitude) dimension 0 is the output."""
        if not shape:
            raise MolsConfigError(f"parameter {name!r} is a scalar with the name of a fused projection; add a rule")
        axis = 1 if self.long_axis and not adapter and len(shape) == 2 and shape[1] > shape[0] else 0
        try:
            inputs = shape[1 - axis] if len(shape) > 1 else 1  # 1 for a bias
            if self.by_heads and not adapter and inputs > 1 and shape[axis] != 3 * inputs:
                fused.need_kv_heads(name, shape, shape[axis], config)
            pattern = self.pattern(name, shape[axis], config)
        except LayoutError as error:
            raise MolsConfigError(str(error)) from None
        inner = math.prod(shape[axis + 1 :])
        lengths = [length for length, _ in pattern]
        if inner == 0 or min(lengths) < 1 or shape[axis] % sum(lengths):
            raise MolsConfigError(
                f"parameter {name!r} of shape {list(shape)} does not divide into {pattern}; add a rule"
            )
        return ElementLayout(inner, pattern)


class Rule(NamedTuple):
    """Search `regex` in the canonical name. `applies` (shape, config) can reject a match; None accepts every match.

    unless_beside: names of weights. The rule does not apply to a module that has one of them.
    """

    regex: re.Pattern[str]
    target: str | Fused
    applies: Callable[[tuple[int, ...], object | None], bool] | None = None
    unless_beside: tuple[str, ...] = ()


# -------------------------------------------------------------------------------------------------- helpers for entries


def _rule(
    names: str,
    target: str | Fused,
    applies: Callable[[tuple[int, ...], object | None], bool] | None = None,
    *,
    inside: str = "",
    families: Sequence[str] = (),
) -> Rule:
    """Make a rule on the last components of the path, directly inside the module `inside`: `x` or `x.weight`."""
    before = rf"(?:^|\.)(?:{inside})\." if inside else r"(?:^|\.)"
    return Rule(re.compile(rf"{before}(?:{names})(?:\.weight)?$"), target, _of(families) if families else applies)


def _under(names: str, target: str = "other", *, families: Sequence[str] = ()) -> Rule:
    """Make a rule on everything inside a module with one of these names."""
    return Rule(re.compile(rf"(?:^|\.)(?:{names})\."), target, _of(families) if families else None)


def _of(families: Sequence[str]) -> Callable[[tuple[int, ...], object | None], bool]:
    return lambda shape, config: config_value(config, "model_type") in families


def _is_router(shape: tuple[int, ...], config: object | None) -> bool:
    """Return whether a weight named `gate` is a router (one row per expert) and not the gate of a gated MLP."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
    experts = config_value(config, *keys)
    counts = experts if isinstance(experts, list | tuple) else [experts]
    return len(shape) == 2 and any(count is not None and shape[0] == whole(count, *keys) for count in counts)


# Parent modules in the path. An attention module may have its projections in a submodule.
_ATTENTION = (
    r"(?:\w*_)?(?:(?:self|cross|co|x|enc|inter|intra|temporal|spatial|window)?_?attn|\w*attentions?|\w*Attention|self_att)"
    r"(?:_layers?|_block)?(?:_?\d+)?(?:\.(?:self|attention|attn|output|self_attention|multihead_attn|\d+|qkv_proj|"
    r"\w*_self_attn))*"
)
_MLP = (
    r"(?:\w*_)?(?:mlps?|moe|feed_?forward\d?|ffns?\d?|ff\d?|experts?|DenseReluDense|PositionwiseFeedForward)"
    r"(?:_block|_layer|_in|_out|_macaron)?(?:\.(?:experts?|shared(?:_experts?)?|expert_\d+|dense|ffn|mlp|w_in|net|ff|\d+))*"
)
_LAYER_ITSELF = r"\d+"  # such as layers.3; a PipelineModule numbers its layers
_NUMBERED = r"(?:layers?|h|blocks?)\.\d+"
_FUSED_QUERIES = ("qkv", "Wqkv")

_GRANITE_SPEECH = ("granite_speech", "granite_speech_plus", "granite_speech5_ctc", "granite_speech5_encoder")

_OTHER: tuple[Rule, ...] = (
    # Biases first: some are 2-D (one row per expert).
    Rule(re.compile(r"(?:^|[._])bias(?:es)?(?:\d+|_[a-z]\w*)?$"), "other"),
    # Norms with weight matrices (A.X K2's gated norm, adaptive norms).
    _under(r"(?!norm_)(?:\w+_)?(?:layer|rms|batch|group|ada)?_?norm(?:\d|_in|_out)?"),  # not DBRX's norm_attn_norm
    # Routers and router MLPs.
    _under(r"(?:\w*_)?routers?"),
    _under(rf"(?:{_MLP})\.gate\.(?!weight$)\w+"),  # a gate module with several layers
    _rule(r"router|\w*_router|shared_expert_gate|shared_gate|wg|expert_gate|router_weights?", "other"),
    Rule(re.compile(r"(?:^|\.)gate(?:\.weight)?$"), "other", _is_router),
    _rule(r"mlp\.gate", "other", families=("inkling_text",)),  # also has rows for shared experts
    # Indexers of sparse attention; DeepSeek-V4's pooling of keys and values.
    _under(r"(?:\w*_)?indexer|scorer|forget_gate"),
    _rule(r"compressor\.(?:gate_proj|position_bias)", "other"),
    # Nemotron-H calls every layer `mixer`: the names of the weights identify attention and MLP layers.
    _rule(r"q_proj|k_proj", "qk", inside="mixer"),
    _rule(r"v_proj|o_proj", "vo", inside="mixer"),
    _rule(r"(?:experts\.|shared_experts\.)?(?:up_proj|down_proj|gate_proj|gate_up_proj)", "mlp", inside="mixer"),
    _rule(r"fc[12]_latent_proj", "mlp", inside="mixer"),
    # State-space and recurrent mixers as a whole, and short convolutions; not what contains attention, an MLP or
    # whole layers, and not flash-attn's attention, which it calls `mixer`.
    Rule(
        re.compile(
            r"(?:^|\.)(?:mamba\w*|mixer|ssm|ssm_\w+|rg_lru|mlstm_layer|slstm_layer|lstm|\w+_lstm|gru|rnn|conv|conv_module)"
            rf"\.(?!(?:.*\.)?(?:{_ATTENTION}|{_MLP}|\w*{_NUMBERED})\.)"
        ),
        "other",
        unless_beside=_FUSED_QUERIES,
    ),
    _rule(r"linear_x|linear_y|linear_out|conv_1d", "other", inside="temporal_block"),  # RecurrentGemma's RG-LRU block
    _rule(r"\w+", "other", inside="attention", families=("rwkv",)),
    _rule(r"time_mix_\w+", "other"),
    _rule(r"linear", "other", inside=r"layers\.\d+", families=("zamba", "zamba2")),
    # Decay, write strength and forget gates of linear attention.
    _rule(
        r"a_proj|b_proj|f_proj|f_a_proj|f_b_proj|in_proj_a|in_proj_b|in_proj_ba|dt_proj|A_log|A|D",
        "other",
        inside=_ATTENTION,
    ),
    # Relative positions and the biases of attention's logits.
    _rule(
        r"\w*relative_(?:attention|pos|position|logits|k)\w*(?:\.\w+)?|rel_(?:pos|logits|embed|l2|attn_embed)\w*(?:\.\w+)?|"
        r"emb_rel_[kv]|r|r_proj|r_kernel|linear_pos|seg_embed|pe_k|distance_embedding|pos_(?:key_|query_|q_)?proj|"
        r"\w*position_bias\w*(?:\.\w+)*|sink_proj|\w*l2_clip\.scale",
        "other",
    ),
    # Hyper-connections, residual mixing and per-layer inputs (DeepSeek-V4, Gemma 3n, Gemma 4, Inkling).
    _under(r"\w+_hc|hc_head|\w*hyper_connection\w*|altup|laurel"),
    _rule(r"per_layer_\w+|ple\.(?:key|value)_proj|altup_\w+(?:\.\d+)?|(?:attention|mlp)_input\.query", "other"),
    # Dense layers before an output layer, poolers, projections of embeddings.
    _rule(r"out|out_mid", "other", inside="encoder", families=_GRANITE_SPEECH),
    _rule(r"proj", "other", inside="decoder", families=("cohere_asr",)),
    _rule(
        r"downsample\.reduction|upsample\.projection|\w*sequence_reduction|gru_rel_pos_linear|temporal_dense|"
        r"classifier\.linear_hidden|(?:head|projection_head)\.linear[12]|xpath_unitseq2_inner|inner2emb|"
        r"contact_head\.regression|(?:audio_)?enc_to_dec_proj",
        "other",
    ),
    _rule(r"dense", "other", families=("eurobert",)),
    _under(r"pooler|\w+_pooler|transform(?=\.dense\.)|sequence_summary|\w+_summary"),
    _rule(
        r"(?:lm_head|classifier|classification_head|head|cls\.predictions|predictions|generator_predictions|"
        r"projection_head)\.dense(?:_\d)?|pooler|pre_classifier|vocab_transform|embeddings_project|"
        r"embedding_hidden_mapping_in|embedding_transformation|map_inputs_layer|patch_embedding_projection|entity_embedding_dense|embedding_projection|embeddings\.projection|eh_proj",
        "other",
    ),
)

_EMBEDDINGS: tuple[Rule, ...] = (
    _rule(
        r"wte|wpe|tok_emb|pos_emb|token_emb|pos_embed|(?:embed|word_embed|tokens_embed|positions_embed)(?!_out)(?:_\w+)?|"
        r"\w*embeddings?(?:_\w*\d)?|segment_emb|HashBucketCodepointEmbedder_\d|\w+_embeddings\.\d+|embed_tokens\w*(?:\.\d+)?|embed_positions\w*|position_embeds?_layer",
        "embedding",
    ),
    Rule(re.compile(rf"^(?!.*{_NUMBERED}\.)(?:.*\.)?shared(?:\.weight)?$"), "embedding"),  # T5
    _rule(r"\w+_embed|\w+_embedder", "embedding", inside=r"(?:\w*_)?embeddings?"),
    # Patches of an image, frames of a sound.
    _rule(
        r"proj|projection|patch_embeddings?|patch_projection|convolution|input_proj",
        "embedding",
        inside=r"(?:\w*_)?(?:patch_embed(?:dings?|der|ding)?|embed_patches)(?:\.\d+)?",
    ),
    _rule(r"patch_conv|patch_embed|patch_projection|embeddings\.proj|vision_embed_tokens", "embedding"),
    _rule(
        r"feature_projection(?:\.projection)?|subsampler\.dense_\d|embeddings\.register_tokens|subsampling\.linear|input_embeds_layers?(?:\.\d+)?|embeddings\.latents|"
        r"position_embeddings\.weights\.\d|patch_embeddings\.(?:up|down)_proj",
        "embedding",
    ),
    _rule(r"input_linear", "embedding", inside="encoder", families=_GRANITE_SPEECH),
    _rule(r"w", "embedding", inside="transformer", families=("ctrl",)),
    _rule(r"prompt_encoder\.[^.]+\.\w*embedding", "embedding"),  # peft's prompt tuning
)

_CONVOLUTIONS = (
    _rule(r"subsampling\.layers\.\d+", "other"),
    # Everything inside a convolution, except attention and MLPs (a backbone may be called conv_encoder).
    Rule(
        re.compile(
            r"(?:^|\.)(?:convs\d?|convolutions?|conv_\w+|\w+_s?conv|\w+_convolution|short_conv\w*)"
            r"\.(?!.*(?:attn|attention|mlp|ffn|embed\w*)\.)"
        ),
        "other",
    ),
    _rule(r"\w*conv(?:olution)?s?(?:_?\d+d?\d*)?(?:_\w+)?|depthwise|pointwise", "other"),
)

_HEADS: tuple[Rule, ...] = (
    _rule(
        r"lm_head|embed_out|output_layer|output_projection|generator_lm_head|lm_loss|vocab_projector|ctc_head|"
        r"codec_head|proj_out|logits_dense|unembedding_projection|qa_outputs|score|summary|v_head",
        "head",
    ),
    _rule(r"(?:\w*\.)?(?:predictions|entity_predictions|lm_head|head)\.decoder|pred_layer\.proj|lm_heads\.\d+", "head"),
    _rule(
        r"(?:classifier|classification_head|cls_head|score)(?:\.(?:out_proj|summary|\d+|linear|linear_out|classifier))?|"
        r"cls\.seq_relationship|lm_head\.out_proj|distillation_classifier|cls_classifier|logits_proj",
        "head",
    ),
    Rule(re.compile(r"^(?:model\.)?(?:output|head|decoder)\.weight$"), "head"),
)

# model_type -> order of the rows in a fused query, key and value projection.
_QUERY_KEY_VALUE = dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "persimmon", "bloom"), fused.per_head)
_QUERY_KEY_VALUE |= {"falcon": fused.falcon}
_QKV_PROJ = {
    "phi3": fused.grouped,
    "phi4_multimodal": fused.grouped,
    "minimax": fused.per_head,
    "codegen": fused.codegen,
}
_QUERY_AND_GATE = ["qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"]
_QUERY_AND_GATE += ["qwen4_exp_text"]

_FUSED: tuple[Rule, ...] = (
    _rule("c_attn", Fused(fused.halves, long_axis=True), inside="crossattention"),  # GPT-2: the query is q_attn
    _rule("c_attn", Fused(fused.c_attn, long_axis=True, by_heads=True)),
    _rule("query_key_value", Fused(fused.by_family(_QUERY_KEY_VALUE))),
    _rule("qkv_proj", Fused(fused.by_family(_QKV_PROJ))),
    _rule(r"qkv_linear\.wqkv", Fused(fused.torchtitan), inside=_ATTENTION),
    _rule("|".join(_FUSED_QUERIES), Fused(fused.qkv, by_heads=True), inside=rf"mixer|{_ATTENTION}"),
    _rule("att_proj", Fused(fused.thirds), inside=_ATTENTION, families=("bark",)),
    _rule("in_proj", Fused(fused.per_head), inside=_ATTENTION, families=("deberta",)),
    _rule("in_proj_weight", Fused(fused.thirds)),
    _rule("kv_a_proj_with_mqa", Fused(fused.mla_kv_a)),
    _rule("kv_b_proj", Fused(fused.mla_kv_b)),
    _rule("q_gate_proj", Fused(fused.mla_query_gate), inside=_ATTENTION, families=("axk2",)),
    _rule("kv_proj|compressor.kv_proj", "vo", inside=_ATTENTION, families=("deepseek_v4",)),
    _rule("kv_proj", Fused(fused.halves), inside=_ATTENTION, families=("jetmoe",)),
    _rule("to_kv", Fused(fused.halves), inside=_ATTENTION),
    _rule("q_proj", Fused(fused.query_gate), inside="self_attn", families=_QUERY_AND_GATE),
    _rule("in_proj_qkvz", Fused(fused.delta_net_qkvz), inside="linear_attn"),
    _rule("in_proj_qkv", Fused(fused.delta_net_qkv), inside="linear_attn"),
)

_MLPS: tuple[Rule, ...] = (
    # JetMoe's mixture of attention heads: the experts of a self_attention are query and output projections.
    _rule("input_linear", "qk", inside=r"self_attention\.experts", families=("jetmoe",)),
    _rule("output_linear", "vo", inside=r"self_attention\.experts", families=("jetmoe",)),
    # Experts are 3-D `experts.gate_up_proj` and `experts.down_proj` since transformers 5.
    _rule(
        r"gate_proj|up_proj|down_proj|gate_up_proj|c_fc|c_proj|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h|"
        r"w[123]|w_[01]|w_out|wi(?:_\d)?|wo|Wi|Wo|lin[12]|linear_?[12]|dense_?[12]|layer_[12]|input_linear|"
        r"output_linear|in_proj|out_proj|proj_up|proj_down|proj_up_gate|intermediate(?:_dense)?|output(?:_dense)?|"
        r"(?:intermediate|output)\.dense|pre_expert_proj|post_expert_proj|proj_(?:in|out)|fc[12]_latent_proj|linear_fc[12]|key|value|receptance|v1|\d+",
        "mlp",
        inside=_MLP,
    ),
    _rule(
        r"fc1|fc2|fc_in|fc_out|linear1|linear2", "mlp", inside=_LAYER_ITSELF
    ),  # BART, torch's TransformerEncoderLayer
    _rule(
        r"(?:intermediate|output|intermediate_query|output_query|layout_intermediate|layout_output|ffn|ffn_output|"
        r"output\.bottleneck|bottleneck\.input)"
        r"(?:\.dense)?",
        "mlp",
        inside=_LAYER_ITSELF,
    ),  # BERT
    _rule(
        r"dense_h_to_4h|dense_4h_to_h|c_fc|gate_up_proj|up_proj|down_proj|gate_proj|w1|w2|w3",
        "mlp",
        inside=_LAYER_ITSELF,
    ),
    # Projectors between towers: two linear layers, under many names.
    _rule(
        r"(?:\w*_)?linear_?(?:fc)?[12]?|mlp\.\d+|fc[12]|proj|(?:down|up|gate)_proj",
        "mlp",
        inside=r"(?:\w*_)?(?:projector|connector|aligner|mergers?(?:_list)?|modality_projection|adapter)(?:\.\d+)?",
    ),
    _rule(r"gate_up_proj_adapter_list\.\d+\.\d+", "mlp", inside=_MLP),  # Zamba2's adapters of shared layers
    _rule(r"adapter_modules\.\w+\.dense[12]", "mlp"),  # X-MOD
    _rule(_MLP, "mlp"),
)

_ATTENTIONS: tuple[Rule, ...] = (
    _rule(
        r"(?:q_proj|k_proj|q_a_proj|q_b_proj|q_attn|wq|wk|wq_[ab]|Wq|Wk|query|key|q_lin|k_lin|query_proj|key_proj|"
        r"project_[qk]|to_q|to_k|to_query|to_key|[qk]_head|(?:query|key)_global|layout_(?:query|key)|projection_(?:query|key)|linear_[qk]|"
        r"query_key|[we]2[we]_query|q|k)(?:\.linear)?",
        "qk",
        inside=_ATTENTION,
    ),
    _rule(
        r"(?:v_proj|o_proj|out_proj|wv|wo|Wv|Wo|value|c_proj|dense|proj|output|v_lin|out_lin|value_proj|project_v|"
        r"attention_out|to_v|to_out|to_value|v_head|post_proj|value_global|layout_value|layout_output\.dense|"
        r"output_projection\.(?:o_proj|gate_proj)|projection_value|linear_v|linear_out|"
        r"o_a_proj|o_b_proj|v_proj_current|v_proj_delayed|projection|projection_layer|final_proj|v|o|"
        r"gate_proj|g_proj|g_a_proj|g_b_proj|output_gate|in_proj_z|to_out\.\d)(?:\.linear)?",
        "vo",
        inside=_ATTENTION,
    ),
    _rule(r"linear_[qk]_adapter_list\.\d+\.\d+", "qk", inside=_ATTENTION),
    _rule(r"linear_v_adapter_list\.\d+\.\d+", "vo", inside=_ATTENTION),
    _rule(r"query|key_\w+", "qk", inside="adapter", families=("evolla",)),
    _rule(r"value_\w+|out_proj", "vo", inside="adapter", families=("evolla",)),
    _rule(r"q_proj|k_proj", "qk", inside=r"self_attn\.qkv_proj|temporal_block|" + _LAYER_ITSELF),
    _rule(r"v_proj|o_proj", "vo", inside=r"temporal_block|" + _LAYER_ITSELF),
)

_WITHOUT_BLOCKS: tuple[Rule, ...] = tuple(  # a small model whose layer is the model, or an entry of an nn.Sequential
    Rule(re.compile(rf"^(?:(?:\d+|model|net|body|backbone|transformer)\.)*(?:{names})(?:\.weight)?$"), group)
    for names, group in (("q_proj|k_proj", "qk"), ("v_proj|o_proj", "vo"), ("(?:gate|up|down)_proj", "mlp"))
)

PRESETS: tuple[Rule, ...] = (
    *(*_OTHER, *_EMBEDDINGS, *_CONVOLUTIONS, *_HEADS, *_FUSED, *_MLPS, *_ATTENTIONS),
    *_WITHOUT_BLOCKS,
)
"""First match wins."""
