"""Runs scenarios on the engines, many in one launch of ranks, and reports what differs from the reference."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from tests.helpers.harness import RankError, run_cases
from tests.scenarios.compare import differences
from tests.scenarios.generate import generate
from tests.scenarios.reference import ReferenceRun
from tests.scenarios.scenario import Action, Scenario
from tests.scenarios.snapshot import Snapshot

SECONDS = 60.0  # time limit of one scenario


def run_reference(scenario: Scenario) -> tuple[Scenario, list[Snapshot]]:
    """Run a scenario on the reference, in this process.

    Returns:
        The scenario without invalid actions, and the expected snapshots: one at the start and one after each action.
    """
    state = torch.get_rng_state()
    reference = _reference_of(scenario)
    actions: list[Action] = []
    snapshots = [reference.snapshot([], "")]
    for proposed in scenario.actions:
        result = reference.apply(proposed)
        if result is not None:
            actions.append(result[0])
            snapshots.append(result[1])
    torch.set_rng_state(state)
    return Scenario(scenario.seed, scenario.settings, tuple(actions)), snapshots


def _reference_of(scenario: Scenario) -> ReferenceRun:
    if scenario.settings.engine == "deepspeed":
        return ReferenceRun(scenario)
    from tests.scenarios.megatron_reference import MegatronReferenceRun

    return MegatronReferenceRun(scenario)


def check(scenarios: Sequence[Scenario]) -> dict[int, list[str]]:
    """Compare the engines with the reference. Scenarios with the same number of ranks share a launch.

    Returns:
        For each seed, the lines that say what differs. Empty: nothing differs.
    """
    references = {scenario.seed: run_reference(scenario) for scenario in scenarios}
    result: dict[int, list[str]] = {}
    launches = {(scenario.settings.engine, scenario.settings.ranks) for scenario in scenarios}
    for engine, ranks in sorted(launches):
        valid = [
            references[scenario.seed][0]
            for scenario in scenarios
            if (scenario.settings.engine, scenario.settings.ranks) == (engine, ranks)
        ]
        actual = run_cases(_rank_function(engine), ranks, [(scenario,) for scenario in valid], timeout=SECONDS)
        for scenario in valid:
            try:
                result[scenario.seed] = differences(scenario, references[scenario.seed][1], actual[scenario,])
            except RankError as error:
                result[scenario.seed] = str(error).splitlines()
    return result


def _rank_function(engine: str) -> Callable[[Scenario], list[Snapshot]]:
    if engine == "deepspeed":
        from tests.scenarios.deepspeed_run import run_scenario
    else:
        from tests.scenarios.megatron_run import run_scenario
    return run_scenario


def report(scenario: Scenario, lines: Sequence[str]) -> str:
    """The settings, the actions, what differs, and the command that repeats the scenario."""
    valid = run_reference(scenario)[0]
    return "\n".join(
        [
            f"seed {scenario.seed}: {valid.settings}",
            *(f"  {number}. {action}" for number, action in enumerate(valid.actions, 1)),
            *lines,
            f"repeat: python -m tests.scenarios {scenario.seed}",
        ]
    )


def shrink(scenario: Scenario, seconds: float) -> Scenario:
    """Remove actions, one at a time, while the scenario still fails. Stops after `seconds`."""
    limit, position = time.monotonic() + seconds, len(scenario.actions)
    while position > 0 and time.monotonic() < limit:
        position -= 1
        actions = scenario.actions[:position] + scenario.actions[position + 1 :]
        shorter = dataclasses.replace(scenario, actions=actions)
        if check([shorter])[scenario.seed]:
            scenario, position = shorter, min(position, len(shorter.actions))
    return scenario


def run_seeds(seeds: Sequence[int]) -> dict[int, str]:
    """For each seed, the report of its scenario if it failed, else an empty string."""
    scenarios = [generate(seed) for seed in seeds]
    failures = check(scenarios)
    return {
        scenario.seed: report(scenario, failures[scenario.seed]) if failures[scenario.seed] else ""
        for scenario in scenarios
    }
