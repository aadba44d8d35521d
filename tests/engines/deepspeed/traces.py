"""A model whose forward pass leaves traces of many kinds, and all that a user could see of an engine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker
from torch import Tensor, nn

from tests.engines.deepspeed.models import Tiny
from tests.engines.deepspeed.state import snapshot
from tests.helpers.digests import digest

WIDTH = 12
TRACKED = "model-parallel"
"""A generator of DeepSpeed's tracker, which its activation checkpointing uses under model parallelism."""


class Rotary(nn.Module):
    """A cache that grows with the longest batch; its size is noted in a number, as in many rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self.register_buffer("cos", torch.zeros(0), persistent=False)

    def forward(self, length: int) -> Tensor:
        if length > self.longest:
            self.longest = length
            self.register_buffer("cos", torch.cos(torch.arange(length) / length), persistent=False)
        return self.cos[:length, None]


class Codebook(nn.Module):
    """Moving averages: in place, replaced, through `.data`, first made in a pass; a number and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hits", torch.zeros(4, dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("vector", torch.ones(WIDTH))  # spectral norm's u
        self.register_buffer("first", None, persistent=False)
        self.register_buffer("many", torch.arange(3).expand(5, 3), persistent=False)  # cannot change in place
        self.passes = 0
        self.norm = torch.zeros(())
        self.seen = torch.zeros(2)
        self.attn = nn.ModuleDict({"o_proj": nn.Linear(WIDTH, WIDTH, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            flat = x.detach().float().flatten(0, 1)
            self.passes += 1
            self.norm = flat.norm()
            self.seen += 1
            self.mean = 0.9 * self.mean + 0.1 * flat.mean(0)
            self.hits.scatter_add_(0, flat.argmax(1) % 4, torch.ones(len(flat), dtype=torch.int64))
            vector = flat.T @ (flat @ self.vector.float())
            self.vector.data.copy_(vector / vector.norm())
            if self.first is None:
                self.first = flat[0].clone()
        return self.attn["o_proj"](x + self.mean.to(x.dtype) + self.vector.to(x.dtype)) / (1 + self.hits.max())


def begin() -> None:
    """Create the tracked generator again."""
    get_cuda_rng_tracker().reset()
    get_cuda_rng_tracker().add(TRACKED, 9)


class Traced(Tiny):
    """`Tiny` with dropout, BatchNorm, the two above, and layers left out by Python's and NumPy's random numbers."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.frozen_norm = nn.BatchNorm1d(WIDTH, affine=False, momentum=None)
        self.rotary, self.codebook = Rotary(), Codebook()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.rotary(tokens.shape[1]).to(x.dtype)
        if x.dtype is torch.float32:  # torch has no batch norm of 16 bits on a CPU
            x = self.batch_norm(x.flatten(0, 1)).view_as(x) + self.frozen_norm(x.flatten(0, 1)).view_as(x)
        x = x + self.codebook(x)
        x = x * (1 + 0.1 * torch.rand((), generator=self.generator).to(x.dtype))
        with get_cuda_rng_tracker().fork(TRACKED):
            x = x * (1 + 0.1 * torch.rand(()).to(x.dtype))
        for layer in self.layers:
            if random.random() < 0.3 and np.random.rand() < 0.5:
                x = x * 1.0  # a layer without effect; its weights still get gradients
            mixed = torch.tanh(layer["q_proj"](x)) * layer["k_proj"](x) + layer["v_proj"](x)
            x = x + (0.5 + np.random.rand()) * self.dropout(layer["down_proj"](torch.tanh(layer["up_proj"](mixed))))
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


PLAIN = (bool, int, float, str, type(None))
TIMES = ("timer", "time")
ZEROS = ("ds_", "applied_pre_backward_ref_cnt")
"""ZeRO-3's bookkeeping (runtime/zero/parameter_offload.py), which grows in a module without a gradient."""
STEP = ("_step_applied", "_global_grad_norm", "_running_engine_step")
"""State of an engine that belongs to its last step alone."""


def plain(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """(name, digest) of a number, a word, a tensor, or of a dict of them."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield name, digest(value) + repr((value.shape, value.dtype))
    elif isinstance(value, PLAIN):
        yield name, repr(value)
    elif isinstance(value, torch.Generator):
        yield name, digest(value.get_state())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from plain(f"{name}.{key}", item)


def visible(engine: Any) -> dict[str, str]:
    """Digests of weights, gradients, optimizer state, every buffer and attribute of every module, every number of the
    engine and its optimizer, and the generators."""
    seen = snapshot(engine)
    for path, module in engine.module.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if name not in ("_parameters", "_buffers", "_modules") and not name.startswith(ZEROS):
                seen.update(plain(f"module {path}.{name}", value))
        seen[f"buffers of {path}"] = repr(sorted(module._buffers))
    for owner, where in ((engine, "engine"), (engine.optimizer, "optimizer")):
        for name, value in vars(owner).items():
            if name not in STEP and not any(word in name for word in TIMES):
                seen.update(plain(f"{where} {name}", value) if isinstance(value, PLAIN) else ())
    seen["tracker"] = digest(get_cuda_rng_tracker().get_states()[TRACKED])
    seen["python's generator"] = digest(torch.tensor(random.getstate()[1]))
    seen["numpy's generator"] = digest(torch.from_numpy(np.random.get_state()[1].astype(np.int64)))
    return seen
