"""A page of search results: one file to open in a browser, with small images inside and no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anytoken.inference.index import Hit
from anytoken.segments import Image, Segment, SegmentError, Video
from anytoken.utils.atomic import write_file

SIDE_PX = 160  # of an image on the page
STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem}
figure{margin:0;overflow-wrap:anywhere}img{max-width:100%;image-rendering:pixelated;border-radius:6px}
audio{width:100%}figcaption{color:light-dark(#666,#999);font-size:.85rem}
"""


def write_sheet(path: str | Path, query: Sequence[Segment], hits: Sequence[Hit]) -> Path:
    """Write the results of a query as a page; files that have gone are named, not shown."""
    asked = "".join(_shown(segment) for segment in query)
    cells = "".join(
        f"<figure>{_cell(hit)}<figcaption>{hit.score:.3f} {html.escape(str(hit.file))}</figcaption></figure>"
        for hit in hits
    )
    return write_file(
        path,
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Search results</title><style>{STYLE}</style><h1>Query</h1>{asked}<h1>Results</h1>"
        f"<main>{cells}</main></html>\n",
    )


def _cell(hit: Hit) -> str:
    try:
        return _shown(hit.open())
    except (ValueError, OSError) as error:  # one that has gone must not hide the others
        return f"<p>{html.escape(str(error))}</p>"


def _shown(segment: Segment) -> str:
    if isinstance(segment, Image):
        scale = min(1.0, SIDE_PX / max(segment.height, segment.width))
        small = segment.resize(max(1, round(segment.height * scale)), max(1, round(segment.width * scale)))
        return Video(small.pixels[np.newaxis])._repr_html_()  # a webp of one frame
    show = getattr(segment, "_repr_html_", None)
    if show is None:
        raise SegmentError(f"{segment.kind} has no image.")
    return str(show())
