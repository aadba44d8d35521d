"""Write the checkpoints of tests/checkpoints/fixtures. Ran once, with release 0.4.0.

    python -m tests.checkpoints.write_fixtures [PART ...]     # parts: deepspeed, megatron, jobs

The fixtures are NOT to be written again by later releases: they are what 0.4.0 wrote, and show that such files still
load. The script stays to say how they were made. A later release that needs fixtures of its own adds a folder.

Each fixture is a folder:
    checkpoint/      what the engine wrote (without DeepSpeed's copies of its conversion script)
    settings.json    all that is needed to build the run again; every key of the "mols" section is written out
    expected.json    what 0.4.0 gave when it loaded the checkpoint in a fresh process and trained on
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mols_ds
from mols_ds import MolsConfig
from tests.checkpoints import deepspeed_runs, job_runs, megatron_runs
from tests.checkpoints.comparing import FIXTURES, merge
from tests.engines.megatron.building import Setup
from tests.helpers.harness import run_cases

RELEASE, WORLD = "0.4.0", 2
START, SAMPLES, HALF = 2, 18, 11  # 11 of 18 samples: one sample block of 8 is full, the next is open


def full_section(**chosen: Any) -> dict[str, Any]:
    """A "mols" section with every key."""
    section: dict[str, Any] = MolsConfig.parse(chosen).model_dump(mode="json")
    assert set(section) == set(MolsConfig.model_fields)
    return section


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


# --- DeepSpeed ----------------------------------------------------------------------------------------------------

ESTIMATORS = ("damping", "mean", "median", "pooled")  # one a stage


def deepspeed_section(stage: int, mode: str) -> dict[str, Any]:
    return full_section(
        preset="robust",
        start=START,
        samples=SAMPLES,
        mode=mode,
        estimator=ESTIMATORS[stage],
        noise_floor_correction=False,  # so few samples of so small a model lie below the floor
        alpha_min=0.01,
        alpha_max=100.0,
        ramp="cosine" if stage == 3 else "linear",
        ramp_end=6 if mode == "probe" else 25,
        granularity="layer_type" if stage == 2 else "type",
        total_steps=60,
        report_dir="report",
    )


def deepspeed_settings(stage: int, mode: str) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "round_robin_gradients": False,
        "elastic_checkpoint": False,
    }
    if stage == 3:  # elements: several sub-groups; norms stay whole on every rank
        zero |= {"sub_group_size": 400, "stage3_param_persistence_threshold": 20}
        zero |= {"stage3_max_live_parameters": 10_000, "stage3_prefetch_bucket_size": 1000}
    return {
        "release": RELEASE,
        "engine": "deepspeed",
        "world": WORLD,
        "model": {"tokens": 31, "width": 12, "inner": 19, "layers": 2},
        "data": {"sequences": 2, "length": 9},
        "optimizer": {
            "options": {"betas": [0.9, 0.95], "eps": 1e-4, "amsgrad": False, "foreach": False, "fused": False},
            "groups": [
                {"params": "matrices", "lr": 2e-2, "weight_decay": 0.1},
                {"params": "vectors", "lr": 5e-2, "weight_decay": 0.0},
            ],
        },
        "schedule": {"warmup": 4, "decay": 0.98},
        "ds_config": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "mols": deepspeed_section(stage, mode),
        },
    }


# point -> (iteration after which it is saved, iterations that a run goes on from it)
PROBE_POINTS = {
    "waiting": (0, 22),
    "calibrating": (START + HALF - 1, 14),
    "ramping": (START + SAMPLES + 1, 6),
    "fixed": (START + SAMPLES + 4, 6),
}
ONLINE_POINTS = {"calibrating-online": (START + HALF - 1, 14)}


def write_deepspeed() -> None:
    runs = {}
    for stage in (0, 1, 2, 3):
        for mode, points in (("probe", PROBE_POINTS), ("online", ONLINE_POINTS)):
            settings = deepspeed_settings(stage, mode)
            runs[json.dumps(settings)] = {f"zero{stage}-{point}": (settings, *where) for point, where in points.items()}
    write_checkpoints(deepspeed_runs.written, runs)
    expect(deepspeed_runs.continued, "zero")


# --- Megatron -----------------------------------------------------------------------------------------------------

MEGATRON_RUNS = {  # fixture -> (grid, way in)
    "megatron-dp2": ({"tp": 1}, "apply"),
    "megatron-tp2": ({"tp": 2}, "attach"),
}


def megatron_settings(name: str, mode: str) -> dict[str, Any]:
    grid, way = MEGATRON_RUNS[name]
    setup = Setup(
        **grid,
        distributed=True,
        micro_batches=4,
        layers=1,
        hidden=16,
        heads=2,
        kv_groups=2,
        vocab=32,
        seq=8,
        lr=2e-2,
        weight_decay=0.1,
        clip=1.0,
        dtype="float32",
        position="rope",
        tied=False,
        bias=False,
    )
    return {
        "release": RELEASE,
        "engine": "megatron",
        "world": WORLD,
        "setup": dataclasses.asdict(setup),
        "way": way,
        "sharding": "fully_reshardable",
        "optimizer": {
            "iterations": 60,
            "warmup": 4,
            "optimizer": "adam",
            "lr": 2e-2,
            "min_lr": 2e-3,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "adam_eps": 1e-4,
            "decoupled_weight_decay": True,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
        },
        "mols": full_section(
            preset="robust",
            start=START,
            samples=SAMPLES,
            mode=mode,
            estimator="damping" if grid["tp"] == 2 else "mean",
            noise_floor_correction=False,
            alpha_min=0.01,
            alpha_max=100.0,
            ramp="linear",
            ramp_end=6 if mode == "probe" else 25,
            granularity="type",
            total_steps=60,
            report_dir="report",
        ),
    }


def write_megatron() -> None:
    runs = {}
    for name in MEGATRON_RUNS:
        for mode, points in (("probe", PROBE_POINTS), ("online", ONLINE_POINTS)):
            settings = megatron_settings(name, mode)
            runs[json.dumps(settings)] = {f"{name}-{point}": (settings, *where) for point, where in points.items()}
    write_checkpoints(megatron_runs.written, runs)
    expect(megatron_runs.continued, "megatron-")


# --- programs -----------------------------------------------------------------------------------------------------

# 3 updates and 4 of 6 samples: the seventh iteration, which has two passes, is under way when the signal comes
JOB_START, JOB_SAMPLES, JOB_STEPS, STOP_AT_PASS = 3, 6, 8, 13
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}


def job_section() -> dict[str, Any]:
    return full_section(
        preset="robust",
        start=JOB_START,
        samples=JOB_SAMPLES,
        mode="probe",
        estimator="damping",
        noise_floor_correction=False,
        alpha_min=0.01,
        alpha_max=100.0,
        ramp_end=6,
        total_steps=JOB_STEPS,
        report_dir=f"{job_runs.OUT}/mols_report",
    )


def job_inputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Write what the two programs read; returns fixture -> settings."""
    from mols_ds.training.megatron_settings import validate
    from mols_ds.training.tokens import train_tokenizer
    from tests.apps.command import write_text

    write_text(folder / "text.jsonl", documents=30)
    rows = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text("utf-8").splitlines()]
    train_tokenizer(rows, TINY_LLAMA["vocab_size"], folder / "tokenizer")
    write_json(folder / "model.json", TINY_LLAMA)
    adam = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-4, "weight_decay": 0.1, "torch_adam": True}
    write_json(
        folder / "ds.json",
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000},
            "optimizer": {"type": "AdamW", "params": {**adam, "adam_w_mode": True}},
            "mols": job_section(),
        },
    )
    llama = TINY_LLAMA
    content = {
        "model": {
            "num_layers": 1,
            "hidden_size": llama["hidden_size"],
            "ffn_hidden_size": llama["intermediate_size"],
            "num_attention_heads": 2,
            "vocab_size": llama["vocab_size"],
            "vocab_multiple": 4,
        },
        "parallel": {"tp": 2},
        "precision": {"dtype": "fp32", "transformer_engine": False},
        "optimizer": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1},
        "batch": {"micro": 2, "global": 4},
        "data": {"source": "text.jsonl", "eval_share": 0.2, "tokenizer": "tokenizer", "cache_dir": "cache"},
        "run": {"steps": JOB_STEPS, "seq_len": 32, "eval_every": 3, "eval_sequences": 6},
        "mols": job_section(),
    }
    write_json(folder / "job.yaml", validate(content, "job.yaml").model_dump(mode="json", by_alias=True))
    out = ["--out", job_runs.OUT]
    run = [("steps", JOB_STEPS), ("seq-len", 32), ("seed", 0), ("eval-every", 3), ("eval-sequences", 6)]
    run += [("save-every", 0), ("log-every", 1), ("eval-share", 0.2), ("text-key", "text"), ("cache-dir", "cache")]
    named = [("deepspeed_config", "ds.json"), ("model", "model.json"), ("data", "text.jsonl"), *run]
    train = [*out, "--tokenizer", "tokenizer", *(word for key, value in named for word in (f"--{key}", str(value)))]
    about = {"release": RELEASE, "world": WORLD, "stop_at_pass": STOP_AT_PASS, "samples": JOB_SAMPLES}
    return {
        "job-train": {**about, "script": "train.py", "arguments": train},
        "job-train_megatron": {**about, "script": "train_megatron.py", "arguments": ["--config", "job.yaml", *out]},
    }


JOB_FILES = {
    "job-train": ("text.jsonl", "tokenizer", "model.json", "ds.json"),
    "job-train_megatron": ("text.jsonl", "tokenizer", "job.yaml"),
}


def write_jobs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder, "inputs")
        inputs.mkdir()
        cases, settings = {}, job_inputs(inputs)
        for name, files in JOB_FILES.items():
            place = Path(folder, name)
            place.mkdir()
            for file in files:
                copy = shutil.copytree if (inputs / file).is_dir() else shutil.copy
                copy(inputs / file, place / file)
            cases[name] = (str(place), json.dumps(settings[name]))
        results = run_cases(job_runs.interrupted, WORLD, list(cases.values()))
        for name, case in cases.items():
            assert results[case]
            shutil.rmtree(FIXTURES / name, ignore_errors=True)
            shutil.copytree(case[0], FIXTURES / name / job_runs.START)
            for copied in (FIXTURES / name).rglob("zero_to_*.py"):
                copied.unlink()
            write_json(FIXTURES / name / "settings.json", settings[name])
    results = run_cases(job_runs.continued, WORLD, [(name,) for name in JOB_FILES])
    for name in JOB_FILES:
        first, second = results[(name,)]
        assert first == second
        write_json(FIXTURES / name / "expected.json", first)


# --- all engines --------------------------------------------------------------------------------------------------


def write_checkpoints(written: Any, runs: dict[str, dict[str, tuple[dict[str, Any], int, int]]]) -> None:
    """Run each of `runs` (settings as JSON -> fixture -> settings, where to save, how far to go on); keep its files."""
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            (folder, settings, tuple((name, iteration) for name, (_, iteration, _) in points.items()))
            for settings, points in runs.items()
        ]
        results = run_cases(written, WORLD, cases)
        for case, points in zip(cases, runs.values(), strict=True):
            phases = results[case][0]
            for name, (settings, iteration, more) in points.items():
                target = FIXTURES / name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(Path(folder, name), target)
                for copied in target.rglob("zero_to_*.py"):
                    copied.unlink()
                about = {"phase": phases[name], "saved_after_iteration": iteration, "iterations": more}
                write_json(target / "settings.json", {**settings, **about})


def expect(continued: Any, prefix: str) -> None:
    """Write `expected.json` of every fixture whose name begins with `prefix`."""
    names = sorted(path.name for path in FIXTURES.glob(f"{prefix}*"))
    results = run_cases(continued, WORLD, [(name,) for name in names])
    for name in names:
        write_json(FIXTURES / name / "expected.json", merge(results[(name,)]))


PARTS = {"deepspeed": write_deepspeed, "megatron": write_megatron, "jobs": write_jobs}


def main(parts: list[str]) -> None:
    if mols_ds.__version__ != RELEASE:
        raise SystemExit(f"these fixtures are what release {RELEASE} wrote; this is {mols_ds.__version__}")
    for part in parts or list(PARTS):
        PARTS[part]()


if __name__ == "__main__":
    main(sys.argv[1:])
