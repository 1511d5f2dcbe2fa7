"""The page: chat, tokens and a training run, as a Gradio application.

    anytoken web mini
    anytoken web runs/4_instruct --run runs

Replies of several visitors are decoded together; further ones wait in Gradio's queue and see their place in it. Nothing
is loaded from other sites, and nothing is reported to any.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from anytoken import recipes
from anytoken.inference.api import AnyToken
from anytoken.segments import (
    DNA,
    DNA_SUFFIXES,
    IMAGE_SUFFIXES,
    SPEECH_SUFFIXES,
    TEXT_SUFFIXES,
    VIDEO_SUFFIXES,
    Image,
    Speech,
    Text,
    Video,
)
from anytoken.serving.settings import ServerSettings
from anytoken.serving.web import runs, talk, tokens
from anytoken.serving.web.runs import find_runs, run_view
from anytoken.serving.web.session import Part, Session, read_file, settings_of
from anytoken.serving.web.shared import MAX_REPLIES, SharedModel
from anytoken.serving.web.talk import add_realtime
from anytoken.serving.web.tokens import token_view
from anytoken.utils.errors import RequestError

log = logging.getLogger(__name__)
SUFFIXES = tuple(
    dict.fromkeys(
        f".{name.rsplit('.', 1)[1]}"
        for name in IMAGE_SUFFIXES + SPEECH_SUFFIXES + VIDEO_SUFFIXES + DNA_SUFFIXES + TEXT_SUFFIXES
    )
)
MAX_FILE = "32mb"
KEPT_SECONDS = 24 * 3600  # of files that visitors sent or got
NOTE_SECONDS = 20
REFRESH_SECONDS = 3  # of a training run's view
CSS = f"""
.gradio-container{{width:100%;max-width:960px !important;margin:auto}}
#chat{{height:max(300px,calc(100dvh - 530px)) !important}}
#bar{{flex-wrap:nowrap;align-items:end;gap:.5rem}}#head h1{{font-size:1.3rem;margin:0}}#head p{{margin:.1rem 0}}
#bar input{{padding-right:1.6rem;text-overflow:ellipsis}}
:focus-visible,label:has(:focus-visible){{outline:2px solid var(--color-accent) !important;outline-offset:1px}}
#chat figure{{margin:0}}#chat figcaption{{font-size:.8rem;opacity:.75;margin-top:.2rem}}
#chat figure img,#chat figure video{{width:min(256px,60vw);height:auto;border-radius:8px;display:block}}
#chat audio{{width:min(320px,64vw);display:block}}
#chat .edit-textarea{{width:min(480px,60vw) !important}}
#chat .dna{{font:13px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}}
@media(max-width:640px){{.gradio-container main{{padding:.5rem !important}}#bar{{flex-wrap:wrap}}
#chat{{height:max(280px,calc(100dvh - 520px)) !important}}}}
{tokens.STYLE}{runs.STYLE}{talk.STYLE}
"""
# Gradio labels every button, but no text area of a chat.
HEAD = f"""<script>{talk.SCRIPT}</script>"""
HEAD += """<script>
new MutationObserver(() =>
  document.querySelectorAll("#box textarea, #tokenize textarea, .edit-textarea").forEach(
    one => one.ariaLabel ||= one.placeholder || "Message"
  )
).observe(document.documentElement, {childList: true, subtree: true})
</script>"""
CLICK_FILE = "() => document.querySelector('#file').click()"
FONT = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")


@dataclass(frozen=True)
class Example:
    """Something to click: words, files and the kinds of the reply."""

    label: str
    words: str
    files: tuple[str, ...]
    kinds: tuple[str, ...]


def examples(model: AnyToken) -> list[Example]:
    """What to try first, of the kinds that the model has; with files that come along."""
    assets = recipes.assets()
    clip = str(sorted((assets / "audio").rglob("*.flac"))[0])
    image, video = str(assets / "images" / "sample.png"), str(sorted((assets / "videos").glob("*.webp"))[0])
    every = [
        Example("Draw a fox", "a fox, 3d, blue background", (), ("image",)),
        Example("What is in this image?", "What is this?", (image,), ("text",)),
        Example("Say “fox” and draw it", "fox, voice slt", (), ("speech", "image")),
        Example("What does this recording say?", "", (clip,), ("text",)),
        Example("Animate this image", "", (image,), ("video",)),
        Example("Name this video", "", (video,), ("text",)),
    ]
    needs = {image: "image", clip: "speech", video: "video"}
    return [one for one in every if {*one.kinds, *(needs[file] for file in one.files)} <= set(model.kinds)]


class Page(gr.Blocks):
    """The page; `model` is what its visitors share, under its name."""

    model: SharedModel
    model_name: str


def build_page(model: AnyToken, name: str, files: Path, run: Path | None = None) -> Page:
    """The page for a model. `files`: a folder for what visitors send and get, which `launch` serves.

    `run`: a training run, or a folder of runs, to watch; CheckpointError if it holds none.
    """
    if run is not None:
        find_runs(run)
    with Page(title=f"AnyToken: {name}", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as page:
        gr.Markdown(f"# AnyToken: {name}\nReads and writes {_listed(model.kinds)}.", elem_id="head")
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                chat = _Chat(model, files)
                page.model, page.model_name, session = chat.model, name, chat.session
            with gr.Tab("Tokens", id="tokens") as tab:
                _build_tokens(model, session, tab)
            if run is not None:
                with gr.Tab("Training", id="training"):
                    _build_run(run)
    page.queue(default_concurrency_limit=8)
    return page


def launch(page: Page, files: Path, host: str, port: int, settings: ServerSettings) -> str:
    """Serve the page from a thread; its address. With API keys, visitors log in with any name and a key as password."""
    _, url, _ = page.launch(
        server_name=host,
        server_port=port or None,
        auth=(lambda name, key: settings.knows_key(key)) if settings.api_keys else None,
        auth_message="Any user name, and an API key as the password.",
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[str(files)],
        max_file_size=MAX_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        theme=gr.themes.Default(font=FONT, font_mono=MONOSPACE),
        css=CSS,
        head=HEAD,
    )
    add_realtime(page.app, page.model, page.model_name, settings)
    return url


def shown_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are a note in the page, and change nothing else of it."""

    def handler(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            show_error(error)
            return gr.skip()

    return handler


def show_error(error: Exception) -> None:
    """Show an error as one sentence; what is not the visitor's doing is logged, and its details stay here."""
    gr.Warning(words_of(error), duration=NOTE_SECONDS)


def words_of(error: Exception) -> str:
    """What a visitor reads of an error."""
    if isinstance(error, ValueError):
        return html.escape(str(error))
    log.error("The page failed", exc_info=error)
    return "Internal error; your request is fine. See the server log for details."


# ---- chat ----


class _Chat:
    """The chat tab: its components, and what they do."""

    def __init__(self, model: AnyToken, root: Path) -> None:
        self.model, self.root = SharedModel(model), root
        self.examples = examples(model)
        self.session = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=_close)
        with gr.Row(elem_id="bar"):
            self.conversation = gr.Dropdown(
                [("1: new", 0)], value=0, label="Conversation", scale=4, min_width=120, interactive=True
            )
            self.new = gr.Button("New", scale=0, min_width=70, size="sm")
            self.save = gr.Button("Save", scale=0, min_width=70, size="sm")
            self.file = gr.DownloadButton("Download", visible="hidden", elem_id="file")
        self.chat = gr.Chatbot(
            elem_id="chat", label="Conversation", show_label=False, editable="user", render_markdown=False,
            examples=[_clickable(one) for one in self.examples], buttons=["copy"], layout="bubble",
            placeholder="Type, drop a file, record, or try an example.", feedback_options=None,
        )  # fmt: skip
        self.box = gr.MultimodalTextbox(
            sources=["upload", "microphone"], file_types=list(SUFFIXES), file_count="multiple", max_lines=8,
            label="Your message", show_label=False, placeholder="Type, drop a file or record …",
            elem_id="box",
        )  # fmt: skip
        gr.HTML(talk.PANEL, elem_id="talk", visible="speech" in self.model.kinds)
        self.kinds = gr.CheckboxGroup(
            self.model.kinds,
            label="Reply with",
            info="If none is selected, the model decides.",
            elem_id="kinds",
        )
        with gr.Accordion("Settings", open=False), gr.Row():
            self.settings = [
                gr.Number(None, label="Temperature", info="0: always the most likely", minimum=0, maximum=2, step=0.1,
                          min_width=140),
                gr.Number(None, label="Guidance", info="1: off; more: closer to the prompt", minimum=0, maximum=20,
                          step=0.5, min_width=140),
                gr.Number(None, label="Seed", info="the same seed gives the same reply", minimum=0, precision=0,
                          min_width=140),
                gr.Number(None, label="Max tokens", info="per reply", minimum=1, precision=0, min_width=140),
            ]  # fmt: skip
            gr.Markdown("Empty: the model's defaults for each modality.")
        self._connect()

    def _connect(self) -> None:
        everything = [self.session, self.chat, self.box, self.conversation]
        asked = [self.kinds, *self.settings]
        model: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": MAX_REPLIES,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        at_once: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.box.submit(self._send, [self.session, self.box, *asked], everything, **model)
        self.chat.example_select(
            self._example, [self.session, *self.settings], [*everything, self.kinds], **model
        )
        self.chat.retry(self._retry, [self.session, *asked], everything, **model)
        self.chat.edit(self._edit, [self.session, *asked], everything, **model)
        self.box.stop(self._stopped, [self.session], None, **at_once)
        self.chat.undo(shown_errors(self._undo), [self.session], everything, **at_once)
        self.chat.clear(shown_errors(self._new), [self.session], everything, **at_once)
        self.new.click(shown_errors(self._new), [self.session], everything, **at_once)
        self.conversation.input(
            shown_errors(self._open), [self.session, self.conversation], everything, **at_once
        )
        # A click on a download button brings the file that was there before: this one is clicked with the new one.
        self.save.click(self._save, [self.session], [self.file], **at_once).success(
            None, None, None, js=CLICK_FILE
        )

    def _begin(self) -> Session:
        return Session(self.model, self.root)

    def _idle(self, session: Session | None) -> Session:
        """The session, in which no reply is made any more.

        Replies are not cancelled by Gradio, which then may show an error in place of the conversation.
        """
        session = session or self._begin()
        session.stop()
        return session

    # handlers; each gives the values of session, chat, box and conversation

    def _send(
        self, session: Session | None, value: dict[str, Any], kinds: list[str], *settings: Any
    ) -> Iterator[list[Any]]:
        session = session or self._begin()
        yield from self._reply(
            session, lambda: session.say(value["text"], value["files"], self._ordered(kinds)), settings, value
        )

    def _example(self, event: gr.SelectData, session: Session | None, *settings: Any) -> Iterator[list[Any]]:
        talk, one = session or self._begin(), self.examples[event.index]
        for shown in self._reply(talk, lambda: talk.say(one.words, one.files, one.kinds), settings, None):
            yield [*shown, list(one.kinds)]

    def _retry(self, session: Session | None, kinds: list[str], *settings: Any) -> Iterator[list[Any]]:
        yield from self._reply(session or self._begin(), lambda: None, settings, None)

    def _edit(
        self, event: gr.EditData, session: Session | None, kinds: list[str], *settings: Any
    ) -> Iterator[list[Any]]:
        talk = session or self._begin()
        number = event.index[0] if isinstance(event.index, list | tuple) else event.index
        yield from self._reply(talk, lambda: talk.edit(talk.parts()[number], event.value), settings, None)

    def _reply(
        self,
        session: Session,
        begin: Callable[[], None],
        settings: Sequence[Any],
        value: dict[str, Any] | None,
    ) -> Iterator[list[Any]]:
        """Do what comes before the reply, then show it while it is made; after a failure all is as it was."""
        with session.replying():
            turns = list(session.chat.turns)
            try:
                begin()
                yield [session, gr.skip(), _busy(), gr.skip()]
                for parts in session.answer(**settings_of(*settings)):
                    yield [session, _messages(parts), gr.skip(), gr.skip()]
            except Exception as error:
                session.chat.turns = turns
                yield self._view(session, gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False))
                show_error(error)
            else:
                found = self._view(session, _ready())
                yield (
                    [session, gr.skip(), *found[2:]] if session.stopped else found
                )  # what there is of it stays

    def _stopped(self, session: Session | None) -> None:
        """The message stays, unanswered: it can be retried, edited or taken back."""
        if session is not None:
            session.stop()
            gr.Info("Stopped. Retry answers your message again.")

    def _undo(self, session: Session | None) -> list[Any]:
        session = self._idle(session)
        words, files = session.take_back()
        value = {"text": words, "files": files}
        return self._view(session, gr.MultimodalTextbox(value=value, submit_btn=True, stop_btn=False))

    def _new(self, session: Session | None) -> list[Any]:
        session = self._idle(session)
        session.new()
        return self._view(session, _ready())

    def _open(self, session: Session | None, number: int) -> list[Any]:
        session = self._idle(session)
        session.open(number)
        return self._view(session, _ready())

    def _save(self, session: Session | None) -> str | None:
        try:
            return str((session or self._begin()).archive())
        except RequestError as error:
            show_error(error)
            return None  # so that no earlier file is downloaded

    def _view(self, session: Session, box: Any) -> list[Any]:
        names = gr.Dropdown(session.titles(), value=session.current)
        return [session, _messages(session.parts()), box, names]

    def _ordered(self, kinds: Sequence[str]) -> list[str]:
        return [kind for kind in self.model.kinds if kind in kinds]


def _busy() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)


def _ready() -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False)


def _messages(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts as Gradio shows them, a message each, so that the numbers of its events are those of the parts."""
    return [{"role": part.role, "content": _content(part)} for part in parts]


def _content(part: Part) -> Any:
    """Media are plain elements of HTML: players that a keyboard and a screen reader know, and nothing to share."""
    if part.file is None:
        return {"type": "text", "text": part.text}
    source, words = f"gradio_api/file={quote(str(part.file))}", html.escape(part.text, quote=True)
    if isinstance(part.segment, DNA):
        shown = f"<div class='dna'>{part.segment._repr_html_()}</div>"
    elif isinstance(part.segment, Image):
        shown = f"<img src='{source}' alt='{words}'>"
    elif isinstance(part.segment, Speech):
        shown = f"<audio controls src='{source}' aria-label='{words}'></audio>"
    elif isinstance(part.segment, Video):
        shown = (
            f"<video controls loop autoplay muted playsinline src='{source}' aria-label='{words}'></video>"
        )
    else:
        shown = f"<p>{words}</p>"
    return gr.HTML(
        f"<figure>{shown}<figcaption>{words} · <a href='{source}' download>download</a></figcaption></figure>"
    )


def _clickable(one: Example) -> dict[str, Any]:
    image = next((file for file in one.files if file.endswith(".png")), None)
    found: dict[str, Any] = {"text": one.words or one.label, "display_text": one.label}
    return {**found, "icon": image} if image else found


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()


def _listed(words: Sequence[str]) -> str:
    names = [{"dna": "DNA", "image": "images"}.get(word, word) for word in words]
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]


# ---- tokens ----


def _build_tokens(model: AnyToken, session: gr.State, tab: gr.Tab) -> None:
    which = gr.Radio(["Last exchange", "Whole conversation"], value="Last exchange", label="Show", scale=2)
    box = gr.MultimodalTextbox(
        sources=["upload", "microphone"], file_types=list(SUFFIXES), label="Or see the tokens of something else",
        placeholder="Type, drop a file or record …", elem_id="tokenize",
    )  # fmt: skip
    view = gr.HTML(elem_id="tokens")

    def conversation(session: Session | None, which: str) -> str:
        turns = session.chat.turns if session is not None else []
        said = [number for number, turn in enumerate(turns) if turn.role == "user"]
        shown = turns[said[-1] :] if said and which == "Last exchange" else turns
        return token_view(model, [token for turn in shown for token in turn.ids])

    def other(value: dict[str, Any]) -> str:
        segments = [read_file(file) for file in value["files"]]
        segments += [Text(value["text"])] if value["text"].strip() else []
        if not segments:
            raise RequestError("Write something or drop a file first.")
        return token_view(model, [token for segment in segments for token in model.tokenize(segment)])

    options: dict[str, Any] = {
        "concurrency_limit": 1,
        "concurrency_id": "tokens",
        "show_progress": "minimal",
        "api_visibility": "private",
    }
    tab.select(shown_errors(conversation), [session, which], view, **options)
    which.change(shown_errors(conversation), [session, which], view, **options)
    box.submit(shown_errors(other), box, view, **options)


# ---- training ----


def _build_run(folder: Path) -> None:
    found = find_runs(folder)
    run = gr.Dropdown([(one.name, str(one)) for one in found], value=str(found[0]), label="Run")
    view = gr.HTML(run_view(found[0]), elem_id="run")
    seen = gr.State(("", 0.0))

    def refresh(chosen: str, seen: tuple[str, float]) -> list[Any]:
        """The view, if the run has gone on or another one was chosen; and the list of runs."""
        known = find_runs(folder)
        path = next((one for one in known if str(one) == chosen), known[0])
        names = gr.Dropdown([(one.name, str(one)) for one in known], value=str(path))
        now = (str(path), runs.changed(path))
        return [names, run_view(path) if now != tuple(seen) else gr.skip(), now]

    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.Timer(REFRESH_SECONDS).tick(shown_errors(refresh), [run, seen], [run, view, seen], **options)
    run.input(shown_errors(refresh), [run, seen], [run, view, seen], **options)
