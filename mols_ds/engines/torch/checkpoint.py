"""MoLS state in the checkpoints of a plain torch loop: `mols.state_dict()` and `mols.load_state_dict()`.

What is the same on every rank (phase, counters, alphas, report) is the string "common". The accumulators and the state
of a probe window differ by rank; they are under a key with the rank and the number of ranks, and only inside of a
calibration. Keys of two ranks are never equal, because torch.distributed.checkpoint saves equal keys once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mols_ds.core.rank_checks import together
from mols_ds.core.session import Session
from mols_ds.engines.torch.placement import describe
from mols_ds.engines.torch.shards import TorchShards
from mols_ds.errors import MolsCheckpointError

COMMON, STEPS = "common", "steps"
TENSORS = ("mean", "m2", "exponents", "cells", "cell_squares")
"""Accumulators in a rank's part, beside "ids" (tokens), "window" (a saved window as bytes) and "rest" (JSON)."""


def rank_key() -> str:
    """Key of this rank's part."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return f"rank_{rank:05d}_of_{world:05d}"


def pack_common(common: Mapping[str, Any], steps: int) -> str:
    """Return the part that is the same on every rank."""
    return json.dumps({**common, STEPS: steps})


def unpack_common(state: object) -> tuple[dict[str, Any], int]:
    """Return (result of `Session.common_state`, steps) from a `state_dict`.

    Raises:
        MolsCheckpointError: it is not one.
    """
    try:
        common = json.loads(state[COMMON])  # type: ignore[index]
        return common, int(common.pop(STEPS))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MolsCheckpointError(
            "load_state_dict: this is not the result of mols.state_dict(); for a checkpoint without MoLS do not call it"
        ) from None


class TorchCheckpoints:
    """State of one session.

    Args:
        mols, shards: of the optimizers.
        count_from: sets the number of updates.
    """

    def __init__(self, mols: Session, shards: TorchShards, count_from: Callable[[int], None]) -> None:
        self.mols, self.shards, self._count_from = mols, shards, count_from
        self._template: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state. No communication."""
        state: dict[str, Any] = {COMMON: pack_common(self.mols.common_state(), self.mols.steps)}
        if self._template is not None:
            return {**state, rank_key(): self._template}
        return {**state, rank_key(): part} if (part := self._own_part()) else state

    def _own_part(self) -> dict[str, Any]:
        controller = self.mols.controller
        if not controller.measuring:
            return {}
        self.mols.window.close_batch()  # a checkpoint loses a partially accumulated batch
        samples, window = controller.elements.state_dict(), self.mols.window.state_dict()
        part: dict[str, Any] = {}
        if window is not None:
            part["window"] = _as_bytes(window)
        if samples is not None:
            moments: Mapping[str, Any] = samples["moments"]
            part |= {key: moments[key] for key in TENSORS}
            part |= {} if samples["ids"] is None else {"ids": samples["ids"]}
            rest = {key: moments[key] for key in ("numel", "count")}
            part["rest"] = json.dumps({"owned": samples["owned"], "moments": rest, "placements": self._placements()})
        return part

    def _placements(self) -> list[str]:
        return [describe(p) for p in self.shards.params.values()]

    def template_of(self, checkpoint_id: str) -> None:
        """Make the next `state_dict` a template of this rank's part in a folder of torch.distributed.checkpoint.

        Raises:
            MolsCheckpointError: the folder has several parts of this rank.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, stored in FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata.items():
            before, key, leaf = name.rpartition(f"{rank_key()}.")
            if key:
                part = found.setdefault(before, {})
                part[leaf] = ""
                if isinstance(stored, TensorStorageMetadata):
                    part[leaf] = torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
        if len(found) > 1:
            raise MolsCheckpointError(
                f"{checkpoint_id} has the MoLS states {', '.join(sorted(found))}: save one per checkpoint"
            )
        self._template = next(iter(found.values()), None)

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. Collective."""
        self._template = None
        mols = self.mols
        common, steps = unpack_common(state)
        mols.window.forget()
        self._count_from(steps)
        mols.resume(common, steps, lambda: self._load_part(state, bool(common["state"]["samples"])))

    def _load_part(self, state: Mapping[str, Any], started: bool) -> str | None:
        """Continue a partial calibration. Returns an error, the same on every rank, or None."""
        if started and self.mols.config.mode == "moments":
            return None  # its state is the optimizer's
        problems = together(lambda: self._part_problem(state.get(rank_key())))
        problem = next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None), None)
        return problem if started else None

    def _part_problem(self, part: Mapping[str, Any] | None) -> str | None:
        if not part:
            return (
                f"the state has none of {rank_key().replace('_', ' ')}: call state_dict() on every rank and load each "
                "rank's own; with torch.distributed.checkpoint call mols.resume_from(checkpoint_id) before dcp.load; "
                "another number of ranks cannot continue them"
            )
        try:
            if "rest" in part:
                rest = json.loads(part["rest"])
                if rest["placements"] != self._placements():
                    return "they were saved with other placements of the parameters"
                moments = {**rest["moments"], **{key: part[key] for key in TENSORS}}
                self.mols.controller.elements.load_state_dict(
                    {"owned": rest["owned"], "moments": moments, "ids": part.get("ids")}
                )
            window = part.get("window")
            self.mols.window.load_state_dict(None if window is None else _from_bytes(window))
        except (KeyError, ValueError, TypeError, RuntimeError, MolsCheckpointError) as error:
            return str(error) or type(error).__name__
        return None


def _as_bytes(value: object) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return torch.load(io.BytesIO(tensor.cpu().numpy().tobytes()), weights_only=True)
