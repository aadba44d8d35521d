"""Build the model of a training job from a model file (configs/models/*.json, a transformers configuration with its
`model_type`) or a transformers checkpoint folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mols_ds.core.groups import Granularity, group_table
from mols_ds.core.json_text import read_json
from mols_ds.core.json_types import JsonObject
from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_model_config(source: str) -> PretrainedConfig:
    """Load the transformers configuration of a model file or checkpoint folder.

    Raises:
        MolsConfigError: missing, not JSON, without a known `model_type`, or with a bad value.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise MolsConfigError(f"model {source}: no such model file or checkpoint folder (see configs/models/)")
    settings = read_json(file, f"model {file}")
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise MolsConfigError(f'model {file}: needs a "model_type" that transformers has, such as "llama"')
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(settings)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # unknown type: ValueError; bad value: huggingface_hub's own validation errors
        raise MolsConfigError(f"model {file}: {one_line(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise MolsConfigError(f"model {file}: model_type {config.model_type!r} has no causal language model")
    if path.is_file():
        _check_keys(given, config, f"model {file}")
    return config


def _check_keys(given: JsonObject, config: PretrainedConfig, where: str) -> None:
    """Check the keys of a model file. transformers keeps unknown ones silently, and reads some former names, so only
    a key that resembles a known one is refused. Raises MolsConfigError."""
    kind = type(config)
    try:
        default = kind()
    except Exception:  # a configuration without defaults
        return
    known = {*vars(default), *default.to_dict(), *kind.attribute_map, "dtype", "torch_dtype", "architectures"}
    known |= {key for base in kind.__mro__ for key in getattr(base, "__annotations__", {})}
    for key in (key for key in given if key not in known):
        for near in difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise MolsConfigError(f'{where}: "{key}" is no setting of {kind.__name__}; did you mean "{near}"?')


def groups_of(source: str, granularity: Granularity = "type") -> list[str]:
    """Return the module groups of a model file or checkpoint folder, without weights. Raises MolsConfigError."""
    return list(group_table(meta_model(source), None, granularity).elements)


def is_checkpoint(source: str) -> bool:
    """Whether the source has weights (a folder with a weight file), so that training continues from them."""
    path = Path(source)
    return path.is_dir() and any(path.glob("*.safetensors")) | any(path.glob("pytorch_model*.bin"))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def tokenizer_of(source: str, given: Path | None) -> Path | None:
    """Return the tokenizer folder of a job: `given`, or the model folder itself; None: train one, for a model file.

    Raises:
        MolsConfigError: `given` is no folder, or a model folder has no tokenizer.
    """
    if given is not None:
        if not given.is_dir():
            raise MolsConfigError(f"--tokenizer {given}: no such folder")
        return given
    folder = Path(source)
    if not folder.is_dir():
        return None
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise MolsConfigError(
            f"model {source}: the folder has no tokenizer: give the model's by --tokenizer FOLDER, or train a new "
            f"model with a new tokenizer by --model {folder / 'config.json'}"
        )
    return folder


def meta_model(source: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model of a file or checkpoint folder on the meta device: names and shapes without memory.

    Raises:
        MolsConfigError: no such model, or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = load_model_config(source)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise MolsConfigError(f"model {source}: cannot be built: {one_line(error)}") from error
    return model


def build_model(
    source: str,
    *,
    vocab_size: int,
    end: int,
    seq_len: int,
    seed: int,
    dtype: torch.dtype,
    checkpointing: bool = False,
    attention: str | None = None,
) -> nn.Module:
    """Build the model for training in `dtype`, with weights drawn with `seed` or from the checkpoint.

    Enlarges a model file's vocabulary to the tokenizer's. `end`: its end-of-text token.

    Raises:
        MolsConfigError: a checkpoint's vocabulary is too small, positions are fewer than `seq_len`, or the model cannot
            be built.
    """
    from transformers import AutoModelForCausalLM

    config = load_model_config(source)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < seq_len:
        raise MolsConfigError(f"--seq-len {seq_len}: model {source} has max_position_embeddings {positions}")
    if config.vocab_size < vocab_size:
        if is_checkpoint(source):
            raise MolsConfigError(
                f"model {source}: its vocabulary of {config.vocab_size} is smaller than the tokenizer's {vocab_size}"
            )
        config.vocab_size = vocab_size
    config.use_cache = False
    options = {} if attention is None else {"attn_implementation": attention}
    config.bos_token_id = config.eos_token_id = end
    torch.manual_seed(seed)
    try:
        if is_checkpoint(source):
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (ValueError, ImportError, OSError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise MolsConfigError(f"model {source}: cannot be built: {one_line(error)}") from error
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model  # type: ignore[no-any-return]


def check_compiler(backend: str, device: torch.device | str, config: JsonObject) -> None:
    """Compile a tiny function. Raises MolsConfigError if torch.compile does not know the backend or fails here, and for
    ZeRO-3, whose hooks break the graphs around every weight."""
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise MolsConfigError(
            "--compile: at ZeRO stage 3 DeepSpeed gathers each weight in hooks that torch.compile leaves out of its "
            "graphs, so no matrix product would be compiled: use stage 0, 1 or 2"
        )
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise MolsConfigError(f"--compile {backend}: torch.compile has {', '.join(known)}")
    try:
        torch.compile(torch.sin, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:  # compilers raise dozens of unrelated types
        raise MolsConfigError(
            f"--compile {backend}: torch.compile fails on this machine, train without it: {one_line(error)}"
        ) from error


def zero_init(config: JsonObject) -> object | None:
    """Make transformers build models under `deepspeed.zero.Init` while the returned object exists, so that a stage-3
    model is never whole on one rank. Returns None for other stages."""
    if config.get("zero_optimization", {}).get("stage") != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    kept: object = HfDeepSpeedConfig(config)
    return kept
