"""One reader of DeepSpeed configs: it reads what DeepSpeed reads, and who fills in which "auto"."""

from __future__ import annotations

import base64
import copy
import functools
import json
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

import mols_ds
from mols_ds.core.plain_data import MAX_DEPTH
from mols_ds.engines.deepspeed.auto_values import (
    ACCELERATE,
    DEFAULTED,
    TRAINER,
    auto_keys,
    check_no_auto,
    refused_by_deepspeed,
)
from mols_ds.engines.deepspeed.config_reader import SHOWN, misspelt_section, read_config
from mols_ds.errors import MolsConfigError
from mols_ds.training import ds_config
from tests.engines.deepspeed.engines import config
from tests.engines.deepspeed.loops import iterate
from tests.engines.deepspeed.models import model_of
from tests.helpers.harness import run_ranks

TEXTS = {
    "JSON": '{"a": [1, 2.5, true, null], "b": {"c": "x\\u00e9"}}',
    "comments": '{\n  # one\n  "a": 1, // two\n  /* three */ "b": 2\n}',
    "trailing commas": '{"a": [1, 2,], "b": {"c": 1,},}',
    "no quotes, no commas, no braces": "a: 1\nb: {c: [x\ny\n]}\n",
    "several lines": "{a: '''\n  x\n  y\n  ''', b: 1}",
    "a comment that is part of a text": "{a: x # y\n}",
    "NaN is a text": "{a: NaN\n}",
    "last comma": '{"a": 1,}',
    "twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "cut off": '{"a": [1, {"b": "x',
    "cut off in an escape": '{"a": "\\u00',
    "no object": "[1, 2]",
    "a word": "stage",
    "control character": '{"a": "\0"}',
    "BOM": '\ufeff{"a": 1}',
    "empty": " \n",
    "too large for a float": '{"a": 1e400}',
}
BROKEN = ("cut off", "cut off in an escape", "control character", "too large for a float")
REFUSED_HERE = ("no object", "a word", "empty")
"""DeepSpeed reads these and fails later."""


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_it_reads_what_deepspeed_reads(tmp_path: Path, name: str, coded: bool) -> None:
    path = tmp_path / "ds.json"
    path.write_text(TEXTS[name], "utf-8")
    given = base64.urlsafe_b64encode(TEXTS[name].encode()).decode() if coded else str(path)
    try:
        wanted: Any = load_ds_config(given)
    except Exception:
        wanted = None
    if wanted is not None and name not in REFUSED_HERE:
        assert read_config(given) == wanted
        assert json.dumps(read_config(given)) == json.dumps(wanted)
    else:
        with pytest.raises(MolsConfigError) as caught:
            read_config(given)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert (wanted is None) == (
        name in ("cut off", "cut off in an escape", "control character", "too large for a float")
    ) or name == "twice"


def test_a_key_that_stands_twice_is_refused_in_a_file_and_the_last_one_counts_in_base64(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(TEXTS["twice"], "utf-8")
    with pytest.raises(MolsConfigError, match="key 'c' is there twice"):
        read_config(str(tmp_path / "ds.json"))
    assert read_config(base64.urlsafe_b64encode(TEXTS["twice"].encode()).decode())["b"] == {"c": 2}


def test_a_share_of_all_steps_stays_one(tmp_path: Path) -> None:
    """hjson, and so DeepSpeed, reads 1.0 as 1, which as "ramp_end" would be the first step."""
    (tmp_path / "ds.json").write_text('{"a": 1.0, "mols": {"start": 1, "ramp_end": 1.0, "alpha_max": 1e1}}', "utf-8")
    content = read_config(str(tmp_path / "ds.json"))
    assert [(value, type(value)) for value in (content["a"], *content["mols"].values())] == [
        (1, int), (1, int), (1.0, float), (10.0, float)
    ]  # fmt: skip


@pytest.mark.parametrize("deep", [MAX_DEPTH + 1, 100_000])
def test_deep_nesting_is_one_line(tmp_path: Path, deep: int) -> None:
    text = '{"a": ' + "[" * deep + "]" * deep + "}"
    (tmp_path / "ds.json").write_text(text, "utf-8")
    for given in (str(tmp_path / "ds.json"), base64.urlsafe_b64encode(text.encode()).decode()):
        with pytest.raises(MolsConfigError, match="nested too deeply") as caught:
            read_config(given)
        assert len(str(caught.value)) < SHOWN + 200


def test_what_is_no_config(tmp_path: Path) -> None:
    for given, said in (
        ("none.json", "no such file, and not a config in base64"),
        ("conf", "no such file"),
        ("x" * 5000, "no such file"),
        ("a\0b", "no such file"),
        (str(tmp_path), "folder"),
        (7, "not int"),
        (tmp_path / "ds.json", "not PosixPath"),
    ):
        with pytest.raises(MolsConfigError, match=said) as caught:
            read_config(given)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_the_jobs_read_it_too(tmp_path: Path) -> None:
    """And take "total_steps": "auto" for their own number of steps, as a Trainer's callback does."""
    text = "{\n  # a comment\n  train_batch_size: 8\n  mols: {total_steps: auto\n}}"
    (tmp_path / "ds.json").write_text(text, "utf-8")
    for given in (str(tmp_path / "ds.json"), base64.urlsafe_b64encode(text.encode()).decode()):
        content = ds_config.read_config(given)
        assert content == {"train_batch_size": 8, "mols": {}}
        assert ds_config.resolve(content, world=2, steps=30, out=tmp_path)["mols"]["total_steps"] == 30


def test_a_misspelt_section() -> None:
    assert [misspelt_section({key: {}}) for key in ("mols", "optimizer", "model", "zero_optimization")] == [""] * 4
    assert all(misspelt_section({key: {}}) for key in ("mol", "MOLS", "mosl", "molss"))
    assert misspelt_section({1: 2}) == ""  # type: ignore[dict-item]


# ---------------------------------------------------------------------- "auto"

EVERYWHERE = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    **dict.fromkeys(("gradient_clipping", "steps_per_print", "wall_clock_breakdown", "prescale_gradients"), "auto"),
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay", "amsgrad"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        **dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "overlap_comm"), "auto"),
        **dict.fromkeys(("stage3_param_persistence_threshold", "sub_group_size"), "auto"),
        "stage3_gather_16bit_weights_on_model_save": "auto",
        "offload_optimizer": {"device": "auto", "nvme_path": "auto"},
        "offload_param": {"device": "auto", "nvme_path": "auto"},
        "stage": 3,
    },
    "torch_autocast": {"enabled": "auto"},
    "tensorboard": {"enabled": "auto"},
}
"""Keys that may be "auto", at ZeRO stage 3."""


def test_what_a_trainer_and_accelerate_fill() -> None:
    """The tables against the classes themselves, with every "auto" at once."""
    transformers = pytest.importorskip("transformers.integrations.deepspeed")
    accelerate = pytest.importorskip("accelerate.utils")
    numbers = {
        "world_size": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
    }
    numbers |= {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8, "weight_decay": 0}
    flags = dict.fromkeys(("save_on_each_node", "fp16", "fp16_full_eval", "bf16", "bf16_full_eval"), False)
    arguments = SimpleNamespace(**numbers, **flags, get_warmup_steps=lambda steps: 1)
    filled = transformers.HfTrainerDeepSpeedConfig(copy.deepcopy(EVERYWHERE))
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=8)), 10)
    before, after = set(auto_keys(EVERYWHERE)), set(auto_keys(filled.config))
    assert before - after == set(TRAINER)
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=filled)
    left = set(auto_keys(plugin.deepspeed_config))
    assert after - left == set(ACCELERATE) - {"zero_optimization.stage"}
    for key in left:
        *path, last = key.split(".")
        alone: dict[str, Any] = {last: "auto"}
        for part in reversed(path):
            alone = {part: alone}
        with pytest.raises(ValueError, match=f"`{key}` not found in kwargs"):
            plugin.deepspeed_config_process(must_match=False, config=alone)
    stage = accelerate.DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": "auto"}})
    assert stage.get_value("zero_optimization.stage") != "auto"


def with_auto(key: str) -> dict[str, Any]:
    content = config(2, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}, micros=1)
    if key.startswith("scheduler."):
        params = {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 1, "total_num_steps": 4}
        content["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    section = content
    *path, last = key.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = "auto"
    return content


KEYS = [key for key in auto_keys(EVERYWHERE) if refused_by_deepspeed(key) or key.startswith(DEFAULTED)]


def with_deepspeed_alone() -> dict[str, str]:
    """Result of each unfilled "auto": the error's type, or "built". One rank."""
    seen = {}
    for key in KEYS:
        model = model_of()
        try:
            engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=with_auto(key))[0]
            for iteration in range(2):
                iterate(engine, iteration, micros=1)
            engine.destroy()
            seen[key] = "built"
        except Exception as error:
            seen[key] = type(error).__name__
    return seen


@pytest.mark.distributed
@pytest.mark.tier("all")
def test_what_deepspeed_makes_of_auto() -> None:
    (seen,) = run_ranks(with_deepspeed_alone, 1)
    refused = {key for key in KEYS if refused_by_deepspeed(key)}
    assert {key for key, what in seen.items() if what != "built"} == refused - {"optimizer.params.amsgrad"}  # a flag


def test_the_check_names_every_key() -> None:
    check_no_auto({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "mols": {"samples": "auto"}})
    with pytest.raises(MolsConfigError, match=r'"auto" in train_batch_size, optimizer\.params\.lr, which') as caught:
        check_no_auto(
            {"train_batch_size": "auto", "optimizer": {"params": {"lr": "auto"}}, "bf16": {"enabled": "auto"}}
        )
    assert "Trainer" in str(caught.value)


# ---------------------------------------------------------------------- initialize


def refused_and_warned() -> dict[str, Any]:
    """Through `mols_ds.initialize` and the patched function, on one rank."""
    section = {"start": 1, "samples": 4, "ramp_end": 8}
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    stock = deepspeed.initialize

    def built(given: Any, patched: bool, **arguments: Any) -> str:
        model = model_of()
        parameters = list(model.parameters())
        if patched:
            mols_ds.patch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                make = deepspeed.initialize if patched else mols_ds.initialize
                engine = make(model=model, model_parameters=parameters, config=given, **arguments)[0]
                said = engine.mols.phase if hasattr(engine, "mols") else "stock"
                engine.destroy()
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            finally:
                mols_ds.unpatch()
                deepspeed.initialize = stock
        return " | ".join([said, *(str(one.message) for one in caught if "MoLS" in str(one.message))])

    def settings(**more: Any) -> dict[str, Any]:
        return config(2, section, micros=1, optimizer=adamw, **more)

    auto = settings(gradient_clipping="auto")
    auto_lr = settings()
    auto_lr["optimizer"] = {"type": "AdamW", "params": {"lr": "auto"}}
    library = settings()
    library["optimizer"] = {"type": "AdamW", "source": "library", "params": {"lr": "auto"}}
    misspelt = settings()
    misspelt["mosl"] = misspelt.pop("mols")
    large = settings(seed=2**70)
    auto_scheduler = with_auto("scheduler.params.warmup_max_lr") | {"mols": section}
    own = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: 1.0)
    seen: dict[str, Any] = {}
    for patched in (False, True):
        seen[f"auto {patched}"] = built(auto, patched)
        seen[f"auto lr {patched}"] = built(auto_lr, patched)
        seen[f"library {patched}"] = built(library, patched)
        seen[f"misspelt {patched}"] = built(misspelt, patched)
        seen[f"large {patched}"] = built(large, patched)
        seen[f"scheduler {patched}"] = built(auto_scheduler, patched)
        seen[f"own {patched}"] = built(auto_scheduler, patched, lr_scheduler=own)
        args = Namespace(deepspeed_config=base64.urlsafe_b64encode(json.dumps(auto).encode()).decode(), local_rank=0)
        seen[f"base64 {patched}"] = built(None, patched, args=args)
    return seen


@pytest.mark.distributed
def test_no_section_is_left_out_silently() -> None:
    (seen,) = run_ranks(refused_and_warned, 1)
    for patched in (False, True):
        for name, key in (("auto", "gradient_clipping"), ("auto lr", "optimizer.params.lr"), ("base64", "gradient_cl")):
            assert seen[f"{name} {patched}"].startswith(f'MolsConfigError: DeepSpeed config: "auto" in {key}'), seen
        assert 'DeepSpeed config: "auto" in scheduler.params.warmup_max_lr' in seen[f"scheduler {patched}"], seen
        assert seen[f"own {patched}"] == "waiting", "the argument replaces the section"
        assert (
            "MoLS is off: the DeepSpeed config has no section \"mols\", but a key 'mosl'" in seen[f"misspelt {patched}"]
        )
    assert seen["large False"].startswith('MolsConfigError: DeepSpeed config: "seed": an integer of more than')
    assert seen["large True"].startswith("stock | MoLS is off: DeepSpeed takes this config, and MoLS cannot read it")
