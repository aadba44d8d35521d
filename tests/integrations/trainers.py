"""transformers' Trainer and TRL's SFTTrainer and DPOTrainer on a tiny LLaMA: one run, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import mols_ds
from mols_ds.integrations.transformers import MolsCallback
from tests.integrations.accelerate_loop import use_scaler
from tests.integrations.runs import (
    LR,
    PLAIN,
    SAVED,
    SECTION,
    STEPS,
    WARMUP,
    Examples,
    Plain,
    Run,
    end_of,
    kept_in,
    kinds_of,
    model,
    phase_of,
    saved_in,
    zero_section,
)

TIMES = ("runtime", "per_second")


@dataclass(frozen=True)
class Spec:
    """One run.

    Attributes:
        how: "stock", "callback" or "patch".
        trainer: "trainer", "sft" or "dpo".
        mols: keys of the "mols" section beside SECTION; None: no section.
        argument: the section is an argument of the callback, not in the config.
        arguments: of TrainingArguments.
        ds: "hf" (optimizer and schedule are the Trainer's) or "deepspeed" (both in the config).
        resume: a checkpoint folder.
        lora: adapters are trained.
        scaler: a loss scale to begin with; without DeepSpeed.
        own_sampler: every loader of the training data has one sampler, which remembers.
    """

    how: str = "callback"
    trainer: str = "trainer"
    stage: int = 2
    micros: int = 1
    mols: Mapping[str, Any] | None = field(default_factory=dict)
    argument: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ds: str = "hf"
    out: str = "out"
    resume: str | None = None
    lora: bool = False
    scaler: float | None = None
    own_sampler: bool = False


def ds_config(spec: Spec) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = {**zero_section(spec.stage), "reduce_bucket_size": "auto"}
    if spec.stage == 3:
        zero["stage3_prefetch_bucket_size"] = "auto"
    config: dict[str, Any] = {**dict.fromkeys(auto, "auto"), "bf16": {"enabled": "auto"}, "zero_optimization": zero}
    config["steps_per_print"] = 10**9
    if spec.ds == "deepspeed":
        params = {**dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"), "torch_adam": True}
        config["optimizer"] = {"type": "AdamW", "params": params}
        keys = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
        config["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(keys, "auto")}
    if spec.mols is not None and not spec.argument:
        config["mols"] = SECTION | dict(spec.mols)
    return config


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes what the engine is and what the schedule says after each update."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.callback: MolsCallback | None = None
        self.seen: dict[str, Any] = {"counts": [], "lrs": [], "phases": [], "saved": {}}

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine; without DeepSpeed an object with the same attributes."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            return trainer.model_wrapped
        return Plain(trainer.model, self.callback and self.callback.mols, trainer.state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine, seen = self.engine, self.seen
        seen["counts"].append((state.global_step, engine.global_steps, engine.micro_steps))
        seen["lrs"].append(float(self.trainer.lr_scheduler.get_last_lr()[0]))
        seen["phases"].append(phase_of(engine))
        for part, update in SAVED.items():
            if update == state.global_step and hasattr(engine, "mols"):
                seen["saved"][part] = saved_in(engine, update)


class Remembers(torch.utils.data.Sampler[int]):
    """Draws its order from a generator of its own, for ever on."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return len(Examples())

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self), generator=self.generator).tolist())


class OwnSampler(Trainer):  # type: ignore[misc]
    """A Trainer with one sampler for all its loaders."""

    sampler: Any = None

    def _get_train_sampler(self, *args: Any) -> Any:
        self.sampler = self.sampler or Remembers()
        return self.sampler


def make(spec: Spec, watch: Watch, callback: MolsCallback | None) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": spec.micros,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 7,
        "bf16": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    deepspeed = None if spec.stage == PLAIN else ds_config(spec)
    arguments = {**defaults, **spec.arguments, "output_dir": spec.out, "deepspeed": deepspeed}
    callbacks = [watch] if callback is None else [watch, callback]
    if spec.trainer != "trainer":
        return _trl(spec, arguments, callbacks)
    args = TrainingArguments(**arguments)
    set_seed(7)
    train, held_out = Examples(), Examples()
    kind = OwnSampler if spec.own_sampler else Trainer
    return kind(
        model=model(), args=args, train_dataset=train, eval_dataset=[held_out[i] for i in range(8)], callbacks=callbacks
    )


def _trl(spec: Spec, arguments: dict[str, Any], callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    words = ["[UNK]", "[PAD]", "</s>", *(f"w{i}" for i in range(125))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")
    texts = [" ".join(words[3 + int(token) // 2] for token in row) for row in Examples().rows]
    dpo = spec.trainer == "dpo"
    rows = [{"prompt": t[:8], "chosen": t[8:], "rejected": t[8:][::-1]} if dpo else {"text": t} for t in texts]
    config, kind = (DPOConfig, DPOTrainer) if dpo else (SFTConfig, SFTTrainer)
    args = config(**arguments, max_length=24 if dpo else 16, gradient_checkpointing=False)
    set_seed(7)
    return kind(
        model=model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=fast,
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if spec.lora else None,
        **({"ref_model": model()} if dpo and not spec.lora else {}),
    )


def history(trainer: Any, ours: bool) -> list[dict[str, float]]:
    """The Trainer's log, without times, and with or without our keys."""
    return [
        {k: v for k, v in row.items() if not any(t in k for t in TIMES) and (ours or not k.startswith("mols/"))}
        for row in trainer.state.log_history
    ]


def train(spec: Spec) -> dict[str, Any]:
    """Train as `spec` says; everything that another run can be compared with."""
    watch = Watch()
    section = SECTION | dict(spec.mols or {}) if spec.argument else None
    callback = MolsCallback(section) if spec.how == "callback" else None
    if spec.how == "patch":
        mols_ds.patch()
    try:
        trainer = make(spec, watch, callback)
        watch.trainer, watch.callback = trainer, callback
        if callback is not None:
            callback.bind(trainer)
        if spec.scaler is not None:
            use_scaler(trainer.accelerator, torch.amp.GradScaler("cpu", init_scale=spec.scaler))
        trainer.train(resume_from_checkpoint=spec.resume)
    finally:
        mols_ds.unpatch()
    same = {
        "log": history(trainer, ours=False),
        "kept": kept_in(spec.out, "checkpoint*"),
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "flos": trainer.state.total_flos,
        "loaders": len(trainer.accelerator._dataloaders),
    }
    watch.seen["kinds"] = kinds_of(trainer.model_wrapped)
    read = trainer.train_dataset.read if isinstance(trainer.train_dataset, Examples) else []
    rows = [row for row in history(trainer, ours=True) if "loss" in row]
    logs = [{"update": row["step"], "lr": row["learning_rate"], **row} for row in rows]
    for row in logs:
        row.pop("num_tokens", None)  # TRL counts them from each start on
    return {**watch.seen, "logs": logs, "same": same, "read": read, **end_of(watch.engine)}


EVALUATING: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}


def train_run(trainer: str, lora: bool, run: Run) -> dict[str, Any]:
    """A run of the table: accumulation, and epochs that end in its middle."""
    arguments = EVALUATING if run.evaluate else {}
    if run.save:
        arguments = {"save_strategy": "steps", "save_steps": 2}
    resume = None if run.resume is None else f"{run.saved}/checkpoint-{SAVED[run.resume]}"
    how = "stock" if run.mols is None else "callback"
    plain = run.stage == PLAIN
    return train(Spec(how, trainer, run.stage, 2, run.mols, plain, arguments, out=run.out, resume=resume, lora=lora))
