"""The interactive session, driven line by line."""

import io
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from nld_train.evaluation.chat import OPEN, ChatSession
from nld_train.testing.exports import write_tokenizer


@pytest.fixture
def session(make_model, tmp_path):
    """On a terminal, whose output is ``session.screen``."""
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    model = make_model(3, vocab_size=264)
    with torch.no_grad():
        model.diffusion_head.weight[:8] = 0.0  # no special token
        model.diffusion_head.weight[8 + 94 :] = 0.0  # printable characters only
    session = ChatSession(model, tokenizer, "diffusion", console, max_new_tokens=8, block_length=4, threshold=1.0)
    session.screen = screen
    return session


def feed(session, *lines):
    rest = list(lines)

    def read(prompt):
        if not rest:
            raise EOFError
        return rest.pop(0)

    session.run(read)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", session.screen.getvalue())


def test_a_block_is_shown_while_it_is_denoised(session):
    shown = feed(session, "hello")
    prompt_ids = session._tokenizer("hello", return_tensors="pt").input_ids
    output_ids, num_forwards = session._model.generate(prompt_ids, 8, 4, threshold=1.0)
    answer = session._tokenizer.decode(output_ids[0, 5:])
    assert session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    assert f"{answer}\n[diffusion] 8 tokens, {num_forwards} forwards" in shown
    pictures = [line.rstrip() for line in shown.splitlines() if OPEN in line]
    # Each of both blocks: three, two, one position open; the first picture has one token of four.
    assert [picture.count(OPEN) for picture in pictures if len(picture) == 4] == [3, 2, 1]
    assert [picture.count(OPEN) for picture in pictures if len(picture) == 8] == [3, 2, 1]
    assert re.search(r"\[diffusion\] 1 tokens, 2 forwards, 0\.50 tokens per forward", shown)


def test_commands(session):
    shown = feed(
        session, "/mode ar", "hello", "/mode quadratic", "/set max_new_tokens 3", "again", "/mode cubic", "/set x 1",
        "/set threshold 7", "/mode diffusion", "more", "/set threshold none", "/reset", "new", "/nothing", "/quit",
        "never",
    )  # fmt: skip
    assert "[ar] 8 tokens, 8 forwards, 1.00 tokens per forward" in shown
    assert "[quadratic] 3 tokens" in shown
    for message in ("'cubic' is not a valid", "'/set x 1': no such command", "'/nothing': no such command"):
        assert message in shown
    assert "threshold: 7.0; it is a probability" in shown
    # A reset ends the conversation.
    assert [message["content"] for message in session.messages if message["role"] == "user"] == ["new"]
    assert len(session.messages[1]["content"]) == 3


def test_turns_are_continued_or_go_through_the_template(session):
    session.settings["temperature"] = 0.0
    first = session.answer("ab")
    assert session._prompt(session.messages) == "ab" + first
    session._tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
    session.answer("cd")
    assert session._prompt(session.messages[:3]) == f"<user>ab<assistant>{first}<user>cd>"


def test_without_a_terminal_only_the_answer_is_printed(session):
    plain = io.StringIO()
    session._console = Console(file=plain)
    session.answer("ab")
    assert OPEN not in plain.getvalue()
    assert "\x1b" not in plain.getvalue()


def test_what_is_refused_or_interrupted_is_no_part_of_the_conversation(session, monkeypatch):
    shown = feed(session, "first", "/set threshold 7", "refused", "/set threshold 1", "/set top_k 2.5", "/set top_k 2")
    assert "error: threshold: 7.0" in shown
    assert "error: invalid literal for int() with base 10: '2.5'" in shown
    assert session.settings["top_k"] == 2
    kept = list(session.messages)
    assert [message["content"] for message in kept if message["role"] == "user"] == ["first"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session._model, "generate", interrupt)
    shown = feed(session, "stopped", "/mode ar", "second")
    assert "(stopped)" in shown
    assert session.messages[: len(kept)] == kept
    assert [message["content"] for message in session.messages if message["role"] == "user"] == ["first", "second"]


def test_the_prompt_names_the_mode_and_the_template_opens_an_answer(session):
    asked, lines = [], ["/mode linear", "/quit"]

    def read(prompt):
        asked.append(prompt)
        return lines.pop(0)

    session.run(read)
    assert asked == ["[diffusion] > ", "[linear] > "]
    session._tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert session._prompt([{"role": "user", "content": "ab"}]) == "<ab>A:"
