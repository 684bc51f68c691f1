"""Records to prompt and response text: one template for training and evaluation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hadamax.errors import ConfigError, DataError, nearest

TEMPLATES = {
    "plain": "{instruction}\n{input}\nAnswer:\n",
    # Stanford Alpaca's wording, with the input under the instruction where there is one.
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n{input}\n### Response:\n"
    ),
    "none": "{instruction}{input}",
}


class Part(NamedTuple):
    """A piece of a record's text; `learn` marks what the model has to say."""

    text: str
    learn: bool


def template_text(name: str) -> str:
    """The text of a named template, or `name` itself where it holds {instruction}.

    Example:
        >>> template_text("Q: {instruction} A:")
        'Q: {instruction} A:'
        >>> template_text("alpacca")
        Traceback (most recent call last):
        ...
        hadamax.errors.ConfigError: unknown template 'alpacca', nor a text with {instruction}; nearest: 'alpaca'
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{instruction}" not in name:
        raise ConfigError(f"unknown template {name!r}, nor a text with {{instruction}}{nearest(name, TEMPLATES)}")
    return name


def render(record: Mapping[str, Any], template: str, tokenizer: Any = None) -> list[Part]:
    """Parts of a record. A prompt ends where the model has to start.

    Records are `instruction` (`input`) `output`, or `question` `answer`, or a chat of `messages` with `role` and
    `content`. A chat uses the tokenizer's own chat template where it has one, and otherwise one line per turn.

    Raises:
        DataError: a record without the fields.

    Example:
        >>> render({"question": "1 + 1?", "answer": "2"}, template_text("plain"))
        [Part(text='1 + 1?\\nAnswer:\\n', learn=False), Part(text='2', learn=True)]
    """
    if "messages" in record:
        return _chat(record["messages"], tokenizer)
    for question, answer in (("instruction", "output"), ("question", "answer")):
        if question in record:
            fields = {"instruction": record[question], "input": record.get("input") or "", "output": record.get(answer)}
            for name, value in zip((question, "input", answer), fields.values(), strict=True):
                if value is None and name not in record:
                    raise DataError(f"no field {name!r}; the record has {', '.join(map(str, record))}")
                if not isinstance(value, str):
                    raise DataError(f"field {name!r} should be a text, found {type(value).__name__}")
            # A line of its own for the input disappears with it.
            text = template if fields["input"] else template.replace("{input}\n", "")
            prompt = text.replace("{input}", fields["input"]).replace("{instruction}", fields["instruction"])
            return [Part(prompt, False), Part(fields["output"], True)]
    found = ", ".join(map(repr, record)) or "none"
    raise DataError(f"no 'instruction' and 'output', 'question' and 'answer', or 'messages'; its fields: {found}")


def _chat(messages: Any, tokenizer: Any) -> list[Part]:
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' should be a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f"a turn of 'messages' should have texts 'role' and 'content', found {turn!r:.60}")
    replies = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not replies:
        raise DataError("'messages' has no turn of role 'assistant' to learn from")
    parts, done = [], ""
    for i in replies:
        prompt, reply = _turns(messages[:i], tokenizer, True), _turns(messages[: i + 1], tokenizer, False)
        if not (prompt.startswith(done) and reply.startswith(prompt)):
            raise DataError("the tokenizer's chat template rewrites earlier turns, so responses cannot be told apart")
        parts += [Part(prompt[len(done) :], False), Part(reply[len(prompt) :], True)]
        done = reply
    return parts


def _turns(messages: list[dict[str, str]], tokenizer: Any, prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    lines = "".join(f"{turn['role']}: {turn['content']}\n" for turn in messages)
    return lines + "assistant: " if prompt else lines
