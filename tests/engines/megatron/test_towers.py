"""Towers of other modalities have their own groups, and rows by their own config: LLaVA, MIMO, mixed layers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.group_rules import module_configs, tag_layouts, tag_table
from mols_ds.errors import MolsConfigError
from tests.engines.megatron import building
from tests.engines.megatron.building import Built, Setup
from tests.engines.megatron.tag_models import SMALL, make_config, one_rank, row_groups
from tests.helpers.harness import run_cases

LANGUAGE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 16}
VISION = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 48}
PROJECTION = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 72}
SECTION: dict[str, Any] = {"mode": "online", "samples": 4, "start": 0, "ramp_end": 5}
QKV = "vision_model.decoder.layers.0.self_attention.linear_qkv.weight"


def parts(**parallel: Any) -> tuple[Any, Any, Any, Any]:
    """Configs of language model, vision tower and projection, and the spec of the projection."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    plain = {key: value for key, value in parallel.items() if key != "pipeline_model_parallel_size"}
    language = make_config(**LANGUAGE, ffn_hidden_size=40, pipeline_dtype=torch.float32, **parallel)
    vision = make_config(**VISION, gated_linear_unit=False, **plain)
    vision.vision_model_type = "internvit"
    projection = make_config(**PROJECTION, gated_linear_unit=False, **plain)
    return language, vision, projection, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def llava(first: bool = True, last: bool = True, **parallel: Any) -> Any:
    """Fused projections of both parts have 192 rows, of 8 heads with 2 query groups and of 4 heads."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    language, vision, projection, spec = parts(**parallel)
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        language_vocab_size=32,
        language_max_sequence_length=32,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=False,
        vision_projection_config=projection,
        vision_projection_layer_spec=spec,
        language_position_embedding_type="rope",
        pre_process=first,
        post_process=last,
        add_encoder=first,
        img_h=28,
        img_w=28,
        patch_dim=14,
    )


TOWER = {
    "vision.embedding": 3 * 14 * 14 * 64 + 5 * 64,
    "vision.qk": 2 * 2 * 64 * 64,
    "vision.vo": 2 * 2 * 64 * 64,
    "vision.mlp": 2 * 2 * 64 * 48,
    "projector.mlp": 64 * 72 + 72 * 128,
}
EXPECTED = {
    "embedding": 32 * 128,
    "head": 32 * 128,
    "qk": 2 * (8 + 2) * 16 * 128,
    "vo": 2 * (2 * 16 * 128 + 128 * 128),
    "mlp": 2 * 3 * 128 * 40,
    **TOWER,
}


def test_llava() -> None:
    with one_rank():
        table = tag_table(llava())
    assert {group: n for group, n in table.elements.items() if group != "other"} == EXPECTED
    assert row_groups(table.layouts[QKV], (192, 64)) == 4 * (["vision.qk"] * 32 + ["vision.vo"] * 16)
    language = "language_model.decoder.layers.1.self_attention.linear_qkv.weight"
    assert row_groups(table.layouts[language], (192, 128)) == 2 * (["qk"] * 80 + ["vo"] * 16)


def test_mimo() -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec

    with one_rank():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.mimo.config.base_configs import MimoModelConfig
        from megatron.core.models.mimo.model.base import MimoModel
        from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
        from megatron.core.models.vision.clip_vit_model import CLIPViTModel
        from megatron.core.models.vision.multimodal_projector import MultimodalProjector
        from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

        language, vision, projection, spec = parts()
        sizes = {"img_h": 28, "img_w": 28, "patch_dim": 14, "model_subtype": "internvit"}
        layers = {"transformer_config": vision, "transformer_layer_spec": get_vit_layer_with_local_spec()}
        encoder = ModuleSpec(CLIPViTModel, params=sizes | layers)
        into = {"config": projection, "submodules": spec, "projector_type": "mlp", "input_size": 64}
        images = ModuleSpec(
            VisionModalitySubmodules,
            submodules={
                "encoders": {"clip": encoder},
                "input_projections": [ModuleSpec(MultimodalProjector, params=into)],
            },
        )
        decoder = {"config": language, "transformer_layer_spec": get_gpt_layer_local_spec(normalization="RMSNorm")}
        gpt = ModuleSpec(
            GPTModel, params={**decoder, "vocab_size": 32, "max_sequence_length": 32, "position_embedding_type": "rope"}
        )
        table = tag_table(MimoModel(MimoModelConfig(gpt, {"images": images}, {"images": 31})))
    assert {group: n for group, n in table.elements.items() if group != "other"} == EXPECTED


def test_a_frozen_language_model_leaves_the_tower_a_tower() -> None:
    with one_rank():
        model = llava()
    model.language_model.requires_grad_(False)
    assert {group: n for group, n in tag_table(model).elements.items() if group != "other"} == TOWER


# ------------------------------------------------------------------------------------------------------ configs


def test_a_tower_is_not_divided_by_the_language_models_config() -> None:
    """The rows agree by chance: 192 are 2 x (4 + 2) x 16 of the language model and 4 x 3 x 16 of the tower."""
    config = {**LANGUAGE, "ffn_hidden_size": 40}
    with pytest.raises(MolsConfigError, match=re.escape(f"{QKV!r} is in a tower (vision) of its own config")):
        tag_layouts({QKV: (192, 64), "decoder.layers.0.mlp.linear_fc2.weight": (128, 40)}, config)
    with pytest.raises(MolsConfigError, match="tower"):
        tag_layouts({QKV: (192, 64)}, config)
    layouts = tag_layouts(
        {QKV: (192, 64), "language_model.decoder.layers.0.mlp.linear_fc2.weight": (128, 40)},
        config,
        modules={"vision_model": VISION},
    )
    assert layouts[QKV].pattern == ((32, "vision.qk"), (16, "vision.vo"))


def test_layers_of_a_heterogeneous_model_have_their_own() -> None:
    def block(group: int | None) -> dict[str, Any]:
        attention = {"no_op": False, "replace_with_linear": group is None, "n_heads_in_group": group}
        mlp = {"no_op": False, "replace_with_linear": group is None, "ffn_mult": None if group is None else 2.0}
        return {"attention": attention, "ffn": mlp}

    with one_rank():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
        from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

        config = HeterogeneousTransformerConfig(
            **{**SMALL, "num_layers": 3},
            kv_channels=6,
            heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": [block(4), block(2), block(None)]}),
            use_cpu_initialization=True,
            add_bias_linear=False,
            normalization="RMSNorm",
        )
        spec = get_gpt_heterogeneous_layer_spec(config, use_te=False)
        model = GPTModel(config, spec, vocab_size=32, max_sequence_length=16)
        layouts = tag_table(model).layouts
        assert set(module_configs(model)) == {"", "decoder.layers.0", "decoder.layers.1"}
    name = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert row_groups(layouts[name.format(0)], (36, 24)) == ["qk"] * 30 + ["vo"] * 6
    assert row_groups(layouts[name.format(1)], (48, 24)) == 2 * (["qk"] * 18 + ["vo"] * 6)
    assert layouts["decoder.layers.2.self_attention.weight"].groups == ("vo",)


# ------------------------------------------------------------------------------------------------- on ranks


def attached(grid: str) -> dict[str, Any]:
    """On a rank of `grid`: the groups, and the multipliers after a calibration on random gradients."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    setup = Setup(tp=2) if grid == "tp" else Setup(pp=2)
    with cpu_megatron():
        building.start(setup)
        rank = torch.distributed.get_rank()
        first, last = (True, True) if grid == "tp" else (rank == 0, rank == 1)
        sizes = {"tensor_model_parallel_size": setup.tp, "pipeline_model_parallel_size": setup.pp}
        model = llava(first, last, **sizes)
        config = model.config
        ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
        built = Built(setup, [ddp], config, torch.float32)
        optimizer, scheduler = building.optimizer(built)
        mols = building.attach(built, optimizer, scheduler, SECTION)
        for _ in range(SECTION["samples"] + 2):
            for parameter in model.parameters():
                parameter.main_grad.normal_(1.0)
            optimizer.step()
        result = {"groups": dict(mols.controller.table.elements), "multipliers": dict(mols.multipliers)}
        result["holds_the_tower"] = model.vision_model is not None
        config.grad_scale_func = None
        building.stop()
    return result


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize("grid", ["tp", "pp"])
def test_ranks_agree_on_the_towers_and_leave_their_rates_alone(grid: str) -> None:
    """With pipeline parallelism the second rank has no part of the tower, and gets its config."""
    ranks = run_cases(attached, 2, [(grid,)], timeout=120)[grid,]
    assert [rank["holds_the_tower"] for rank in ranks] == [True, grid == "tp"]
    for rank in ranks:
        assert {group: n for group, n in rank["groups"].items() if group != "other"} == EXPECTED
        assert rank["multipliers"] == ranks[0]["multipliers"]
        moved = {group for group, multiplier in rank["multipliers"].items() if multiplier != 1.0}
        assert moved and not moved & set(TOWER)
