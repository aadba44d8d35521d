"""What a run will need before it is started: memory of each rank, bytes of each message, time that MoLS adds."""
