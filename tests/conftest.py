"""Settings of every test process: the CPU accelerator, one thread a process, no network, no display. And the tiers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiers
from tests.helpers.harness import RANK_ENVIRONMENT, apply_environment

apply_environment(RANK_ENVIRONMENT)

import torch  # noqa: E402  (reads the environment above when it is imported)
from hypothesis import HealthCheck, settings  # noqa: E402

from mols_ds.core.compile_locks import lock_problem, stale_locks  # noqa: E402

torch.set_num_threads(1)
# A shell ignores Ctrl-C for what it starts in the background, and nohup a closed terminal. Commands that tests start
# would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
# No test depends on time: a busy machine may take seconds for one example.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def environment_is_put_back() -> Iterator[None]:
    """Megatron-core sets variables in this process; ranks of another environment would need separate servers."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=list(tiers.CHOICES),
        default="full",
        help="which tests: quick (make test), all (make test-all), rest (all without quick), full (the default here), "
        "exhaustive (full without all)",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and (problem := lock_problem(stale_locks())):
        raise pytest.UsageError("; ".join(problem))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if missing := tiers.undocumented(items, Path(__file__).parent):
        raise pytest.UsageError(
            f"tests/README.md does not say what covers the full tier of {', '.join(sorted(missing))}"
        )
    items[:], left = tiers.choose(items, config.getoption("tier"))
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: all tests that read one launch of ranks go to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class ByLaunch(LoadScopeScheduling):  # type: ignore[misc,no-any-unimported]
        def _split_scope(self, nodeid: str) -> str:
            return tiers.launch_of(nodeid)

    return ByLaunch(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    tiers.note(session.items)
