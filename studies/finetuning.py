"""Does MoLS help when a small model is fine-tuned? The design was written before the first run.

    OMP_NUM_THREADS=1 python studies/finetuning.py             # everything; stop it at any time, start it again
    OMP_NUM_THREADS=1 python studies/finetuning.py report      # the tables of the finished runs, as markdown

Rows: studies/results/finetuning.jsonl. Needs `pip install -e '.[finetune,evaluate]'`, no network. Its parts:

data      Prompt: the line `def name(arguments):` of a public function in the sources of torch and transformers.
          Completion: the first line of its docstring. One function for each line, so equal lines are on one side. By a
          hash of the line, the first 400 are held out, the next 4,000 are for training. A task for lm-eval: which of
          four held-out lines belongs to this held-out function, 200 questions, wrong answers of similar length.
pretrain  LLaMA, 4 layers, width 128, vocabulary 4,096 (1.8 M weights): 1,200 steps of 8 x 128 tokens of Python's
          standard library by train.py with Adam; continues from its checkpoint. Exported as a transformers folder.
run       100 steps of 16 examples, at most 64 tokens each, by finetune.py with configs/ds_finetune.json, with its
          "mols" section or without. Six arms: full, LoRA and DoRA (rank 8), each with and without MoLS.

Questions, each on the held-out loss over answer tokens, paired by seed (the same batches and adapters):
1. Primary: arm with MoLS minus the same arm without, three comparisons; p-values by Holm's method over the three.
2. Secondary: the arms with adapters minus `full`; Holm's method over the four.
3. Secondary: accuracy of the arms on the task. 200 questions have a standard error of 3 points.
Tuning: three rates with seed 0; while the best is at an edge, one further rate on that side, at most two. Then seeds
11 to 15 at the best rate. The rates were chosen after four runs of 60 steps on longer examples: `full` at 1e-3 4.89 and
at 4e-3 4.74, LoRA at 4e-3 5.38 and at 1.6e-2 5.33.

Budget: an hour of one core: some 55 runs of 40 s (60 with lm-eval) and 8 minutes of pre-training. Cut for it: one
tuning seed and three rates where four were planned, 100 steps where 150 were; one checkpoint, one task, one rank. The
run sees 1,600 of the 4,000 examples.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mols_ds.apps.study.paired import Difference, compare, holm
from mols_ds.apps.study.rows import Rows

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers")
RATES = {"full": (1e-3, 2e-3, 4e-3), "lora": (4e-3, 8e-3, 1.6e-2), "dora": (4e-3, 8e-3, 1.6e-2)}
ARMS = tuple(f"{method}{mols}" for method in RATES for mols in ("", "-mols"))
QUESTIONS = {
    "primary": [(f"{method}-mols", method) for method in RATES],
    "secondary": [(arm, "full") for arm in ARMS if not arm.startswith("full")],
}
TUNE_SEED, SEEDS, EXTEND = 0, (11, 12, 13, 14, 15), 2
STEPS, CUTOFF, TRAINING, HELD_OUT, ASKED = 100, 64, 4000, 400, 200
LINE, PROMPT = (15, 80), 100
"""Characters of a docstring's line; most characters of a prompt."""
TASK = "docstring_lines"
MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


class Run(NamedTuple):
    """A fine-tuning. Runs of fresh seeds are evaluated on the task too."""

    arm: str
    rate: float
    seed: int


# ---------------------------------------------------------------------- data


def examples(folders: Iterable[Path]) -> list[dict[str, str]]:
    """Return {"prompt", "completion"} of public functions in Python files, one for each line, by a hash of the line."""
    found: dict[str, str] = {}
    for file in (file for folder in folders for file in sorted(folder.rglob("*.py"))):
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # of another version of Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                line = (ast.get_docstring(node) or "\n").splitlines()[0].strip()
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                if LINE[0] <= len(line) <= LINE[1] and line.isascii() and len(prompt) <= PROMPT:
                    found.setdefault(line, prompt)
    lines = sorted(found, key=lambda line: hashlib.sha256(line.encode()).digest())
    return [{"prompt": found[line], "completion": line} for line in lines]


def questions(held_out: Sequence[Mapping[str, str]], number: int) -> list[dict[str, Any]]:
    """Return the task: the wrong answers are drawn from the 20 other lines whose lengths are closest."""
    asked = []
    for index, example in enumerate(held_out[:number]):
        length = len(example["completion"])
        others = [other["completion"] for other in held_out if other is not example]
        near = sorted(others, key=lambda line: (abs(len(line) - length), line))[:20]
        draw = random.Random(index)
        choices = [example["completion"], *draw.sample(near, 3)]
        draw.shuffle(choices)
        answer = choices.index(example["completion"])
        asked.append({"prompt": example["prompt"], "choices": choices, "answer": answer})
    return asked


def write_data(out: Path) -> None:
    """Write train.jsonl, held_out.jsonl, the task's folder and data.sha256, unless they are there."""
    if (out / "data.sha256").is_file():
        return
    (out / "task").mkdir(parents=True, exist_ok=True)
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    found = examples(Path(str(spec.origin)).parent for spec in specs if spec)
    held_out, training = found[:HELD_OUT], found[HELD_OUT : HELD_OUT + TRAINING]
    files = {"train": training, "held_out": held_out, f"task/{TASK}": questions(held_out, ASKED)}
    digest = hashlib.sha256()
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        digest.update(text.encode())
        (out / f"{name}.jsonl").write_text(text, "utf-8")
    task = {
        "task": TASK, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str((out / f"task/{TASK}.jsonl").resolve())}},
        "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (out / f"task/{TASK}.yaml").write_text(json.dumps(task, indent=2) + "\n", "utf-8")  # JSON is YAML
    (out / "data.sha256").write_text(digest.hexdigest()[:16], "utf-8")


# ---------------------------------------------------------------------- training


def command(out: Path, *arguments: object) -> None:
    """Run a program of the checkout with this Python, its output in out/log. Stops the study if it fails."""
    argv = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (out / "log").open("a", encoding="utf-8") as log:
        status = subprocess.run(argv, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode
    if status:
        raise SystemExit(f"{' '.join(argv)}\nended with status {status}; its output is in {out / 'log'}")


def write_config(path: Path, source: str, mols: str = "", **changes: object) -> Path:
    """Write a shipped DeepSpeed config with changes, without its "mols" section unless `mols`."""
    config = {**json.loads((ROOT / "configs" / source).read_text("utf-8")), **changes}
    if not mols:
        del config["mols"]
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return path


def pretrain(out: Path) -> None:
    """Make the checkpoint in out/checkpoint, unless it is there."""
    if (out / "checkpoint").is_dir():
        return
    model, run, part = out / "model.json", out / "pretraining", out / "checkpoint-part"
    model.write_text(json.dumps(MODEL) + "\n", "utf-8")
    config = write_config(out / "ds_pretrain.json", "ds_mols_cpu.json", train_batch_size=8)
    command(
        out, "train.py", "--config", config, "--model", model, "--data", "stdlib", "--steps", 1200, "--lr", 2e-3,
        "--save-every", 200, "--keep-last", 1, "--log-every", 50, "--out", run,
        "--resume" if (run / "checkpoints" / "latest").is_file() else "--overwrite",
    )  # fmt: skip
    command(out, "-m", "mols_ds", "export", run, part)
    part.rename(out / "checkpoint")


def fine_tune(out: Path, run: Run, *more: object, steps: int = STEPS) -> dict[str, Any]:
    """Fine-tune, with further arguments, and return the row of the run."""
    method, _, mols = run.arm.partition("-")
    folder = out / "current"
    config = write_config(out / "ds_finetune.json", "ds_finetune.json", mols)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command(
        out, "finetune.py", "--config", config, "--model", out / "checkpoint", "--data", out / "train.jsonl",
        "--eval-data", out / "held_out.jsonl", "--eval-examples", HELD_OUT, "--eval-every", steps, "--cutoff", CUTOFF,
        "--method", method, "--steps", steps, "--lr", run.rate, "--seed", run.seed, "--out", folder, "--overwrite",
        "--log-every", 5, *more,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *lines, final = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    report = folder / "mols_report" / "mols_report.json"
    row = {
        "val_loss": final["val_loss"] if math.isfinite(final["val_loss"]) else None,
        **{key: final[key] for key in ("alphas", "tokens")},
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "curve": {key: [line[key] for line in lines if "loss" in line] for key in ("step", "loss")},
        "report": json.loads(report.read_text("utf-8")) if mols else {},
        "evaluation": evaluation(folder) if more else None,
    }
    shutil.rmtree(folder)
    return row


def evaluation(folder: Path) -> dict[str, Any]:
    """Return what lm-eval found, with its version."""
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    return {**found["tasks"][TASK]["metrics"], "lm_eval": found["lm_eval"]}


# ---------------------------------------------------------------------- which runs


def tuning(arm: str, losses: Mapping[Run, float]) -> tuple[list[float], float | None, bool]:
    """Return the rates to run with the tuning seed, the best rate (None before they are all there), and whether it is
    at an edge of the rates tried."""
    rates = list(RATES[arm.partition("-")[0]])
    for further in range(EXTEND + 1):
        found = [losses.get(Run(arm, rate, TUNE_SEED)) for rate in rates]
        if None in found:
            return rates, None, False
        best = rates[min(range(len(rates)), key=lambda index: found[index] or 0.0)]
        if best not in (rates[0], rates[-1]):
            return rates, best, False
        if further < EXTEND:
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
    return rates, best, True


def next_run(losses: Mapping[Run, float]) -> Run | None:
    """Return the next run that is missing: tuning of every arm, then a seed at a time; None at the end."""
    for arm in ARMS:
        for rate in tuning(arm, losses)[0]:
            if Run(arm, rate, TUNE_SEED) not in losses:
                return Run(arm, rate, TUNE_SEED)
    for seed in SEEDS:
        for arm in ARMS:
            run = Run(arm, tuning(arm, losses)[1] or 0.0, seed)
            if run not in losses:
                return run
    return None


def losses_of(rows: Iterable[Mapping[str, Any]]) -> dict[Run, float]:
    """Return the held-out loss of each run in the rows; infinite if it diverged."""
    losses = {Run(row["arm"], row["rate"], row["seed"]): row["val_loss"] for row in rows}
    return {run: math.inf if loss is None else loss for run, loss in losses.items() if run.arm in ARMS}


def run_all(out: Path, rows: Rows) -> None:
    """Run what is missing; a finished run is one line of the file at once."""
    weights = hashlib.sha256((out / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()[:16]
    started = {"data": (out / "data.sha256").read_text("utf-8"), "checkpoint": weights}
    for row in rows.read().values():
        if (theirs := {name: row[name] for name in started}) != started:
            raise SystemExit(f"{rows.path} has rows from {theirs}, but this is {started}: give another --rows")
    evaluate = ("--evaluate", TASK, "--evaluate-tasks", out / "task", "--evaluate-batch", 16)
    if "checkpoint" not in rows.read():
        row = fine_tune(out, Run("full", 1e-30, 0), steps=1)  # its held-out loss: a rate that changes no weight
        command(out, "finetune.py", "--model", out / "checkpoint", "--epochs", 0, "--out", out / "evaluated", *evaluate)
        row |= {"arm": "checkpoint", "rate": 0.0, "seed": 0, "evaluation": evaluation(out / "evaluated")}
        rows.add("checkpoint", {**started, **row})
    while run := next_run(losses_of(rows.read().values())):
        row = fine_tune(out, run, *(() if run.seed == TUNE_SEED else evaluate))
        rows.add(f"{run.arm}-{run.rate:g}-{run.seed}", {**run._asdict(), **started, **row})
        print(f"{run.arm} {run.rate:g} seed {run.seed}: {row['val_loss']:.4f}, {row['cpu_seconds']} s", flush=True)


# ---------------------------------------------------------------------- report


def interval(found: Difference, digits: int, scale: float = 1.0) -> str:
    """Return the mean and Student's 95 % interval over the seeds."""
    low, high = (math.nan if end is None else end for end in (found.low, found.high))
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(scale * x for x in (found.mean, low, high)), d=digits)


def table(titles: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (titles, ["---"] * len(titles), *lines))


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of the finished runs, as markdown."""
    losses = losses_of(rows)
    titles = ("arm", "best rate", "tried", "held-out loss", "accuracy", "seeds")
    lines: list[Sequence[object]] = []
    lines += [
        ("checkpoint", "", "", f"{row['val_loss']:.4f}", f"{row['evaluation']['acc']:.1%}", "")
        for row in rows
        if row["arm"] == "checkpoint"
    ]
    final: dict[str, dict[int, float]] = {}
    right: dict[str, dict[int, float]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        tried, best, edge = tuning(arm, losses)
        runs = [row for row in rows if (row["arm"], row["rate"]) == (arm, best) and row["seed"] in SEEDS]
        final[arm] = {row["seed"]: losses[Run(arm, row["rate"], row["seed"])] for row in runs}
        right[arm] = {row["seed"]: row["evaluation"]["acc"] for row in runs}
        if runs:
            loss, accuracy = (statistics.fmean(values[arm].values()) for values in (final, right))
            rates = f"{best:g}{' (edge)' if edge else ''}", f"{min(tried):g} to {max(tried):g}"
            lines.append((arm, *rates, f"{loss:.4f}", f"{accuracy:.1%}", len(runs)))
        if runs and arm.endswith("-mols"):
            groups = runs[0]["alphas"]
            alphas[arm] = {name: statistics.geometric_mean(row["alphas"][name] for row in runs) for name in groups}
    text = table(titles, lines)
    for question, pairs in QUESTIONS.items():
        compared = [(f"{a} - {b}", compare(final[a], final[b]), compare(right[a], right[b])) for a, b in pairs]
        known = [(name, loss, accuracy) for name, loss, accuracy in compared if loss and accuracy]
        p = [1.0 if loss.p is None else loss.p for _, loss, _ in known]
        text += "\n" + table(
            (question, "held-out loss", "lower on", "p", "Holm's p", "accuracy, points"),
            [
                (name, interval(loss, 4), f"{loss.won} of {loss.pairs}", f"{own:.2g}", f"{adjusted:.2g}",
                 interval(accuracy, 1, 100))
                for (name, loss, accuracy), own, adjusted in zip(known, p, holm(p), strict=True)
            ],
        )  # fmt: skip
    groups = sorted({group for found in alphas.values() for group in found})
    cells = [
        [arm, *(f"{found[group]:.2f}" if group in found else "" for group in groups)] for arm, found in alphas.items()
    ]
    return text + "\n" + table(("alphas, geometric means", *groups), cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("data", "pretrain", "run", "report"), help="default: everything")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "finetuning", help="data, checkpoint, log")
    parser.add_argument("--rows", type=Path, default=ROOT / "studies" / "results" / "finetuning.jsonl")
    args = parser.parse_args(argv)
    out, rows = args.out.resolve(), Rows(args.rows)
    if args.part != "report":
        out.mkdir(parents=True, exist_ok=True)
        write_data(out)
    if args.part in (None, "pretrain", "run"):
        pretrain(out)
    if args.part in (None, "run"):
        run_all(out, rows)
    if args.part in (None, "report"):
        print(report(list(rows.read().values())))


if __name__ == "__main__":
    main()
