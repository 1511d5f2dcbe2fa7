"""Conversations: what is remembered, saved and read back."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anytoken.inference.api import AnyToken
from anytoken.inference.chat import Chat, ChatError, _load_part, _save_part
from anytoken.segments import DNA, KINDS, Image, Text

PICTURE = Image(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))


def test_turns_are_remembered_as_ids_and_segments(model: AnyToken) -> None:
    chat = model.chat(system="Be brief.")
    first = chat.send([PICTURE, "What is this?"], output=["text", "image"], seed=0, max_new_tokens=40)
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant"]
    assert chat.messages[1]["content"] == [PICTURE, Text("What is this?")]
    assert chat.messages[2]["content"] == first.segments
    prompt = model.processor.encode_chat(chat.messages[:2], add_generation_prompt=True)
    assert chat.ids == prompt + first.ids
    second = chat.send("red apple", output="tone", seed=0)
    assert second.usage.prompt_tokens == len(chat.ids) - len(second.ids) > len(prompt) + len(first.ids)
    model.processor.grammar.validate(chat.ids)


def test_stream_remembers_when_it_ends(model: AnyToken) -> None:
    sent, streamed = model.chat(), model.chat()
    sent.send("red apple", output="text", seed=2, max_new_tokens=20)
    events = streamed.stream("red apple", output="text", seed=2, max_new_tokens=20)
    next(events)
    assert len(streamed) == 0
    for _ in events:
        pass
    assert streamed.ids == sent.ids and streamed.messages == sent.messages


def test_a_failed_turn_changes_nothing(model: AnyToken) -> None:
    chat = model.chat()
    chat.send("a", output="tone", seed=0)
    before = (list(chat.ids), list(chat.messages))
    for bad in ({"prompt": "a", "output": "smell"}, {"prompt": "xyz " * 300}, {"prompt": None}):
        with pytest.raises(ValueError, match=r"\w"):
            chat.send(**bad)
    assert (chat.ids, chat.messages) == before


def test_saved_chat_continues_the_same(model: AnyToken, tmp_path: Path) -> None:
    chat = model.chat(system="Be brief.")
    chat.send([PICTURE, "What is this?"], output=["text", "tone", "image"], seed=0, max_new_tokens=60)
    chat.save(tmp_path / "talk")
    loaded = Chat.load(tmp_path / "talk", model)
    assert loaded.ids == chat.ids and loaded.messages == chat.messages
    again = loaded.send("a", output="image", seed=1)
    assert again.ids == chat.send("a", output="image", seed=1).ids
    chat.save(tmp_path / "talk")
    assert len(Chat.load(tmp_path / "talk", model)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]


def test_another_model_reads_the_media_anew(model: AnyToken, toys: SimpleNamespace, tmp_path: Path) -> None:
    chat = model.chat()
    chat.send("a", output="image", seed=0)
    chat.save(tmp_path / "talk")
    other = toys.make_model()
    next(other.processor.tokenizers["image"].parameters()).data.add_(0.1)
    loaded = Chat.load(tmp_path / "talk", other)
    assert loaded.messages == chat.messages
    assert loaded.ids == other.processor.encode_chat(loaded.messages, add_generation_prompt=False)


def test_damaged_chats_are_named(model: AnyToken, tmp_path: Path) -> None:
    chat = model.chat()
    chat.send("a", output="image", seed=0)
    folder = chat.save(tmp_path / "talk")
    [media] = folder.glob("*.png")
    media.unlink()
    with pytest.raises(ChatError, match=media.name):
        Chat.load(folder, model)
    data = json.loads((folder / "chat.json").read_text())
    (folder / "chat.json").write_text(json.dumps(data)[:-20])
    for path in (folder, tmp_path / "nothing"):
        with pytest.raises(ChatError, match=path.name):
            Chat.load(path, model)


def test_turns_sent_as_messages_keep_their_roles(
    model: AnyToken, toys: SimpleNamespace, tmp_path: Path
) -> None:
    chat = model.chat()
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    chat.send(turns, output="tone", seed=0)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "user", "assistant"]
    chat.save(tmp_path / "talk")
    other = toys.make_model()
    next(other.processor.tokenizers["image"].parameters()).data.add_(0.1)
    assert Chat.load(tmp_path / "talk", other).ids == chat.ids  # tokenized anew


def test_a_chat_that_has_not_begun_is_kept(model: AnyToken, toys: SimpleNamespace, tmp_path: Path) -> None:
    path = model.chat().save(tmp_path / "talk")
    grown = toys.make_model()
    grown.add_modality(toys.HumTokenizer())
    assert Chat.load(path, model).ids == Chat.load(path, grown).ids == [model.token_space.bos]


@pytest.mark.parametrize("name", ["", "gene 1"])
def test_dna_keeps_its_name_or_none(name: str, tmp_path: Path) -> None:
    part = _save_part(DNA("ACGTn", name), tmp_path, "000-0")
    assert _load_part(part, tmp_path, KINDS) == DNA("ACGTn", name)


@pytest.mark.parametrize("ids", [[999_999], ["x"], [1.5], None, []])
def test_ids_that_are_no_conversation_are_refused(model: AnyToken, tmp_path: Path, ids: Any) -> None:
    folder = model.chat().save(tmp_path / "talk")
    data = json.loads((folder / "chat.json").read_text())
    (folder / "chat.json").write_text(json.dumps(data | {"ids": ids}))
    with pytest.raises(ChatError, match="talk"):
        Chat.load(folder, model)


def test_save_does_not_replace_something_else(model: AnyToken, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        model.chat().save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
