"""torchtitan's own Trainer on its debug model with the lines of docs/torch.md, on CPU ranks; for test_torchtitan.py.

    torchrun --nproc_per_node 2 tests/integrations/torchtitan_run.py OUT whole|resumed

Replaced, since torchtitan asks for a GPU and a later torch: the device and its memory counters, FlexAttention by
torch's scaled dot product, FSDP's pre-multiplied sums by plain ones, and `torch.distributed.set_timeout`. Data and
tokenizer are not in its wheel.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as utils
from torch.distributed.fsdp import FSDPModule


class Cpu(types.ModuleType):
    """`torch.cpu` with the memory counters of an accelerator."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    get_device_name = staticmethod(lambda device=None: "cpu")
    get_device_properties = staticmethod(lambda device=None: types.SimpleNamespace(total_memory=2**30))
    memory_stats = staticmethod(lambda device=None: {})
    current_device = staticmethod(lambda: 0)
    set_device = reset_peak_memory_stats = empty_cache = staticmethod(lambda *args: None)


utils.device_type, utils.device_module = "cpu", Cpu("cpu")
utils.get_device = lambda *args, **kwargs: torch.device("cpu")
dist.set_timeout = lambda *args, **kwargs: None  # type: ignore[attr-defined]

import torchtitan.distributed.utils as dist_utils  # noqa: E402
import torchtitan.models.llama3 as llama3  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import config_registry  # noqa: E402

import mols_ds  # noqa: E402

llama3.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
STEPS, SAVED = 12, 6  # in the window of the calibration
SECTION = {"mode": "online", "start": 4, "samples": 4, "ramp_end": 10, "report_dir": "report"}
VOCABULARY = 2048


class Data(BaseDataLoader):
    """Random tokens, low ids more often."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Any, *, dp_world_size: int, dp_rank: int, seq_len: int, **more: Any) -> None:
        self.read, self.rank, self.world, self.length = 0, dp_rank, dp_world_size, seq_len

    def __iter__(self) -> Iterator[Any]:
        while True:
            generator = torch.Generator().manual_seed(self.read * self.world + self.rank)
            self.read += 1
            ids = (torch.rand(2, self.length + 1, generator=generator) ** 3 * VOCABULARY).long()
            yield {"input": ids[:, :-1]}, ids[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.read = state["read"]


class Tokenizer(BaseTokenizer):
    """Of no use here; the Trainer builds one."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any, **more: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


def config_of(resumed: bool) -> Any:
    config = config_registry.llama3_debugmodel_ce_loss()
    changed = {
        "training": {"seq_len": 32, "steps": STEPS, "disable_cuda_graphs": True, "mixed_precision_param": "float32"},
        "optimizer": {"implementation": "for-loop"},
        "parallelism": {"spmd_backend": "partial_dtensor"},
        "lr_scheduler": {"total_steps": STEPS},
        "checkpoint": {
            "enable": True, "interval": SAVED, "load_step": SAVED if resumed else -1, "async_mode": "disabled",
            "last_save_model_only": False, "initial_load_model_only": False,
        },
    }  # fmt: skip
    parts = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in changed.items()}
    spec = llama3.model_registry("debugmodel")
    made = {"model_spec": spec, "dataloader": Data.Config(), "tokenizer": Tokenizer.Config(), "dump_folder": "out"}
    return dataclasses.replace(config, **parts, **made)


def main(out: str, resumed: bool) -> None:
    config = config_of(resumed)
    trainer = config.build()
    model = trainer.model_parts[0]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    mols = mols_ds.attach(trainer.optimizers, model, SECTION, total_steps=STEPS)
    trainer.checkpointer.states["mols"] = mols
    clip = dist_utils.clip_grad_norm_

    def read_and_clip(*args: Any, **kwargs: Any) -> Any:
        mols.read_gradients()
        return clip(*args, **kwargs)

    dist_utils.clip_grad_norm_ = read_and_clip
    if resumed:
        mols.resume_from(f"out/checkpoint/step-{SAVED}")
    trainer.train()
    sums = {name: p.full_tensor().double().sum().item().hex() for name, p in model.named_parameters()}
    kinds = sorted({type(p.detach()).__name__ for p in model.parameters()})
    report = mols.report()["groups"]
    seen = {"alphas": mols.alphas, "weights": sums, "kinds": kinds, "phase": mols.phase, "steps": mols.steps}
    if dist.get_rank() == 0:
        elements = {group: row["elements"] for group, row in report.items()}
        Path(out).write_text(json.dumps({**seen, "elements": elements}), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "resumed")
