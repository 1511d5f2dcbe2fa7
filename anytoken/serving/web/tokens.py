"""Tokens as people can look at them: ids in the colour of their modality, codes as a grid, and the experts' use.

HTML fragments for a page that brings STYLE.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch

from anytoken.inference.api import AnyToken
from anytoken.processor import Processor
from anytoken.tokenizers.base import Codes

# Backgrounds that dark text reads well on, in light and dark pages alike (colours of Okabe and Ito, lightened).
COLOURS = {
    "text": "#dfe6ee", "image": "#ffd9a0", "speech": "#a9dcf5", "video": "#f6bfd8", "dna": "#a8e5cd",
    "control": "#c9c9d2",
}  # fmt: skip
OTHER = "#e8e2a0"  # kinds of plug-in modalities
GOLDEN_ANGLE = 137.508  # neighbouring codes get hues far apart
STYLE = """
.tokens{display:flex;flex-direction:column;gap:.8rem;overflow-wrap:anywhere}
.tokens h3{margin:.4rem 0 .1rem;font-size:1rem}.tokens p{margin:0}
.tokens .ids{display:flex;flex-wrap:wrap;gap:3px;align-items:flex-start}
.tokens .id{color:#1b1b1f;border-radius:4px;padding:0 .35em;font:13px/1.6 ui-monospace,monospace;white-space:pre}
.tokens figure{margin:.2rem 0;max-width:100%}.tokens figcaption{font-size:.85rem;margin-bottom:.2rem}
.tokens .codes{display:grid;gap:2px;width:max-content;max-width:100%;margin-bottom:6px}
.tokens .codes.run{display:flex;flex-wrap:wrap;width:auto}
.tokens .codes span{min-width:2.1em;color:#1b1b1f;
font:11px/1.9 ui-monospace,monospace;text-align:center;border-radius:2px}
.tokens .frames{display:flex;flex-wrap:wrap;gap:10px}
.tokens table{border-collapse:collapse}
.tokens th,.tokens td{padding:.2rem .7rem !important;text-align:right;border:0 !important;white-space:nowrap}
.tokens th:first-child{text-align:left !important}.tokens .scroll{overflow-x:auto;overflow-wrap:normal}
"""


def token_view(model: AnyToken, ids: Sequence[int]) -> str:
    """The ids of a conversation or a part of it: legend, turns, and how each modality uses the experts."""
    if not len(ids):
        return "<div class='tokens'><p>No tokens yet: say something in the chat, or drop something above.</p></div>"
    pieces = "".join(_pieces(model.processor, ids))
    return f"<div class='tokens'>{_legend(model, ids)}{pieces}{_experts(model, ids)}</div>"


def _legend(model: AnyToken, ids: Sequence[int]) -> str:
    space = model.token_space
    names = [space.modality_names[index] for index in space.modality_of(torch.tensor(list(ids))).tolist()]
    chips = [
        _chip(f"{name} {count}", name)
        for name, count in sorted(Counter(names).items(), key=lambda one: -one[1])
    ]
    total = f"<p>{len(ids)} tokens; controls count as text. Context: {model.engine.context}.</p>"
    return f"{total}<div class='ids'>{''.join(chips)}</div>"


def _pieces(processor: Processor, ids: Sequence[int]) -> Iterator[str]:
    """Text ids and controls as runs of chips, each medium as a figure, a heading for each turn."""
    space = processor.token_space
    roles = {getattr(space, role): role for role in ("system", "user", "assistant")}
    opens = {space.open_token(name): space.close_token(name) for name in space.modalities}
    chips: list[str] = []
    place = 0
    while place < len(ids):
        token = ids[place]
        if token in roles or token in opens:
            if chips:
                yield f"<div class='ids'>{''.join(chips)}</div>"
            chips = []
        if token in opens:
            stop = list(ids).index(opens[token], place) + 1
            yield _figure(processor, ids[place:stop])
            place = stop
            continue
        if token in roles:
            yield f"<h3>{roles[token]}</h3>"
        chips.append(_token(processor, token))
        place += 1
    if chips:
        yield f"<div class='ids'>{''.join(chips)}</div>"


def _token(processor: Processor, token: int) -> str:
    space = processor.token_space
    if token >= space.text_size:
        return _chip(space.token_name(token), "control", f"id {token}")
    text = processor.text_tokenizer.id_bytes(token).decode("utf-8", "replace")
    return _chip(text.replace("\n", "⏎").replace(" ", "␣"), "text", f"id {token}")


def _chip(text: str, kind: str, title: str = "") -> str:
    hint = f" title='{title}'" if title else ""
    return f"<span class='id' style='background:{COLOURS.get(kind, OTHER)}'{hint}>{html.escape(text)}</span>"


def _figure(processor: Processor, ids: Sequence[int]) -> str:
    [piece] = processor.grammar.parse(ids)
    kind, codes = piece.kind, piece.codes
    size = " × ".join(map(str, codes.size)) if codes.size else f"{len(codes)} frames"
    books = codes.values.shape[1]
    caption = f"{kind}: {size}" + (f", {books} codebooks" if books > 1 else "") + f"; {len(ids)} tokens"
    header = f"<p>global codes</p>{_run(codes.header)}" if len(codes.header) else ""
    return (
        f"<figure><figcaption>{_chip(caption, kind)}</figcaption>{header}"
        f"<div class='frames'>{''.join(_grids(codes))}</div></figure>"
    )


def _grids(codes: Codes) -> Iterator[str]:
    """A grid for each codebook and each image of a video; a run of codes for what has no grid."""
    for book in codes.values.T:
        if len(codes.size) < 2:
            yield _run(book)
            continue
        *outer, rows, columns = codes.size
        grids = book.reshape(*outer, rows * columns)
        for place in product(*map(range, outer)):
            cells = "".join(map(_cell, grids[place].tolist()))
            yield f"<div class='codes' style='grid-template-columns:repeat({columns},1fr)'>{cells}</div>"


def _run(values: np.ndarray) -> str:
    return f"<div class='codes run'>{''.join(map(_cell, values.tolist()))}</div>"


def _cell(code: int) -> str:
    hue = code * GOLDEN_ANGLE % 360
    return f"<span style='background:hsl({hue:.0f} 70% 78%)'>{code}</span>"


def _experts(model: AnyToken, ids: Sequence[int]) -> str:
    """A row for each modality: the share of its routings that each expert gets, over all layers."""
    if not getattr(model.lm, "has_experts", False):
        return "<p>This model has no experts.</p>"
    recent = torch.tensor([list(ids)[-model.engine.context :]], device=model.lm.device)
    with torch.inference_mode():
        use = model.lm(input_ids=recent, output_expert_use=True, use_cache=False).expert_use
    shown = [(name, one.load.tolist(), one.entropy) for name, one in use.items()]
    head = "".join(f"<th>{number}</th>" for number in range(len(shown[0][1])))
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(map(_share, load))}<td>{entropy:.2f}</td></tr>"
        for name, load, entropy in shown
    )
    return (
        "<h3>Experts</h3><p>Share of each modality's tokens that an expert gets, over all layers. "
        "Entropy: 1 is an even use, 0 a single expert.</p><div class='scroll'>"
        f"<table><tr><th>expert</th>{head}<th>entropy</th></tr>{rows}</table></div>"
    )


def _share(share: float) -> str:
    return f"<td style='background:rgb(37 99 235/{min(1.0, share) * 0.6:.2f})'>{100 * share:.0f} %</td>"
