"""Settings, schedule, model files and the commands' messages, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mols_ds import cli
from mols_ds.apps import train as job
from mols_ds.core.config import MolsConfig
from mols_ds.errors import MolsConfigError
from mols_ds.training import ds_config as settings
from mols_ds.training.batches import BatchShape
from mols_ds.training.deepspeed_backend import schedule
from mols_ds.training.ds_config import read_config, resolve
from mols_ds.training.models import build_model, load_model_config
from mols_ds.training.trainer import Metrics
from tests.apps.command import ROOT, TINY_CONFIG, TINY_MODEL, job_arguments, write_job

# hidden, intermediate, heads, layers: METHOD, the paper's sizes
SIZES = {
    "llama_60m": (512, 1376, 8, 8),
    "llama_130m": (768, 2048, 12, 12),
    "llama_350m": (1024, 2736, 16, 24),
    "llama_1b": (2048, 5461, 32, 24),
    "llama_3b": (2560, 6848, 32, 32),
    "llama_7b": (4096, 11008, 32, 32),
    "gpt2_125m": (768, 3072, 12, 12),
    "gpt2_355m": (1024, 4096, 16, 24),
    "qwen_350m": (1024, 3328, 16, 26),
}


@pytest.mark.parametrize("name", SIZES)
def test_model_files_have_the_paper_s_sizes(name: str) -> None:
    config = load_model_config(str(ROOT / "configs" / "models" / f"{name}.json"))
    inner = config.n_inner if config.model_type == "gpt2" else config.intermediate_size
    assert (config.hidden_size, inner, config.num_attention_heads, config.num_hidden_layers) == SIZES[name]


def test_schedule_is_the_paper_s() -> None:
    factor = schedule(200)
    assert [factor(0), factor(9), factor(19)] == pytest.approx([1 / 20, 0.5, 1.0])
    assert factor(199) == pytest.approx(0.1)
    assert factor(109) == pytest.approx(0.55)
    assert all(factor(step) >= factor(step + 1) for step in range(19, 199))


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        ({"train_batch_size": 32}, 2, (32, 16, 1)),
        ({"train_batch_size": 512}, 4, (512, 16, 8)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 3}, 2, (12, 2, 3)),
        ({"train_micro_batch_size_per_gpu": 4}, 3, (12, 4, 1)),
        (
            {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2},
            2,
            (32, 8, 2),
        ),
    ],
)
def test_batch_sizes_are_filled_in(
    given: dict[str, Any], world: int, expected: tuple[int, ...], tmp_path: Path
) -> None:
    config = resolve(given, world=world, steps=10, out=tmp_path)
    assert tuple(config[key] for key in settings.BATCH_KEYS) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 33}, "33 does not divide among 2"),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 5}, "is not micro batch 5"),
        ({"train_batch_size": "many"}, "give a whole number"),
        ({"optimizer": {"type": "AdmW"}}, "AdmW"),
        ({"optimizer": {"params": {}}}, 'needs a "type"'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, "warmup_num_steps"),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MolsConfigError, match=message):
        resolve(config, world=2, steps=10, out=tmp_path)


def test_the_user_s_own_numbers_stay(tmp_path: Path) -> None:
    given = {**TINY_CONFIG, "gradient_clipping": 0.5, "mols": {"total_steps": 77, "report_dir": "mine"}}
    config = resolve(given, world=1, steps=10, out=tmp_path)
    assert config["gradient_clipping"] == 0.5
    assert config["mols"] == {"total_steps": 77, "report_dir": "mine"}
    assert config["optimizer"]["params"]["lr"] == 1e-2
    assert resolve(given, world=1, steps=10, out=tmp_path, lr=0.5)["optimizer"]["params"]["lr"] == 0.5
    assert "total_steps" not in TINY_CONFIG["mols"]
    filled = resolve(TINY_CONFIG, world=1, steps=10, out=tmp_path)["mols"]
    assert filled["total_steps"] == 10
    assert filled["report_dir"] == str(tmp_path / "mols_report")


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_on_where_the_device_has_it(native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "native_bf16", lambda: native)
    for given in ({}, {"bf16": {"enabled": "auto"}}):
        assert resolve(given, world=1, steps=1, out=tmp_path)["bf16"]["enabled"] is native
    assert resolve({"fp16": {"enabled": True}}, world=1, steps=1, out=tmp_path)["bf16"]["enabled"] is False
    assert resolve({"bf16": {"enabled": not native}}, world=1, steps=1, out=tmp_path)["bf16"]["enabled"] is not native


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ds_*.json")), ids=lambda path: path.stem)
def test_ready_configs_are_valid(path: Path, tmp_path: Path) -> None:
    config = resolve(read_config(str(path)), world=1, steps=100, out=tmp_path)
    settings.check_with_deepspeed(config, str(path))
    assert MolsConfig.parse(config["mols"]).enabled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "object is needed"),
        ('{"mols": {}, "mols": {}}', "twice"),
        ('{"mol": {}}', 'did you mean "mols"'),
        ('{"mols": {"sampels": 3}}', "sampels"),
        ('{"mols": {"start": 0.5, "ramp_end": 0.1}}', "after ramp_end"),
        ('{"mols": {"samples": 3}}', "noise_floor_correction"),
    ],
)
def test_bad_config_files_are_one_line_and_status_2(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content, "utf-8")
    with pytest.raises(MolsConfigError, match=message):
        read_config(str(path))
    assert job.main(["--deepspeed_config", str(path), "--out", str(tmp_path / "out")]) == job.USER_MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")


def test_bad_arguments_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_job(tmp_path)
    config = ["--config", str(paths["config"])]
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({key: value for key, value in TINY_CONFIG.items() if key != "mols"}), "utf-8")
    cases = {
        "unrecognized arguments: --stepz": [*config, "--stepz", "3"],
        "0 is not at least 1": [*config, "--steps", "0"],
        "--lr -1.0 is not above 0": [*config, "--lr", "-1"],
        "no config": [],
        "no such file": ["--config", "none.json"],
        "no such model file": [*config, "--model", str(tmp_path / "none.json")],
        "--tokenizer": [*config, "--tokenizer", str(tmp_path / "none")],
        "--resume: there is no checkpoint": [*config, "--resume"],
        'no enabled "mols" section': ["--config", str(plain), "--compare", "adam"],
        "no such file or folder": [*config, "--data", str(tmp_path / "none.txt")],
    }
    for message, argv in cases.items():
        assert job.main([*argv, "--out", str(tmp_path / "out")]) == job.USER_MISTAKE
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line, (message, line)


def test_models_are_equal_for_equal_seeds_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY_MODEL), "utf-8")
    fixed: dict[str, Any] = {"end": 0, "dtype": torch.float32}

    def build(seed: int = 0, vocab_size: int = 300, seq_len: int = 32, source: Path = path) -> torch.nn.Module:
        return build_model(str(source), vocab_size=vocab_size, seq_len=seq_len, seed=seed, **fixed)

    first, again, other = (torch.cat([p.flatten() for p in build(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert build(vocab_size=500).get_input_embeddings().weight.shape[0] == 500  # type: ignore[operator]
    build().save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    loaded = build(seed=9, source=tmp_path / "checkpoint")
    assert torch.equal(torch.cat([p.flatten() for p in loaded.parameters()]), first)
    with pytest.raises(MolsConfigError, match="smaller than the tokenizer"):
        build(vocab_size=500, source=tmp_path / "checkpoint")
    with pytest.raises(MolsConfigError, match="max_position_embeddings 64"):
        build(seq_len=65)
    for content in ("{", "{}", '{"model_type": "lama"}', '{"model_type": "llama", "hidden_size": "wide"}'):
        path.write_text(content, "utf-8")
        with pytest.raises(MolsConfigError, match="model"):
            build()


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.clear()
    for step in range(1, 6):
        metrics.write({"step": step})
    metrics.write({"final": True})
    with metrics.path.open("a") as file:
        file.write('{"step": 7, "lo')
    metrics.rewind(3)
    assert [json.loads(line) for line in metrics.path.read_text("utf-8").splitlines()] == [
        {"step": n} for n in (1, 2, 3)
    ]


def test_groups_command_counts_the_real_llama(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["groups", str(ROOT / "configs" / "models" / "llama_60m.json"), "--parameters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[2].replace(",", "") for line in lines[1:7]}
    hidden, inner, _, layers = SIZES["llama_60m"]
    expected = {
        "embedding": 32000 * hidden,
        "head": 32000 * hidden,
        "qk": layers * 2 * hidden**2,
        "vo": layers * 2 * hidden**2,
        "mlp": layers * 3 * hidden * inner,
        "other": (2 * layers + 1) * hidden,
    }
    assert {group: int(count) for group, count in rows.items()} == expected
    assert any(line.startswith("model.embed_tokens.weight") for line in lines)


@pytest.mark.parametrize("argv", [["groups", "none.json"], ["report", "none"], [], ["grups"]])
def test_mols_ds_says_a_mistake_in_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mols-ds: ")


@pytest.mark.parametrize(("given", "limit"), [(["--timeout", "7"], 7), ([], None)])
def test_timeout_reaches_the_ranks(
    given: list[str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[float | None] = []

    def start(timeout: float | None = None) -> tuple[int, int]:
        heard.append(timeout)
        raise MolsConfigError("far enough")

    monkeypatch.setattr(job, "start_ranks", start)
    paths = write_job(tmp_path)
    arguments = job_arguments(paths, tmp_path / "out", "--deepspeed_config", str(paths["config"]), *given)
    assert job.main(arguments) == job.USER_MISTAKE
    assert heard == [limit]


def test_a_run_of_train_py_ends_on_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal then does is in tests/tools/faults, on real engines."""
    jobs: list[Any] = []
    monkeypatch.setattr(job, "run_arms", lambda made, compare: jobs.append(made))
    args = job.parse_arguments(["--deepspeed_config", "x.json", "--out", str(tmp_path)])
    job._arms(args, {}, None, None, [], BatchShape(32, 1, 1, 0, 1), {}, False, lambda: None)  # type: ignore[arg-type]
    assert jobs[0].preemptible
