"""MoLS on plain torch optimizers: one process, DDP, FSDP2 and DTensor tensor parallelism."""
