"""Compare two arms of a training job: print and plot the results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mols_ds.core.files import write_whole
from mols_ds.core.log import GuardedWriter, tell
from mols_ds.errors import MolsConfigError, printable
from mols_ds.training.train_job import Outcome, TrainJob, TrainSetup
from mols_ds.training.trainer import ADAM, METRICS, MOLS, has_checkpoint, read_lines, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 10
"""Number of logged steps to average the plotted training loss over."""
TRAINING = f"training: mean of {SMOOTHING} logged steps"


def titles(optimizer: str) -> dict[str, str]:
    """Names of both arms for `optimizer`. Adam with decoupled weight decay is named Adam."""
    name = "Adam" if optimizer.lower() == "adamw" else optimizer
    return {ADAM: name, MOLS: f"{name} + MoLS"}


def split_arms(setup: TrainSetup, out: Path) -> dict[str, TrainSetup]:
    """Return the setups of both arms in the order of training: Adam's has no "mols" section.

    The second arm's report goes to its own folder, unless the user named one.
    """
    section = dict(setup.section or {})
    if section["report_dir"] == str(out / "mols_report"):
        section["report_dir"] = str(out / MOLS / "mols_report")
    return {ADAM: setup.with_section(None), MOLS: setup.with_section(section)}


def run_arms(job: TrainJob, *, compare: bool) -> list[Path]:
    """Train the one arm, or first Adam's, and print the results. Returns each arm's folder."""
    if not compare:
        outcome = train(job)
        if job.rank == 0:
            GuardedWriter()("results", lambda: print_outcome(outcome, job.out))
        return [job.out]
    outcomes = {}
    for name, setup in split_arms(job.setup, job.out).items():
        # An interrupted comparison may not have started its second arm
        resume = job.resume and has_checkpoint(job.out / name)
        arm = replace(job, out=job.out / name, setup=setup, resume=resume)
        try:
            arm.out.mkdir(exist_ok=True)
        except OSError as error:
            raise MolsConfigError(f"--out {job.out}: {arm.out}: {error.strerror or error}") from error
        outcomes[name] = train(arm)
    if job.rank == 0:
        GuardedWriter()("results", lambda: print_comparison(outcomes, job.out, job.setup.optimizer))
    return [job.out / name for name in outcomes]


def alphas_text(alphas: dict[str, float]) -> str:
    """Return one line of groups and alphas; for more than six groups, their number and range."""
    shown = {group: alpha for group, alpha in alphas.items() if group != "other"}
    if len(shown) > 6:
        return f"{len(shown)} groups, {min(shown.values()):.3g} to {max(shown.values()):.3g}"
    return ", ".join(f"{group} {alpha:.3g}" for group, alpha in shown.items()) or "none"


def print_outcome(outcome: Outcome, out: Path) -> None:
    """Print the result of a single arm."""
    tell(f"held-out perplexity {outcome.val_ppl:.3f} (loss {outcome.val_loss:.4f}), {outcome.tokens:,} tokens")
    if outcome.alphas:
        tell(f"alphas: {alphas_text(outcome.alphas)}")
    for path in _report_files(outcome):
        tell(f"report: {path}")
    tell(f"metrics: {out / METRICS}")


def print_comparison(outcomes: dict[str, Outcome], out: Path, optimizer: str) -> None:
    """Print the table of both arms, the files, and what to do next."""
    names = titles(optimizer)
    table = Table(title="held-out perplexity, same model, data order and steps")
    for column in ("", "perplexity", "loss", "tokens", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, outcome in outcomes.items():
        numbers = (f"{outcome.val_ppl:.3f}", f"{outcome.val_loss:.4f}", f"{outcome.tokens:,}", f"{outcome.seconds:.0f}")
        table.add_row(escape(printable(names[name])), *numbers)
    summary = _summary(outcomes, out)
    Console().print(table)
    mols = outcomes[MOLS]
    if mols.probe_steps:
        tell(f"MoLS measured {mols.probe_steps} further batches without training on them.")
    tell(f"alphas: {alphas_text(mols.alphas)}")
    for path in [*_report_files(mols), _plot(outcomes, out, names), summary]:
        if path is not None:
            tell(f"  {path}")
    tell("Next:")
    tell(f"  mols-ds report {out / MOLS}: SNR and rate of each group, and how to read them (docs/report.md)")
    tell("  --data FOLDER, --model, --steps: your own text and model (docs/training.md)")
    tell("  mols-ds compare studies/laptop.yaml: one seed proves nothing, this tunes both and compares over seeds")


def _report_files(outcome: Outcome) -> list[Path]:
    if outcome.report is None:
        return []
    return [path for path in (outcome.report, outcome.report.with_suffix(".png")) if path.is_file()]


def _summary(outcomes: dict[str, Outcome], out: Path) -> Path:
    path = out / "compare.json"
    keys = ("val_loss", "val_ppl", "tokens", "alphas", "seconds")
    arms = {name: {key: getattr(outcome, key) for key in keys} for name, outcome in outcomes.items()}
    write_whole(path, json.dumps(arms, indent=2) + "\n")
    return path


def read_curve(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one key of a metrics file."""
    entries = read_lines(path)
    points = [(entry["step"], entry[key]) for entry in entries if "step" in entry and key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _plot(outcomes: dict[str, Outcome], out: Path, names: dict[str, str]) -> Path | None:
    """Plot training loss (smoothed) and held-out loss of both arms to compare.png. None if plotting fails."""
    path = out / "compare.png"

    def draw() -> None:
        figure = draw_curves(out, {name: names[name] for name in outcomes})
        write_whole(path, lambda beside: figure.savefig(beside, dpi=150, format="png"))

    return path if GuardedWriter()(path.name, draw) else None


def draw_curves(out: Path, names: dict[str, str]) -> Figure:
    """Plot the curves of arms (folder in `out` -> name). Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # without pyplot, which reads MPLBACKEND

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        steps, losses = read_curve(out / name / METRICS, "loss")
        smooth = [fmean(losses[max(0, i - SMOOTHING) : i]) for i in range(1, len(losses) + 1)]
        axes.plot(
            steps,
            smooth,
            color=f"C{index}",
            alpha=0.45,
            linewidth=1.0,
            label=f"{names[name]}, {TRAINING}",
        )
        steps, losses = read_curve(out / name / METRICS, "val_loss")
        axes.plot(steps, losses, color=f"C{index}", marker="o", markersize=3.5, label=f"{names[name]}, held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    return figure
