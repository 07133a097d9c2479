"""A conversation in the terminal, with answers that the test supplies."""

from types import SimpleNamespace

import pytest

from internlm3 import Chunk
from internlm3.runtime.cli.chat import Chat, show
from internlm3.tests.support.command_line import FIGURES


def chat(monkeypatch, turns, answer=None, messages=()):
    """Runs a chat with these inputs. `answer` returns the text for a conversation, or raises."""
    asked: list[list[dict]] = []

    def chunks(conversation):
        asked.append(conversation)
        for text in answer(conversation) if answer else [f"answer {len(asked)}"]:
            if isinstance(text, BaseException):
                raise text
            yield Chunk(text, [1], [0.0], None, None, None, 1, 1, 1.0, 1.0, 1.0, 0)

    inputs = iter(turns)

    def read():
        turn = next(inputs, EOFError())
        if isinstance(turn, BaseException):
            raise turn
        return turn

    monkeypatch.setattr("internlm3.runtime.cli.chat.reader", lambda: read)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    talk = Chat(chunks, list(messages))
    talk.run()
    return talk.messages, asked


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_conversation_grows(monkeypatch, capsys):
    messages, asked = chat(monkeypatch, ["one", "  ", "two\nlines"])
    assert messages == [*turn("one", "answer 1"), *turn("two\nlines", "answer 2")]
    assert asked[1] == messages[:3]
    assert capsys.readouterr().out == "answer 1\nanswer 2\n\n"


def test_a_turn_shows_what_was_reused_and_how_fast(capsys):
    for reused, drafted, words in (
        (0, 0, "2.00 GB]\n"),
        (512, 0, "2.00 GB] [512 of the prompt's tokens reused]\n"),
        (0, 30, "2.00 GB] [12 of 30 drafted tokens were right]\n"),
    ):
        show(iter([Chunk("hi", [1], [0.0], None, None, None, 600, 1, 900.0, 30.0, 2.0, reused, drafted, 12)]))
        printed = capsys.readouterr().err
        assert (
            FIGURES.search(printed).groups() == ("600", "1") and "30.0 tokens/s" in printed and printed.endswith(words)
        )


def test_an_answer_that_a_limit_cuts_says_so(capsys):
    for reason, cut in (("length", True), ("stop", False)):
        show(iter([Chunk("half", [1], [0.0], None, reason, None, 9, 7, 1.0, 1.0, 1.0, 0)]))
        printed = capsys.readouterr()
        assert printed.out == "half\n" and FIGURES.search(printed.err)
        assert ("[cut off after 7 tokens, the limit of --max-tokens" in printed.err) == cut


def test_an_answer_that_an_error_ends(capsys):
    """It is an error of the command. (A chat reports it: `test_a_question_that_fails_is_removed`.)"""
    with pytest.raises(ValueError, match="not numbers"):
        show(iter([Chunk("", [], [], None, "error", "not numbers", 1, 0, 0.0, 0.0, 1.0, 0)]))
    printed = capsys.readouterr()
    assert "answer 0 tokens" in printed.err and printed.out == ""


def test_control_c_loses_no_conversation(monkeypatch, capsys):
    """Before the answer begins, the question is removed; during it, the text so far stays; at the prompt, all stays."""
    answers = iter([["first"], [KeyboardInterrupt()], ["half", KeyboardInterrupt()], ["last"]])
    turns = ["one", KeyboardInterrupt(), "two", "three", "four"]
    messages, _ = chat(monkeypatch, turns, lambda _: next(answers))
    assert messages == [*turn("one", "first"), *turn("three", "half"), *turn("four", "last")]
    printed = capsys.readouterr()
    assert "removed" in printed.err and "[stopped]" in printed.err and "stopped" not in printed.out


def test_a_question_that_fails_is_removed(monkeypatch, capsys):
    answers = iter([["first"], [ValueError("too long")], ["last"]])
    messages, _ = chat(monkeypatch, ["one", "two", "three"], lambda _: next(answers))
    assert messages == [*turn("one", "first"), *turn("three", "last")]
    assert "too long (/undo removes a turn, /reset starts a new conversation)" in capsys.readouterr().err


SYSTEM = [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("turns", "left", "says"),
    [
        (["one", "/undo", "two"], [*SYSTEM, *turn("two", "answer 2")], "removed: one"),
        (["/undo"], SYSTEM, "nothing to remove"),
        (["one", "/clear", "two"], [*SYSTEM, *turn("two", "answer 2")], "a new conversation"),
        (["one", "/reset"], SYSTEM, "a new conversation"),
        (["one", "/quit", "two"], [*SYSTEM, *turn("one", "answer 1")], ""),
        (["one", " /exit ", "two"], [*SYSTEM, *turn("one", "answer 1")], ""),
        (["one", "/system Rhyme\nalways."], [{"role": "system", "content": "Rhyme\nalways."}, *turn("one", "answer 1")],
         "system prompt: Rhyme"),
        (["/system"], SYSTEM, "system prompt: Be brief."),
        (["/help"], SYSTEM, "/undo"),
        (["/hepl"], SYSTEM, "there is no /hepl; did you mean /help?"),
        (["/quti", "/cler"], SYSTEM, "did you mean /clear?"),
        (["/zzzz"], SYSTEM, "there is no /zzzz; /help lists the commands"),
        (["/usr/bin is a folder?"], [*SYSTEM, *turn("/usr/bin is a folder?", "answer 1")], ""),
        (["/ 2"], [*SYSTEM, *turn("/ 2", "answer 1")], ""),
    ],
)  # fmt: skip
def test_commands(monkeypatch, capsys, turns, left, says):
    messages, _ = chat(monkeypatch, turns, messages=SYSTEM)
    assert messages == left
    assert says in capsys.readouterr().err


def test_system_where_there_was_none(monkeypatch, capsys):
    messages, _ = chat(monkeypatch, ["/system", "one", "/system Be kind.", "two"])
    assert messages == [{"role": "system", "content": "Be kind."}, *turn("one", "answer 1"), *turn("two", "answer 2")]
    assert "system prompt: none" in capsys.readouterr().err
