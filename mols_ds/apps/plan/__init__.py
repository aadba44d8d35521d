"""Predict what a run needs: memory of each rank, bytes of each message, time that MoLS adds."""
