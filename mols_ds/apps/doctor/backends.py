"""Process groups of one rank that run a real all-reduce. `imports` calls each in its own process."""

from __future__ import annotations


def gloo() -> str:
    """Create a gloo group of one rank and all-reduce one number."""
    return _reduce("gloo", "cpu")


def nccl() -> str:
    """Create an NCCL group of one rank and all-reduce one number. Return NCCL's version."""
    import torch

    _reduce("nccl", "cuda")
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _reduce(backend: str, device: str) -> str:
    import torch
    from torch import distributed

    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    value = torch.full((1,), 3.0, device=device)
    distributed.all_reduce(value)
    if value.item() != 3.0:
        raise RuntimeError(f"the sum over one rank of 3 is {value.item()}")
    distributed.destroy_process_group()
    return "one rank, one all-reduce"
