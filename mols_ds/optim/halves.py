"""Settings of optimizers that treat block matrices separately from all other parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mols_ds.optim.settings import Settings


class Halves(NamedTuple):
    """Settings of both halves.

    arguments: of the constructor. matrices, rest: of the parameter groups.
    """

    arguments: Settings
    matrices: Settings
    rest: Settings


Split = Callable[[Settings, int], Halves]
"""(settings, hidden size of `build.hidden_size`) -> settings of both halves."""


def muon(settings: Settings, hidden: int) -> Halves:
    """Muon on the matrices, AdamW on the rest, in one object (arXiv 2502.16982 for the update's size)."""
    adam_lr = settings["adam_lr"] if settings["adam_lr"] is not None else settings["lr"]
    shape = {key: settings[key] for key in ("lr", "momentum", "nesterov", "ns_steps", "use_adjusted_lr")}
    rest = {"lr": adam_lr, "betas": settings["betas"], "eps": settings["eps"]}
    decay = {"weight_decay": settings["weight_decay"]}
    return Halves({}, {"use_muon": True, **shape, **decay}, {"use_muon": False, **rest, **decay})


def soap(settings: Settings, hidden: int) -> Halves:
    """SOAP; the rest has the identity as its basis, which is Adam (arXiv 2409.11321, section 4)."""
    return Halves(settings, {}, {"max_precondition_dim": 1})


def low_rank(*keys: str) -> Split:
    """GaLore and APOLLO: `keys` are settings of the matrices' groups; groups without a rank use Adam."""

    def split(settings: Settings, hidden: int) -> Halves:
        rank = settings["rank"] if settings["rank"] is not None else max(1, hidden // 4)
        own = {key: settings[key] for key in keys}
        arguments = {key: value for key, value in settings.items() if key not in keys and key != "rank"}
        return Halves(arguments, {"rank": rank, **own}, {})

    return split
