"""transformers' Trainer and TRL's SFTTrainer on a tiny LLaMA built from its config: one run, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import mols_ds
from mols_ds.integrations.transformers import MolsCallback
from tests.engines.deepspeed.state import full_weights
from tests.helpers.digests import digest
from tests.helpers.harness import draw_nothing

draw_nothing()

STEPS, START, SAMPLES, RAMP_END = 14, 4, 4, 9
EXAMPLES = 44  # with two sequences a batch: the epochs end in the middle of the run
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


def ds_config(spec: Spec) -> dict[str, Any]:
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    zero: dict[str, Any] = {"stage": spec.stage, "reduce_bucket_size": "auto"}
    if spec.stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 100,
            "stage3_prefetch_bucket_size": "auto",
            "sub_group_size": 5000,
        }
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


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes what the engine is and what the schedule says after each update."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.rows: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        phase = engine.mols.phase if hasattr(engine, "mols") else "stock"
        lr = float(self.trainer.lr_scheduler.get_last_lr()[0])
        self.rows.append((state.global_step, engine.global_steps, engine.micro_steps, lr, phase))


def model() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **sizes))


def make(spec: Spec, watch: Watch, callback: MolsCallback | None) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": spec.micros,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 7,
        "bf16": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = {**defaults, **spec.arguments, "output_dir": spec.out, "deepspeed": ds_config(spec)}
    callbacks = [watch] if callback is None else [watch, callback]
    if spec.trainer != "trainer":
        return _trl(spec, arguments, callbacks)
    args = TrainingArguments(**arguments)
    set_seed(7)
    train, held_out = Examples(), Examples()
    return Trainer(
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
    shared = {"processing_class": fast, "callbacks": callbacks}
    if spec.trainer == "dpo":
        rows = [{"prompt": text[:8], "chosen": text[8:], "rejected": text[8:][::-1]} for text in texts]
        preferences = DPOConfig(**arguments, max_length=24, gradient_checkpointing=False)
        set_seed(7)
        net, reference = model(), model()
        return DPOTrainer(net, reference, args=preferences, train_dataset=Dataset.from_list(rows), **shared)
    args = SFTConfig(**arguments, max_length=16, gradient_checkpointing=False)
    set_seed(7)
    return SFTTrainer(
        model=model(),
        args=args,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if spec.lora else None,
        **shared,
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
        watch.trainer = trainer
        if callback is not None:
            callback.bind(trainer)
        trainer.train(resume_from_checkpoint=spec.resume)
    finally:
        mols_ds.unpatch()
    engine = trainer.model_wrapped
    seen: dict[str, Any] = {
        "rows": watch.rows,
        "log": history(trainer, ours=False),
        "log with mols": history(trainer, ours=True),
        "weights": {name: digest(weight) for name, weight in full_weights(engine).items()},
        "saved": sorted(path.name for path in Path(spec.out).glob("checkpoint*")),
        "best": Path(trainer.state.best_model_checkpoint or "").name,
        "random": digest(torch.get_rng_state()),
        "flos": trainer.state.total_flos,
        "loaders": len(trainer.accelerator._dataloaders),
    }
    if isinstance(trainer.train_dataset, Examples):
        seen["read"] = trainer.train_dataset.read
    if hasattr(engine, "mols"):
        mols = engine.mols
        seen |= {"alphas": mols.alphas, "phase": mols.phase, "samples": mols.samples, "applied": mols.applied_lrs}
    engine.destroy()
    return seen


def own_folder(name: str) -> Path:
    """A folder for a case of its own, the same on all ranks."""
    folder = Path(name.replace(" ", "_").replace(",", ""))
    folder.mkdir(exist_ok=True)
    return folder.resolve()


def interrupted(spec: Spec, checkpoints: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """One run that saves after each update, and one run from each of those checkpoints to the end."""
    saving = {**spec.arguments, "save_strategy": "steps", "save_steps": 1}
    whole = train(replace(spec, arguments=saving))
    resumed = {}
    for step in range(1, STEPS):
        if checkpoints is None or checkpoints(step):
            resumed[step] = train(replace(spec, out=f"{spec.out}_{step}", resume=f"{spec.out}/checkpoint-{step}"))
    return {"whole": whole, "resumed": resumed}
