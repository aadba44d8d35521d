"""Compare the ranks' models when MoLS attaches (see also `mols_ds.core.rank_checks`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_patches.param_map import LocalParameter
from mols_ds.errors import MolsError

Shapes = dict[str, tuple[int, ...]]


def merge_shapes(gathered: Sequence[Mapping[str, Sequence[int]]]) -> Shapes:
    """Merge the names and shapes of all ranks into the logical model.

    Args:
        gathered: parameter name -> unsharded shape, of each rank.

    Returns:
        parameter name -> unsharded shape.

    Raises:
        MolsError: two ranks have different shapes of one parameter.
    """
    shapes: Shapes = {}
    sender: dict[str, int] = {}
    for rank, theirs in enumerate(gathered):
        for name, sizes in theirs.items():
            shape = tuple(sizes)
            if shapes.setdefault(name, shape) != shape:
                raise MolsError(
                    f"parameter {name!r} has the unsharded shape {list(shape)} on rank {rank} and "
                    f"{list(shapes[name])} on rank {sender[name]}: the ranks were built from different model configs"
                )
            sender.setdefault(name, rank)
    return shapes


def check_locals(locals_: Sequence[LocalParameter], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare this rank's parameters with the logical model.

    Args:
        locals_: of this rank.
        shapes: from `merge_shapes`.

    Raises:
        MolsError: a shape differs from the shape on the rank that counts the parameter.
    """
    for local in locals_:
        if shapes.get(local.name) == local.shape:
            continue
        there = f"of unsharded shape {list(shapes[local.name])}" if local.name in shapes else "without it"
        raise MolsError(
            f"parameter {local.name!r} has the unsharded shape {list(local.shape)} here, but the rank that counts it "
            f"has a model {there}: the ranks were built from different model configs"
        )
