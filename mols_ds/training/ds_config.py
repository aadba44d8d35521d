"""The DeepSpeed config of the main job: read it, replace "auto" values by numbers, pass it to DeepSpeed as a dict."""

import copy
import warnings
from pathlib import Path

import torch
from pydantic import ValidationError

from mols_ds.core.config import MolsConfig
from mols_ds.core.json_types import JsonObject
from mols_ds.core.log import warn_here
from mols_ds.core.validation import validation_message
from mols_ds.engines.deepspeed import config_reader
from mols_ds.engines.deepspeed.auto_values import auto_keys
from mols_ds.engines.deepspeed.compat import module
from mols_ds.engines.deepspeed.config_keys import misspelt_keys
from mols_ds.errors import MolsConfigError
from mols_ds.optim.build import split_config
from mols_ds.optim.choose import AUTO as AUTO
from mols_ds.optim.choose import fill, rename
from mols_ds.training.sources import one_line

PAPER_CLIPPING = 1.0
PAPER_BATCH = 512
LARGEST_MICRO_BATCH = 16
SECTIONS = ("optimizer", "bf16", "fp16", "zero_optimization", "tensorboard")
"""Sections that are read here before DeepSpeed reads them."""
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_config(given: str) -> JsonObject:
    """A DeepSpeed config for this package's jobs.

    Args:
        given: the path of a file or a base64 text, as `mols_ds.engines.deepspeed.config_reader.read_config` takes it.

    Returns:
        The config. `"total_steps": "auto"` in its "mols" section is removed: the job has the number.

    Raises:
        MolsConfigError: it cannot be read, misspells "mols" or holds a wrong "mols" section.
    """
    config = config_reader.read_config(given)
    if key := config_reader.misspelt_section(config):
        raise MolsConfigError(f'{config_reader.config_name(given)}: unknown key {key!r}; did you mean "mols"?')
    if "model" in config and "run" in config:
        raise MolsConfigError(f"{config_reader.config_name(given)}: it is a config of train_megatron.py")
    section = config.get("mols")
    if isinstance(section, dict) and section.get("total_steps") == AUTO:
        del section["total_steps"]
    if "mols" in config:
        MolsConfig.parse(config["mols"])
    return config


def check_keys(config: JsonObject, path: str, optimizer: str | None = None) -> None:
    """Check the names of keys before anything starts: DeepSpeed ignores unknown top-level keys.

    Args:
        config: from `read_config`.
        path: of its file.
        optimizer: name that replaces the config's.

    Raises:
        MolsConfigError: a misspelt key, also among the optimizer's parameters; one line with the nearest right key.
    """
    name = config_reader.config_name(path)
    if unknown := misspelt_keys(config):
        each = (f'unknown key "{key}"; did you mean "{near}"?' for key, near in unknown.items())
        raise MolsConfigError(f"{name}: {'; '.join(each)}")
    section = config.get("optimizer")
    if isinstance(section, dict):
        trial = copy.deepcopy({**config, "optimizer": section if optimizer is None else rename(section, optimizer)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `resolve` warns
            try:
                fill(trial)
            except MolsConfigError as error:
                raise MolsConfigError(f"{name}: {error}") from error


def resolve(
    config: JsonObject,
    *,
    world: int,
    steps: int,
    out: Path,
    lr: float | None = None,
    optimizer: str | None = None,
) -> JsonObject:
    """A copy of `config` in which nothing is left to guess: batch sizes, precision, optimizer, clipping, the mols
    section's total steps and report folder. A number that the user wrote is never changed, except the rate by `lr`;
    `optimizer` is a name in the place of the config's.

    Raises MolsConfigError for batch sizes that do not fit `world` ranks, for "auto" where it means nothing, and for an
    optimizer or a parameter of it that is not known; MolsUnsupportedError where it does not go with the ZeRO stage.
    """
    config = copy.deepcopy(config)
    for name in [name for name in SECTIONS if name in config]:
        if not isinstance(config[name], dict):
            raise MolsConfigError(f'config: "{name}" is {config[name]!r}; give an object, {{...}}, or leave it out')
    _batch_sizes(config, world)
    _precision(config)
    section = config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    if optimizer is not None:
        config["optimizer"] = rename(section, optimizer)
    fill(config, lr)
    _warn_of_plain_adam(config["optimizer"], steps)
    if config.get("gradient_clipping", AUTO) == AUTO:
        config["gradient_clipping"] = PAPER_CLIPPING
    config.setdefault("steps_per_print", None)  # the progress bar and metrics.jsonl show it
    zero = config.get("zero_optimization", {})
    for key in [key for key, value in zero.items() if value == AUTO]:
        del zero[key]  # DeepSpeed's own default
    board = config.get("tensorboard", {})
    if board.get("output_path", AUTO) in (AUTO, "") and board.get("enabled"):
        board["output_path"] = str(out / "tensorboard")
        board.setdefault("job_name", out.name)
    mols = config.get("mols")
    if mols is not None:
        if mols.get("total_steps") is None:
            mols["total_steps"] = steps
        mols.setdefault("report_dir", str(out / "mols_report"))
    for key in auto_keys(config):  # what nobody replaced
        raise MolsConfigError(f'config: "{key}" is "auto", which is not known for this key: give a value')
    split_config(config)
    return config


def _warn_of_plain_adam(section: JsonObject, steps: int) -> None:
    """Warn if SGG would end before its first clusters have an effect."""
    interval = section["params"].get("interval", 0)
    if section["type"] == "SGG" and interval >= steps:
        warn_here(
            f'SGG clusters every {interval} steps and this run has {steps}: it is plain Adam. Set a smaller "interval"',
            stacklevel=3,
        )


def _batch_sizes(config: JsonObject, world: int) -> None:
    """Fills train_batch_size = micro x accumulation x world in, from whichever of the three are given."""
    given: list[int | None] = []
    for key in BATCH_KEYS:
        value = config.get(key)
        if value is not None and value != AUTO and (not isinstance(value, int) or value is True or value < 1):
            raise MolsConfigError(f'config: "{key}" is {value!r}: give a whole number of at least 1, or "auto"')
        given.append(value if isinstance(value, int) else None)
    total, micro, passes = given
    if total is None:
        total = micro * (passes or 1) * world if micro is not None else PAPER_BATCH
    if total % world:
        raise MolsConfigError(f'config: "train_batch_size" {total} does not divide among {world} processes')
    share = total // world
    if micro is None and passes is None:
        micro = max(n for n in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % n == 0)
    micro = micro if micro is not None else share // (passes or 1)
    passes = passes if passes is not None else share // max(micro, 1)
    if micro * passes != share:
        raise MolsConfigError(
            f'config: "train_batch_size" {total} is not micro batch {micro} x accumulation {passes} x {world} processes'
        )
    config.update(zip(BATCH_KEYS, (total, micro, passes), strict=True))


def native_bf16() -> bool:
    """Whether this process's device computes in bf16 rather than emulating it."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return bool(accelerator.is_bf16_supported())
    capabilities: JsonObject = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch: fp32 then
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _precision(config: JsonObject) -> None:
    """bf16 where the device has it (the default), fp16 only where asked for."""
    half = config.get("fp16")
    if half is not None and half.get("enabled") == AUTO:
        half["enabled"] = False  # bf16 is this job's choice; fp16 needs a clear yes
    brain = config.setdefault("bf16", {"enabled": AUTO})
    if brain.get("enabled") == AUTO:
        brain["enabled"] = not (half or {}).get("enabled", False) and native_bf16()


def model_dtype(config: JsonObject) -> torch.dtype:
    """The dtype that the model is built in for a resolved config."""
    if config["bf16"].get("enabled"):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled") else torch.float32


def check_with_deepspeed(config: JsonObject, path: str) -> None:
    """Has DeepSpeed validate a resolved config before anything is built. Raises MolsConfigError with one line."""
    name = config_reader.config_name(path)
    checked = module("deepspeed.runtime.config").DeepSpeedConfig
    request = split_config(config)
    try:
        checked(copy.deepcopy(config if request is None else request.config))
    except ValidationError as error:
        raise MolsConfigError(f"{name}: {error.title}: {validation_message(error, _section(error))}") from error
    except Exception as error:  # DeepSpeed asserts and raises plain Exceptions for wrong values
        raise MolsConfigError(f"{name}: DeepSpeed refuses it: {one_line(error)}") from error


def _section(error: ValidationError) -> object:
    """Return DeepSpeed's class of the section that an error is about, for suggestions; None if it is not found."""
    base = module("deepspeed.runtime.config_utils").DeepSpeedConfigModel
    return next((kind for kind in base.__subclasses__() if kind.__name__ == error.title), None)
