"""A plan as text: tables of rich, up to 100 columns wide."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mols_ds.apps.plan.parts import KINDS
from mols_ds.core.json_types import JsonMapping
from mols_ds.core.vocabulary import CHUNK
from mols_ds.errors import MolsConfigError, printable

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
GIB = 2**30


def render(plan: JsonMapping) -> str:
    """Return the plan as text. Raises MolsConfigError if rich is not installed."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise MolsConfigError("the tables need rich: pip install rich, or use --json") from error
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=False, highlight=False)
    for line in [_cluster(plan["cluster"]), *plan["run"]["summary"], _mols(plan["mols"])]:
        console.print(printable(line), markup=False)
    for table in (_memory(plan), _messages(plan), _seconds(plan)):
        console.print(table)
    for line in _verdict(plan):
        console.print(line, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _cluster(cluster: JsonMapping) -> str:
    return (
        f"{cluster['name']}: {cluster['nodes']} x {cluster['accelerators']} accelerators of "
        f"{cluster['memory_gib']:g} GiB, {cluster['usable_share']:.0%} of it usable"
    )


def _mols(mols: JsonMapping) -> str:
    if not mols["enabled"]:
        return "no MoLS"
    if mols["mode"] == "fixed":
        return "MoLS with fixed alphas: no measurement" + _copies(mols)
    where = "on the host" if mols["accumulators"] == "cpu" else "on the accelerator"
    held = f", accumulators {where}" if mols["mode"] != "moments" else ""
    return f"MoLS: {mols['mode']}, {mols['samples']} samples from step {mols['start']}{held}{_copies(mols)}"


def _copies(mols: JsonMapping) -> str:
    return f"; a scaled step holds copies of up to {size(mols['copies'])} of weights" if mols["copies"] else ""


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def size(count: float) -> str:
    """Format bytes as B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _memory(plan: JsonMapping) -> Table:
    phases = plan["phases"]
    table = _table(f"Memory of {plan['heaviest']}, the heaviest", "", *(phase["phase"] for phase in phases))
    for where in ("device", "host"):
        kinds = [kind for kind in KINDS if any(kind in phase[where] for phase in phases)]
        for kind in kinds:
            name = kind if where == "device" else f"host: {kind}"
            table.add_row(name, *(size(phase[where].get(kind, 0)) for phase in phases))
        if kinds or where == "device":
            name = "accelerator" if where == "device" else "host"
            limit = size(plan["limits"][where])
            total = [size(phase[f"{where}_total"]) for phase in phases]
            table.add_row(f"{name}, of {limit} usable", *total, style="bold", end_section=True)
    if plan["nvme"]:
        table.add_row("NVMe", *(size(plan["nvme"]) for _ in phases))
    table.add_row("peak at", *(phase["moment"] for phase in phases))
    return table


def _messages(plan: JsonMapping) -> Table:
    table = _table("Messages of a rank in a step", "what", "operation", "ranks", "calls", "tensors", "a call", "sent")
    for message in plan["messages"]:
        over = f"{message['size']} {message['over']}"
        call = size(message["bytes"] / max(1, message["calls"]))
        counts = (f"{message['calls']:,}", size(message["bytes"]), call, size(message["sent"]))
        table.add_row(message["what"], message["operation"], over, *counts)
    sums, asked = plan["calibration"]["sums_bytes"], plan["calibration"]["agreement_bytes"]
    if sums:
        ranks = f"{plan['cluster']['ranks']} all"
        table.add_row("MoLS, once: group sums", "all-reduce", ranks, "1", size(sums), size(sums), size(2 * sums))
    if tokens := plan["calibration"]["tokens_bytes"]:
        calls = -(-tokens // CHUNK)
        call = size(min(tokens, CHUNK))
        table.add_row("MoLS, once: tokens", "all-reduce", ranks, str(calls), size(tokens), call, size(2 * tokens))
    if asked:
        samples = plan["mols"]["samples"]
        table.add_row("MoLS, in all: agreement", "all-reduce", ranks, str(samples), size(asked), "8 B", size(2 * asked))
    return table


def _seconds(plan: JsonMapping) -> Table:
    seconds, steps = plan["seconds"], plan["run"]["steps"]
    table = _table("Time, from nominal figures", "", "seconds", "of the run")

    def row(name: str, value: float, style: str = "") -> None:
        table.add_row(name, f"{value:,.4g}", f"{value / seconds['run']:.4%}", style=style)

    row(f"a step, at {plan['cluster']['mfu']:.0%} of the peak", seconds["step"])
    row("its messages alone, if nothing overlapped", seconds["messages_of_a_step"])
    row(f"the run: {steps:,} steps without MoLS", seconds["run"])
    if plan["mols"]["calibrations"]:
        row("a calibration: passes without an update", seconds["passes"])
        row("a calibration: accumulators", seconds["updates"])
        row("a calibration: gradients to the host", seconds["transfer"])
        row("a calibration: messages", seconds["reduction"])
    times = plan["mols"]["calibrations"]
    row(f"MoLS adds, {times} calibration{'s' if times != 1 else ''}", seconds["added"], "bold")
    return table


def _verdict(plan: JsonMapping) -> list[str]:
    seconds = plan["seconds"]
    slow = (
        ["A step's messages alone take longer than a step at this mfu: lower --mfu, or send less."]
        if seconds["messages_of_a_step"] > seconds["step"]
        else []
    )
    if plan["fits"]:
        return [*slow, f"It fits. MoLS adds {plan['overhead'] * 100:.2g} % to the run's time."]
    lines = [*slow, "It does not fit:", *(f"  {problem}" for problem in plan["problems"])]
    near = plan["nearest"]
    if near is None:
        return [*lines, "No setting fits on up to 4,096 nodes."]
    more = near["nodes"] > plan["cluster"]["nodes"]
    lines.append(
        f"Nothing fits on {plan['cluster']['nodes']} nodes. The smallest number that fits, and the nearest setting:"
        if more
        else "The nearest setting that fits:"
    )
    lines.append(f"  {', '.join(near['changes'])}")
    lines += [f"  {line}" for line in near["summary"]]
    lines.append(f"  accelerator {size(near['device_total'])}, host {size(near['host_total'])} per rank")
    return lines
