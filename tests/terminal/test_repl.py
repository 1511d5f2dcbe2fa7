"""The chat loop: what each line does, what a mistake or Ctrl-C costs, history and completion."""

import re
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from anytoken.segments import DNA, Text
from anytoken.terminal.repl import COMMANDS, HELP, ChatRepl, _complete, line_reader


class FakeChat:
    """Answers with what it was asked for, as events; refuses the word "no", and is stopped at "stop"."""

    model = "the model"

    def __init__(self):
        self.sent = []
        self.turns = [SimpleNamespace(output=None)] * 4 + [SimpleNamespace(output="image")] * 2

    def stream(self, prompt, output=None, **options):
        from anytoken.inference.streaming import SegmentFinished, TextDelta

        if "no" in prompt:
            raise ValueError("does not\nfit")
        self.sent.append(([getattr(part, "kind", part) for part in prompt], output, options))
        yield TextDelta("he")
        if "stop" in prompt:
            raise KeyboardInterrupt
        yield TextDelta("llo")
        yield SegmentFinished(Text("hello"))
        yield SegmentFinished(DNA("ACGT"))

    def regenerate_stream(self, **options):
        yield from self.stream(["again"], **options)

    def undo(self):
        self.sent.append("undo")
        self.turns = self.turns[:4]
        return [DNA("ACGT"), Text("old words")]

    def __len__(self):
        return len(self.turns)

    def save(self, path):
        return path

    def load(self, path, model):
        assert model == self.model
        self.sent.append(f"load {path}")
        return self

    def show(self):
        self.sent.append("show")


def converse(tmp_path, *lines, interactive=True):
    chat, screen, rest = FakeChat(), StringIO(), iter(lines)

    def read():
        try:
            line = next(rest)
        except StopIteration:
            raise EOFError from None
        if isinstance(line, BaseException):
            raise line
        return line

    ChatRepl(chat, tmp_path, Console(file=screen, width=200), seed=1).run(read, interactive)
    return chat.sent, screen.getvalue()


def test_chat_attaches_files_and_asks_for_kinds(tmp_path):
    sent, screen = converse(
        tmp_path, "/dna ACGT", "what is it?", "/draw a red apple", "/say hi", "", "/quit", "never"
    )
    assert sent == [
        (["dna", "what is it?"], None, {"seed": 1}),
        (["a red apple"], "image", {"seed": 1}),
        (["hi"], "speech", {"seed": 1}),
    ]
    assert "hello\n" in screen and (tmp_path / "dna-002.fasta").exists()


def test_a_mistake_in_chat_costs_one_line_and_no_attachment(tmp_path):
    sent, screen = converse(tmp_path, "/image none.png", "/bogus", "/dna ACGT", "no", "again", "/save there")
    assert sent == [(["dna", "again"], None, {"seed": 1})]
    assert (
        "none.png" in screen and "/bogus" in screen and "does not fit" in screen and "saved there" in screen
    )


def test_kinds_in_order_and_every_single_kind(tmp_path):
    sent, _ = converse(tmp_path, "/ask text,image a fox", "/sequence ATG", "/animate a fox", "/tell me")
    assert [(prompt, output) for prompt, output, _ in sent] == [
        (["a fox"], ["text", "image"]), (["ATG"], "dna"), (["a fox"], "video"), (["me"], "text"),
    ]  # fmt: skip


def test_the_conversation_is_managed(tmp_path):
    sent, screen = converse(
        tmp_path,
        "/undo",
        "/regenerate",
        "/regenerate 7",
        "/regenerate x",
        "/load 'my talk'",
        "/show",
        "/save",
    )
    assert sent == [
        "undo", (["again"], None, {"seed": None}), (["again"], None, {"seed": 7}), "load my talk", "show", "show",
    ]  # fmt: skip
    assert (
        "received 'x'" in screen
        and f"saved {tmp_path / 'chat'}" in screen
        and "4 messages are left" in screen
    )


def test_other_words_go_with_the_same_files_and_a_failure_leaves_the_old_ones(tmp_path):
    sent, _ = converse(tmp_path, "/edit new words")
    assert sent == ["undo", (["dna", "new words"], "image", {"seed": 1})]
    chat = FakeChat()
    for words, error in (("no", ValueError), ("stop", KeyboardInterrupt)):
        with pytest.raises(error):
            ChatRepl(chat, tmp_path, Console(file=StringIO())).handle_command(f"/edit {words}")
        assert len(chat) == 6


def test_a_command_without_its_value_says_so(tmp_path):
    sent, screen = converse(tmp_path, "/image", "/load ", "/ask", "/edit")
    assert not sent and screen.count("needs an argument") == 4


def test_what_looks_like_a_path_is_said(tmp_path):
    sent, _ = converse(tmp_path, "/etc/passwd is a file")
    assert sent[0][0] == ["/etc/passwd is a file"]


def test_dropped_files_are_found_whatever_their_name(tmp_path):
    for name in ("my gene.fasta", "gène's 🧬.fasta"):
        DNA("ACGT").save(tmp_path / name)
    sent, screen = converse(
        tmp_path,
        f"/dna '{tmp_path}/my gene.fasta'",
        f"/dna {tmp_path}/my\\ gene.fasta",
        f"/dna {tmp_path}/my gene.fasta",
        f"/dna {tmp_path}/gène's 🧬.fasta",
        "what are these?",
    )
    assert sent[0][0] == ["dna"] * 4 + ["what are these?"], screen


def test_ctrl_c_stops_the_reply_not_the_conversation(tmp_path):
    sent, screen = converse(tmp_path, "/dna ACGT", "stop", KeyboardInterrupt(), "go on")
    assert sent[-1][0] == ["dna", "go on"] and screen.count("stopped") == 2
    with pytest.raises(KeyboardInterrupt):
        converse(tmp_path, "stop", interactive=False)


def test_help_names_every_command():
    assert set(re.findall(r"(?<![\w.])/[a-z]+", HELP)) == set(COMMANDS)


def test_commands_and_files_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foxes").mkdir()
    (tmp_path / "fox.png").touch()
    assert [_complete("/s", place) for place in range(5)] == [
        "/speech ",
        "/say ",
        "/sequence ",
        "/save ",
        "/show ",
    ]
    assert _complete("/s", 5) is None
    assert [_complete("fo", place) for place in range(3)] == ["fox.png", "foxes/", None]
    assert _complete(f"{tmp_path}/fox.", 0) == f"{tmp_path}/fox.png"


def test_history_is_kept_where_it_can_be(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setattr("builtins.input", lambda prompt: readline.add_history("a fox") or "a fox")
    assert line_reader(tmp_path / "state/history")() == "a fox"
    assert "a fox" in (tmp_path / "state/history").read_text()
    (tmp_path / "file").touch()
    assert line_reader(tmp_path / "file/history")() == "a fox"
