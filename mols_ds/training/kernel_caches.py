"""Check the caches of compiled kernels before a job's ranks use them."""

from __future__ import annotations

import os

from mols_ds.core.cache_folders import BY_GROUP, cache_problems, use_own_inductor_cache
from mols_ds.core.compile_locks import lock_problem, stale_locks
from mols_ds.core.log import warn_here
from mols_ds.errors import MolsConfigError


def check_kernel_caches() -> None:
    """Give torch's compiler a cache that only this user can write, and warn about stale locks, once per node.

    Only warns if the group can write a cache, and in a container with user root, where caches are often mounted.

    Raises:
        MolsConfigError: another user owns a cache, or everybody can write to it.
    """
    use_own_inductor_cache()
    problems = ["; ".join(problem) for problem in cache_problems()]
    refused = [problem for problem in problems if BY_GROUP not in problem]
    if refused and os.getuid() != 0:
        raise MolsConfigError(refused[0])
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    locks = lock_problem(stale_locks())
    for line in [*problems, *(["; ".join(locks)] if locks is not None else [])]:
        warn_here(line, stacklevel=3)
