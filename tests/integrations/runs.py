"""What the runs of all clients share: the section, the model, the data, and what is compared of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from mols_ds.core.handle import Handle
from tests.engines.deepspeed.state import full_weights
from tests.engines.torch.parallel import full_weights as plain_weights
from tests.helpers.digests import digest
from tests.helpers.harness import draw_nothing

draw_nothing()

STEPS, START, SAMPLES, RAMP_END = 14, 4, 4, 9
WARMUP, LR = 2, 2e-3
EXAMPLES = 44  # with two sequences a batch and accumulation the epochs end in the middle of the run
PLAIN = -1
"""Stage of a run without DeepSpeed."""
SECTION: dict[str, Any] = {
    "start": START,
    "samples": SAMPLES,
    "ramp_end": RAMP_END,
    "report_dir": "report",
    "noise_floor_correction": False,  # of so few samples of so small a model most groups would be clamped
    "estimator": "mean",
}
CLAMPED = {"alpha_min": 1.0, "alpha_max": 1.0}
"""With these every alpha is 1: the run must be the stock one, bit for bit."""
ONLINE = {"mode": "online", "ramp_end": 11}
SAVED = {"waiting": 2, "due": START, "window": START + 2, "ramp": 6, "fixed": 12}
"""When a checkpoint is saved -> after which update; in the window in mode "online", whose samples are updates too."""


@dataclass(frozen=True)
class Run:
    """One run of a client.

    Attributes:
        stage: of ZeRO, or PLAIN.
        mols: keys of the "mols" section beside SECTION; None: no MoLS at all.
        out: folder of checkpoints and logs.
        save: whether it saves after each update of SAVED.
        resume: the checkpoint (of SAVED) in the folder `saved` that it goes on from.
        evaluate: with evaluations, and checkpoints that the client itself keeps and deletes.
    """

    stage: int
    mols: Mapping[str, Any] | None
    out: str
    save: bool = False
    resume: str | None = None
    saved: str = ""
    evaluate: bool = False

    @property
    def section(self) -> dict[str, Any] | None:
        """The "mols" section."""
        return None if self.mols is None else SECTION | dict(self.mols)


class Examples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that differ in what they teach; notes which of them were read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(0, 128, (12,), generator=generator) // (1 + i % 5) for i in range(EXAMPLES)]
        self.read: list[int] = []

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def model() -> Any:
    """A LLaMA of two layers with random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes))


def zero_section(stage: int) -> dict[str, Any]:
    """ "zero_optimization" of a stage; at 3 matrices are partitioned, and there are several sub-groups."""
    sizes = {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000} if stage == 3 else {}
    return {"stage": stage, **sizes}


class Plain:
    """What DeepSpeed's engine has, for a model that is trained without it; `mols` only if there is MoLS."""

    micro_steps = None

    def __init__(self, net: torch.nn.Module, mols: Handle | None = None, updates: int = 0) -> None:
        self.net, self.global_steps = net, updates
        if mols is not None and type(mols) is not Handle:
            self.mols = mols

    def destroy(self) -> None:
        pass


def kinds_of(net: torch.nn.Module) -> list[str]:
    """Classes of the model as it is called and of its weights."""
    return sorted({type(net).__name__, *(type(p.detach()).__name__ for p in net.parameters())})


def phase_of(engine: Any) -> str:
    """Phase of its MoLS; "stock" without."""
    return str(engine.mols.phase) if hasattr(engine, "mols") else "stock"


def end_of(engine: Any) -> dict[str, Any]:
    """What a run came to: weights, random state, and alphas and rates where there is MoLS. Destroys the engine."""
    weights = plain_weights(engine.net) if isinstance(engine, Plain) else full_weights(engine)
    seen: dict[str, Any] = {
        "weights": {name: digest(weight) for name, weight in weights.items()},
        "random": digest(torch.get_rng_state()),
        "phase": phase_of(engine),
    }
    if hasattr(engine, "mols"):
        seen |= {"alphas": engine.mols.alphas, "applied": engine.mols.applied_lrs, "samples": engine.mols.samples}
    engine.destroy()
    return seen


def saved_in(engine: Any, updates: int) -> dict[str, Any]:
    """In which phase a checkpoint is saved."""
    return {"phase": phase_of(engine), "samples": engine.mols.samples, "updates": updates}


def kept_in(folder: str, pattern: str) -> list[str]:
    """Names of the checkpoints in a folder, after all ranks have written and deleted theirs."""
    if dist.is_initialized():
        dist.barrier()
    return sorted(path.name for path in Path(folder).glob(pattern))


def own_folder(name: str) -> Path:
    """A folder for a case of its own, the same on all ranks."""
    folder = Path(name.replace(" ", "_").replace(",", ""))
    folder.mkdir(exist_ok=True)
    return folder.resolve()
