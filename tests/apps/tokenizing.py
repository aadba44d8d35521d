"""Tokenize generated text and print the peak memory of the process after each size: `python -m tests.apps.tokenizing
FOLDER SUFFIX MEGABYTES...`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from mols_ds.training.sources import DataSpec
from mols_ds.training.tokens import prepare

WORDS = [f"word{number:08d}" for number in range(2000)]
"""Long ones: a tokenizer takes its time for each word."""
PER_DOCUMENT = 500
BLOCK = 1_000_000


def generate(path: Path, size: int) -> None:
    """Write about `size` bytes of random words: rows of JSONL, or paragraphs. They repeat after `BLOCK` bytes."""
    random = np.random.default_rng(0)
    block = ""
    while len(block) < min(size, BLOCK):
        text = " ".join(random.choice(WORDS, PER_DOCUMENT))
        block += json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(1, round(size / len(block)))):
            file.write(block)


def word_tokenizer(folder: Path) -> Path:
    """Write a tokenizer folder with one token a word, which is fast."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def main(folder: Path, suffix: str, *sizes: str) -> None:
    """Print {"bytes", "tokens", "seconds", "peak"} for each size."""
    tokenizer = word_tokenizer(folder / "tokenizer")
    for size in sizes:
        path = folder / f"{size}{suffix}"
        generate(path, int(float(size) * 1e6))
        began = time.monotonic()
        given = {"vocab_size": len(WORDS), "seed": 0, "held_out_tokens": 0}
        _, tokens = prepare(DataSpec(str(path)), folder / "cache", tokenizer=tokenizer, **given)  # type: ignore[arg-type]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        count = sum(map(len, (*tokens.train, tokens.held_out)))
        line = {"bytes": path.stat().st_size, "tokens": count, "seconds": time.monotonic() - began, "peak": peak}
        print(json.dumps(line), flush=True)
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
