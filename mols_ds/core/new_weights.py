"""Weights that were unfrozen, or given to the optimizer, after MoLS was attached: they are named, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from mols_ds.core.lr_scaler import LRScaler

SHOWN = 3


class NewWeights:
    """Looks for such weights after each step.

    Args:
        modules: the model, or its chunks.
        scalers: one for each inner optimizer; they note tensors that are stepped without a plan.
        include: what to do so that MoLS scales such a weight.
        train: what to do so that the engine steps an unfrozen weight at all.
    """

    def __init__(self, modules: Iterable[nn.Module], scalers: Sequence[LRScaler], *, include: str, train: str) -> None:
        self.modules, self.scalers, self.include, self.train = list(modules), scalers, include, train
        self._frozen = {name: p for name, p in self._named() if not p.requires_grad}

    def look(self, say: Callable[[str], None]) -> None:
        """After a step. No communication; a few microseconds where there is nothing to say."""
        stepped = [tensor for scaler in self.scalers for tensor in scaler.take_unknown()]
        if stepped:
            found = {id(tensor) for tensor in stepped}
            names = [name for name, p in self._named() if id(p) in found] or ["none of the model's"]
            say(
                f"{len(stepped)} weights train that were frozen or not in the optimizer when MoLS was attached "
                f"({_listed(names)}): they get the base rate and are not measured; {self.include} to include them"
            )
        thawed = [name for name, p in self._frozen.items() if p.requires_grad]
        if not thawed:
            return
        in_groups = {id(t) for s in self.scalers for group in s.optimizer.param_groups for t in group["params"]}
        still = [name for name in thawed if id(self._frozen.pop(name)) not in in_groups]
        if still:
            say(
                f"{len(still)} weights were unfrozen after the engine was built ({_listed(still)}): no optimizer steps "
                f"them, so they do not train; {self.train}"
            )

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return (named for module in self.modules for named in module.named_parameters())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
