"""The plan's arithmetic, its search, and the command. tests/apps/test_plan_measured.py compares it with engines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds.apps.plan import grid, scaling, zero
from mols_ds.apps.plan.calibration import accumulators, sums_bytes
from mols_ds.apps.plan.cluster import Cluster, gib
from mols_ds.apps.plan.gpt import Gpt
from mols_ds.apps.plan.live import gathered
from mols_ds.apps.plan.model import load
from mols_ds.apps.plan.optimizers import Weight, state_bytes
from mols_ds.apps.plan.parts import Footprint, ring
from mols_ds.cli import main
from mols_ds.core.layout import ElementLayout
from mols_ds.core.local_stats import LocalStats
from mols_ds.core.lr_scaler import LRScaler, make_plan
from mols_ds.core.ranges import ShardRange
from mols_ds.core.subsample import ELEMENTS
from mols_ds.errors import MolsConfigError, MolsUnsupportedError

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "configs/clusters").glob("*.yaml"))
TINY = str(ROOT / "configs/models/llama_tiny.json")
KEYS = {
    "schema", "cluster", "run", "mols", "heaviest", "measured_elements", "limits", "phases", "nvme", "ranks_of",
    "messages", "calibration", "seconds", "overhead", "fits", "problems", "nearest",
}  # fmt: skip


def config(tmp_path: Path, **more: Any) -> str:
    content: dict[str, Any] = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "mols": {"start": 10, "samples": 16, "mode": "probe", "accumulators": {"device": "accelerator"}},
        **more,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content), "utf-8")
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    out = capsys.readouterr()
    return status, out.out, out.err


# ------------------------------------------------------------------ parts


def test_accumulators_are_what_moments_allocates() -> None:
    for elements in (0, 1, 126, 100_000):
        owned, layouts = [ShardRange("w", 0, 0, elements)], {"w": ElementLayout.whole("vo")}
        for samples in (8, 32, 40, 70):
            stats = LocalStats(owned, layouts, ("vo",), torch.device("cpu"))
            for _ in range(samples):
                stats.open()
                stats.add(0, torch.ones(elements), 1.0)
                stats.close()
            planned, measured = accumulators(elements, "cpu", samples), stats.accumulators
            assert measured is not None and measured.kept is not None
            assert planned.kept == measured.nbytes
            kept = measured.kept.state(samples)
            held = sum(value.nbytes for value in kept.values() if isinstance(value, torch.Tensor))
            # a stride that is prime leaves out some
            assert held <= planned.samples <= 2 * held + 10 * ELEMENTS


def test_sums_are_below_the_limit_of_one_all_reduce() -> None:
    assert 0 < sums_bytes(("embedding", "head", "qk", "vo", "mlp", "other"), 32) <= 262_144


def test_partitions_cover_every_element_once() -> None:
    weights = [Weight(str(i), (size,), "mlp") for i, size in enumerate((7, 1, 30, 2))]
    for ranks in (1, 2, 3, 64):
        parts = zero.partitions(weights, ranks)
        assert sum(part.owned for part in parts) == 40
        assert all(part.size * ranks == part.flat >= 40 for part in parts)
        assert all(part.whole >= part.owned for part in parts)


def test_a_reuse_distance_of_zero_gathers_twice_and_a_large_one_once() -> None:
    weights = [Weight(f"layers.{i}.w", (10,), "mlp") for i in range(5)]
    often = gathered(weights, reuse=0, prefetch=0, most=10**9, checkpointing=False, layers=5)
    once = gathered(weights, reuse=10**9, prefetch=0, most=10**9, checkpointing=False, layers=5)
    assert (often.elements, often.live) == (100, 10)
    assert (once.elements, once.live) == (50, 50)


def test_ring() -> None:
    assert (ring("all-reduce", 100, 4), ring("all-gather", 100, 4), ring("send and receive", 100, 4)) == (150, 75, 100)


def test_sizes_of_memory() -> None:
    assert gib("80GiB") == gib("80") == 80
    assert gib("80GB") == pytest.approx(80e9 / 2**30)
    for text in ("", "80 apples", "-1GiB", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
            gib(text)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_shipped_clusters(path: Path) -> None:
    import yaml

    cluster = Cluster.parse(yaml.safe_load(path.read_text("utf-8")), str(path))
    assert cluster.ranks >= 2 and cluster.limit < cluster.memory_gib * 2**30


def test_a_wrong_cluster_names_every_key() -> None:
    with pytest.raises(MolsConfigError, match=r'"memory_gib" is missing.*"nods": unknown key'):
        Cluster.parse({"nods": 2}, "cluster x.yaml")


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "RMSprop", "Adagrad"])
def test_state_of_torchs_optimizers(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = getattr(torch.optim, name)([parameter], lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor))
    said = state_bytes(name, {}, [Weight("w", (64, 64), "mlp")])
    assert said == pytest.approx(held, abs=16)  # the step's count


def test_every_optimizer_of_the_table_has_a_state() -> None:
    from mols_ds.optim.catalog import OPTIMIZERS

    assert all(entry.state is not None for entry in OPTIMIZERS.values())
    with pytest.raises(MolsUnsupportedError, match="OneBitAdam"):
        state_bytes("OneBitAdam", {}, [])


def test_model_is_the_real_one() -> None:
    decoder = load(str(ROOT / "configs/models/llama_7b.json"))
    assert decoder.numel == sum(row.elements for row in decoder.table) == 6_738_415_616
    # Head and blocks, not the embedding's look-up; norms are vectors.
    assert decoder.matmul == decoder.numel - 32_000 * 4096 - 65 * 4096


def test_activations_grow_with_batch_and_shrink_with_checkpointing() -> None:
    decoder = load(TINY)
    small, large = (decoder.activations(n, 64, torch.bfloat16) for n in (1, 8))
    assert large.kept(False) == pytest.approx(8 * small.kept(False), rel=0.01)  # rotary tables do not grow
    assert large.kept(True) - large.fixed < 0.5 * (large.kept(False) - large.fixed)


# ------------------------------------------------------------------ Megatron


SIZES: dict[str, Any] = dict(
    layers=8, hidden=64, heads=8, kv=4, channels=8, ffn=128, vocab=256, gated=True, bias=False, norm_bias=False,
    tied=False, positions=0, qk_norm=False, experts=0, topk=1, shared_ffn=0, tp=1, pp=1, vp=1, ep=1, etp=1, cp=1,
    sp=False, recompute="", flash=True,
)  # fmt: skip


CUTS: list[dict[str, int]] = [{"tp": 2, "etp": 2}, {"pp": 4}, {"pp": 2, "vp": 2}, {"tp": 2, "etp": 1, "ep": 2}]
KINDS: list[dict[str, Any]] = [{}, {"tied": True}, {"bias": True, "norm_bias": True}, {"experts": 4, "topk": 2}]


@pytest.mark.parametrize(("more", "cut"), [(m, c) for m in KINDS for c in CUTS if "ep" not in c or "experts" in m])
def test_the_cut_model_has_the_whole_models_elements(more: dict[str, Any], cut: dict[str, int]) -> None:
    assert Gpt(**(SIZES | more | cut)).total() == Gpt(**(SIZES | more)).total()


def test_buffers_are_padded_for_the_distributed_optimizer_alone() -> None:
    weights = [Weight("a", (100,), "mlp"), Weight("b", (30,), "mlp")]
    assert grid.buffer_elements(weights, 4, distributed=False, bucket=None) == 130
    assert grid.buffer_elements(weights, 4, distributed=True, bucket=None) == 256  # 30 -> 64, + 100 -> 256
    assert grid.buffer_elements(weights, 3, distributed=True, bucket=None) == 384


def test_micro_batches_in_flight() -> None:
    gpt = Gpt(**(SIZES | {"pp": 4}))
    assert [gpt.in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert Gpt(**(SIZES | {"pp": 4, "vp": 2})).in_flight(0, 8) == 2 * 3 + 4 + 1


@pytest.mark.parametrize(
    ("cluster", "changes", "layers"),
    [
        ("laptop_cpu", [], "Megatron-core, traced"),
        ("h100_8x80", [], "Transformer Engine, by formula"),
        ("h100_8x80", ["--set", "precision.transformer_engine=false"], "Megatron-core, traced"),
    ],
)
def test_layers_are_those_of_the_cluster(
    capsys: pytest.CaptureFixture[str], cluster: str, changes: list[str], layers: str
) -> None:
    """Whatever this machine has."""
    path, machines = ROOT / "configs/megatron/tiny_tp2_pp2.yaml", ROOT / f"configs/clusters/{cluster}.yaml"
    arguments = ["--config", str(path), "--cluster", str(machines), "--accelerators-per-node", "4", "--json", *changes]
    status, out, err = plan(capsys, *arguments)
    assert status == 0, err
    made = json.loads(out)
    assert f"layers: {layers}" in made["run"]["summary"]
    assert ("fp32" in made["run"]["summary"][0]) == (cluster == "laptop_cpu")


def test_processors_have_no_transformer_engine(capsys: pytest.CaptureFixture[str]) -> None:
    path, machines = ROOT / "configs/megatron/tiny_tp2_pp2.yaml", ROOT / "configs/clusters/laptop_cpu.yaml"
    arguments = ["--config", str(path), "--cluster", str(machines), "--accelerators-per-node", "4"]
    status, _, err = plan(capsys, *arguments, "--set", "precision.transformer_engine=true")
    assert status == 2 and "the cluster's ranks are processors" in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------ the command


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = (
        TINY,
        "--config",
        config(tmp_path),
        "--memory",
        "80GiB",
        "--sequence",
        "128",
        "--steps",
        "1000",
        "--json",
    )
    status, out, _ = plan(capsys, *arguments)
    made = json.loads(out)
    assert status == 0 and set(made) == KEYS
    waiting, calibrating, ramping = made["phases"]
    held = calibrating["device"]["accumulators"]
    assert calibrating["device_total"] - waiting["device_total"] == held > 8 * made["measured_elements"]
    assert ramping["device"] == waiting["device"]
    # 16 passes that do not update, of 1,000 steps, and little else.
    assert 0.016 < made["overhead"] < 0.020
    assert made["mols"]["start"] == 10 and made["calibration"]["agreement_bytes"] == 16 * 8


def test_text_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    cluster = str(ROOT / "configs/clusters/laptop_cpu.yaml")
    arguments = (TINY, "--config", config(tmp_path), "--cluster", cluster, "--sequence", "64", "--steps", "100")
    status, out, _ = plan(capsys, *arguments, "--plot", str(picture))
    assert status == 0 and picture.stat().st_size > 10_000
    assert "It fits" in out and "accumulators" in out and max(map(len, out.splitlines())) <= 100


def test_what_does_not_fit_gets_the_fewest_changes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [TINY, "--config", config(tmp_path), "--sequence", "512", "--steps", "1000", "--json", "--memory"]
    fits = json.loads(plan(capsys, *arguments, "80GiB")[1])["phases"]
    most, least = fits[1]["device_total"], fits[0]["device_total"]
    between = (most + least) / 2 / 0.9 / 2**30  # room for training, not for the accumulators
    status, out, _ = plan(capsys, *arguments, f"{between:.6f}")
    made = json.loads(out)
    assert status == 1 and not made["fits"] and made["problems"][0].startswith("calibrating: accelerator")
    assert made["nearest"]["changes"] == ["accumulators on the host"]
    status, out, _ = plan(capsys, *arguments, "1MiB")
    assert status == 1 and json.loads(out)["nearest"] is None


def test_the_nearest_setting_of_a_megatron_run_fits(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs/megatron/llama_7b_tp2_pp2.yaml")
    assert plan(capsys, "--config", path, "--memory", "80GiB", "--json")[0] == 0
    status, out, _ = plan(capsys, "--config", path, "--memory", "24GiB", "--json")
    near = json.loads(out)["nearest"]
    assert status == 1 and near["device_total"] < 24 * 0.9 * 2**30
    assert near["nodes"] == 1 or near["changes"][0].endswith("nodes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "80 apples"], "not a size"),
        ([], "--memory 80GiB"),
        (["--memory", "80GiB", "--cluster", "none.yaml"], "No such file"),
        (["--memory", "80GiB", "--accelerators-per-node", "7"], "does not divide among 7"),
        (["--memory", "80GiB", "--sequence", "0"], "--sequence 0"),
        (["--memory", "80GiB", "--sequence", "1000000"], "max_position_embeddings"),
        (["--memory", "80GiB", "--mfu", "2"], '"mfu"'),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = plan(capsys, TINY, "--config", config(tmp_path), "--steps", "10", *arguments)
    assert status == 2 and not out and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}, "OneBitAdam"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization"),
    ],
)
def test_what_is_not_known_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    path = config(tmp_path, **section)
    status, _, err = plan(capsys, TINY, "--config", path, "--memory", "80GiB", "--steps", "10")
    assert status == 2 and len(err.splitlines()) == 1 and message in err


def test_the_length_of_the_run_must_be_known(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = plan(capsys, TINY, "--config", config(tmp_path), "--memory", "80GiB")
    assert status == 2 and "--steps" in err


@pytest.mark.parametrize("rates", [{"qk": 0.25}, {"qk": 4.0}], ids=["slower", "faster"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("numel", [48 * 6, 48 * 200])
def test_copies_of_a_scaled_step_are_bounds(numel: int, views: bool, columns: bool, rates: dict[str, float]) -> None:
    """Compare with a scaler's copies of such a tensor; one of the two rates reaches the bound."""
    layout = ElementLayout(1, ((32, "qk"), (16, "vo"))) if columns else ElementLayout(8, ((4, "qk"), (2, "vo")))
    tensor = torch.nn.Parameter(torch.zeros(numel))
    tensor.grad = torch.ones(numel)
    optimizer = torch.optim.AdamW([tensor])
    optimizer.step()
    piece = make_plan(numel, [ShardRange("w", 0, 0, numel)], {"w": layout}, elementwise=views)
    scaler = LRScaler(optimizer, {id(tensor): piece}, lambda: rates, elementwise=views, groups_only=True)
    held: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: held.append(sum(delta.old.numel() for delta in scaler._deltas)))
    optimizer.step()
    most = scaling.held_of_tensor(layout, numel, "vo", views=views)
    assert held[0] <= most and (rates["qk"] > 1 or held[0] == most)


def test_copies_of_fused_projections(capsys: pytest.CaptureFixture[str]) -> None:
    """Two thirds of Megatron's linear_qkv under Transformer Engine's FusedAdam, cut over tensor and data ranks."""
    path = str(ROOT / "configs/megatron/llama_7b_tp2_pp2.yaml")
    made = json.loads(plan(capsys, "--config", path, "--memory", "80GiB", "--json")[1])
    ranks = made["cluster"]["ranks"] // 4
    assert made["mols"]["copies"] == pytest.approx(4 * 16 * 2 * 4096 * 4096 / 2 / ranks, rel=1e-6)


def test_copies_are_of_the_step_and_of_its_place() -> None:
    step = Footprint({"weights": 5}, {"backward": {"activations": 10}, "step": {"workspace": 2}}, 1, 1, copies=9)
    assert step.peak() == ("backward", {"weights": 5, "activations": 10})
    assert step.peak(scaled=True) == ("step", {"weights": 5, "workspace": 2, "copies": 9})
    offloaded = Footprint({"weights": 5}, {"backward": {}}, 1, 1, copies=9)
    assert offloaded.peak(scaled=True) == ("backward", {"weights": 5}) and not offloaded.steps_on_device


@pytest.mark.parametrize(
    ("optimizer", "stage", "offload", "held"),
    [("AdamW", 2, "", False), ("Adam8bit", 2, "", True), ("Adam8bit", 2, "cpu", True), ("Adam8bit", 0, "", False)],
)
def test_copies_of_flat_shards(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, optimizer: str, stage: int, offload: str, held: bool
) -> None:
    """Of an optimizer that reads blocks of elements, all that may be scaled: all but `vo` and norms."""
    zero_section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1000}
    zero_section |= {"offload_optimizer": {"device": offload}} if offload else {}
    path = config(tmp_path, optimizer={"type": optimizer, "params": {"lr": 1e-3}}, zero_optimization=zero_section)
    arguments = (TINY, "--config", path, "--memory", "80GiB", "--sequence", "16", "--steps", "1000", "--json")
    made = json.loads(plan(capsys, *arguments)[1])
    elements = load(TINY).table.elements
    scaled = sum(count for group, count in elements.items() if group not in ("vo", "other"))
    scaled //= made["cluster"]["ranks"]
    assert made["mols"]["copies"] == (4 * scaled if held else 0)
    waiting, _, ramping = made["phases"]
    if offload:
        assert ramping["host"]["copies"] == 4 * scaled and "copies" not in waiting["host"]


@pytest.mark.parametrize(("key", "found"), [("exclude", 4096), ("include", 0)])
def test_the_all_reduce_of_tokens_has_a_byte_per_row(
    key: str, found: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, mols={"start": 10, "samples": 16, "unseen_rows": key})
    status, out, _ = plan(capsys, TINY, "--config", file, "--cluster", str(CLUSTERS[0]), "--steps", "1000", "--json")
    assert status == 0 and json.loads(out)["calibration"]["tokens_bytes"] == found
