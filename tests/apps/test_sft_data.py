"""Examples: their three forms, their text, which tokens are trained on, and which batches they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mols_ds.apps.finetune.data import (
    IGNORED,
    AnswerBatches,
    Tokenized,
    held_out_batches,
    load_tokenizer,
    prepare,
    tokenize,
)
from mols_ds.apps.finetune.examples import Example, parse_row, read_examples
from mols_ds.apps.finetune.template import text_parts
from mols_ds.errors import MolsConfigError
from mols_ds.training.batches import BatchShape
from mols_ds.training.sources import DataSpec
from mols_ds.training.tokens import train_tokenizer
from tests.apps.command import ROOT

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Farewell.")]
MESSAGES = {"messages": [{"role": role, "content": content} for role, content in TALK]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text to count bytes of " * 20], 300, folder)
    return load_tokenizer(str(folder))


def example(row: Any) -> Example:
    return parse_row(row, "here")


def answers(data: Tokenized, number: int, tokenizer: Any) -> str:
    span = slice(data.starts[number], data.starts[number + 1])
    return str(tokenizer.decode(data.ids[span][data.answers[span]]))


def whole(data: Tokenized, number: int, tokenizer: Any) -> str:
    return str(tokenizer.decode(data.ids[data.starts[number] : data.starts[number + 1]]))


@pytest.mark.parametrize(
    ("row", "text", "trained"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4", "id": 7}, "2 + 2 = 4<|endoftext|>", " 4<|endoftext|>"),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3<|endoftext|>",
            "3<|endoftext|>",
        ),
        (
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            "### Instruction:\nGreet.\n\n### Response:\nHi<|endoftext|>",
            "Hi<|endoftext|>",
        ),
        (
            MESSAGES,
            "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello.<|endoftext|>\n\n"
            "### User:\nBye\n\n### Assistant:\nFarewell.<|endoftext|>",
            "Hello.<|endoftext|>Farewell.<|endoftext|>",
        ),
    ],
)
def test_forms_as_plain_text(row: dict[str, Any], text: str, trained: str, tokenizer: Any) -> None:
    data = tokenize([example(row)], tokenizer, "auto", 500)
    assert whole(data, 0, tokenizer) == text
    assert answers(data, 0, tokenizer) == trained
    assert data.targets.tolist() == [int(data.answers.sum())]


def test_chat_template_is_for_conversations_or_for_all(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    data = tokenize([example(MESSAGES), example(row)], tokenizer, "auto", 500)
    talk = "".join(f"<{role}>{content}<|endoftext|>" for role, content in TALK)
    assert whole(data, 0, tokenizer) == talk
    assert answers(data, 0, tokenizer) == "Hello.<|endoftext|>Farewell.<|endoftext|>"
    assert whole(data, 1, tokenizer).startswith("### Instruction:")
    data = tokenize([example(row)], tokenizer, "chat", 500)
    assert whole(data, 0, tokenizer) == "<user>Add.\n\n1, 2<|endoftext|><assistant>3<|endoftext|>"
    assert text_parts(example(MESSAGES), "plain", tokenizer)[0].text.startswith("### System:")
    for template, message in {
        "{{ messages | length }}": "rewrites the text before",
        "{{ raise_exception('roles') }}": "refuses it: TemplateError: roles",
    }.items():
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(MolsConfigError, match=f"here: .*{message}"):
            tokenize([example(MESSAGES)], tokenizer, "auto", 500)


def test_a_begin_of_text_token_stands_before_plain_texts_only(tokenizer: Any) -> None:
    class WithBegin:
        """A tokenizer that puts its token 7 before each text, as LLaMA's does."""

        chat_template, eos_token_id = CHAT, tokenizer.eos_token_id
        apply_chat_template = staticmethod(
            lambda messages, **given: tokenizer.apply_chat_template(messages, chat_template=CHAT, **given)
        )

        def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    rows = [example({"prompt": "a", "completion": "b"}), example(MESSAGES)]
    data = tokenize(rows, WithBegin(), "auto", 500)
    assert data.ids[0] == 7 and not data.answers[0]
    assert 7 not in data.ids[1:]


def test_what_is_cut_and_dropped_is_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "p" * n, "completion": "c" * 5} for n in (1, 3, 8)]
    data = tokenize([example(row) for row in rows], tokenizer, "auto", 8)
    assert (len(data), data.cut, data.dropped) == (2, 2, 1)
    assert data.lengths.tolist() == [7, 8]  # "p", 5 x "c", end; 3 x "p" and the 5 "c" without the end
    assert data.targets.tolist() == [6, 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a JSON object is needed, not list"),
        ({"text": "a"}, "it needs .*its keys are text"),
        ({}, "its keys are none"),
        ({"prompt": "a"}, '"completion" is missing'),
        ({"completion": "a"}, '"prompt" is missing'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"instruction": " ", "output": "b"}, '"instruction" is empty'),
        ({"instruction": "a", "output": None}, '"output" is missing'),
        ({"instruction": "a", "output": 3}, '"output" must be text, not int'),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" must be text, not int'),
        ({"messages": []}, "must be a list"),
        ({"messages": ["a"]}, "message 1: an object"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: \"role\" is 'bot'; allowed: system, user"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last message is the user's"),
        ({"messages": [*MESSAGES["messages"], {"role": "assistant", "content": ""}]}, 'message 6: "content" is empty'),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str) -> None:
    with pytest.raises(MolsConfigError, match=f"^here(: |, ).*{message}"):
        example(row)


def test_files_of_all_kinds_give_the_same_examples(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [{"prompt": f"{n}\u2028", "completion": f"answer {n}"} for n in range(3)]  # a line break that JSONL's is not
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows), "utf-8")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    one, two, three = (
        [each.messages for each in read_examples(DataSpec(str(path)))] for path in sorted(tmp_path.iterdir())
    )
    assert one == two == three and len(one) == 3
    assert len(read_examples(DataSpec(str(tmp_path)))) == 9
    (tmp_path / "b.json").write_text("{}", "utf-8")
    with pytest.raises(MolsConfigError, match="JSON list of objects"):
        read_examples(DataSpec(str(tmp_path)))
    (tmp_path / "d.txt").write_text("text", "utf-8")
    with pytest.raises(MolsConfigError, match=r"are read from .jsonl, .json, .parquet"):
        read_examples(DataSpec(str(tmp_path / "d.txt")))


def test_the_example_data_are_read_and_split(tokenizer: Any) -> None:
    spec = DataSpec(str(ROOT / "configs" / "data" / "instructions.jsonl"), eval_share=0.2)
    given: dict[str, Any] = {"tokenizer": tokenizer, "template": "auto", "cutoff": 500}
    train, held_out = prepare(spec, None, seed=0, **given)
    assert len(train) + len(held_out) == 52 and 4 <= len(held_out) <= 18
    again, _ = prepare(spec, None, seed=0, **given)
    other, _ = prepare(spec, None, seed=1, **given)
    assert train.digest == again.digest != other.digest
    everything, same = prepare(spec, spec, seed=0, **given)
    assert len(everything) == len(same) == 52


@pytest.fixture(scope="module")
def numbered() -> Tokenized:
    """Example n is n + 2 tokens n, of which the last n + 1 are answers."""
    ids = np.concatenate([np.full(n + 2, n, np.int64) for n in range(11)])
    marks = np.concatenate([np.arange(n + 2) > 0 for n in range(11)])
    return Tokenized(ids, marks, np.cumsum([0, *(n + 2 for n in range(11))]))


def rows_of(batch: Any) -> list[int]:
    """The examples of a batch, with the padding, mask and labels checked."""
    found = [int(row[0]) for row in batch.ids]
    for row, number in enumerate(found):
        length = number + 2
        assert batch.mask[row].tolist() == [1] * length + [0] * (batch.ids.shape[1] - length)
        assert batch.ids[row, length:].eq(99).all()
        assert batch.labels[row].tolist() == [
            IGNORED,
            *[number] * (length - 1),
            *[IGNORED] * (batch.ids.shape[1] - length),
        ]
    assert batch.ids.shape[1] == max(found) + 2
    return found


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_a_step_has_the_same_examples_however_it_is_dealt_out(
    micro: int, accumulation: int, world: int, numbered: Tokenized
) -> None:
    alone = AnswerBatches(numbered, BatchShape(50, 4, 1, 0, 1), 3, 99)
    for step in range(6):  # more than two epochs of 11 examples
        (batch,) = alone.step("train", step)
        wanted = rows_of(batch)
        dealt, weighted = [], 0.0
        for rank in range(world):
            shape = BatchShape(50, micro, accumulation, rank, world)
            for part in AnswerBatches(numbered, shape, 3, 99).step("train", step):
                dealt += rows_of(part)
                weighted += part.weight * float((part.labels != IGNORED).sum()) / (accumulation * world)
        assert sorted(dealt) == sorted(wanted)
        assert weighted == pytest.approx(1.0)  # the step's loss is a mean over its answer tokens
    assert alone.tokens(6) == sum(int(numbered.lengths[alone.indices("train", step)].sum()) for step in range(6))
    epoch = [number for step in range(2) for number in alone.indices("train", step).tolist()]
    assert len(set(epoch)) == 8
    assert alone.indices("probe", 0).tolist() != alone.indices("train", 0).tolist()


def test_held_out_examples_count_once(numbered: Tokenized) -> None:
    for limit, count in ((5, 5), (99, 11)):
        seen: list[int] = []
        numbers = set()
        for rank in range(2):
            batches = held_out_batches(numbered, BatchShape(50, 2, 3, rank, 2), limit, 99)
            numbers.add(len(batches))
            for batch, valid in batches:
                seen += rows_of(batch)[:valid]
        assert sorted(seen) == list(range(count))
        assert len(numbers) == 1
