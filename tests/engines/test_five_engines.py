"""One model, one set of weights and data, five engines: the same statistics, alphas and weights.

The weights are Megatron's logical ones (`megatron/weights.py`); transformers' LLaMA gets them converted. Two ranks, but
for one process; four micro-batches of Megatron's in each global batch, dealt over the ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import mols_ds
from megatron_patches.cpu.emulation import cpu_megatron
from tests.engines.deepspeed.engines import adamw, engine_of
from tests.engines.deepspeed.engines import config as ds_config
from tests.engines.deepspeed.state import full_weights as zero_weights
from tests.engines.megatron import building
from tests.engines.megatron.building import Setup, tokens
from tests.engines.megatron.weights import logical, logical_names
from tests.engines.torch.parallel import full_weights
from tests.helpers.harness import Results, run_cases
from tests.helpers.oracle.adamw import AdamSettings

pytestmark = [pytest.mark.distributed, pytest.mark.tier("all"), pytest.mark.timeout(900)]

START, SAMPLES, UPDATES = 1, 6, 11  # 10 of the updates are scaled
BOUNDS = {"alpha_min": 0.05, "alpha_max": 20.0, "factors": {"embedding": 2.0}}
SECTION = {"start": START, "samples": SAMPLES, "ramp_end": 4, **BOUNDS}
SETUP = Setup(distributed=True, lr=1e-3, clip=0.05, layers=3)  # clipping always acts; a weight lies on both ranks
EPS = 1e-4  # well above the float noise, which Adam's first steps would turn into full steps
ADAM = AdamSettings(lr=SETUP.lr, beta2=0.95, eps=EPS, weight_decay=SETUP.weight_decay, clip=SETUP.clip)
ENGINES = {"torch": 1, "ddp": 2, "fsdp2": 2, "zero3": 2, "megatron": 2}
"""Engine -> ranks."""
TOLERANCE = 1e-5


def as_llama(weights: Callable[[str, tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    """transformers' weights from Megatron's. weights: (logical name, shape) -> weight."""
    hidden, width = SETUP.hidden, SETUP.hidden // SETUP.heads
    found = {
        "model.embed_tokens.weight": weights("embedding.word_embeddings.weight", (SETUP.vocab, hidden)),
        "model.norm.weight": weights("decoder.final_layernorm.weight", (hidden,)),
        "lm_head.weight": weights("output_layer.weight", (SETUP.vocab, hidden)),
    }
    per_group = SETUP.heads // SETUP.kv_groups
    for layer in range(SETUP.layers):
        theirs, ours = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights(
            f"{theirs}self_attention.linear_qkv.weight", ((SETUP.heads + 2 * SETUP.kv_groups) * width, hidden)
        )
        query, key, value = qkv.view(SETUP.kv_groups, per_group + 2, width, hidden).split([per_group, 1, 1], 1)
        gate, up = weights(f"{theirs}mlp.linear_fc1.weight", (4 * hidden, hidden)).chunk(2)
        found |= {
            f"{ours}input_layernorm.weight": weights(f"{theirs}input_layernorm.weight", (hidden,)),
            f"{ours}post_attention_layernorm.weight": weights(f"{theirs}pre_mlp_layernorm.weight", (hidden,)),
            f"{ours}self_attn.q_proj.weight": query.reshape(-1, hidden),
            f"{ours}self_attn.k_proj.weight": key.reshape(-1, hidden),
            f"{ours}self_attn.v_proj.weight": value.reshape(-1, hidden),
            f"{ours}self_attn.o_proj.weight": weights(f"{theirs}self_attention.linear_proj.weight", (hidden, hidden)),
            f"{ours}mlp.gate_proj.weight": gate,
            f"{ours}mlp.up_proj.weight": up,
            f"{ours}mlp.down_proj.weight": weights(f"{theirs}mlp.linear_fc2.weight", (hidden, 2 * hidden)),
        }
    return found


def llama() -> nn.Module:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SETUP.vocab,
            hidden_size=SETUP.hidden,
            intermediate_size=2 * SETUP.hidden,
            num_hidden_layers=SETUP.layers,
            num_attention_heads=SETUP.heads,
            num_key_value_heads=SETUP.kv_groups,
            max_position_embeddings=SETUP.seq,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(as_llama(logical))
    return model


def losses(model: Callable[..., Any], iteration: int) -> Any:
    """The losses of this rank's micro-batches of a global batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for number in range(rank, SETUP.micro_batches, world):
        ids = tokens(SETUP, iteration, number)
        logits = model(input_ids=ids).logits
        yield nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())


def by_torch(how: str) -> Any:
    module = llama()
    run: nn.Module = module
    if how == "ddp":
        run = DistributedDataParallel(module)
    elif how == "fsdp2":
        for layer in module.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        run = fully_shard(module)
    optimizer = adamw(module, ADAM)
    mols = mols_ds.attach(optimizer, run, SECTION, total_steps=UPDATES)
    micros = SETUP.micro_batches // ENGINES[how]
    for iteration in range(UPDATES + SAMPLES):
        for loss in losses(run, iteration):
            (loss / micros).backward()
        mols.read_gradients()
        torch.nn.utils.clip_grad_norm_(module.parameters(), SETUP.clip)
        optimizer.step()
        optimizer.zero_grad()
    return mols, full_weights(module)


def by_deepspeed() -> Any:
    config = ds_config(3, SECTION, micros=SETUP.micro_batches // 2)
    engine = engine_of({**config, "gradient_clipping": SETUP.clip}, llama(), ADAM)
    for iteration in range(UPDATES + SAMPLES):
        for loss in losses(engine, iteration):
            engine.backward(loss)
            engine.step()
    found = engine.mols, zero_weights(engine)
    engine.destroy()
    return found


def by_megatron() -> Any:
    building.start(SETUP)
    built = building.build(SETUP)
    optimizer, scheduler = building.optimizer(built, warmup=0, style="constant", adam_eps=EPS)
    mols = building.attach(built, optimizer, scheduler, SECTION)
    for iteration in range(UPDATES + SAMPLES):
        building.step(built, optimizer, scheduler, iteration)
    names = logical_names(built.chunks[0], SETUP)
    return mols, as_llama(lambda name, shape: names[name].detach().clone().view(shape))


def run(engine: str) -> dict[str, Any]:
    """On a rank."""
    with cpu_megatron() if engine == "megatron" else contextlib.nullcontext():
        if engine == "megatron":
            mols, weights = by_megatron()
        else:
            mols, weights = by_deepspeed() if engine == "zero3" else by_torch(engine)
    owned = [tuple(item) for item in mols.controller.elements.ranges]
    return {"report": mols.report(), "alphas": mols.alphas, "weights": weights, "phase": mols.phase, "owned": owned}


def everything() -> dict[str, list[dict[str, Any]]]:
    """Engine -> of each rank."""
    found: Results = run_cases(run, 1, [("torch",)], timeout=300)
    more = run_cases(run, 2, [(engine,) for engine, ranks in ENGINES.items() if ranks == 2], timeout=300)
    return {engine: (found if ranks == 1 else more)[(engine,)] for engine, ranks in ENGINES.items()}


def check_sharing(ranks: dict[str, list[dict[str, Any]]]) -> None:
    """Each of two ranks measures a part of the elements, and a weight lies on both."""
    (alone,) = ranks["torch"]
    total = sum(item[3] for item in alone["owned"])
    for engine in ("ddp", "fsdp2", "zero3", "megatron"):
        first, second = (rank["owned"] for rank in ranks[engine])
        counts = [sum(item[3] for item in owned) for owned in (first, second)]
        assert 0 < min(counts) < total and sum(counts) == total, (engine, counts)
        assert {item[0] for item in first} & {item[0] for item in second}, engine
    assert any("linear_qkv" in item[0] for rank in ranks["megatron"] for item in rank["owned"]), "a fused weight"


def test_statistics_alphas_and_weights_are_the_same() -> None:
    ranks = everything()
    seen = {engine: every[0] for engine, every in ranks.items()}
    check_sharing(ranks)
    expected = seen.pop("torch")
    rows = expected["report"]["groups"]
    assert max(expected["alphas"].values()) / min(expected["alphas"].values()) > 1.5
    steps = {group: row["snr"] for group, row in rows.items()}
    assert expected["alphas"]["embedding"] == pytest.approx(2.0 * steps["vo"] / steps["embedding"]), "factors"
    untouched = as_llama(logical)
    for engine, one in seen.items():
        assert one["phase"] == "fixed" and one["alphas"] == pytest.approx(expected["alphas"], rel=TOLERANCE), engine
        for group, row in one["report"]["groups"].items():
            for key, value in row.items():
                wanted = rows[group][key]
                close = pytest.approx(wanted, rel=TOLERANCE) if isinstance(wanted, float) else wanted
                assert value == close, (engine, group, key)
        for name, weight in one["weights"].items():
            assert float((weight - expected["weights"][name]).abs().max()) < TOLERANCE, (engine, name)
            assert float((weight - untouched[name]).abs().max()) > 100 * TOLERANCE, (engine, name)
