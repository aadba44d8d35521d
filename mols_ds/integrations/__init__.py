"""MoLS in other libraries' training loops: transformers and TRL, Accelerate, Lightning."""
