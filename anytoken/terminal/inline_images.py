"""Images in a terminal: the terminal's own protocol if it has one, else half-block characters in true color.

Kitty's graphics protocol (also Ghostty): https://sw.kovidgoyal.net/kitty/graphics-protocol/. iTerm2's inline images
(also WezTerm): https://iterm2.com/documentation-images.html. Both are known by what they set in the environment;
inside tmux or screen, which swallow them, blocks are used. A block "▀" is two pixels, its colour and its background.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.color import Color
from rich.console import Console, ConsoleOptions
from rich.segment import Segment as Cell
from rich.style import Style

if TYPE_CHECKING:
    from anytoken.segments import Image, Segment

COLUMNS = 32
STRIP = 4  # images of a video, side by side
CHUNK = 4096  # characters of one kitty escape sequence


def image_of(segment: Segment) -> Image | None:
    """The image of a segment: an image, or some frames of a video side by side; None for other kinds."""
    import numpy as np

    from anytoken.segments import Image, Video

    if isinstance(segment, Video):
        count = min(STRIP, len(segment.frames))
        places = [place * len(segment.frames) // count for place in range(count)]
        return Image(np.concatenate(segment.frames[places], axis=1))
    return segment if isinstance(segment, Image) else None


def protocol(console: Console, environ: Mapping[str, str] = os.environ) -> str | None:
    """The image protocol of this console: "kitty", "iterm2", "blocks", or None if it cannot."""
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not term.startswith(("tmux", "screen")):
        if "kitty" in term or "KITTY_WINDOW_ID" in environ or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm"):
            return "iterm2"
    rich_colors = console.color_system in ("truecolor", "256") and not console.no_color
    return "blocks" if rich_colors and not console.options.ascii_only else None


def show_image(console: Console, segment: Segment, environ: Mapping[str, str] = os.environ) -> None:
    """Show the image of a segment, if the console supports it."""
    image, how = image_of(segment), protocol(console, environ)
    if image is None or how is None:
        return
    if how == "blocks":
        console.print(HalfBlockImage(image))
        return
    png = image._repr_png_()
    console.file.write((kitty if how == "kitty" else iterm2)(png) + "\n")
    console.file.flush()


def kitty(png: bytes) -> str:
    """The escape sequences that show a PNG in kitty, COLUMNS wide."""
    data = base64.b64encode(png).decode()
    parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    heads = [f"a=T,f=100,c={COLUMNS},", *[""] * (len(parts) - 1)]
    more = [1] * (len(parts) - 1) + [0]
    return "".join(
        f"\x1b_G{head}m={flag};{part}\x1b\\" for head, flag, part in zip(heads, more, parts, strict=True)
    )


def iterm2(png: bytes) -> str:
    """The escape sequence that shows a PNG in iTerm2, COLUMNS wide."""
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={COLUMNS};preserveAspectRatio=1:{data}\x07"


class HalfBlockImage:
    """An image as half-block characters, for rich to print."""

    def __init__(self, image: Image) -> None:
        self.image = image

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Cell]:
        columns = min(COLUMNS, options.max_width)
        lines = max(1, round(columns * self.image.height / self.image.width / 2))
        pixels = self.image.resize(2 * lines, columns).pixels.tolist()
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
            for above, below in zip(upper, lower, strict=True):
                yield Cell("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
            yield Cell.line()
