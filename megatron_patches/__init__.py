"""MoLS on Megatron-core: module groups and learning-rate multipliers under TP, PP, EP, CP and DP (docs/megatron.md).

    mols = megatron_patches.attach(model_chunks, optimizer, scheduler, {"samples": 32})

Or call `megatron_patches.apply({...})` before a script builds its optimizer. Importing this package patches nothing
and does not import megatron.core.
"""

# Not lazy: the function `apply` must replace the module of the same name.
from megatron_patches.apply import apply, attach, current, undo
from megatron_patches.cpu.emulation import cpu_megatron
from megatron_patches.group_rules import tag_layouts, tag_table

__all__ = ["apply", "attach", "cpu_megatron", "current", "tag_layouts", "tag_table", "undo"]
