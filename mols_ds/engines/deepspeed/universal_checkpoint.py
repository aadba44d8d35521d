"""DeepSpeed's universal checkpoints (`deepspeed.checkpoint.ds_to_universal`): add and correct what its loaders lack.

A universal checkpoint has each parameter's whole fp32 weight and Adam moments in `TAG/zero/NAME/*.pt`, so that another
number of ranks can shard them again. DeepSpeed 0.19.8 makes one from ZeRO 1, 2 or 3 and loads it at the same kind of
stage. This module converts between stages 1, 2 and stage 3 (only names and format of the files differ), undoes errors
of the loaders, and raises on every rank where only some loaders would fail while the others wait.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from mols_ds.engines.deepspeed.compat import STATE, VERSION, WHOLE, Config, Engine
from mols_ds.engines.deepspeed.parallel.autotp import is_megatron, tensor_parallel_size
from mols_ds.errors import MolsCheckpointError, MolsUnsupportedError

STEP = "step"
Content = dict[str, Any]
"""Content of a checkpoint file."""
Options = dict[str, Any]
"""Keys of a parameter group beside its parameters: lr, betas, ..."""
Load = Callable[..., Any]
"""`torch.load`, or a replacement."""
FAMILIES = {"1 or 2": "mp_rank_*_model_states.pt", "3": "zero_pp_rank_*_model_states.pt"}
"""ZeRO stages whose checkpoints have the same format -> file names of model states."""


def folder_of(engine: Engine, load_dir: str | os.PathLike[str] | None, tag: object) -> Path | None:
    """Return the folder that `engine.load_checkpoint(load_dir, tag)` reads; None without a file with the tag."""
    if not load_dir:
        return None
    if tag is None:
        latest = Path(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
        if not latest.is_file():
            return None
        tag = latest.read_text("utf-8").strip()
    return Path(load_dir, str(tag))


def saved_at(folder: Path) -> str | None:
    """Return the key of FAMILIES for a checkpoint; None if it has no model states."""
    return next((stages for stages, pattern in FAMILIES.items() if any(folder.glob(pattern))), None)


def family_of_stage(stage: int) -> str:
    """Return the key of FAMILIES for a run at this stage."""
    return "3" if stage == 3 else "1 or 2"


# ------------------------------------------------------------------ refusals


def refuse(engine: Engine, folder: Path | None, with_optimizer: bool) -> None:
    """Raise where DeepSpeed's loader would fail with an unclear message or none. Every rank sees the same files.

    Raises:
        MolsUnsupportedError: a universal load that this engine cannot do.
        MolsCheckpointError: the checkpoint's format is not the one that this engine loads.
    """
    universal = bool(engine.load_universal_checkpoint())
    if universal:
        _refuse_universal(engine)
    if folder is None or not folder.is_dir():
        return
    if universal != (folder / "zero" / "optimizer_state.pt").is_file():
        raise MolsCheckpointError(
            f'{folder} is not a universal checkpoint, but the config has "load_universal": {conversion_hint(folder)}'
            if universal
            else f'{folder} is a universal checkpoint: set "checkpoint": {{"load_universal": true}} in the config'
        )
    if not universal:
        _refuse_stage(engine.zero_optimization_stage(), folder, with_optimizer)


def conversion_hint(folder: Path) -> str:
    """Say how to load a checkpoint into another layout."""
    return (
        f"convert it (python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {folder} "
        f'--output_folder {folder}_universal) and set "checkpoint": {{"load_universal": true}} in the DeepSpeed config'
    )


def _refuse_stage(stage: int, folder: Path, with_optimizer: bool) -> None:
    saved, here = _stages(folder, stage), "0" if stage == 0 else family_of_stage(stage)
    if saved is None or saved == here:
        return
    differs = f"{folder} was saved at ZeRO stage {saved}, this run is at {stage}"
    if "0" not in (saved, here):
        raise MolsCheckpointError(f"{differs}: {conversion_hint(folder)}")
    if with_optimizer or "3" in (saved, here):
        raise MolsCheckpointError(
            f"{differs}, and DeepSpeed converts nothing between stages 3 and 0, and only weights between 0 and 1 or 2 "
            "(load_checkpoint(..., load_module_only=True)): resume at the same stage"
        )


def _stages(folder: Path, stage: int) -> str | None:
    """ZeRO stage of the checkpoint: "0" or a key of FAMILIES."""
    saved = saved_at(folder)
    if saved in (None, "3"):
        return saved
    sharded = any(folder.glob("*zero_pp_rank_*_optim_states.pt"))
    if stage == 0 and sharded:  # these files may be older than a save at stage 0
        path = min(folder.glob(FAMILIES["1 or 2"]))
        sharded = torch.load(path, map_location="cpu", weights_only=False, mmap=True).get("optimizer") is None
    return "1 or 2" if sharded else "0"


def _refuse_universal(engine: Engine) -> None:
    if engine.zero_optimization_stage() == 0:
        raise MolsUnsupportedError(
            "a universal checkpoint at ZeRO stage 0: DeepSpeed has no loader for it; resume at stage 1, 2 or 3"
        )
    if engine.zero_nvme_offload_optimizer():
        raise MolsUnsupportedError(
            "a universal checkpoint with the optimizer on NVMe: DeepSpeed loads swap files of the same layout "
            "only; resume with offload_optimizer on the CPU"
        )
    if getattr(engine.optimizer, "round_robin_gradients", False):
        raise round_robin_error("this run")
    if is_megatron(engine.module) and tensor_parallel_size(engine) > 1:
        raise MolsUnsupportedError(
            "a universal checkpoint of a tensor-parallel Megatron-core model: DeepSpeed does not record how its "
            "parameters are split; resume with the same number of ranks and tensor-parallel size, without "
            '"load_universal", or train with Megatron\'s own optimizer, whose checkpoints move'
        )


def was_round_robin(client_state: Config) -> bool:
    """Whether the run that saved this state had round_robin_gradients."""
    zero = (client_state.get("ds_config") or {}).get("zero_optimization") or {}
    return bool(zero.get("round_robin_gradients")) and zero.get("stage") in (1, 2)


def round_robin_error(which: str) -> MolsUnsupportedError:
    """Error for round_robin_gradients: `_link_all_hp_params` uses another order of groups than the shards."""
    return MolsUnsupportedError(
        f"a universal checkpoint with round_robin_gradients in {which}: DeepSpeed puts most weights in wrong places; "
        'resume with the same number of ranks and without "load_universal", or set "round_robin_gradients": false in '
        "both runs"
    )


def empty_group(engine: Engine) -> str | None:
    """Return an error if this rank has no element of a parameter group (stages 1 and 2), or None.

    `load_hp_checkpoint_state_from_checkpoint_dir` (runtime/base_optimizer.py) then raises IndexError on this rank
    alone.
    """
    groups = getattr(engine.optimizer, "bit16_groups", None) or getattr(engine.optimizer, "bf16_groups", None) or ()
    for number, group in enumerate(groups):
        if all(getattr(parameter, "_hp_mapping", None) is None for parameter in group):
            return f"parameter group {number} has {sum(p.numel() for p in group)} elements, none of them on this rank"
    return None


def empty_group_error(rank: int) -> MolsUnsupportedError:
    """Error for a problem of `empty_group` on `rank`."""
    return MolsUnsupportedError(
        f"a universal checkpoint where rank {rank} has no element of a parameter group (its log says which): "
        "DeepSpeed's loader fails there; join that group with another, or resume on fewer ranks or at ZeRO stage 3"
    )


# ------------------------------------------------------------------ between stages 1, 2 and 3


@contextlib.contextmanager
def reading(engine: Engine, folder: Path | None) -> Iterator[None]:
    """Let DeepSpeed's loader read a universal checkpoint of the other kind of stage. Writes nothing.

    Weights and moments are the same. The names of the model-state files, the place of the optimizer's common state and
    the wrapping of tensors differ.
    """
    source = None if folder is None or not engine.load_universal_checkpoint() else saved_at(folder)
    if folder is None or source is None or source == family_of_stage(engine.zero_optimization_stage()):
        yield
        return
    load = torch.load
    states = sorted(str(path) for path in folder.glob(_first(FAMILIES[source])))
    engine._get_all_ckpt_names = lambda *_: states
    torch.load = _translated(load, folder / "zero", family_of_stage(engine.zero_optimization_stage()))
    try:
        yield
    finally:
        torch.load = load
        del engine._get_all_ckpt_names
    if family_of_stage(engine.zero_optimization_stage()) != "3":
        _set_step(engine, _common(folder)[STATE]["state"][0][STEP])


def _first(pattern: str) -> str:
    """Pattern of the files of data-parallel rank 0, one per tensor-parallel rank."""
    return pattern.replace("zero_pp_rank_*_", "zero_pp_rank_0_mp_rank_*_")


def _common(folder: Path) -> Content:
    content: Content = torch.load(
        folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False, mmap=True
    )
    return content


def _translated(load: Load, zero: Path, to: str) -> Load:
    """Return a `torch.load` that converts files below `zero` for the loader of the stages `to`."""

    def translated(file: object, *args: Any, **kwargs: Any) -> object:
        content = load(file, *args, **kwargs)
        if not isinstance(file, str | os.PathLike) or zero not in Path(file).parents:
            return content
        if Path(file).name != "optimizer_state.pt":
            return {WHOLE: content} if to != "3" and isinstance(content, Tensor) else content
        if to != "3":
            return {VERSION: deepspeed.__version__, **content}
        step = load(next(iter(sorted(zero.glob(f"*/{STEP}.pt")))), weights_only=False)
        return {**content, STATE: {"state": {0: {STEP: step}}, "param_groups": content["param_groups"]}}

    return translated


def _set_step(engine: Engine, step: Tensor | float) -> None:
    """Set the step count: stage 3 has one counter for all, stages 1 and 2 have one per shard."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for values in inner.state.values():
        if "exp_avg" in values:
            values[STEP] = step.clone() if isinstance(step, Tensor) else step


# ------------------------------------------------------------------ after a load


def options_of(inner: torch.optim.Optimizer) -> list[Options]:
    """Return the options of each parameter group."""
    return [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]


def repair(engine: Engine, folder: Path, before: list[Options]) -> str | None:
    """Undo errors of a universal load. `before`: this run's options. Returns a warning, or None.

    With another number of parameter groups in the checkpoint (its file is that of the first pipeline stage), this run's
    options stay. At stage 3, `load_hp_checkpoint_state_from_checkpoint_dir_stage3` (runtime/zero/stage3.py) gives every
    group the options of group 0: each gets its own back. It also makes all sub-groups share one step counter, which
    would advance once per sub-group: each gets its own.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    saved = [{k: v for k, v in group.items() if k != "params"} for group in _common(folder)["param_groups"]]
    same = len(saved) == len(inner.param_groups)
    if not same or engine.zero_optimization_stage() == 3:
        for group, options in zip(inner.param_groups, saved if same else before, strict=True):
            group.update(options)
    if engine.zero_optimization_stage() == 3:
        for values in inner.state.values():
            if isinstance(values.get(STEP), Tensor):
                values[STEP] = values[STEP].clone()
    if same:
        return None
    return (
        f"the universal checkpoint has {len(saved)} parameter groups, this run {len(inner.param_groups)}: the groups "
        "keep the learning rates and options of this run's config"
    )


def unrestored_warning(engine: Engine) -> str | None:
    """Return a warning about state that DeepSpeed's loader did not restore, or None.

    The loader restores what the optimizer has. It does not read the model's own state dict.
    """
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    known = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    buffers = [name for name, value in engine.module.state_dict().items() if name not in known and value is not None]
    if not frozen and not buffers:
        return None
    return (
        f"DeepSpeed restores only trained parameters from a universal checkpoint: {len(frozen)} frozen parameters and "
        f"{len(buffers)} buffers ({', '.join([*frozen, *buffers][:3])}) are as this run's model was built"
    )
