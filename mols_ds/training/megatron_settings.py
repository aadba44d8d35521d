"""Config file of train_megatron.py: typed sections; an unknown key is an error with a suggestion.

Sections have the names of Megatron-core where it has one. `model` may also have any other field of its
TransformerConfig, checked against the field's type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from mols_ds.core.config import MolsConfig
from mols_ds.core.json_types import JsonMapping, JsonObject
from mols_ds.core.validation import Frozen, validation_message
from mols_ds.errors import MolsConfigError
from mols_ds.training.yaml_text import parse_yaml, read_yaml

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(Frozen):
    model_config = ConfigDict(strict=True)


class ModelSettings(_Section):
    """The network. Other keys are fields of Megatron-core's TransformerConfig and are passed on."""

    model_config = ConfigDict(extra="allow")

    num_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    ffn_hidden_size: Positive | None = None
    num_query_groups: Positive | None = None
    vocab_size: Positive = 4096
    max_sequence_length: Positive | None = None
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activation: Literal["swiglu", "geglu", "gelu", "squared_relu"] = "swiglu"
    position_embedding: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: Positive = 10000
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    tied_embeddings: bool = False
    vocab_multiple: Positive = 128
    """The embedding's rows are rounded up to a multiple of this times tp, as in Megatron-LM."""

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        for key, value in self.further.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key}: must be a finite number, got {value}")
        return self

    @property
    def further(self) -> JsonObject:
        """The keys for TransformerConfig."""
        return dict(self.__pydantic_extra__ or {})


class ParallelSettings(_Section):
    """Ranks per axis; the rest of the world is data-parallel."""

    tp: Positive = 1
    pp: Positive = 1
    vp: Positive | None = None
    ep: Positive = 1
    etp: Positive | None = None
    cp: Positive = 1
    sp: bool = False
    distributed_optimizer: bool = True
    distributed_optimizer_instances: Positive = 1
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @model_validator(mode="after")
    def _check(self) -> ParallelSettings:
        if self.vp is not None and self.pp == 1:
            raise ValueError("vp: interleaved stages need pp of at least 2; leave vp out")
        if self.sp and self.tp == 1:
            raise ValueError("sp: sequence parallelism needs tp of at least 2; set sp: false")
        if self.overlap_param_gather and not self.distributed_optimizer:
            raise ValueError("overlap_param_gather: needs distributed_optimizer: true")
        return self


class PrecisionSettings(_Section):
    """`auto` is bf16 on a GPU that supports it, else fp32. FP8 and FP4 need Transformer Engine."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    transformer_engine: bool | Literal["auto"] = "auto"
    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    fp8_param: bool = False
    fp4: Literal["e2m1"] | None = None
    fp4_param: bool = False
    grad_reduce_in_fp32: bool = True
    gradient_accumulation_fusion: bool = False

    @model_validator(mode="after")
    def _check(self) -> PrecisionSettings:
        if (self.fp8 or self.fp4) and self.dtype in ("fp32", "fp16"):
            raise ValueError(f"dtype: {self.dtype} cannot go with fp8 or fp4, which need bf16")
        return self


class OptimizerSettings(_Section):
    """The paper's settings (METHOD.md): Adam (0.9, 0.95, 1e-8) without weight decay, clipping at 1."""

    name: Literal["adam", "sgd"] = "adam"
    lr: Rate
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Rate = 1e-8
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    precision_aware: bool = False

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class SchedulerSettings(_Section):
    """The paper's schedule (METHOD.md): linear warm-up over 10 % of the steps, then cosine to 10 % of the rate."""

    style: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.10
    min_lr_share: Share = 0.10


class BatchSettings(_Section):
    """Sequences: `micro` per forward pass, `global` per step over all data-parallel ranks."""

    model_config = ConfigDict(populate_by_name=True)

    micro: Positive
    total: Positive = Field(alias="global")


class DataSettings(_Section):
    """The text; see --data of train.py. Without a tokenizer folder, a tokenizer is trained on the text."""

    source: str = "stdlib"
    text_key: str | None = None
    eval_share: float | None = None
    tokenizer: str | None = None
    cache_dir: str | None = None


class RunSettings(_Section):
    """Length of the run, and when to evaluate, log and save."""

    steps: Positive
    seq_len: Positive
    seed: Count = 0
    eval_every: Count | None = None
    eval_sequences: Positive = 256
    save_every: Count = 0
    keep_last: Positive | None = None
    keep_every: Positive | None = None
    """Checkpoints to keep: the newest `keep_last`, and those of every `keep_every`-th step. Default: all."""
    reshardable_checkpoints: bool = False
    """Whether another tp or pp can load the checkpoints; costs a gather on data-parallel rank 0."""
    log_every: Positive = 1
    out: str | None = None
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None


class Settings(_Section):
    """A whole config file. `read` raises MolsConfigError."""

    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings = SchedulerSettings()
    batch: BatchSettings
    data: DataSettings = DataSettings()
    run: RunSettings
    mols: JsonObject | None = None

    def with_mols(self, section: JsonObject | None) -> Settings:
        """Return a copy with another "mols" section."""
        return self.model_copy(update={"mols": section})


# ------------------------------------------------------------------ reading


def read(path: str, changes: Iterable[str] = ()) -> Settings:
    """Read the settings of a file and apply `section.key=value` changes of the command line.

    Raises:
        MolsConfigError: the file is missing or not YAML, a key is unknown, or a value is wrong; one line for all.
    """
    content = read_yaml(path, f"config {path}")
    if not isinstance(content, dict):
        raise MolsConfigError(f"config {path}: must have sections, not {type(content).__name__}")
    if {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"} & set(content):
        raise MolsConfigError(f"config {path}: it is a DeepSpeed config, for train.py and finetune.py")
    for change in changes:
        _change(content, change)
    return validate(content, f"config {path}")


def _change(content: JsonObject, change: str) -> None:
    """Apply one `section.key=value` to the file's content."""
    name, equals, value = change.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not section or not key:
        raise MolsConfigError(f"--set {change}: write it as section.key=value, such as run.steps=100")
    place = content.setdefault(section, {})
    if not isinstance(place, dict):
        raise MolsConfigError(f"--set {change}: {section!r} is not a section of the config")
    *path, last = key.split(".")
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise MolsConfigError(f"--set {change}: {part!r} is a value, not a section")
    place[last] = parse_yaml(value, f"--set {change}")


def validate(content: JsonMapping, where: str) -> Settings:
    """Return settings from plain values. Raises MolsConfigError: one line for all mistakes."""
    try:
        settings = Settings.model_validate(dict(content))
    except ValidationError as error:
        raise MolsConfigError(f"{where}: {validation_message(error, Settings)}") from None
    if settings.mols is not None:
        try:
            MolsConfig.parse(settings.mols)
        except MolsConfigError as error:
            raise MolsConfigError(f"{where}: {error}") from None
    return settings
