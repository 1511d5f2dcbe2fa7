"""The web page without a browser: a visitor's conversations, the view of tokens, a training run, the command."""

import json
import logging
import re
import threading
import time
import zipfile

import numpy as np
import pytest
from typer.testing import CliRunner

from anytoken import Chat, Image, recipes
from anytoken.cli import app
from anytoken.segments import DNA, Speech, Text, Video, open_segment
from anytoken.serving.web.page import build_page, examples, words_of
from anytoken.serving.web.runs import find_runs, run_view
from anytoken.serving.web.session import Session, read_file, settings_of
from anytoken.serving.web.shared import SharedModel
from anytoken.serving.web.tokens import token_view
from anytoken.training.metrics import MetricsLog
from anytoken.utils.errors import CheckpointError, RequestError

PICTURE = recipes.assets() / "images" / "sample.png"


@pytest.fixture
def session(mini, tmp_path):
    return Session(mini, tmp_path)


def finish(views):
    """All views of a reply, and the last one."""
    every = list(views)
    return every, every[-1]


def test_a_reply_is_shown_while_it_is_made_and_is_what_generate_gives(mini, session):
    session.say("a fox, 3d", [], ["text", "image"])
    views, last = finish(session.answer(seed=3))
    reply = mini.generate("a fox, 3d", output=["text", "image"], seed=3)
    assert [part.role for part in last] == ["user", "assistant", "assistant"]
    assert last[1].text == reply.text and last[2].segment == reply.images[0]
    assert len(views) > 2 and all(view[0].text == "a fox, 3d" for view in views)
    assert views[0][-1].text.endswith("…"), "the first view says that something is under way"
    shown = open_segment(last[2].file)
    assert shown.pixels[::4, ::4].shape == reply.images[0].pixels.shape
    assert np.array_equal(shown.pixels[::4, ::4], reply.images[0].pixels)


def test_retry_edit_and_taking_back(session):
    session.say("a fox, 3d", [str(PICTURE)], ["text"])
    _, first = finish(session.answer(seed=0))
    assert [type(part.segment) for part in first] == [Image, Text, Text]
    _, again = finish(session.answer(seed=0))
    assert again == first
    session.edit(first[1], "What is this?")
    assert len(session.chat) == 1 and session.chat.messages[0]["content"][0] == Image.open(PICTURE)
    _, edited = finish(session.answer(seed=0))
    assert edited[1].text == "What is this?" and len(session.chat) == 2
    with pytest.raises(RequestError, match="Only words"):
        session.edit(edited[0], "words")
    with pytest.raises(RequestError, match="empty message"):
        session.edit(edited[1], "  ")
    words, files = session.take_back()
    assert words == "What is this?" and len(session.chat) == 0 and len(files) == 1


def test_a_reply_that_is_stopped_leaves_the_message(session):
    session.say("fox, voice slt", [], ["speech"])
    views = session.answer(seed=0)
    next(views)
    views.close()
    assert [turn.role for turn in session.chat.turns] == ["user"]
    _, last = finish(session.answer(seed=0))
    assert isinstance(last[-1].segment, Speech)


def test_stopping_shows_what_there_is_and_waits_for_the_end(session):
    session.say("fox, voice slt", [], ["speech", "video"])
    shown, begun = [], threading.Event()

    def reply():
        with session.replying():
            for parts in session.answer(seed=0):
                shown.append(parts)
                begun.set()

    thread = threading.Thread(target=reply)
    thread.start()
    begun.wait()
    session.stop()
    assert shown[-1][-1].text == "stopped" and [turn.role for turn in session.chat.turns] == ["user"]
    thread.join()
    with session.replying():
        _, last = finish(session.answer(seed=0))
    assert isinstance(last[-1].segment, Video), "the next reply is made whole"


def test_visitors_are_answered_at_the_same_time(mini, tmp_path):
    shared = SharedModel(mini)
    wanted = {"a fox, 3d": ["image"], "an owl, flat": ["text", "image"]}
    sessions = {words: Session(shared, tmp_path) for words in wanted}
    views = {}
    for words, kinds in wanted.items():
        sessions[words].say(words, [], kinds)
        views[words] = sessions[words].answer(seed=1)
        next(views[words])  # nothing of the reply, which begins with the next one
        next(views[words])
    assert shared.worker.load == (2, 0), "both replies are in the batch"
    for words, kinds in wanted.items():
        _, last = finish(views[words])
        assert [part.segment for part in last[1:]] == mini.generate(
            words, output=kinds, seed=1, best_of=1
        ).segments


def test_a_visitor_who_stops_or_fails_frees_the_place(mini, tmp_path):
    shared = SharedModel(mini)
    session = Session(shared, tmp_path)
    session.say("fox, voice slt", [], ["speech"])
    views = session.answer(seed=0)
    next(views), next(views)
    views.close()
    with pytest.raises(ValueError, match="max_new_tokens is 3"):
        list(session.answer(max_new_tokens=3))
    until = time.monotonic() + 10
    while shared.worker.load != (0, 0):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_conversations_are_kept_apart_and_saved(mini, session, tmp_path):
    with pytest.raises(RequestError, match="nothing to save"):
        session.archive()
    session.say("a fox " * 20, [], ["image"])
    finish(session.answer(seed=0))
    session.new()
    session.new()
    assert [number for _, number in session.titles()] == [1, 0], "an empty conversation is used again"
    assert session.parts() == [] and session.titles()[1][0].endswith("…")
    session.open(0)
    with zipfile.ZipFile(session.archive()) as packed:
        packed.extractall(tmp_path / "saved")
    assert Chat.load(tmp_path / "saved", mini).ids == session.chat.ids
    with pytest.raises(RequestError, match="gone"):
        session.open(7)
    session.close()
    assert not session.folder.exists()


def test_what_cannot_be_said_is_refused_in_words_a_visitor_knows(session, tmp_path):
    with pytest.raises(RequestError, match="Write something"):
        session.say("  ", [], [])
    broken = tmp_path / "cat.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"cat\.png") as failed:
        session.say("look", [str(broken)], [])
    assert str(tmp_path) not in str(failed.value) and session.chat.turns == []
    with pytest.raises(RequestError, match=r"notes\.xyz"):
        read_file(tmp_path / "notes.xyz")


def test_errors_of_the_page(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("anytoken"), "propagate", True)
    assert words_of(RequestError("<b> is not a kind")) == "&lt;b&gt; is not a kind"
    assert "secret" not in words_of(RuntimeError("/secret/path")) and "/secret/path" in caplog.text


def test_settings_left_empty_are_the_checkpoints(mini):
    assert set(settings_of(None, None, None, None).values()) == {None}
    options = settings_of(0.5, 2, 7.0, 100.0)
    assert mini.request([], "image", **options).seed == 7


def test_tokens_show_text_grids_and_experts(mini, session):
    session.say("a fox", [], ["image"])
    finish(session.answer(seed=0))
    ids = session.chat.ids
    view = token_view(mini, ids)
    image = session.chat.turns[1].content[0]
    codes = mini.processor.tokenizers["image"].encode(image).values
    cells = re.findall(r"<span style='background:hsl\([^)]*\)'>(\d+)</span>", view)
    [piece] = mini.processor.grammar.parse(session.chat.turns[1].ids[1:-1])
    kind, written = piece.kind, piece.codes
    assert kind == "image" and [int(cell) for cell in cells] == [*written.header, *written.values[:, 0]]
    assert len(codes) == 64 and len(cells) == 3 + 64 and "image: 8 × 8" in view
    assert "&lt;|user|&gt;" in view and "␣fox" in view and f"{len(ids)} tokens" in view
    table = view[view.index("<table>") :]
    shares = [int(one) for one in re.findall(r">(\d+) %<", table[table.index("<th>image</th>") :])]
    assert len(shares) == 8 and abs(sum(shares) - 100) <= 4
    assert "No tokens yet" in token_view(mini, [])


def test_tokens_of_every_kind_can_be_shown(mini):
    clip = Speech.open(next((recipes.assets() / "audio").rglob("*.flac")))
    video = Video.open(next((recipes.assets() / "videos").glob("*.webp")))
    for segment in (clip, video, DNA("ATGAAACGT"), Text("<b>bold</b>")):
        assert segment.kind in token_view(mini, mini.tokenize(segment))
    assert "<b>" not in token_view(mini, mini.tokenize(Text("<b>bold</b>")))


def write_run(folder, steps):
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.write({"step": step, "loss": 5.0 - step / 10, "tokens_per_second": 100.0,
                   "groups": {"text": {"bits": 8.0 - step / 10}}})  # fmt: skip
    return folder


def test_a_run_is_shown_as_far_as_it_is(tmp_path):
    run = write_run(tmp_path / "runs" / "first", 3)
    (run / "samples").mkdir()
    (run / "samples" / "step-00000003.json").write_text(
        json.dumps([{"prompt": "a <fox>", "output": "text", "html": "<p>hello</p>"}])
    )
    view = run_view(run)
    assert (
        "Step 3, loss 4.700" in view
        and "<polyline" in view
        and "<p>hello</p>" in view
        and "a &lt;fox&gt;" in view
    )
    late = tmp_path / "runs" / "late"
    late.mkdir()
    (late / "run.json").write_text(json.dumps({"commit": "abc123", "data": []}))
    assert "No step has been logged yet" in run_view(late) and "abc123" in run_view(late)
    assert {one.name for one in find_runs(tmp_path / "runs")} == {"first", "late"}
    assert find_runs(run) == [run]
    with pytest.raises(CheckpointError, match="no training run"):
        find_runs(tmp_path / "runs" / "first" / "samples")
    with pytest.raises(CheckpointError, match="not a folder"):
        find_runs(tmp_path / "nowhere")


def test_examples_are_of_kinds_the_model_has(mini):
    found = examples(mini)
    assert {kind for one in found for kind in one.kinds} >= {"text", "image", "speech", "video"}
    assert all(open_segment(file) for one in found for file in one.files)


def test_the_page_reports_to_nobody_and_serves_only_its_files(mini, tmp_path):
    page = build_page(mini, "mini", tmp_path)
    assert page.analytics_enabled is False
    assert all(one.api_visibility == "private" for one in page.fns.values())


def test_mistakes_of_the_command_are_one_line(tmp_path):
    for words, says in (
        (["--host", "0.0.0.0"], "without an API key"),
        (["--run", str(tmp_path)], "no training run"),
    ):
        done = CliRunner().invoke(app, ["web", *words])
        assert done.exit_code == 2 and says in done.stderr and done.stderr.count("\n") == 1
