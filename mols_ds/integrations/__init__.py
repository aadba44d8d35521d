"""Other people's training loops: transformers and TRL, Accelerate, Lightning. Each imports its library itself."""
