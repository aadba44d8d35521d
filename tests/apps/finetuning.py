"""A tiny checkpoint and tokenizer to fine-tune, and a rank's work to fine-tune it and check the saved files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.apps.command import ROOT, read_metrics

DATA = ROOT / "configs" / "data" / "instructions.jsonl"
STEPS = 6
VOCABULARY = 512
# A wide spread of the output head, which adapters leave as it is: else no adapter could lower the loss by much.
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "mols": {"start": 1, "samples": 4, "mode": "probe", "ramp_end": 4},
}


def write_checkpoint(folder: Path) -> Path:
    """A randomly initialised LLaMA with a tokenizer trained on the example data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mols_ds.training.tokens import train_tokenizer

    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    heads = "\n### Instruction:\n\n### Input:\n\n### Response:\n"
    train_tokenizer([" ".join(row.values()) + heads for row in rows], VOCABULARY, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)
    return folder


def config_path(folder: Path, stage: int) -> Path:
    """Where `write_config` writes."""
    return folder / f"ds_{stage}.json"


def write_config(folder: Path, stage: int) -> None:
    """The config for a ZeRO stage; stage 3 shards even the smallest weight."""
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config_path(folder, stage).write_text(json.dumps({**CONFIG, "zero_optimization": zero}), "utf-8")


def arguments(folder: Path, config: Path, out: Path, method: str, *more: str) -> list[str]:
    """finetune.py's arguments for a short run on the example data."""
    fixed = ["--config", str(config), "--model", str(folder / "tiny"), "--data", str(DATA), "--out", str(out)]
    return [*fixed, "--method", method, "--eval-share", "0.2", "--eval-every", "3", *more]


def fine_tune(folder: str, method: str, stage: int, *more: str) -> dict[str, Any]:
    """Runs finetune.py's job in this rank. Returns status, metrics, and the largest difference between the logits of
    the engine as it was saved and those of the saved folder loaded again."""
    from mols_ds.apps.finetune import main as job
    from mols_ds.apps.finetune import model, task
    from mols_ds.training import ranks as commandline

    commandline.PATIENCE_SECONDS = 0.0
    base, world = Path(folder), torch.distributed.get_world_size()
    out = base / f"{method}-{stage}-{world}{'-'.join(more).replace('/', '_')}"
    ids = torch.arange(40).view(2, 20)
    seen: dict[str, torch.Tensor] = {}
    stock = model.save_weights

    def save(engine: Any, target: Path, tokenizer: Any, *, adapters: bool) -> None:
        engine.eval()
        with torch.no_grad():
            seen["logits"] = engine(input_ids=ids, use_cache=False).logits.clone()
        engine.train()
        stock(engine, target, tokenizer, adapters=adapters)

    task.save_weights = save  # type: ignore[assignment]
    try:
        config = config_path(base, stage)
        status = job.main(arguments(base, config, out, method, "--steps", str(STEPS), *more))
    finally:
        task.save_weights = stock  # type: ignore[assignment]
    found: dict[str, Any] = {"status": status, "out": str(out)}
    if torch.distributed.get_rank() == 0 and status == 0:
        loaded = model.load_saved(str(out / ("model" if method == "full" else "adapter")), torch.float32)
        with torch.no_grad():
            found["difference"] = float((loaded(input_ids=ids).logits - seen["logits"]).abs().max())
        found["metrics"] = read_metrics(out)
    torch.distributed.barrier()
    return found


def resume(folder: str, method: str, stage: int) -> list[dict[str, Any]]:
    """Train with a checkpoint in the middle, then continue from a copy of it. Returns both runs' metrics."""
    whole = fine_tune(folder, method, stage, "--save-every", "3", "--activation-checkpointing")
    out = Path(whole["out"])
    part = out.with_name(out.name + "-part")
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.copytree(out / "checkpoints" / "step3", part / "checkpoints" / "step3")
        shutil.copy(out / "metrics.jsonl", part)
        (part / "checkpoints" / "latest").write_text("step3", "utf-8")
    torch.distributed.barrier()
    from mols_ds.apps.finetune import main as job

    more = ["--steps", str(STEPS), "--save-every", "3", "--activation-checkpointing", "--resume"]
    config = config_path(Path(folder), stage)
    assert job.main(arguments(Path(folder), config, part, method, *more)) == 0
    wrong = job.main(arguments(Path(folder), config, part, method, *more, "--lora-rank", "4"))
    assert wrong == job.USER_MISTAKE, wrong
    if rank != 0:
        return []
    adapter = {
        name: sum(p.stat().st_size for p in (place / "adapter").iterdir())
        for name, place in {"mid": part / "checkpoints" / "step3", "end": part}.items()
    }
    assert min(adapter.values()) > 0
    return [whole["metrics"], read_metrics(part)]
