"""Warn about weights in no optimizer, and once about those that arrive there after MoLS was attached."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

from torch import Tensor, nn

from mols_ds.core.groups import GroupTable
from mols_ds.core.log import warn_here
from mols_ds.core.lr_scaler import LRScaler

SHOWN = 3


class NewWeights:
    """Check for such weights after each step.

    Args:
        modules: the model, or its chunks.
        scalers: one per inner optimizer; they note tensors stepped without a plan.
        include: advice to let MoLS scale such a weight.
        train: advice to let the engine step an unfrozen weight at all.
        held: frozen parameters with a part in the engine's shards.
        again: advice to let MoLS scale one of those.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        scalers: Sequence[LRScaler],
        *,
        include: str,
        train: str,
        held: Iterable[Tensor] = (),
        again: str = "",
    ) -> None:
        self.modules, self.scalers, self.include, self.train = list(modules), scalers, include, train
        self.again, self._held = again, {id(p) for p in held}
        self._frozen = {name: p for name, p in self._named() if not p.requires_grad}

    def check(self, say: Callable[[str], None]) -> None:
        """Check after a step. No communication; takes a few microseconds if nothing changed."""
        stepped = [tensor for scaler in self.scalers for tensor in scaler.take_unplanned()]
        if stepped:
            found = {id(tensor) for tensor in stepped}
            names = [name for name, p in self._named() if id(p) in found] or ["none of the model's"]
            say(_trains(len(stepped), names, self.include))
        thawed = [name for name, p in self._frozen.items() if p.requires_grad]
        held = [name for name in thawed if id(self._frozen[name]) in self._held]
        if held:
            say(_trains(len(held), held, self.again))
        if not thawed:
            return
        in_groups = {id(t) for s in self.scalers for group in s.optimizer.param_groups for t in group["params"]}
        still = [name for name in thawed if id(self._frozen.pop(name)) not in in_groups | self._held]
        if still:
            say(
                f"{len(still)} weights were unfrozen after the engine was built ({_listed(still)}): no optimizer steps "
                f"them, so they do not train; {self.train}"
            )

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return (named for module in self.modules for named in module.named_parameters())


def without_untrained(table: GroupTable, held: Container[str], rank: int) -> GroupTable:
    """Leave the parameters out of the table that are in no optimizer. Rank 0 warns about them.

    Args:
        table: the groups of all trainable parameters.
        held: names of the parameters in this rank's optimizers.
        rank: of this process.
    """
    left_out = [name for name in table.layouts if name not in held]
    if left_out and rank == 0:
        warn_here(
            f"{len(left_out)} trainable parameters are not in the optimizer and stay unscaled: {left_out[:SHOWN]}",
            stacklevel=6,
        )
    return GroupTable(
        {name: layout for name, layout in table.layouts.items() if name in held},
        {name: shape for name, shape in table.shapes.items() if name in held},
    )


def _trains(count: int, names: Sequence[str], include: str) -> str:
    return (
        f"{count} weights train that were frozen or not in the optimizer when MoLS was attached ({_listed(names)}): "
        f"they get the base rate and are not measured; {include} to include them"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
