"""Pictures in terminals: which protocol is taken, and that what is sent is the picture."""

import base64
import re
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from anytoken.segments import DNA, Image, Video
from anytoken.terminal import inline_images
from anytoken.terminal.inline_images import image_of, protocol, show_image

NOISE = Image(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def console(**options) -> Console:
    return Console(**{"file": StringIO(), "force_terminal": True, "color_system": "truecolor", **options})


@pytest.mark.parametrize(
    ("environ", "how"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
    ],
)
def test_the_terminal_is_known_by_its_environment(environ, how):
    assert protocol(console(), environ) == how


def test_what_cannot_show_pictures_gets_none():
    environ = {"TERM": "xterm-256color"}
    assert protocol(console(force_terminal=False), environ) is None
    assert protocol(console(no_color=True), environ) is None
    assert protocol(console(color_system=None), environ) is None
    screen = console(force_terminal=False)
    show_image(screen, NOISE, environ)
    show_image(console(), DNA("ACGT"), environ)
    assert screen.file.getvalue() == ""


@pytest.mark.parametrize(
    ("environ", "pattern"),
    [
        ({"TERM": "xterm-kitty"}, r"\x1b_G[^;]*;([^\x1b]*)\x1b\\"),
        ({"TERM_PROGRAM": "iTerm.app"}, r"\x1b\]1337;File=inline=1;size=\d+[^:]*:([^\x07]*)\x07"),
    ],
)
def test_protocols_send_the_picture_itself(environ, pattern):
    screen = console()
    show_image(screen, NOISE, environ)
    sent = re.findall(pattern, screen.file.getvalue())
    assert Image.open(base64.b64decode("".join(sent))) == NOISE
    if "TERM" in environ:
        assert len(sent) > 1 and all(len(part) <= 4096 for part in sent)
        flags = re.findall(r"m=(\d)", screen.file.getvalue())
        assert flags == ["1"] * (len(sent) - 1) + ["0"]


def test_blocks_are_two_pixels_each():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32], pixels[32:] = (250, 0, 0), (0, 0, 250)
    screen = console(width=80)
    screen.print(inline_images.HalfBlockImage(Image(pixels)))
    lines = screen.file.getvalue().splitlines()
    assert len(lines) == 16 and all(line.count("▀") == 32 for line in lines)
    assert lines[0].count("38;2;250;0;0;48;2;250;0;0") >= 1 and "38;2;0;0;250;48;2;0;0;250" in lines[-1]
    narrow = console(width=10)
    narrow.print(inline_images.HalfBlockImage(Image(pixels)))
    assert narrow.file.getvalue().splitlines()[0].count("▀") == 10


def test_of_a_video_some_frames_are_seen():
    frames = np.stack([np.full((4, 4, 3), 10 * step, np.uint8) for step in range(8)])
    strip = image_of(Video(frames))
    assert strip.pixels.shape == (4, 16, 3) and strip.pixels[0, ::4, 0].tolist() == [0, 20, 40, 60]
    assert image_of(Video(frames[:1])).pixels.shape == (4, 4, 3) and image_of(DNA("A")) is None
