"""Training on several processes: FSDP2 and expert parallelism, DeepSpeed ZeRO."""
