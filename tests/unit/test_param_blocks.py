"""The sums that sharded optimizers take: blocks of parameters, K-means and medians, against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mols_ds.core.groups import build_layouts
from mols_ds.optim.adam_mini import parameter_blocks
from mols_ds.optim.clustering import cluster, median_deviations, nearest
from mols_ds.optim.param_blocks import Blocks, step_squares
from tests.helpers.oracle.sgg import lower_median


def brute_force(blocks: Blocks, numel: int) -> list[int]:
    of_step = [b for b, width in enumerate(w for w, count in blocks.widths for _ in range(count)) for _ in range(width)]
    return [of_step[i // blocks.inner % len(of_step)] for i in range(numel)]


@settings(max_examples=150)
@given(
    inner=st.integers(1, 5),
    widths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    repetitions=st.integers(1, 4),
    data=st.data(),
)
def test_views_of_any_range_cover_it_once_and_name_the_right_blocks(
    inner: int, widths: list[tuple[int, int]], repetitions: int, data: st.DataObject
) -> None:
    blocks = Blocks(inner, tuple(widths))
    numel = inner * blocks.steps * repetitions
    start = data.draw(st.integers(0, numel - 1))
    length = data.draw(st.integers(1, numel - start))
    expected = brute_force(blocks, numel)[start : start + length]
    found = torch.full((length,), -1)
    views = list(blocks.views(start, length))
    for view in views:
        assert bool((view.of(found) == -1).all())
        view.of(found).copy_(blocks.of_step[view.first : view.first + view.steps][:, None].expand(-1, view.width))
    assert found.tolist() == expected and len(views) <= 5
    counts = blocks.counted(start, length)
    assert counts.tolist() == [expected.count(b) for b in range(blocks.count)]
    first, count = blocks.touched(start, length)
    assert first <= min(expected) and max(expected) < first + count
    assert blocks.sizes(numel).sum() == numel


@pytest.mark.parametrize("shape", [(1, 1, 10_001), (1, 5, 4_097), (300, 7, 1), (1, 3, 2), (129, 2, 4_100)])
def test_squares_are_those_of_float64(shape: tuple[int, int, int]) -> None:
    """Off by the rounding of at most 4,096 float32 additions: in one lane, a walk of sqrt(4,096) roundings of
    6e-8, so 4e-6. Measured: up to 3.9e-7."""
    values = torch.randn(2 * math.prod(shape), generator=torch.Generator().manual_seed(0))[::2].view(-1)
    view = values[: math.prod(shape)].contiguous().view(shape)
    torch.testing.assert_close(step_squares(view), view.double().square().sum((0, 2)), rtol=4e-6, atol=0)


def blocks_of(name: str, shape: tuple[int, ...], config: dict[str, Any], transposed: bool = False) -> Any:
    layout = build_layouts({name: shape}, config)[name]
    found = parameter_blocks(name, shape, layout, 4, transposed)
    return found.inner, found.widths


def test_blocks_of_parameters() -> None:
    llama = {"model_type": "llama", "num_attention_heads": 3, "hidden_size": 12}
    assert blocks_of("h.0.self_attn.q_proj.weight", (12, 12), llama) == (12, ((4, 3),))
    assert blocks_of("h.0.self_attn.k_proj.weight", (4, 12), llama) == (12, ((4, 1),))  # grouped queries
    assert blocks_of("h.0.self_attn.v_proj.weight", (12, 12), llama) == (12, ((1, 12),))
    assert blocks_of("h.0.self_attn.q_proj.bias", (12,), llama) == (1, ((1, 12),))
    assert blocks_of("h.0.norm.weight", (12,), llama) == (12, ((1, 1),))
    assert blocks_of("embed_tokens.weight", (7, 12), llama) == (12, ((1, 7),))
    assert blocks_of("h.0.mlp.experts.down_proj", (2, 12, 5), llama) == (5, ((1, 24),))
    assert blocks_of("h.0.self_attn.q_proj.lora_A.default.weight", (8, 12), llama) == (12, ((1, 8),))
    assert blocks_of("h.0.self_attn.q_proj.lora_B.default.weight", (12, 8), llama) == (8, ((4, 3),))
    gpt2 = {"model_type": "gpt2", "n_head": 3, "n_embd": 12}
    assert blocks_of("h.0.attn.c_attn.weight", (12, 36), gpt2) == (1, ((4, 6), (1, 12)))
    assert blocks_of("h.0.mlp.c_fc.weight", (12, 48), gpt2, transposed=True) == (1, ((1, 48),))
    neox = {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 8}
    head = ((4, 2), (1, 4))  # query, key, then four rows of the value, head by head
    assert blocks_of("h.0.attention.query_key_value.weight", (24, 8), neox) == (8, head + head)


# --------------------------------------------------------------------------------------------------------- clustering


def test_medians_are_exact_and_do_not_depend_on_the_pieces() -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(size, generator=generator) * scale for size, scale in ((1000, 1e-3), (7, 5.0), (1, 1.0))]
    layers[0][:40] = 0.5  # ties, in a cluster of their own
    sizes = torch.tensor([float(layer.numel()) for layer in layers], dtype=torch.float64)
    whole = list(enumerate(layers))
    cut = [(n, part) for n, layer in whole for part in layer.split(300)]
    results = []
    for pieces in (whole, cut):
        found = cluster(pieces, sizes, None, 3, lambda values: values, 20)
        results.append((found, median_deviations(pieces, found, lambda values: values)))
    found, medians = results[0]
    assert torch.equal(found.centers, results[1][0].centers)
    assert torch.equal(medians.clusters.nan_to_num(-1), results[1][1].clusters.nan_to_num(-1))
    deviations = [(layer - found.means[n]).abs() for n, layer in whole]
    for n, layer in whole:
        index = nearest(layer, found.centers[n])
        for c in range(3):
            chosen = deviations[n][index == c].numpy()
            assert float(medians.clusters[n, c]) == (
                lower_median(chosen) if len(chosen) else pytest.approx(math.nan, nan_ok=True)
            )
    assert float(medians.overall) == lower_median(torch.cat(deviations).numpy())
    assert bool(medians.clusters[2].isnan().any())  # one element, three clusters


def test_k_means_goes_on_from_given_centres_and_keeps_an_empty_one() -> None:
    values = torch.tensor([0.0, 0.1, 10.0, 10.2])
    start = torch.tensor([[-50.0, 1.0, 9.0]])
    found = cluster([(0, values)], torch.tensor([4.0], dtype=torch.float64), start, 3, lambda v: v, 20)
    torch.testing.assert_close(found.centers, torch.tensor([[-50.0, 0.05, 10.1]]))
