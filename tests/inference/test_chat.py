"""Conversations: what is remembered, saved and read back."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anytoken.inference.api import AnyToken
from anytoken.inference.chat import (
    Chat,
    _load_part,
    _save_part,
)
from anytoken.inference.streaming import finish
from anytoken.segments import DNA, KINDS, Image, Text
from anytoken.utils.errors import RequestError

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


def test_what_is_loaded_equals_what_was_saved(toys: SimpleNamespace, tmp_path: Path) -> None:
    """Media of every kind, said by either side, lose nothing: sound is not cut to 16 bits either."""
    from anytoken.segments import Speech, Video
    from anytoken.tokenizers.speech import SpeechTokenizer
    from anytoken.tokenizers.video import VideoTokenizer

    model = toys.make_model(context=1024)
    model.add_modality(SpeechTokenizer(16, 1, 1, levels=[5, 5, 4], max_frames=20).eval())
    model.add_modality(VideoTokenizer(8, 1, 1, levels=[4, 3], side_px=16).eval())
    noise = np.random.default_rng(0)
    sound = Speech(noise.uniform(-2, 2, 3_000), 11_025)
    clip = Video(noise.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8), 3.7)
    chat = model.chat()
    chat.send([sound, clip, PICTURE, toys.Tone([(1, 2), (3, 4)]), "schön 🍎"], ["speech", "video"], seed=0)
    loaded = Chat.load(chat.save(tmp_path / "talk"), model)
    assert loaded.messages == chat.messages and loaded.ids == chat.ids
    assert loaded.regenerate(seed=5).ids == chat.regenerate(seed=5).ids


def test_an_interrupted_save_leaves_the_old_chat(
    model: AnyToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat(system="a")
    chat.save(tmp_path / "talk")
    chat.send("a", "image", seed=0)

    def interrupted(self: Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.save(tmp_path / "talk")
    assert len(Chat.load(tmp_path / "talk", model)) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["talk", "chat.json"]


def test_regenerate_replaces_the_reply(model: AnyToken) -> None:
    chat = model.chat()
    first = chat.send("red apple", output="tone", seed=0)
    before = list(chat.messages)
    again = chat.regenerate(seed=3)
    assert [segment.kind for segment in again.segments] == ["tone"] and again.ids != first.ids
    assert chat.messages == [before[0], {"role": "assistant", "content": again.segments}]
    assert chat.regenerate(seed=0).ids == first.ids and chat.messages == before
    assert finish(chat.regenerate_stream(seed=3)).ids == again.ids
    assert chat.regenerate("image", seed=0).images and chat.regenerate(seed=1).images  # the later wish holds
    with pytest.raises(ValueError, match="smell"):
        chat.regenerate("smell")
    assert chat.messages[1]["content"][0].kind == "image"


def test_a_chat_that_is_edited_is_one_that_was_said_so(model: AnyToken) -> None:
    chat, straight = model.chat(system="Be brief."), model.chat(system="Be brief.")
    chat.send("red apple", output="tone", seed=0)
    chat.send("a", output="text", seed=0, max_new_tokens=9)
    chat.edit(1, [PICTURE, "What is this?"])
    assert len(chat) == 2
    chat.regenerate(seed=4)
    straight.send([PICTURE, "What is this?"], output="tone", seed=4)
    assert chat.messages == straight.messages and chat.ids == straight.ids
    chat.edit(-1, "a green pear")
    assert chat.messages[-1] == {"role": "assistant", "content": [Text("a green pear")]}
    model.processor.grammar.validate(chat.ids)
    chat.edit(0, "Be long.")
    assert [message["role"] for message in chat.messages] == ["system"]
    for index in (1, -2):
        with pytest.raises(RequestError, match=f"no message {index}"):
            chat.edit(index, "a")


def test_undo_takes_back_what_was_said_and_its_reply(model: AnyToken) -> None:
    chat = model.chat(system="Be brief.")
    chat.send("red apple", output="tone", seed=0)
    before = (chat.messages, chat.ids)
    chat.send([PICTURE, "a"], output="tone", seed=0)
    assert chat.undo() == [PICTURE, Text("a")]
    assert (chat.messages, chat.ids) == before
    chat.undo()
    for again in (chat.undo, chat.regenerate):
        with pytest.raises(RequestError, match="Nothing has been said"):
            again()
    assert len(chat) == 1


def test_the_oldest_exchanges_are_truncated_whole_when_the_context_is_full(
    model: AnyToken, caplog: pytest.LogCaptureFixture
) -> None:
    chat, lost = model.chat(system="Be brief."), []
    for turn in range(12):
        reply = chat.send(f"{turn} red apple", output="image", sizes={"image": (4, 3)}, seed=turn)
        assert reply.finish_reason == "stop" and reply.images[0].pixels.shape == (32, 24, 3)
        read = [chat.turns[0], *chat.turns[1 + chat.num_truncated : -1]]
        assert reply.usage.prompt_tokens == 2 + sum(len(one.ids) for one in read)
        assert reply.usage.prompt_tokens <= model.engine.context // 2
        lost.append(chat.num_truncated)
    assert len(chat) == 25 and chat.num_truncated % 2 == 0 and chat.num_truncated > 10
    assert lost == sorted(lost) and any(a == b > 0 for a, b in pairwise(lost)), "prompts went on in between"
    assert f"({chat.num_truncated} truncated)" in repr(chat)
    [warning] = [record.getMessage() for record in caplog.records if "outgrown" in record.getMessage()]
    assert "256 tokens" in warning
    with pytest.raises(ValueError, match="context"):
        chat.send("xyz " * 300, output="text")


def test_a_chat_shows_itself(model: AnyToken, capsys: pytest.CaptureFixture[str]) -> None:
    chat = model.chat(system="<b>brief</b>")
    chat.send([PICTURE, "What?"], output="image", seed=0)
    page = chat._repr_html_()
    assert page.count("data:image/png") == 2 and "&lt;b&gt;" in page and "<b>" not in page
    chat.show()
    assert capsys.readouterr().out.splitlines()[1] == "user: Image(16x16) What?"


def test_show_displays_in_a_notebook(model: AnyToken, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
    chat = model.chat()
    chat.show()
    assert shown == [chat]


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
    with pytest.raises(RequestError, match=media.name):
        Chat.load(folder, model)
    PICTURE.save(tmp_path / "secret.png")
    media.symlink_to(tmp_path / "secret.png")  # a chat of somebody else's may not read what is not in it
    with pytest.raises(RequestError, match="a link out of its folder"):
        Chat.load(folder, model)
    data = json.loads((folder / "chat.json").read_text())
    (folder / "chat.json").write_text(json.dumps(data)[:-20])
    for path in (folder, tmp_path / "nothing"):
        with pytest.raises(RequestError, match=path.name):
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
    with pytest.raises(RequestError, match="talk"):
        Chat.load(folder, model)


def test_save_does_not_replace_something_else(model: AnyToken, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        model.chat().save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_conversation_replaces_its_own_earlier_state_alone(model: AnyToken, tmp_path: Path) -> None:
    """Also after it was opened again, and where it was saved before conversations had ids."""
    chat = model.chat()
    chat.send([PICTURE, "a"], "image", seed=0)
    folder = chat.save(tmp_path / "talk")
    (folder / "2023-11-05.jpg").write_text("mine")
    chat.undo()
    chat.send("b", "tone", seed=0)
    chat.save(folder)
    assert sorted(path.suffix for path in folder.iterdir() if path.name != "2023-11-05.jpg") == [
        ".json",
        ".tone",
    ]
    again = Chat.load(folder, model)
    again.send("c", "tone", seed=0)
    again.save(folder)
    other = model.chat()
    with pytest.raises(RequestError, match=r"another conversation.*chat\.json.*overwrite=True"):
        other.save(folder)
    assert Chat.load(folder, model).messages == again.messages
    data = json.loads((folder / "chat.json").read_text())
    del data["id"]
    (folder / "chat.json").write_text(json.dumps(data))
    old = Chat.load(folder, model)
    with pytest.raises(RequestError, match="another conversation"):
        other.save(folder)
    old.send("d", "tone", seed=0)
    old.save(folder)
    other.save(folder, overwrite=True)
    assert len(Chat.load(folder, model)) == 0
    assert {path.name for path in folder.iterdir()} == {"chat.json", "2023-11-05.jpg"}


def test_what_was_read_is_not_read_again(model: AnyToken, fed: list[int]) -> None:
    """A second turn reads only what is new, and says what a model that reads all of it says."""
    chat = model.chat("Be brief.")
    chat.send("red apple", "text", temperature=0, max_new_tokens=20)
    said = len(chat.ids)
    fed.clear()
    reply = chat.send("green pear", "image", temperature=0)
    assert fed[0] < said
    start = len(chat.ids) - len(reply.ids)
    assert model.generate_ids([chat.ids[:start]], "image", temperature=0)[0].ids == reply.ids
