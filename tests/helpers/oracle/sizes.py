"""Names and sizes of the tiny models (tests/helpers/oracle/models.py), for references that need no model class.

The sizes are chosen so that shards straddle tensors and elements do not divide evenly: 97 tokens, 67 inner features.
"""

from __future__ import annotations

MODELS = ("llama", "gpt2", "qwen2")
GROUPS = ("embedding", "head", "qk", "vo", "mlp", "other")
VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, POSITIONS = 97, 40, 67, 2, 4, 2, 32
