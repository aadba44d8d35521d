"""The model to fine-tune: load its weights, add peft adapters, save it so that it loads again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError, MolsWarning
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["full", "lora", "dora"]
ADAPTER, MODEL = "adapter", "model"
"""Folders of the trained weights, below a run's or a checkpoint's folder."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Settings of peft: W x + alpha / rank · B A x on every linear layer but the output head. LoRA (arXiv 2106.09685);
    `dora` trains its magnitude separately (arXiv 2402.09353)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False


def load_config(source: str) -> PretrainedConfig:
    """Load the transformers configuration of a checkpoint folder or hub name. Raises MolsConfigError without one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(source)
    if path.is_file():
        raise MolsConfigError(f"model {source}: give a checkpoint folder or hub name, not a file")
    if (path / "adapter_config.json").is_file():
        raise MolsConfigError(f"model {source}: it is an adapter; give the model that it was trained on")
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise MolsConfigError(
            f"model {source}: neither a checkpoint folder nor a model that the hub has: {one_line(error)}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise MolsConfigError(f"model {source}: model_type {config.model_type!r} has no causal language model")
    return config


def build(
    source: str,
    *,
    vocab_size: int,
    seed: int,
    dtype: torch.dtype,
    adapters: AdapterSettings | None,
    checkpointing: bool = False,
) -> nn.Module:
    """Load the model of a checkpoint in `dtype` for training. With adapters (drawn with `seed`), all else is frozen.

    Under ZeRO stage 3, call it while the object of `models.zero_init` exists.

    Raises:
        MolsConfigError: the checkpoint lacks weights, its vocabulary is smaller than `vocab_size`, or peft refuses the
            adapters.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    embedded = getattr(config.get_text_config(), "vocab_size", vocab_size)
    if embedded < vocab_size:
        raise MolsConfigError(
            f"model {source}: its vocabulary of {embedded} is smaller than the tokenizer's {vocab_size}"
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # missing and broken files, wrong sizes: a dozen unrelated types
        raise MolsConfigError(f"model {source}: cannot be loaded: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise MolsConfigError(f"model {source}: no weights for {missing[0]} in its files ({len(missing)} missing)")
    if getattr(config.get_text_config(), "output_router_logits", False):
        warnings.warn("the routers' balancing loss (output_router_logits) is not added", MolsWarning, stacklevel=2)
    torch.manual_seed(seed)
    if adapters is not None:
        model = add_adapters(model, adapters)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model  # type: ignore[no-any-return]


def add_adapters(model: nn.Module, settings: AdapterSettings) -> PeftModel:
    """Add peft's adapters, the only trained parameters. Raises MolsConfigError if peft refuses."""
    import peft

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    asked = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets,
        use_dora=settings.dora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        # In the model's dtype: DeepSpeed has fp32 masters, and stage 3 takes parameters of one dtype only
        adapted = peft.get_peft_model(model, asked, autocast_adapter_dtype=False)
    except Exception as error:  # ValueError for wrong targets, NotImplementedError and others for layers
        raise MolsConfigError(f"--method: peft cannot adapt this model: {one_line(error)}") from error
    # By name: under stage 3 parameters have no shape
    if any(
        ".experts." in name and "lora" not in name and "base_layer" not in name
        for name, _ in adapted.named_parameters()
    ):
        warnings.warn(
            "the experts are not linear layers: they get no adapters and stay frozen", MolsWarning, stacklevel=2
        )
    return adapted


def save_weights(engine: DeepSpeedEngine, folder: Path, tokenizer: PreTrainedTokenizerBase, *, adapters: bool) -> None:
    """Write folder/adapter (peft's files) or folder/model (transformers' files), with the tokenizer. Collective: under
    stage 3 the ranks gather one layer at a time to rank 0, the only writer."""
    state = None
    if engine.zero_optimization_partition_weights():
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapters)
    if engine.global_rank == 0:
        target = folder / (ADAPTER if adapters else MODEL)
        # Embeddings are never resized here, and peft would ask the hub whether one was
        options: JsonObject = {"save_embedding_layers": False} if adapters else {}
        engine.module.save_pretrained(target, state_dict=state, **options)
        tokenizer.save_pretrained(target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def load_saved(folder: str, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """Load a model for inference: one of `save_weights`, or any checkpoint; an adapter loads the model that it names.

    Raises:
        MolsConfigError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        if (Path(folder) / "adapter_config.json").is_file():
            import peft

            base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            return peft.PeftModel.from_pretrained(model, folder).eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    except Exception as error:  # missing and broken files, and errors of the hub's client
        raise MolsConfigError(f"model {folder}: cannot be loaded: {one_line(error)}") from error
