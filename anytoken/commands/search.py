"""Commands of the embedding head: embed, index, search."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anytoken.commands.inference import PROMPT_HELP, PromptCommand
from anytoken.commands.options import Adapter, Device, Engine, Model, examples, load
from anytoken.terminal.prompt_args import read_part

app = typer.Typer()


class IndexKind(StrEnum):
    """How an index is searched."""

    flat = "flat"
    hnsw = "hnsw"
    ivfpq = "ivfpq"


Prompt = Annotated[list[str], typer.Argument(metavar="PROMPT...", help=PROMPT_HELP)]
Width = Annotated[int | None, typer.Option(min=1, help="Dimensions of a vector; one of the head's widths.")]
Untrained = Annotated[
    bool,
    typer.Option(
        "--untrained",
        help="Use the mean of hidden states instead of a trained head; retrieval is much worse.",
    ),
]


@app.command(cls=PromptCommand, epilog=examples('anytoken embed "a fox" --adapter runs/embed'))
def embed(
    prompt: Prompt,
    model: Model = "mini",
    width: Width = None,
    untrained: Untrained = False,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Print a prompt's unit vector as JSON."""
    parts = [read_part(part) for part in prompt]
    [vector] = load(model, device, adapter).embed([parts], width=width, untrained=untrained)
    print(json.dumps([round(float(one), 7) for one in vector]))


@app.command(
    epilog=examples(
        "anytoken index photos --out my.index --adapter runs/embed",
        "anytoken index photos --out http://localhost:6333#photos",
        "anytoken index photos --out my.index --engine ray --workers 16 --device cpu",
    )
)
def index(
    folder: Annotated[
        Path, typer.Argument(help="A folder of images, clips, recordings, texts and sequences.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help="The index to write or update: a folder, or a database's URL such as http://HOST:6333#NAME."
        ),
    ],
    model: Model = "mini",
    kind: Annotated[
        IndexKind | None,
        typer.Option(
            help="flat (default): exact; hnsw: millions of vectors; ivfpq: little memory. Not with a URL."
        ),
    ] = None,
    width: Width = None,
    untrained: Untrained = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index of another folder, model or width.")
    ] = False,
    engine: Engine = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that embed on CPUs; 1 with the local engine: this one.")
    ] = 1,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Index a folder for search; rerun the command to add new files."""
    from anytoken.inference.index import Index, how_to_open
    from anytoken.inference.server_index import ServerIndex
    from anytoken.inference.vector_store import is_url

    if is_url(out) and kind is not None:
        raise typer.BadParameter("--kind is of an index in a folder; a database chooses its own.")
    opened, names = (
        load(model, device, adapter),
        how_to_open(model, None if adapter is None else str(adapter)),
    )
    options = (width, untrained, overwrite, True, engine, workers)
    if is_url(out):
        print(repr(ServerIndex.build(folder, opened, out, *options, opened_by=names)))
        return
    found = Index.build(folder, opened, out, (kind or IndexKind.flat).value, *options)
    found.remember_model(out, names)
    print(f"{out}: {found!r}")


@app.command(
    cls=PromptCommand,
    epilog=examples(
        'anytoken search my.index "a fox on blue" -k 5',
        "anytoken search my.index photo.png --html found.html",
    ),
)
def search(
    path: Annotated[
        str,
        typer.Argument(
            metavar="INDEX", help="Index written by `anytoken index`: a folder or a database's URL."
        ),
    ],
    query: Annotated[list[str], typer.Argument(metavar="QUERY...", help=PROMPT_HELP)],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    kind: Annotated[list[str] | None, typer.Option(help="Only results of this kind; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="By default the model that made the index.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per result, best first.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the results as an HTML page.")] = None,
    device: Device = "auto",
    adapter: Adapter = None,
) -> None:
    """Find the items nearest to a query of text, files or both."""
    from anytoken.inference.index import Index
    from anytoken.inference.index_files import read_index
    from anytoken.inference.server_index import ServerIndex, read_meta
    from anytoken.inference.vector_store import is_url, open_store

    store = open_store(path) if is_url(path) else None
    meta = read_index(path)[0] if store is None else read_meta(path, store)
    parts = [read_part(part) for part in query]
    if model is None and adapter is None and meta.get("adapter"):
        adapter = Path(meta["adapter"])
    opened = load(model or meta.get("model", "mini"), device, adapter)
    found = Index.open(path, opened) if store is None else ServerIndex.open(path, opened, store)
    hits = found.search(parts, k, kind)
    gone = [hit for hit in hits if not hit.exists]
    if gone:
        note = (
            f"{len(gone)} of the results no longer exist, such as {gone[0].file}: run `anytoken index` again."
        )
        Console(stderr=True, soft_wrap=True).print(note, markup=False, highlight=False)
    if html is not None:
        from anytoken.inference.contact_sheet import write_sheet

        write_sheet(html, parts, hits)
    rows = [hit.to_dict() for hit in hits]
    for row in rows:
        print(json.dumps(row, ensure_ascii=False) if as_json else _line(row))
    if html is not None:
        print(html)


def _line(row: dict[str, Any]) -> str:
    part = f" [{row['part'] + 1}]" if row.get("part") else ""
    return f"{row['score']:.4f}  {row['kind']:<6}  {row['path']}{part} {row.get('text', '')}".rstrip()
