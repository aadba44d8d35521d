"""Convert examples to text parts, and mark the answers.

Without a chat template the text is plain: a prompt is unchanged; Alpaca's form and conversations become

    ### Instruction:          ### System:
    {instruction}             {content}

    ### Input:                ### User:
    {input}                   {content}

    ### Response:             ### Assistant:
    {output}{end}             {content}{end}

with an empty line between the parts ("### Input:" only if there is one), a line break before the answer, and the
tokenizer's end-of-text token after each answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from mols_ds.apps.finetune.examples import ChatMessage, Example
from mols_ds.errors import MolsConfigError
from mols_ds.training.sources import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "plain", "chat"]
HEADS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
GAP = "\n\n"


class TextPart(NamedTuple):
    """A part of an example's text. `answer`: it is trained on. `ends`: the end-of-text token follows."""

    text: str
    answer: bool
    ends: bool = False


def uses_chat(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an example uses the tokenizer's chat template; "auto" uses it for conversations only."""
    if template == "auto":
        return example.form == "messages" and bool(tokenizer.chat_template)
    return template == "chat"


def text_parts(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[TextPart]:
    """Return the parts of an example's text. Raises MolsConfigError if the chat template does not fit it."""
    if uses_chat(example, template, tokenizer):
        return _chat(example, tokenizer)
    if example.form == "completion":
        prompt, answer = example.messages
        return [TextPart(prompt.content, False), TextPart(answer.content, True, True)]
    if example.form == "instruction":
        prompt, answer = example.messages
        parts = [f"### Instruction:\n{prompt.content}"]
        parts += [f"### Input:\n{example.input}"] if example.input else []
        return [TextPart(GAP.join([*parts, "### Response:\n"]), False), TextPart(answer.content, True, True)]
    return _plain(example.messages)


def _plain(messages: Sequence[ChatMessage]) -> list[TextPart]:
    found: list[TextPart] = []
    before = ""
    for message in messages:
        before += HEADS[message.role]
        if message.role == "assistant":
            found += [TextPart(before, False), TextPart(message.content, True, True)]
            before = GAP
        else:
            before += message.content + GAP
    return found


def _chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[TextPart]:
    """Return parts where an answer is the text that the template adds between the assistant's prompt and turn end."""
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    if example.input:
        messages[0]["content"] += GAP + example.input
    found: list[TextPart] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:number], example.where, prompt=True)
        rendered = _render(tokenizer, messages[: number + 1], example.where, prompt=False)
        if not (asked.startswith(done) and rendered.startswith(asked)):
            raise MolsConfigError(
                f"{example.where}: the tokenizer's chat template rewrites the text before an answer, so answer "
                "and prompt cannot be separated: use --template plain, or examples with one answer each"
            )
        found += [TextPart(asked[len(done) :], False), TextPart(rendered[len(asked) :], True)]
        done = rendered
    return found


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], where: str, *, prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja's types, and any that a template raises
        raise MolsConfigError(f"{where}: the tokenizer's chat template refuses it: {one_line(error)}") from error
    return text
