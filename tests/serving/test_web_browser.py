"""The web page in a real browser, headless: one visit from a first prompt to the tokens, on a desktop and a phone.

Skipped without Chromium (Debian: chromium) or playwright. ANYTOKEN_SCREENSHOTS=FOLDER keeps the screenshots there.
"""

import json
import os
import re
import shutil
import zipfile
from itertools import product
from pathlib import Path

import httpx
import numpy as np
import pytest
import websockets
from websockets.sync import client

from anytoken import Speech, recipes
from anytoken.serving.settings import ServerSettings
from anytoken.training.metrics import MetricsLog

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"),
    pytest.mark.timeout(600),
]
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 800}
WAIT = 60_000  # ms, for a busy machine
NAMELESS = """all => all.filter(one => one.checkVisibility() && !(one.ariaLabel || one.title || one.innerText.trim()
  || one.labels?.length)).map(one => one.outerHTML)"""

FOCUSED = r"""() => {
  const one = document.activeElement
  const around = [one, one.closest("label")].filter(Boolean).map(it => getComputedStyle(it))
  const shown = around.some(it => it.outlineStyle != "none" && parseFloat(it.outlineWidth) > 1)
  if (one == document.body) return [null, true]
  return [one.ariaLabel || one.innerText.trim().split("\n")[0] ||
    one.labels?.[0]?.innerText.trim() || one.tagName, shown]
}"""


@pytest.fixture(scope="module")
def address(mini, tmp_path_factory):
    """The running page, with a training run to watch."""
    from anytoken.serving.web.page import build_page, launch

    run = tmp_path_factory.mktemp("runs") / "first"
    log_steps(run, range(1, 4))
    files = tmp_path_factory.mktemp("files")
    page = build_page(mini, "mini", files, run)
    yield launch(page, files, "127.0.0.1", 0, ServerSettings()), run
    page.close()


def log_steps(run, steps):
    log = MetricsLog(run / "metrics.jsonl")
    for step in steps:
        log.write({"step": step, "loss": 5.0 - step / 10, "tokens_per_second": 100.0,
                   "groups": {"text": {"bits": 8.0 - step / 10}}})  # fmt: skip


@pytest.fixture(scope="module")
def visit(address, tmp_path_factory):
    """An open page, and a function that takes screenshots."""
    shots = Path(os.environ.get("ANYTOKEN_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    shots.mkdir(parents=True, exist_ok=True)
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    clip = Speech.open(next((recipes.assets() / "audio").rglob("*.flac"))).resample(48_000)
    quiet = np.zeros(clip.sample_rate_hz, np.float32)
    Speech(np.concatenate([quiet, clip.samples, quiet, quiet]), clip.sample_rate_hz).save(spoken)
    microphone = [
        "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={spoken}",
    ]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *microphone])
        page = browser.new_page(viewport=DESKTOP)
        page.set_default_timeout(WAIT)
        page.outside = []
        page.on("request", lambda one: page.outside.append(one.url) if is_outside(one.url) else None)
        page.goto(address[0])
        page.locator("#box textarea").wait_for()

        def shoot(name):
            for size, scheme in product((PHONE, DESKTOP), ("dark", "light")):
                page.set_viewport_size(size)
                page.emulate_media(color_scheme=scheme)
                device = "phone" if size is PHONE else "desktop"
                page.screenshot(path=shots / f"{name}-{device}-{scheme}.png", animations="disabled")

        yield page, shoot
        browser.close()


def is_outside(url):
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


def say(page, words):
    """Type and send with the keyboard."""
    box = page.locator("#box textarea")
    box.fill(words)
    box.press("Enter")


def idle(page):
    """Wait for the end of a reply: the button sends again."""
    page.locator("#box").get_by_label("Submit").wait_for()


def kind(page, name, on=True):
    page.locator("#kinds").get_by_label(name, exact=True).set_checked(on)


def test_a_visit(address, visit):
    """In one browser session, since starting one takes longer than any of the steps."""
    page, shoot = visit
    shoot("start")
    assert page.eval_on_selector_all("button, input, textarea, select", NAMELESS) == []

    # an example that is clicked is answered
    page.get_by_text("What is in this image?").click()
    page.locator("#chat .bot").first.wait_for()
    idle(page)
    assert page.locator("#chat .user img").get_attribute("alt").startswith("image, ")

    # a prompt becomes an image that the browser has loaded
    page.get_by_role("button", name="New").click()
    kind(page, "text", False)
    kind(page, "image")
    say(page, "a fox, 3d, blue background")
    page.locator("#chat .bot img").wait_for()
    idle(page)
    image = page.locator("#chat .bot img")
    page.wait_for_function("one => one.complete && one.naturalWidth == 256", arg=image.element_handle())
    shoot("image")

    # a sound is uploaded and comes back as text
    kind(page, "image", False)
    kind(page, "text")
    clip = next((recipes.assets() / "audio").rglob("*.flac"))
    page.locator("#box input[type=file]").set_input_files(clip)
    page.locator("#box").get_by_text(clip.name).or_(page.locator("#box .thumbnail-item")).first.wait_for()
    say(page, "")
    page.locator("#chat .user audio").wait_for()
    idle(page)
    assert page.locator("#chat .bot").last.inner_text().strip()
    player = page.locator("#chat .user audio").element_handle()
    page.wait_for_function("one => one.readyState > 0 && one.duration > 0.05", arg=player)

    # speech comes back with a player, and a video
    for output, element in (("speech", "audio"), ("video", "video")):
        kind(page, "text", False)
        kind(page, "speech", output == "speech")
        kind(page, "video", output == "video")
        say(page, "fox, voice slt" if output == "speech" else "a fox")
        made = page.locator(f"#chat .bot {element}")
        made.wait_for()
        idle(page)
        page.wait_for_function("one => one.readyState > 0 && one.duration > 0", arg=made.element_handle())
    shoot("media")

    # a message is edited and answered anew
    page.locator("#chat").get_by_label("Edit", exact=True).first.click()
    page.locator("#chat textarea").fill("a cat, flat")
    page.locator("#chat").get_by_label("Submit").click()
    page.locator("#chat .user").get_by_text("a cat, flat").wait_for()
    page.wait_for_function("() => document.querySelectorAll('#chat .user').length == 1")
    idle(page)

    # a mistake is a sentence, and the words stay
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Max tokens").fill("3")
    kind(page, "video", False)
    kind(page, "image")
    say(page, "too short a limit")
    page.get_by_text("max_new_tokens is 3, but").wait_for()
    assert "Traceback" not in page.content() and page.locator("#chat .bot").count() == 1
    assert page.locator("#box textarea").input_value() == "too short a limit"
    shoot("error")

    # the tokens of the exchange, and of something else
    page.get_by_role("tab", name="Tokens").click()
    page.locator("#tokens figure").first.wait_for()
    assert page.locator("#tokens .codes span").count() == 3 + 64
    assert re.search(r"image\s+\d+ %", page.locator("#tokens table").inner_text())
    shoot("tokens")
    page.locator("#tokenize textarea").fill("hello")
    page.locator("#tokenize textarea").press("Enter")
    page.locator("#tokens .id", has_text="hell").or_(
        page.locator("#tokens .id", has_text="he")
    ).first.wait_for()

    # a training run goes on before one's eyes
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("Step 3, loss").wait_for()
    log_steps(address[1], range(4, 6))
    page.get_by_text("Step 5, loss").wait_for()
    shoot("training")

    # nothing is wider than a phone, and nothing came from elsewhere
    page.set_viewport_size(PHONE)
    for tab in ("Chat", "Tokens", "Training"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.outside == []


def test_a_reply_is_stopped_and_a_conversation_saved(address, visit):
    page, _ = visit
    page.goto(address[0])
    page.locator("#box textarea").wait_for()
    for one in ("speech", "video", "dna"):
        kind(page, one)
    for _ in range(3):  # at once, and in the midst of a segment
        say(page, "a fox")
        page.locator("#chat .bot").first.wait_for()
        page.locator("#box").get_by_label("Stop").click()
        idle(page)
        page.get_by_text("stopped", exact=True).wait_for()
        assert page.locator("#chat .error").count() == 0
        page.locator("#chat").get_by_label("Undo", exact=True).click()
        page.locator("#chat .user").wait_for(state="detached")
        assert page.locator("#box textarea").input_value() == "a fox"
    say(page, "a fox")
    page.locator("#chat .bot").first.wait_for()
    page.get_by_role("button", name="New").click()
    page.locator("#chat .user").wait_for(state="detached")
    idle(page)
    for one in ("speech", "video"):
        kind(page, one, False)
    for words, messages in (("a fox", 2), ("a cat", 4)):
        say(page, words)
        page.locator("#chat .bot").nth(messages // 2 - 1).wait_for()
        idle(page)
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save").click()
        with zipfile.ZipFile(saved.value.path()) as archive:
            assert len(json.loads(archive.read("chat.json"))["messages"]) == messages


def test_two_tabs_at_once(address, visit):
    """A short reply in a second tab comes while the first tab's long one is being made."""
    first, _ = visit
    first.goto(address[0])
    second = first.context.browser.new_page(viewport=DESKTOP)
    second.set_default_timeout(WAIT)
    second.goto(address[0])
    for page, kinds in ((first, ("speech", "video", "dna")), (second, ("text",))):
        page.locator("#box textarea").wait_for()
        for one in kinds:
            kind(page, one)
    say(first, "a fox")
    first.locator("#chat .bot").wait_for()
    say(second, "a fox")
    second.locator("#chat .bot").wait_for()
    idle(second)
    assert first.locator("#box").get_by_label("Submit").count() == 0, "the first reply is still being made"
    idle(first)
    assert all(first.locator(f"#chat .bot {one}").count() == 1 for one in ("audio", "video", ".dna"))
    assert second.locator("#chat .bot").inner_text().strip()
    second.close()


def test_talking(address, visit):
    """What the microphone hears is answered by sound that plays, then by what is ticked; a second press ends it."""
    page, shoot = visit
    page.goto(address[0])
    talk = page.locator("#talk")
    talk.get_by_role("button", name="Talk").click()
    talk.get_by_text("Listening …").wait_for()
    replies = talk.locator("li")
    replies.first.wait_for()
    assert re.fullmatch(r"speech, \d+\.\d s", replies.first.inner_text())
    assert float(replies.first.inner_text().split()[1]) > 0.1
    shoot("talk")
    talk.get_by_role("button", name="Stop talking").click()
    talk.get_by_role("button", name="Talk", exact=True).wait_for()

    kind(page, "text")
    before = replies.count()
    talk.get_by_role("button", name="Talk", exact=True).press("Enter")
    replies.nth(before).wait_for()
    assert not replies.nth(before).inner_text().startswith("speech,")
    talk.get_by_role("button", name="Stop talking").click()
    assert page.outside == []


def test_strangers_cannot_talk(mini, tmp_path):
    """Neither without the login of a page that has one, nor from a page of another site."""
    from anytoken.serving.web.page import build_page, launch

    def connect(url, **options):
        with client.connect(f"{url.replace('http', 'ws', 1)}v1/realtime", **options) as socket:
            return json.loads(socket.recv())["type"]

    for keys, origin in (((), "https://evil.example"), (("key",), None)):
        page = build_page(mini, "mini", tmp_path)
        url = launch(page, tmp_path, "127.0.0.1", 0, ServerSettings(api_keys=keys))
        try:
            with pytest.raises(websockets.InvalidStatus):
                connect(url, origin=origin)
            if keys:
                login = httpx.post(f"{url}login", data={"username": "me", "password": "key"})
                cookies = "; ".join(f"{name}={value}" for name, value in login.cookies.items())
                headers = {"Cookie": cookies}
                assert connect(url, additional_headers=headers) == "session.created"
            else:
                assert connect(url, origin=url.rstrip("/")) == "session.created"
        finally:
            page.close()


def test_by_keyboard_alone(address, visit):
    """From the message field, Tab reaches what else there is, and each control that has the focus shows it."""
    page, _ = visit
    page.goto(address[0])
    page.locator("#box textarea").wait_for()
    page.locator("#box textarea").focus()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(FOCUSED)
        if name is None:  # past the last one
            break
        assert outlined, f"{name} has the focus and does not show it"
        reached.append(name)
        if name == "image":
            page.keyboard.press("Space")
    assert page.locator("#kinds").get_by_label("image", exact=True).is_checked()
    assert {"Talk", "text", "image", "speech", "Settings"} <= set(reached), reached
    page.locator("#box textarea").focus()
    page.keyboard.type("a fox, 3d")
    page.keyboard.press("Enter")
    page.locator("#chat .bot img").wait_for()
    idle(page)
