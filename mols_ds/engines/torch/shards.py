"""This rank's gradients of plain torch parameters: whole copies (DDP), and the local parts of DTensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mols_ds.core.groups import GroupTable
from mols_ds.core.layout import ElementLayout
from mols_ds.core.module_state import INTEGERS
from mols_ds.core.pieces import FlatList, Parts, all_finite, local_part, zero_pieces
from mols_ds.core.ranges import ShardRange, pack, split_among_replicas
from mols_ds.core.rank_checks import alike, together
from mols_ds.engines.torch.placement import block_of
from mols_ds.errors import MolsUnsupportedError


class TorchShards:
    """The trained parameters of one model on this rank.

    Attributes:
        params: parameter name -> parameter.
        layouts: parameter name -> layout of its local elements (`placement.Block`).
        ranges: parameter name -> its local elements, at the start of its flat local tensor.
        columns: as in `protocols.Context`, the same parameters on every rank.
        owned: (name, range) of the elements that this rank measures, its share of those that several ranks have.
        accumulated: the ranges of `owned` in the accumulators.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], table: GroupTable, optimizers: Sequence[Optimizer]) -> None:
        """Collective."""
        self.params, self.optimizers = dict(params), optimizers
        self._moved: dict[str, Tensor] = {}
        self.scale = 1.0  # loss scale in the gradients, where no optimizer has it

        def place() -> tuple[list[list[int]], list[str]]:
            blocks = {name: block_of(name, p, table.layouts[name]) for name, p in self.params.items()}
            self.layouts: dict[str, ElementLayout] = {name: block.layout for name, block in blocks.items()}
            self.ranges: dict[str, ShardRange] = {name: block.range.at(0) for name, block in blocks.items()}
            self.columns = {name: block.columns for name, block in blocks.items()}
            unknown = [name for name, columns in self.columns.items() if not columns]
            return [list(mesh) for mesh in self._meshes()], unknown

        gathered = together(place)
        self.columns |= {name: 0 for _, unknown in gathered for name in unknown}
        self.owned = self._split([meshes for meshes, _ in gathered])
        self.accumulated = pack(item for _, item in self.owned)

    def _meshes(self) -> dict[tuple[int, ...], list[str]]:
        """The distinct sets of ranks that share a parameter -> names of the parameters.

        A plain tensor is on one rank: (its number,).
        """
        found: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in self.params.items():
            ranks: tuple[int, ...] = (this_rank(),)
            if isinstance(parameter, DTensor):
                ranks = tuple(parameter.device_mesh.mesh.flatten().tolist())
            found.setdefault(ranks, []).append(name)
        return found

    def _split(self, gathered: Sequence[Sequence[Sequence[int]]]) -> list[tuple[str, ShardRange]]:
        """Return this rank's share of the elements. gathered: `_meshes` of every rank."""
        owned: list[tuple[str, ShardRange]] = []
        for number, (mesh, names) in enumerate(self._meshes().items()):
            same = sorted({tuple(sets[number]) for sets in gathered if number < len(sets)})
            if sum(map(len, same)) != len(gathered):
                raise MolsUnsupportedError(
                    f"MoLS does not support parameter {names[0]!r}, which {sum(map(len, same))} of {len(gathered)} "
                    "ranks have: each rank needs a part or a copy of each parameter (no pipeline or expert parallelism)"
                )
            held: dict[tuple[bool, ...], list[str]] = {}
            for name in names:
                held.setdefault(_copied(self.params[name]), []).append(name)
            for copied, named in held.items():
                index, copies = _copy(self.params[named[0]], copied)
                ranges = [(name, self.ranges[name]) for name in named]
                owned += split_among_replicas(ranges, same.index(mesh) * copies + index, len(same) * copies)
        return owned

    # ------------------------------------------------------------------ GradientSource

    def read(self) -> Parts:
        """Yield (offset in the owned elements, 1-D gradient times `loss_scale()`). No gradient counts as zeros."""
        for (name, item), packed in zip(self.owned, self.accumulated, strict=True):
            gradient = self._moved[name] if name in self._moved else _local_gradient(self.params[name])
            if gradient is None:
                pieces = zero_pieces(item.numel)
            else:
                pieces = FlatList([gradient]).pieces(item.offset, item.numel)
            for at, piece in pieces:
                yield packed.offset + at, piece

    @torch.no_grad()
    def open(self) -> None:
        """Bring gradients to the placements of their parameters, where a backward pass left others. Call before `read`.

        Tensor parallelism leaves whole gradients for sharded embeddings (no communication), and partial sums for the
        norms of sequence parallelism: these are all-reduced here, as the optimizer's step does again.
        """
        for name, p in self.params.items():
            gradient = p.grad
            if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
                self._moved[name] = gradient.redistribute(p.device_mesh, p.placements).to_local()

    def close(self) -> None:
        """Drop what `open` made."""
        self._moved = {}

    def loss_scale(self) -> float:
        """Loss scale in the gradients: a fused optimizer's, which divides by it in its step, or `scale`."""
        scales = [getattr(optimizer, "grad_scale", None) for optimizer in self.optimizers]
        return next((float(scale) for scale in scales if scale is not None), self.scale)

    def finite(self) -> bool:
        """Whether this rank's gradients are finite."""
        return all_finite(found for p in self.params.values() if (found := _local_gradient(p)) is not None)

    @torch.no_grad()
    def copies_agree(self) -> bool:
        """Whether every rank has the same bits in the gradients of plain parameters, which DDP keeps alike."""
        plain = [p.grad for p in self.params.values() if not isinstance(p, DTensor) and p.grad is not None]
        sums = [gradient.view(INTEGERS[gradient.element_size()]).sum() for gradient in plain]
        return alike(int(torch.stack(sums).sum()) % 2**32 if sums else 0, self.reduce)

    def reduce(self, values: Tensor) -> Tensor:
        """SUM over all ranks. 1-D float64 in, CPU float64 out."""
        if not dist.is_initialized():
            return values.cpu()
        sums = values.to(collective_device())
        dist.all_reduce(sums)
        return sums.cpu()

    def reduce_max(self, values: Tensor) -> Tensor:
        """MAX over all ranks. 1-D uint8 on the CPU in and out."""
        if not dist.is_initialized():
            return values
        largest = values.to(collective_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.cpu()

    def discard(self) -> None:
        """Do nothing: as after any step, the loop zeroes its gradients."""


def _local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the local part of a parameter's gradient; None if it has none."""
    return None if parameter.grad is None else local_part(parameter.grad).detach()


def _copied(parameter: nn.Parameter) -> tuple[bool, ...]:
    """Whether each dimension of a DTensor's mesh has copies; () for a plain tensor."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return tuple(placement.is_replicate() for placement in placements)


def _copy(parameter: nn.Parameter, copied: Sequence[bool]) -> tuple[int, int]:
    """Return (this rank's index, number of ranks) among the copies inside of a parameter's mesh."""
    index, copies = 0, 1
    if isinstance(parameter, DTensor):
        coordinate: Sequence[int] = parameter.device_mesh.get_coordinate() or []
        for is_copied, here, size in zip(copied, coordinate, parameter.device_mesh.shape, strict=True):
            if is_copied:
                index, copies = index * size + here, copies * size
    return index, copies


def collective_device() -> torch.device:
    """Return the device of this rank's collectives."""
    if "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def this_rank() -> int:
    """Return this rank; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def tensor_parallel(parameter: nn.Parameter) -> int:
    """Size of the mesh dimension that is named as tensor parallel; 1: none."""
    if not isinstance(parameter, DTensor):
        return 1
    names = parameter.device_mesh.mesh_dim_names or ()
    sizes = zip(names, parameter.device_mesh.shape, strict=False)
    return math.prod(size for name, size in sizes if name in ("tp", "tensor", "tensor_parallel"))
