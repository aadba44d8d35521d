"""Which rank owns which elements under each kind of model parallelism."""
