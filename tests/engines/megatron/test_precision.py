"""Requirements on a machine, and refusals. The machine is an argument: there is no GPU here."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_patches import machine as machines
from megatron_patches.checks import check_classes, decay_refusal
from megatron_patches.machine import RECIPES, Machine
from megatron_patches.precision import check, describe, optimizer_refusals
from mols_ds.errors import MolsConfigError, MolsUnsupportedError

NONE = Machine(None, "the package transformer_engine is not installed", None)
ADA = Machine("2.9.0", "", (8, 9))
HOPPER = Machine("2.9.0", "", (9, 0), cuda=(12, 9))
BLACKWELL = Machine("2.9.0", "", (10, 0), cuda=(12, 9))
FP8 = {"fp8": "hybrid"}


def config(**settings: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **settings)


def test_without_low_precision_nothing_is_asked_of_the_machine() -> None:
    check(config(), machine=NONE)
    check(config(params_dtype=torch.bfloat16, bf16=True), machine=NONE)
    check(config(fp8_recipe="mxfp8"), machine=NONE)  # a recipe alone switches nothing on


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        (FP8, NONE, ["needs Transformer Engine", "not installed", "transformer_engine[pytorch] 1.0", "train in bf16"]),
        ({"fp4": "e2m1"}, NONE, ["fp4 (recipe nvfp4)", "2.7.0 or newer"]),
        (FP8, replace(HOPPER, capability=None), ["compute capability 8.9", "this process has none"]),
        (FP8, replace(HOPPER, capability=(8, 0)), ["8.9 or newer", "has 8.0; or leave fp8 out"]),
        ({**FP8, "fp8_recipe": "mxfp8"}, HOPPER, ["10.0 or newer", "take recipe delayed or tensorwise or blockwise"]),
        ({**FP8, "fp8_recipe": "blockwise"}, ADA, ["9.0 or newer", "take recipe delayed or tensorwise,"]),
        ({"fp4": "e2m1"}, HOPPER, ["nvfp4", "10.0"]),
        ({**FP8, "fp8_recipe": "tensorwise"}, replace(HOPPER, engine="2.1"), ["2.2.0 or newer", "2.1 is installed"]),
        ({**FP8, "fp8_recipe": "blockwise"}, replace(HOPPER, engine="2.2"), ["2.3.0 or newer"]),
        ({**FP8, "fp8_recipe": "mxfp8"}, replace(BLACKWELL, engine="2.0"), ["2.1.0 or newer"]),
        ({"fp4": "e2m1"}, replace(BLACKWELL, engine="2.6.1"), ["2.7.0 or newer"]),
        ({"gradient_accumulation_fusion": True}, NONE, ["fused_weight_gradient_mlp_cuda", "to false"]),
        ({"gradient_accumulation_fusion": True}, HOPPER, ["fused_weight_gradient_mlp_cuda", "the output layer"]),
        ({"fp4": "e2m1", "fp4_param": True}, BLACKWELL, ["fp4_param", "fp4_param_gather", "set fp4_param to false"]),
        ({**FP8, "fp8_recipe": "mxfp8"}, replace(BLACKWELL, capability=(12, 0)), ["below", "12.0", "another recipe"]),
        ({**FP8, "fp8_recipe": "blockwise"}, replace(HOPPER, cuda=(12, 8)), ["CUDA 12.9", "built with 12.8"]),
        ({**FP8, "fp8_recipe": "blockwise"}, replace(HOPPER, cuda=None), ["CUDA 12.9", "built with none"]),
        (
            {"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"},
            BLACKWELL,
            ["full_iteration", "random state", "cuda_graph_impl none"],
        ),
    ],
)
def test_what_the_machine_lacks_is_named_with_the_way_out(
    settings: dict[str, Any], machine: Machine, words: list[str]
) -> None:
    with pytest.raises(MolsUnsupportedError) as caught:
        check(config(**settings), machine=machine)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "machine"),
    [
        (FP8, ADA),
        ({**FP8, "fp8_recipe": "tensorwise"}, replace(ADA, engine="2.2.0.dev0+abc")),
        ({**FP8, "fp8_recipe": "blockwise", "fp8_param": True}, HOPPER),
        ({**FP8, "fp8_recipe": "mxfp8"}, BLACKWELL),
        ({"fp4": "e2m1"}, BLACKWELL),
        ({"gradient_accumulation_fusion": True}, replace(NONE, wgrad_kernel=True)),
    ],
)
def test_what_the_machine_has_is_accepted(settings: dict[str, Any], machine: Machine) -> None:
    check(config(**settings), machine=machine)


@pytest.mark.parametrize(
    "scope", ["full_iteration", ["attn", "full_iteration"], [SimpleNamespace(name="full_iteration")]]
)
def test_graphs_of_full_iterations_however_the_scope_is_written(scope: Any) -> None:
    """A string, a list of strings, a list of Megatron's enum: it differs from release to release."""
    with pytest.raises(MolsUnsupportedError, match="full_iteration"):
        check(SimpleNamespace(cuda_graph_scope=scope), machine=NONE)
    check(SimpleNamespace(cuda_graph_scope=["attn"]), machine=NONE)
    check(SimpleNamespace(cuda_graph_scope="attn,mlp"), machine=NONE)


def test_model_and_optimizer_have_to_agree_on_the_recipe() -> None:
    from megatron.core.optimizer import OptimizerConfig

    check(config(**FP8), OptimizerConfig(fp8_recipe="delayed"), machine=HOPPER)
    check(config(**FP8), OptimizerConfig(), machine=HOPPER)
    with pytest.raises(MolsConfigError, match=r"the model has 'delayed', the optimizer 'blockwise'"):
        check(config(**FP8), OptimizerConfig(fp8_recipe="blockwise"), machine=HOPPER)


def test_every_recipe_of_megatron_is_known_and_an_unknown_one_refused() -> None:
    from megatron.core.enums import Fp4Recipe, Fp8Recipe

    assert {str(r.value) for kind in (Fp8Recipe, Fp4Recipe) for r in kind} == set(RECIPES)
    with pytest.raises(MolsConfigError, match="'rowwise' is not one of delayed"):
        check(config(**FP8, fp8_recipe="rowwise"), machine=HOPPER)


def test_the_real_machine_of_the_tests() -> None:
    machine = machines.probe_machine()
    assert machine.capability == (torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    assert (machine.engine is None) == bool(machine.engine_missing)
    assert machine.apex == (not machine.apex_missing)


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a package of a given text first on the path, as another package of the same name would be."""

    def put(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text, "utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        importlib.invalidate_caches()

    yield put
    for name in ("apex", "transformer_engine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be imported: No module named 'transformer_engine.pytorch'"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    ],
)
def test_a_transformer_engine_that_does_not_load_is_none(shadowed: Any, text: str, why: str) -> None:
    shadowed("transformer_engine", text)
    version, reason = machines.find_transformer_engine()
    assert version is None
    assert why in reason


def test_the_other_package_called_apex_is_none(shadowed: Any) -> None:
    """PyPI's `apex` is a web toolkit: it imports, and has no kernels."""
    shadowed("apex", "__version__ = '0.9.10'")
    found, reason = machines.find_apex()
    assert not found
    assert "amp_C" in reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "float32 main_grad of float32 weights"),
        ({"params_dtype": torch.bfloat16, "bf16": True}, "float32 main_grad of bfloat16 weights"),
        (
            {**FP8, "params_dtype": torch.bfloat16, "bf16": True},
            "float32 main_grad of bfloat16 weights, from fp8 matrix products (recipe delayed), scales divided out",
        ),
        (
            {**FP8, "fp8_param": True, "fp8_recipe": "mxfp8", "gradient_accumulation_fusion": True},
            "float32 main_grad of fp8 primary weights, from fp8 matrix products (recipe mxfp8), scales divided out, "
            "accumulated by the fused weight-gradient product",
        ),
    ],
)
def test_what_the_statistics_read_is_stated(settings: dict[str, Any], words: str) -> None:
    versions = describe(config(**settings), machine=HOPPER)
    assert versions["statistics"] == words
    assert versions["transformer_engine"] == "2.9.0"
    assert versions["low_precision"].startswith("fp8/" if "fp8" in settings else "none")
    assert "not installed" in describe(machine=NONE)["transformer_engine"]


def optimizers() -> dict[str, Any]:
    """Runs on one rank: results for real optimizers, by name of the case."""
    from megatron_patches.cpu.emulation import cpu_megatron

    with cpu_megatron():
        return ordinary() | odd()


def applying(optimizer: Any, mode: Any = "probe", fused: bool = True) -> list[str]:
    refusals = [*optimizer_refusals(optimizer, mode, fused=fused), decay_refusal(optimizer, mode)]
    return [f"{r.what}; {r.way_out}" for r in refusals if r.applies]


def class_problem(optimizer: Any) -> list[str]:
    try:
        check_classes(optimizer)
    except MolsUnsupportedError as error:
        return [str(error)]
    return []


def ordinary() -> dict[str, Any]:
    """What Megatron builds by itself."""
    from tests.engines.megatron import building

    found: dict[str, Any] = {}
    for name, setup in {
        "distributed": building.Setup(dtype="bfloat16"),
        "float16": building.Setup(dtype="bfloat16", distributed=False),
        "fp32": building.Setup(distributed=False),
    }.items():
        building.start(setup)
        built = building.build(setup)
        optimizer, _ = building.optimizer(built)
        found[name] = describe(built.config, optimizer, machine=NONE)
        found[f"{name} refused"] = [x for mode in ("probe", "online", "moments") for x in applying(optimizer, mode)]
    return found


def odd() -> dict[str, Any]:
    """What is refused: Megatron's own classes around a weight of four elements, with the config that asks for it."""
    import pytorch_optimizer
    from megatron.core import optimizer as mo
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    weight = torch.nn.Parameter(torch.zeros(4))
    adam, sgd = torch.optim.AdamW([weight]), torch.optim.SGD([weight], lr=0.1)

    def wrapped(inner: Any, **settings: Any) -> Any:
        plain = mo.OptimizerConfig(lr=0.1)
        for key, value in settings.items():
            setattr(plain, key, value)  # 0.16's config lacks keys of newer ones, and refuses others without a GPU
        return mo.ChainedOptimizer([mo.FP32Optimizer(inner, plain, lambda *_: None)])

    unknown = type("Sophia", (torch.optim.SGD,), {"step": lambda self, closure=None: None})([weight], lr=0.1)
    aware_unknown = wrapped(unknown, use_precision_aware_optimizer_no_fp8_or_ds_fp8=True)
    aware = wrapped(adam, use_precision_aware_optimizer_no_fp8_or_ds_fp8=True, exp_avg_dtype=torch.float16)
    reusing = wrapped(adam, reuse_grad_buf_for_mxfp8_param_ag=True)
    hybrid = HybridDeviceOptimizer(
        [{"params": [weight]}], offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW, pin_cpu_grads=False, pin_cpu_params=False, lr=0.1,
    )  # fmt: skip
    fsdp = wrapped(adam)
    fsdp.chained_optimizers[0].ddp_config = SimpleNamespace(use_megatron_fsdp=True)
    return {
        "sgd": applying(wrapped(sgd, optimizer="sgd")),
        "sgd moments": applying(wrapped(sgd, optimizer="sgd"), "moments"),
        "coupled moments": applying(wrapped(torch.optim.Adam([weight], weight_decay=0.1)), "moments", fused=False),
        "coupled online": applying(wrapped(torch.optim.Adam([weight], weight_decay=0.1)), "online", fused=False),
        "muon": applying(wrapped(adam, optimizer="muon")),
        "dist_muon": applying(wrapped(adam, optimizer="dist_muon")),
        "layer-wise": applying(wrapped(adam, use_layer_wise_distributed_optimizer=True)),
        "graph": applying(wrapped(adam, optimizer_cuda_graph=True)),
        "reuse probe": applying(reusing),
        "reuse online": applying(reusing, "online"),
        "aware fused": applying(aware),
        "aware unknown": applying(aware_unknown, fused=False),
        "aware plain": applying(aware, fused=False),
        "aware moments": applying(aware, "moments", fused=False),
        "hybrid": applying(wrapped(hybrid)),
        "own class": class_problem(wrapped(pytorch_optimizer.FTRL([weight], lr=0.1))),
        "fsdp": applying(fsdp),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    from tests.helpers.harness import run_ranks

    values: dict[str, Any] = run_ranks(optimizers, 1)[0]
    return values


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        ("distributed", "float32 main_grad of bfloat16 weights"),
        ("float16", "float32 main_grad of bfloat16 weights"),
        ("fp32", "float32 main_grad of float32 weights"),
    ],
)
def test_ordinary_optimizers_are_described_and_none_is_refused(
    found: dict[str, Any], name: str, statistics: str
) -> None:
    assert found[name]["statistics"] == statistics
    assert found[name]["optimizer"] == "torch.optim.AdamW"
    assert found[f"{name} refused"] == []


@pytest.mark.distributed
@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sgd", None),
        ("sgd moments", "keeps no Adam moments"),
        ("coupled moments", "weight decay that is added to the gradient"),
        ("coupled online", None),
        ("muon", "'muon'"),
        ("dist_muon", "'dist_muon'"),
        ("layer-wise", "layer-wise"),
        ("graph", "optimizer_cuda_graph: false"),
        ("reuse probe", 'mode "online"'),
        ("own class", "FTRL (its step is not proportional to lr"),
        ("reuse online", None),
        ("aware fused", "use_precision_aware_optimizer with fused"),
        ("aware plain", None),
        ("aware unknown", "not in the catalog"),
        ("aware moments", "below fp32"),
        ("hybrid", "HybridDeviceOptimizer"),
        ("fsdp", "Megatron-FSDP"),
    ],
)
def test_what_mols_refuses_of_an_optimizer(found: dict[str, Any], name: str, words: str | None) -> None:
    if words is None:
        assert found[name] == []
    else:
        (line,) = found[name]
        assert words in line
