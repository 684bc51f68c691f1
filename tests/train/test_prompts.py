"""Records to prompt and response."""

import pytest

from hadamax.errors import ConfigError, DataError
from train.prompts import Part, render, template_text

PLAIN = template_text("plain")


class ChatTokenizer:
    """Stands for a tokenizer with a chat template, as far as `render` uses it."""

    chat_template = "given"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert tokenize is False
        turns = "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")


class Rewriting(ChatTokenizer):
    """A template that shortens earlier turns."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(turn["content"][: 1 if turn is not messages[-1] else None] for turn in messages)


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    "record, prompt, response",
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2\nAnswer:\n", "3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "Add.\nAnswer:\n", "3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add.\nAnswer:\n", "3"),
        ({"instruction": "Say {input}", "output": "3", "answer": "x"}, "Say {input}\nAnswer:\n", "3"),
        ({"question": "1?", "answer": "1"}, "1?\nAnswer:\n", "1"),
    ],
)
def test_a_record_is_a_prompt_and_a_response(record, prompt, response):
    assert render(record, PLAIN) == [Part(prompt, False), Part(response, True)]


def test_a_chat_learns_every_reply_of_the_tokenizers_template():
    assert render({"messages": CHAT}, PLAIN, ChatTokenizer()) == [
        Part("<user>hi<end><assistant>", False),
        Part("yes<end>", True),
        Part("<user>and<end><assistant>", False),
        Part("no<end>", True),
    ]


def test_a_chat_without_a_template_is_a_line_per_turn():
    assert render({"messages": CHAT[:2]}, PLAIN) == [Part("user: hi\nassistant: ", False), Part("yes\n", True)]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "x"}, "no 'instruction' and 'output'.*its fields: 'text'"),
        ({}, "its fields: none"),
        ({"instruction": "x"}, "no field 'output'; the record has instruction"),
        ({"question": "x", "answer": 3}, "field 'answer' should be a text, found int"),
        ({"question": ["x"], "answer": "3"}, "field 'question' should be a text, found list"),
        ({"instruction": "x", "input": 3, "output": "y"}, "field 'input' should be a text, found int"),
        ({"messages": []}, "should be a list of turns"),
        ({"messages": "hi"}, "should be a list of turns"),
        ({"messages": [{"role": "user"}]}, "should have texts 'role' and 'content'"),
        ({"messages": CHAT[:1]}, "no turn of role 'assistant'"),
    ],
)
def test_a_record_without_the_fields_is_refused(record, message):
    with pytest.raises(DataError, match=message):
        render(record, PLAIN)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    with pytest.raises(DataError, match="rewrites earlier turns"):
        render({"messages": CHAT}, PLAIN, Rewriting())


def test_templates_by_name_or_text():
    assert "### Response:" in template_text("alpaca")
    assert template_text("{instruction}!") == "{instruction}!"
    with pytest.raises(ConfigError, match="nearest: 'plain'"):
        template_text("plane")
