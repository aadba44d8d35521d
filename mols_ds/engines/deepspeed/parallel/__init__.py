"""The elements that each rank owns under each kind of model parallelism."""
