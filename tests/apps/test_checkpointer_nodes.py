"""Checkpoints kept by several ranks: in one folder for all, and in a folder on each node."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from tests.helpers.harness import run_ranks


def keep(folder: str, node_local: bool) -> tuple[list[str], str, str | None, list[str]]:
    """Run on ranks that are separate nodes: the manifest's files, the newest, the error for a truncated file."""
    import torch.distributed as dist

    from mols_ds.training.checkpointer import Checkpointer

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place = Path(folder, f"node{rank}" if node_local else "shared")
    checkpointer = Checkpointer(place, node_local=node_local)
    for step in (2, 4):
        checkpointer.save(
            f"step{step}", lambda partial: (partial / f"rank{rank}.pt").write_bytes(bytes(10 + rank)) and None
        )
    newest = checkpointer.newest()
    listed = sorted(json.loads((place / "step4" / "manifest.json").read_text())["files"])
    dist.barrier()
    if rank == 1:
        (place / "step4" / "rank1.pt").write_bytes(b"short")
    dist.barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        broken = checkpointer.problem("step4")
        newest += f" {checkpointer.newest()}"
    return listed, newest, broken, [str(each.message) for each in said]


@pytest.mark.parametrize("node_local", [pytest.param(False, marks=pytest.mark.tier("all")), True])
def test_every_node_lists_its_own_files_and_all_ranks_agree(node_local: bool, tmp_path: Path) -> None:
    """A file that one node alone can see broken sends every rank to the checkpoint before."""
    found = run_ranks(keep, 2, str(tmp_path), node_local)
    both = ["rank0.pt", "rank1.pt"]
    assert [each[0] for each in found] == ([["rank0.pt"], ["rank1.pt"]] if node_local else [both, both])
    assert {each[1] for each in found} == {"step4 step2"}
    assert {each[2] for each in found} == {"rank1.pt has 5 bytes instead of 11"}
    assert len(found[0][3]) == 1 and not found[1][3]
