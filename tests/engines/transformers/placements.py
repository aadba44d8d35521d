"""Which weight of which family is in which group, written by hand from the modeling files of transformers 5.23.

A family is its config's model_type with the groups of all weights of two dimensions or more, biases left out. A line is
`group: names`. A name is the end of a parameter's path without `.weight`, with N for numbers; the longest name that
fits decides, and `tower/name` fits inside a module called `tower` only. A fused weight has its rows in order, as in
`qk256+vo256`: 256 rows of qk, 256 of vo, and again.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """What a line says: target, and the module that the parameter is in ("" for any)."""

    target: str
    inside: str


ATTENTION = """
    embedding: model.embed_tokens
    head: lm_head
    qk: self_attn.q_proj self_attn.k_proj
    vo: self_attn.v_proj self_attn.o_proj
"""
MLP = "    mlp: mlp.gate_proj mlp.up_proj mlp.down_proj\n"
EXPERTS = "    mlp: mlp.experts.gate_up_proj mlp.experts.down_proj\n"
SHARED = "    mlp: mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj\n"
GATE = "    other: mlp.gate\n"  # a router: one row for each expert
MAMBA = "    other: mamba.conv1d mamba.in_proj mamba.out_proj\n"
FEED_FORWARD = "    mlp: feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj\n"
EMBEDDINGS = "    embedding: model.embed_tokens\n    head: lm_head\n"
INDEXER = "    other: self_attn.indexer.wq_b self_attn.indexer.wk self_attn.indexer.weights_proj\n"

FAMILIES: dict[str, str] = {
    # gate_proj of the attention is the output gate (its sigmoid multiplies the attention's output)
    "afmoe": ATTENTION + MLP + EXPERTS + SHARED + "    vo: self_attn.gate_proj\n    other: mlp.router.gate",
    "hrm_text": ATTENTION + MLP + "    vo: self_attn.gate_proj",
    "beam": ATTENTION + MLP + EXPERTS + GATE + "    vo: self_attn.gate_proj",
    # q_proj: view(.., heads, 2 * head_dim), chunked into query and gate. GatedDeltaNet per key head: q, k, values, z
    "qwen3_next": ATTENTION.replace("self_attn.q_proj ", "")
    + EXPERTS
    + GATE
    + """
        qk256+vo256: self_attn.q_proj
        qk256+vo512: linear_attn.in_proj_qkvz
        vo: linear_attn.out_proj
        other: linear_attn.conv1d linear_attn.in_proj_ba mlp.shared_expert_gate
        mlp: mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj
    """,
    "qwen3_5_text": ATTENTION.replace("self_attn.q_proj ", "")
    + MLP
    + """
        qk256+vo256: self_attn.q_proj
        qk4096+vo4096: linear_attn.in_proj_qkv
        vo: linear_attn.in_proj_z linear_attn.out_proj
        other: linear_attn.conv1d linear_attn.in_proj_a linear_attn.in_proj_b
    """,
    "mamba2": """
        embedding: backbone.embeddings
        head: lm_head
        other: mixer.conv1d mixer.in_proj mixer.out_proj
    """,
    "jamba": EMBEDDINGS
    + FEED_FORWARD
    + MAMBA
    + """
        other: mamba.A_log mamba.x_proj mamba.dt_proj feed_forward.router
        mlp: feed_forward.experts.gate_up_proj feed_forward.experts.down_proj
    """,
    "falcon_h1": ATTENTION + FEED_FORWARD + MAMBA,
    "bamba": EMBEDDINGS + FEED_FORWARD + MAMBA,
    # every layer's block is called mixer: Mamba-2, attention, MLP or experts
    "nemotron_h": """
        embedding: model.embeddings
        head: lm_head
        qk: mixer.q_proj mixer.k_proj
        vo: mixer.v_proj mixer.o_proj
        mlp: mixer.up_proj mixer.down_proj mixer.experts.up_proj mixer.experts.down_proj
        mlp: mixer.shared_experts.up_proj mixer.shared_experts.down_proj
        other: mixer.conv1d mixer.in_proj mixer.out_proj mixer.gate
    """,
    "zamba2": ATTENTION
    + MAMBA
    + """
        mlp: feed_forward.gate_up_proj feed_forward.down_proj feed_forward.gate_up_proj_adapter_list.N.N
        other: layers.N.linear
    """,
    "granitemoehybrid": EMBEDDINGS
    + MAMBA
    + """
        mlp: block_sparse_moe.experts.gate_up_proj block_sparse_moe.experts.down_proj
        mlp: shared_mlp.input_linear shared_mlp.output_linear
        other: block_sparse_moe.router
    """,
    # temporal_block is an attention or an RG-LRU
    "recurrent_gemma": """
        embedding: model.embed_tokens
        qk: temporal_block.q_proj temporal_block.k_proj
        vo: temporal_block.v_proj temporal_block.o_proj
        mlp: mlp_block.gate_proj mlp_block.up_proj mlp_block.down_proj
        other: temporal_block.linear_x temporal_block.linear_y temporal_block.linear_out temporal_block.conv_1d
        other: rg_lru.input_gate_weight rg_lru.recurrent_gate_weight
    """,
    "rwkv": """
        embedding: rwkv.embeddings
        head: head
        mlp: feed_forward.key feed_forward.receptance feed_forward.value
        other: attention.key attention.value attention.receptance attention.output
        other: attention.time_mix_key attention.time_mix_value attention.time_mix_receptance
        other: feed_forward.time_mix_key feed_forward.time_mix_receptance
    """,
    "xlstm": """
        embedding: backbone.embeddings
        head: lm_head
        mlp: ffn.proj_up_gate ffn.proj_up ffn.proj_down
        other: mlstm_layer.q mlstm_layer.k mlstm_layer.v mlstm_layer.out_proj
        other: mlstm_layer.ogate_preact mlstm_layer.igate_preact mlstm_layer.fgate_preact
    """,
    "lfm3": """
        embedding: model.embed_tokens
        qk: self_attn.q_proj self_attn.k_proj
        vo: self_attn.v_proj self_attn.o_proj self_attn.g_proj
        mlp: feed_forward.w1 feed_forward.w2 feed_forward.w3
        other: conv.conv conv.in_proj conv.out_proj
    """,
    "deepseek_v32": EMBEDDINGS
    + MLP
    + EXPERTS
    + SHARED
    + GATE
    + INDEXER
    + """
        qk: self_attn.q_a_proj self_attn.q_b_proj
        vo: self_attn.o_proj
        vo512+qk64: self_attn.kv_a_proj_with_mqa
        qk128+vo128: self_attn.kv_b_proj
    """,
    # kv_proj makes one tensor that is key and value; the compressor pools it; hc: hyper-connections
    "deepseek_v4": EMBEDDINGS
    + EXPERTS
    + SHARED
    + GATE
    + """
        qk: self_attn.q_a_proj self_attn.q_b_proj
        vo: self_attn.kv_proj self_attn.o_a_proj self_attn.o_b_proj self_attn.compressor.kv_proj
        other: self_attn.compressor.gate_proj
        other: indexer.kv_proj indexer.gate_proj indexer.q_b_proj indexer.scorer.weights_proj
        other: attn_hc.fn ffn_hc.fn model.hc_head.hc_fn
    """,
    "longcat_flash": EMBEDDINGS
    + EXPERTS
    + """
        mlp: mlps.N.gate_proj mlps.N.up_proj mlps.N.down_proj
        other: mlp.router.classifier
        qk: self_attn.N.q_a_proj self_attn.N.q_b_proj
        vo: self_attn.N.o_proj
        vo512+qk64: self_attn.N.kv_a_proj_with_mqa
        qk128+vo128: self_attn.N.kv_b_proj
    """,
    # q_gate_proj: view(.., heads, qk_head_dim + v_head_dim), split into query and output gate; norms with a gate MLP
    "axk2": EMBEDDINGS
    + MLP
    + EXPERTS
    + SHARED
    + GATE
    + INDEXER
    + """
        qk: self_attn.q_a_proj
        vo: self_attn.o_proj
        qk96+vo64: self_attn.q_gate_proj
        vo128+qk32: self_attn.kv_a_proj_with_mqa
        qk64+vo64: self_attn.kv_b_proj
        other: input_layernorm.mlp.fc1 input_layernorm.mlp.fc2
        other: post_attention_layernorm.mlp.fc1 post_attention_layernorm.mlp.fc2
    """,
    "kimi_linear": ATTENTION
    + MLP
    + EXPERTS
    + SHARED
    + GATE
    + """
        vo: self_attn.g_a_proj self_attn.g_b_proj
        other: self_attn.conv1d self_attn.b_proj forget_gate.A_log forget_gate.f_a_proj forget_gate.f_b_proj
        vo512+qk64: self_attn.kv_a_proj_with_mqa
        qk128+vo128: self_attn.kv_b_proj
    """,
    "bailing_hybrid": ATTENTION
    + MLP
    + EXPERTS
    + SHARED
    + GATE
    + """
        vo: self_attn.g_proj
        other: self_attn.conv1d self_attn.b_proj forget_gate.f_proj
        vo512+qk64: self_attn.kv_a_proj_with_mqa
        qk128+vo128: self_attn.kv_b_proj
    """,
    "olmo_hybrid": ATTENTION
    + MLP
    + """
        qk: linear_attn.q_proj linear_attn.k_proj
        vo: linear_attn.v_proj linear_attn.g_proj linear_attn.o_proj
        other: linear_attn.a_proj linear_attn.b_proj linear_attn.conv1d
    """,
    # lightning attention: reshape(.., heads, 3 * head_dim), split into q, k, v
    "minimax": ATTENTION
    + EXPERTS
    + GATE
    + """
        qk256+vo128: self_attn.qkv_proj
        vo: self_attn.out_proj self_attn.output_gate
    """,
    # the experts of the attention are its query (input) and output projections; kv_proj is chunked in two
    "jetmoe": """
        embedding: model.embed_tokens
        mlp: mlp.input_linear mlp.output_linear
        qk: self_attention.experts.input_linear
        vo: self_attention.experts.output_linear
        qk2048+vo2048: self_attention.kv_proj
        other: mlp.router.layer self_attention.experts.router.layer
    """,
    "zaya": """
        embedding: model.embed_tokens
        qk: qkv_proj.q_proj qkv_proj.k_proj
        vo: qkv_proj.v_proj_current qkv_proj.v_proj_delayed self_attn.o_proj
        other: qkv_proj.conv_qk_depthwise qkv_proj.conv_qk_grouped
        other: mlp.gate.down_proj mlp.gate.router_mlp.fc1 mlp.gate.router_mlp.fc2 mlp.gate.router_mlp.out_proj
    """
    + EXPERTS,
    "gemma3n_text": """
        embedding: model.embed_tokens model.embed_tokens_per_layer
        qk: self_attn.q_proj self_attn.k_proj
        vo: self_attn.v_proj self_attn.o_proj
        other: altup.correction_coefs altup.prediction_coefs altup.modality_router laurel.linear_left
        other: laurel.linear_right per_layer_input_gate per_layer_projection model.per_layer_model_projection
        other: model.altup_projections.N model.altup_unembed_projections.N
    """
    + MLP,
    # four blocks of [q | v | k] of 1024 rows each
    "codegen": """
        embedding: transformer.wte
        head: lm_head
        qk1024+vo1024+qk1024: attn.qkv_proj
        vo: attn.out_proj
        mlp: mlp.fc_in mlp.fc_out
    """,
    "mpt": """
        embedding: transformer.wte
        qk4096+vo2048: attn.Wqkv
        vo: attn.out_proj
        mlp: ffn.up_proj ffn.down_proj
    """,
    "xlnet": """
        embedding: transformer.word_embedding
        head: lm_loss
        qk: rel_attn.q rel_attn.k
        vo: rel_attn.v rel_attn.o
        mlp: ff.layer_1 ff.layer_2
        other: rel_attn.r rel_attn.seg_embed transformer.mask_emb
    """,
    "bert": """
        embedding: word_embeddings position_embeddings token_type_embeddings
        qk: attention.self.query attention.self.key
        vo: attention.self.value attention.output.dense
        mlp: intermediate.dense layer.N.output.dense
        other: cls.predictions.transform.dense
    """,
    "modernbert": """
        embedding: tok_embeddings
        qk1536+vo768: attn.Wqkv
        vo: attn.Wo
        mlp: mlp.Wi mlp.Wo
        other: head.dense
    """,
    "t5": """
        embedding: shared
        qk: SelfAttention.q SelfAttention.k EncDecAttention.q EncDecAttention.k
        vo: SelfAttention.v SelfAttention.o EncDecAttention.v EncDecAttention.o
        mlp: DenseReluDense.wi DenseReluDense.wo
        other: SelfAttention.relative_attention_bias
    """,
    "vit": """
        embedding: position_embeddings patch_embeddings.projection
        qk: attention.q_proj attention.k_proj
        vo: attention.v_proj attention.o_proj
        mlp: mlp.fc1 mlp.fc2
        head: classifier
        other: cls_token
    """,
    "llava": ATTENTION.replace("model.embed_tokens", "language_model.embed_tokens")
    + MLP
    + """
        vision.embedding: vision_tower/embeddings.patch_embedding vision_tower/embeddings.position_embedding
        vision.qk: vision_tower/self_attn.q_proj vision_tower/self_attn.k_proj
        vision.vo: vision_tower/self_attn.v_proj vision_tower/self_attn.out_proj
        vision.mlp: vision_tower/mlp.fc1 vision_tower/mlp.fc2
        projector.mlp: multi_modal_projector/linear_1 multi_modal_projector/linear_2
    """,
    "qwen3_vl": ATTENTION.replace("model.embed_tokens", "language_model.embed_tokens")
    + MLP
    + """
        vision.embedding: visual/patch_embed.proj visual/pos_embed
        vision.qk2304+vision.vo1152: visual/attn.qkv
        vision.vo: visual/attn.proj
        vision.mlp: visual/mlp.linear_fc1 visual/mlp.linear_fc2
        vision.mlp: visual/merger.linear_fc1 visual/merger.linear_fc2
        vision.mlp: visual/deepstack_merger_list.N.linear_fc1 visual/deepstack_merger_list.N.linear_fc2
    """,
}


def places(family: str) -> dict[str, Place]:
    """Name (with the module that it is in) -> place."""
    found: dict[str, Place] = {}
    for line in FAMILIES[family].splitlines():
        target, _, names = line.partition(":")
        for name in names.split():
            inside, slash, _ = name.partition("/")
            found[name] = Place(target.strip(), inside if slash else "")
    return found
