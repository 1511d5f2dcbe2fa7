"""`anytoken bench`: our speed beside a named peer's, both sides taking turns in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anytoken.commands.options import ModelArgument, Overrides, examples, load

app = typer.Typer(no_args_is_help=True, help="Measure speed beside a named peer, in the same run.")
CONTEXTS = [128, 512, 1024, 2048, 4096]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of each side; the median counts.")]


@app.command(epilog=examples("anytoken bench generate mini --kind image --repeats 3"))
def generate(
    model: ModelArgument = "mini",
    kind: Annotated[str, typer.Option(help="What is generated.")] = "image",
    prompt: Annotated[str, typer.Option(help="What is asked for.")] = "a fox, 3d, blue background",
    repeats: Repeats = 3,
    vocabulary: Annotated[int, typer.Option(help="Ids of the large vocabulary.")] = 150_000,
    width: Annotated[int, typer.Option(help="Hidden size of the large random model.")] = 768,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 12,
    contexts: Annotated[
        list[int], typer.Option("--context", min=1, help="Lengths at which a step is timed.")
    ] = CONTEXTS,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_generate.json"),
) -> None:
    """Decoding beside `generate` of transformers (same weights, grammar and ids), and beside its own limits."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.generate import Sizes, bench_generate

    sizes = Sizes(vocabulary, width, layers, tuple(sorted(contexts)))
    harness.report(bench_generate(load(model), kind, prompt, repeats, sizes), out)


@app.command(epilog=examples("anytoken bench score mini --answers animals.txt"))
def score(
    model: ModelArgument = "mini",
    answers: Annotated[
        Path | None, typer.Option(help="A text file with one answer per line; by default the names of emoji.")
    ] = None,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_score.json"),
) -> None:
    """Scoring many answers to one image with the prompt read once, against one forward for every answer."""
    from anytoken import recipes
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.score import bench_score
    from anytoken.segments import Image
    from anytoken.terminal.prompt_args import read_lines

    labels = read_lines(answers or recipes.assets() / "names.txt")
    image = Image.open(recipes.assets() / "images" / "sample.png")
    harness.report(bench_score(load(model), [image, "What is this?"], labels, repeats), out)


@app.command(epilog=examples("anytoken bench embed mini --size 1000 --size 10000"))
def embed(
    model: ModelArgument = "mini",
    sizes: Annotated[
        list[int] | None,
        typer.Option("--size", min=100, help="Vectors of an index; 1k, 10k and 100k by default."),
    ] = None,
    width: Annotated[int, typer.Option(min=4, help="Their dimensions.")] = 256,
    count: Annotated[
        int, typer.Option(min=8, help="Prompts to embed: names, and images between them.")
    ] = 128,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_embed.json"),
) -> None:
    """Embedding beside a bare forward pass; an index's build time, queries per second and recall@10."""
    from anytoken import recipes
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.embed import bench_embed
    from anytoken.segments import Image
    from anytoken.terminal.prompt_args import read_lines

    names = read_lines(recipes.assets() / "names.txt")
    image = Image.open(recipes.assets() / "images" / "sample.png")
    prompts = [image if n % 4 == 0 else names[n % len(names)] for n in range(count)]
    harness.report(bench_embed(load(model), prompts, sizes or [1_000, 10_000, 100_000], width, repeats), out)


@app.command(epilog=examples("anytoken bench serve mini --clients 16 --requests 64"))
def serve(
    model: ModelArgument = "mini",
    prompt: Annotated[str, typer.Option(help="What is asked for.")] = "a fox, 3d, blue background",
    kind: Annotated[str, typer.Option(help="Kind of reply.")] = "image",
    clients: Annotated[int, typer.Option(min=2, help="Concurrent clients.")] = 16,
    requests: Annotated[int, typer.Option(min=2, help="Requests of all clients together.")] = 64,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_serve.json"),
) -> None:
    """A server on this machine: throughput and latency with one client, with many, and beyond its limits."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.serve import bench_serve

    harness.report(bench_serve(model, prompt, kind, clients, requests), out)


@app.command(epilog=examples("anytoken bench train stages/1_alignment.yaml data_root=data/shards"))
def train(
    stage: Annotated[str, typer.Argument(help="A stage recipe.")] = "stages/1_alignment.yaml",
    overrides: Overrides = None,
    repeats: Repeats = 5,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_train.json"),
) -> None:
    """A training step beside transformers' own loss: same weights, same packed batch."""
    import torch

    from anytoken import recipes
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.train import bench_train
    from anytoken.training.config import TrainConfig

    recipe = TrainConfig.load(recipes.find(stage), overrides or [])
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    harness.report(bench_train(recipe, repeats), out)


@app.command(epilog=examples("anytoken bench data --shards data/shards"))
def data(
    shards: Annotated[
        Path,
        typer.Option(
            help="The folder of the stages' tokenized sets; without it, the tiny sets are tokenized."
        ),
    ] = Path("data/shards"),
    repeats: Repeats = 5,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_data.json"),
) -> None:
    """How full packed rows are, loading beside a training step, and reading beside webdataset and datasets."""
    from tempfile import TemporaryDirectory

    from anytoken.benchmarks import harness
    from anytoken.benchmarks.data import bench_data, shards_or_tiny

    with TemporaryDirectory() as scratch:
        harness.report(bench_data(shards_or_tiny(shards, Path(scratch)), Path(scratch), repeats), out)


@app.command(epilog=examples("anytoken bench quantize mini --repeats 5"))
def quantize(
    model: ModelArgument = "mini",
    repeats: Repeats = 5,
    each: Annotated[int, typer.Option(min=1, help="Held-out questions a direction.")] = 4,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_quantize.json"),
) -> None:
    """Weights in int8 beside float32: memory, decoding, and bits a token on the held-out files."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.quantize import bench_quantize

    harness.report(bench_quantize(model, repeats, each), out)


@app.command(epilog=examples("anytoken bench experts --hidden 512 --experts 8 --top-k 2"))
def experts(
    hidden: Annotated[int, typer.Option(min=64, help="Width of both decoders.")] = 512,
    experts: Annotated[int, typer.Option(min=2, help="Experts of every layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token passes.")] = 2,
    repeats: Repeats = 5,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_experts.json"),
) -> None:
    """A training step with experts beside a dense one of equal active parameters; each as a share of the peak."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.experts import bench_experts

    harness.report(bench_experts(hidden, experts, top_k, repeats), out)


@app.command(epilog=examples("anytoken bench model mini --rows 8"))
def model(
    folder: Annotated[
        str, typer.Argument(help="Whose shape and modalities: 'mini' or a checkpoint folder.")
    ] = "mini",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch at the checkpoint's own vocabulary.")] = 8,
    large_rows: Annotated[int, typer.Option(min=1, help="Rows of a batch at the large vocabulary.")] = 4,
    text_size: Annotated[int, typer.Option(min=1, help="Text ids of the large vocabulary.")] = 150_000,
    context: Annotated[int, typer.Option(min=16, help="Ids of a row.")] = 256,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_model.json"),
) -> None:
    """A training step beside stock Qwen3-MoE of the same shape; the head beside computing every logit."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.model import Sizes, bench_model
    from anytoken.training.initialize import checkpoint_folder

    path = checkpoint_folder(folder)
    large = Sizes(path, large_rows, context, text_size)
    harness.report(bench_model(Sizes(path, rows, context), large, repeats), out)


@app.command(epilog=examples("anytoken bench tokenizers runs/tokenizers/image --batch 8 --batch 32"))
def tokenizers(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Tokenizer folders; without any, those of the bundled model.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Items at once.")] = None,
    repeats: Repeats = 3,
    out: Annotated[Path, typer.Option(help="The JSON file of figures.")] = Path("out/bench_tokenizers.json"),
    device: Annotated[str, typer.Option(help="cpu, on one thread; or cuda, or auto.")] = "cpu",
) -> None:
    """Encoding and decoding, many items beside one by one, and speech beside EnCodec and DAC; on one thread."""
    from anytoken.benchmarks import harness
    from anytoken.benchmarks.tokenizers import bench_tokenizers
    from anytoken.training.initialize import checkpoint_folder

    own = sorted(path.parent for path in (checkpoint_folder("mini") / "tokenizers").glob("*/config.json"))
    harness.report(bench_tokenizers(folders or own, batches or [8, 32], repeats, device), out)
