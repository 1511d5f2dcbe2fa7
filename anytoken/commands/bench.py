"""`anytoken bench`: our speed against a named peer, measured alternately in one run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from anytoken import recipes
from anytoken.benchmarks import harness
from anytoken.commands.options import ModelArgument, Overrides, Sets, Stage, examples, load
from anytoken.commands.search import IndexKind

app = typer.Typer(no_args_is_help=True, help="Measure speed against a named peer in the same run.")
CONTEXTS = [128, 512, 1024, 2048, 4096]
Repeats = Annotated[int, typer.Option(min=1, help="Repetitions per side; the median is reported.")]
Results = Annotated[Path, typer.Option(help="JSON file for the results.")]
Kind = Annotated[str, typer.Option(help="Modality to generate.")]
Prompt = Annotated[str, typer.Option(help="Prompt.")]
Hidden = Annotated[int, typer.Option(help="Hidden size of the large random model.")]
Layers = Annotated[int, typer.Option(help="Layers of the large random model.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


@app.command(epilog=examples("anytoken bench generate mini --kind image --repeats 3"))
def generate(
    model: ModelArgument = "mini",
    kind: Kind = "image",
    prompt: Prompt = "a fox, 3d, blue background",
    repeats: Repeats = 3,
    vocabulary: Annotated[int, typer.Option(help="Size of the large vocabulary.")] = 150_000,
    width: Hidden = 768,
    layers: Layers = 12,
    contexts: Annotated[
        list[int],
        typer.Option("--context", min=1, help="Context length at which to time a decoding step; repeatable."),
    ] = CONTEXTS,
    out: Results = Path("out/bench_generate.json"),
) -> None:
    """Decoding against transformers' `generate` (same weights, grammar and ids) and against its own limits."""
    from anytoken.benchmarks.generate import Sizes, bench_generate

    sizes = Sizes(vocabulary, width, layers, tuple(sorted(contexts)))
    harness.report(bench_generate(load(model), kind, prompt, repeats, sizes), out)


@app.command(epilog=examples("anytoken bench decode mini --repeats 9"))
def decode(
    model: ModelArgument = "mini",
    kind: Kind = "image",
    prompt: Prompt = "a fox, 3d, blue background",
    repeats: Repeats = 9,
    threads: Threads = 1,
    width: Hidden = 768,
    layers: Layers = 12,
    out: Results = Path("out/bench_decode.json"),
) -> None:
    """The engine's decoding step against the model's own layers: same weights, same ids."""
    import torch

    from anytoken.benchmarks.generate import Sizes, bench_decode

    torch.set_num_threads(threads)
    harness.report(bench_decode(load(model), kind, prompt, repeats, Sizes(width=width, layers=layers)), out)


@app.command(
    epilog=examples(
        "anytoken bench score mini --answers animals.txt",
        "anytoken bench score mini --naming data/sets/emoji/images.jsonl",
    )
)
def score(
    model: ModelArgument = "mini",
    answers: Annotated[
        Path | None, typer.Option(help="Text file with one answer per line; by default the emoji names.")
    ] = None,
    naming: Annotated[
        Path | None,
        typer.Option(help="Records with captions: also compare generated names with classification."),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Held-out images, with --naming.")] = 200,
    repeats: Repeats = 3,
    out: Results = Path("out/bench_score.json"),
) -> None:
    """Scoring many answers to one image with a single prompt pass, against one forward pass per answer."""
    from anytoken.benchmarks.score import bench_naming, bench_score
    from anytoken.segments import Image
    from anytoken.terminal.prompt_args import read_lines

    labels = read_lines(answers or recipes.assets() / "names.txt")
    image = Image.open(recipes.assets() / "images" / "sample.png")
    opened = load(model)
    figures = bench_score(opened, [image, "What is this?"], labels, repeats)
    figures |= {"naming": bench_naming(opened, naming, count)} if naming else {}
    harness.report(figures, out)
    naming_rows = [
        {key: one["value"] if isinstance(one, dict) else one for key, one in row.items()}
        for row in figures.get("naming", [])
    ]
    harness.show(naming_rows)


@app.command(epilog=examples("anytoken bench embed mini --size 1000 --size 10000"))
def embed(
    model: ModelArgument = "mini",
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            min=100,
            help="Vectors in the index; repeatable; 1k, 10k and 100k by default. 1000000 needs 4 GB of memory.",
        ),
    ] = None,
    kinds: Annotated[
        list[IndexKind] | None, typer.Option("--kind", help="Kind of index; repeatable; all by default.")
    ] = None,
    width: Annotated[int, typer.Option(min=4, help="Dimensions of the vectors.")] = 256,
    count: Annotated[int, typer.Option(min=8, help="Prompts to embed, a mix of names and images.")] = 128,
    repeats: Repeats = 3,
    out: Results = Path("out/bench_embed.json"),
) -> None:
    """Embedding against a plain forward pass; an index's build time, queries per second and recall@10."""
    from anytoken.benchmarks.embed import bench_embed
    from anytoken.segments import Image
    from anytoken.terminal.prompt_args import read_lines

    names = read_lines(recipes.assets() / "names.txt")
    image = Image.open(recipes.assets() / "images" / "sample.png")
    prompts = [image if n % 4 == 0 else names[n % len(names)] for n in range(count)]
    sizes = sizes or [1_000, 10_000, 100_000]
    chosen = [kind.value for kind in kinds or IndexKind]
    save = partial(harness.save, out=out)  # after each row
    harness.report(bench_embed(load(model), prompts, sizes, width, repeats, chosen, save), out)


@app.command(epilog=examples("anytoken bench retrieval mini --scratch-steps 0"))
def retrieval(
    model: ModelArgument = "mini",
    data: Sets = Path("data/sets"),
    shards: Annotated[
        Path, typer.Option(help="Those sets, tokenized with the model's tokenizers: images, videos, speech.")
    ] = Path("data/shards"),
    runs: Annotated[
        Path, typer.Option(help="Where the heads are trained; rerun the command to resume.")
    ] = Path("runs/retrieval"),
    scratch_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of the dual encoder from scratch; by default its recipe's, 0: none."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Held-out prompts per task; all by default.")
    ] = None,
    threads: Threads = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override KEY=VALUE of all three recipes; repeatable.")
    ] = None,
    fill: Annotated[Path | None, typer.Option(help="Markdown file whose retrieval table to update.")] = None,
    out: Results = Path("out/bench_retrieval.json"),
) -> None:
    """Embedding heads trained by the recipes, against untrained states and a dual encoder from scratch."""
    import torch

    from anytoken.benchmarks import retrieval as bench
    from anytoken.emoji_world.report import fill_between

    torch.set_num_threads(threads)
    figures = bench.bench_retrieval(
        load(model, "cpu"), data, shards, runs, scratch_steps, threads, overrides or [], count
    )
    if fill:
        fill_between(fill, "retrieval", bench.markdown(harness.environment() | figures))
    harness.report(figures, out)


@app.command(epilog=examples("anytoken bench serve mini --clients 16 --requests 64"))
def serve(
    model: ModelArgument = "mini",
    prompt: Prompt = "a fox, 3d, blue background",
    kind: Annotated[str, typer.Option(help="Kind of reply.")] = "image",
    clients: Annotated[int, typer.Option(min=2, help="Concurrent clients.")] = 16,
    requests: Annotated[int, typer.Option(min=2, help="Total requests of all clients.")] = 64,
    out: Results = Path("out/bench_serve.json"),
) -> None:
    """A server on this machine: throughput and latency with one client, with many, and beyond its limits.

    Its memory is read before, halfway through and after the many clients' requests: --requests 1000 shows leaks.
    """
    from anytoken.benchmarks.serve import bench_serve

    harness.report(bench_serve(model, prompt, kind, clients, requests), out)


@app.command(epilog=examples("anytoken bench train stages/1_alignment.yaml data_root=data/shards"))
def train(
    stage: Stage = "stages/1_alignment.yaml",
    overrides: Overrides = None,
    repeats: Repeats = 5,
    out: Results = Path("out/bench_train.json"),
) -> None:
    """A training step against transformers' own loss: same weights, same packed batch."""
    import torch

    from anytoken.benchmarks.train import bench_train
    from anytoken.training.config import TrainConfig

    recipe = TrainConfig.load(recipes.find(stage), overrides or [])
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    harness.report(bench_train(recipe, repeats), out)


@app.command(
    epilog=examples("anytoken bench optimizers stages/ablations/optimizers.yaml data_root=data/shards")
)
def optimizers(
    stage: Annotated[str, typer.Argument(help="A stage recipe with Muon and held-out data.")],
    overrides: Overrides = None,
    rates: Annotated[
        list[float], typer.Option("--rate", min=0, help="Learning rate of an AdamW run; repeatable.")
    ] = [1e-3, 2e-3, 4e-3],  # noqa: B006
    runs: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are kept.")] = Path(
        "runs/optimizers"
    ),
    out: Annotated[Path, typer.Option(help="JSON file for the results; the curve goes next to it.")] = Path(
        "out/bench_optimizers.json"
    ),
) -> None:
    """A recipe with its own optimizer and with AdamW at several rates: held-out bits at equal ids, with a curve."""
    from anytoken.benchmarks.optimizers import compare_optimizers, draw
    from anytoken.training.config import TrainConfig

    recipe = TrainConfig.load(recipes.find(stage), overrides or [])
    figures = compare_optimizers(recipe, rates, runs)
    harness.report(figures, out)
    print(draw(figures, out.with_suffix(".svg")))


@app.command(epilog=examples("anytoken bench data --shards data/shards"))
def data(
    shards: Annotated[
        Path, typer.Option(help="Folder of tokenized sets; if missing, the tiny sets are tokenized.")
    ] = Path("data/shards"),
    repeats: Repeats = 5,
    out: Results = Path("out/bench_data.json"),
) -> None:
    """Packing efficiency, data loading against a training step, and reading against webdataset and datasets."""
    from tempfile import TemporaryDirectory

    from anytoken.benchmarks.data import bench_data, shards_or_tiny

    with TemporaryDirectory() as scratch:
        harness.report(bench_data(shards_or_tiny(shards, Path(scratch)), Path(scratch), repeats), out)


@app.command(epilog=examples("anytoken bench quantize mini --repeats 5"))
def quantize(
    model: ModelArgument = "mini",
    repeats: Repeats = 5,
    each: Annotated[int, typer.Option(min=1, help="Held-out prompts per direction.")] = 4,
    out: Results = Path("out/bench_quantize.json"),
) -> None:
    """int8 against float32 weights: memory, decoding speed, and bits per token on the held-out files."""
    from anytoken.benchmarks.quantize import bench_quantize

    harness.report(bench_quantize(model, repeats, each), out)


@app.command(epilog=examples("anytoken bench experts --hidden 512 --experts 8 --top-k 2"))
def experts(
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size of both decoders.")] = 512,
    experts: Annotated[int, typer.Option(min=2, help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 2,
    repeats: Repeats = 5,
    out: Results = Path("out/bench_experts.json"),
) -> None:
    """A mixture-of-experts training step against a dense one of equal active parameters, each with its MFU."""
    from anytoken.benchmarks.experts import bench_experts

    harness.report(bench_experts(hidden, experts, top_k, repeats), out)


@app.command(epilog=examples("anytoken bench model mini --rows 8"))
def model(
    folder: Annotated[
        str, typer.Argument(help="Model whose shape and modalities to use: 'mini' or a checkpoint folder.")
    ] = "mini",
    rows: Annotated[int, typer.Option(min=1, help="Batch size at the checkpoint's own vocabulary.")] = 8,
    large_rows: Annotated[int, typer.Option(min=1, help="Batch size at the large vocabulary.")] = 4,
    text_size: Annotated[int, typer.Option(min=1, help="Text ids in the large vocabulary.")] = 150_000,
    context: Annotated[int, typer.Option(min=16, help="Sequence length in ids.")] = 256,
    repeats: Repeats = 3,
    out: Results = Path("out/bench_model.json"),
) -> None:
    """A training step against stock Qwen3-MoE of the same shape; the chunked loss against full logits."""
    from anytoken.benchmarks.model import Sizes, bench_model
    from anytoken.training.initialize import checkpoint_folder

    path = checkpoint_folder(folder)
    large = Sizes(path, large_rows, context, text_size)
    harness.report(bench_model(Sizes(path, rows, context), large, repeats), out)


@app.command(epilog=examples("anytoken bench tokenizers runs/tokenizers/image --batch 8 --batch 32"))
def tokenizers(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Tokenizer folders; by default those of the bundled model.")
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size; repeatable.")
    ] = None,
    repeats: Repeats = 3,
    out: Results = Path("out/bench_tokenizers.json"),
    device: Annotated[str, typer.Option(help="cpu (one thread), cuda or auto.")] = "cpu",
) -> None:
    """Encoding and decoding: batches against single items, speech against EnCodec and DAC, on one thread."""
    from anytoken.benchmarks.tokenizers import bench_tokenizers
    from anytoken.training.initialize import checkpoint_folder

    own = sorted(path.parent for path in (checkpoint_folder("mini") / "tokenizers").glob("*/config.json"))
    harness.report(bench_tokenizers(folders or own, batches or [8, 32], repeats, device), out)


@app.command(epilog=examples("anytoken bench gpu --out out/bench_gpu.json", "anytoken bench gpu --tiny"))
def gpu(
    out: Annotated[Path, typer.Option(help="The JSON file of figures, written after every case.")] = Path(
        "out/bench_gpu.json"
    ),
    part: Annotated[
        str | None,
        typer.Option(help="One part only: equality, train, decode or codecs; the others are kept."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time of all parts together.")] = 8.5,
    seconds: Annotated[float, typer.Option(min=1, help="Time of one part, with --part.")] = 240,
    tiny: Annotated[bool, typer.Option("--tiny", help="Everything in miniature, on a CPU.")] = False,
) -> None:
    """One large GPU in nine minutes: training MFU, decoding, tokenizers and numeric equality, against transformers."""
    from anytoken.benchmarks.gpu import bench_gpu, rows_of, run_part

    figures = run_part(part, out, seconds, tiny) if part else bench_gpu(out, minutes, tiny)
    harness.show(rows_of(figures))
    print(out)
