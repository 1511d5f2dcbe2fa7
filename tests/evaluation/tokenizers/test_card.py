"""Cards: every kind gets one, small and whole, whose numbers are those of figures.json."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.evaluation.tokenizers import card as cards
from anytoken.evaluation.tokenizers.card import make_card, read_curve, render
from anytoken.evaluation.tokenizers.card_samples import GAP_PX, number, share, table
from anytoken.segments import Image, Speech
from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.speech import SpeechTokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.tokenizers.video import VideoTokenizer
from anytoken.training.tokenizer.recipe import TokenizerRecipe

ROOT = Path(__file__).parents[3]
TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "levels": [4, 3]}
KINDS = ("image", "speech", "video", "dna", "text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, dna_folder):
    """A saved tokenizer of each kind, two of them with the logs that training leaves."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tokenizers")
    ImageTokenizer(**TINY, refine_width=8, refine_depth=1).save_pretrained(root / "image")
    SpeechTokenizer(**TINY).save_pretrained(root / "speech")
    VideoTokenizer(**TINY).save_pretrained(root / "video")
    TextTokenizer.train(["a training, flat, red background", "M K L V"], 300).save_pretrained(root / "text")
    training = {
        "recipe": {"kind": "image", "steps": 20, "lr": 0.002},
        "steps": 20,
        "seconds": 12.5,
        "last": {"loss": 0.25},
    }
    (root / "image" / "training.json").write_text(json.dumps(training))
    lines = [{"step": step, "seconds": step / 2, "loss": 1 / step, "psnr_db": step} for step in (10, 20, 10)]
    (root / "image" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {kind: root / kind for kind in KINDS} | {"dna": dna_folder}


@pytest.fixture(scope="module")
def made(folders, sets, tmp_path_factory):
    """The card folder of each kind."""
    root = tmp_path_factory.mktemp("cards")
    for kind in KINDS:
        make_card(folders[kind], sets, root / kind, count=6)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_is_small_and_its_files_are_there(made, kind):
    page = (made / kind / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert "figures.json" in links and all((made / kind / name).is_file() for name in links)
    assert sum(path.stat().st_size for path in (made / kind).iterdir()) < 150_000
    assert (
        "CC-BY-4.0" in page and "anytoken tokenizer eval" in page and "None" not in page and "nan" not in page
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_made_of_figures_json_alone(made, kind):
    figures = json.loads((made / kind / "figures.json").read_text())
    assert render(figures) == (made / kind / "README.md").read_text()
    rows = len(
        set(re.findall(r"[\d.,]+", render({**figures, "bits_per_unit": 123456.0})))
        ^ set(re.findall(r"[\d.,]+", render(figures)))
    )
    assert rows, "a changed figure must change the page"


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_of_the_machine_is_on_the_page(made, kind, tmp_path_factory):
    text = (made / kind / "README.md").read_text() + (made / kind / "figures.json").read_text()
    assert str(tmp_path_factory.getbasetemp()) not in text


def test_sheets_show_originals_above_what_came_back(made):
    for kind in ("image", "video"):
        sheet = Picture.open(made / kind / "samples.png")
        assert sheet.height == 2 * 64 + GAP_PX and sheet.width > 6 * 64


def test_sounds_come_in_pairs_of_two_voices(made):
    for n in (1, 2):
        before = Speech.open(made / "speech" / f"sample_{n}.flac")
        after = Speech.open(made / "speech" / f"sample_{n}_decoded.flac")
        assert before.seconds == pytest.approx(after.seconds, abs=0.02)
    page = (made / "speech" / "README.md").read_text()
    assert "awb" in page and "rms" in page and "synthetic" in page


def test_training_is_on_the_page_with_its_curve(made):
    page = (made / "image" / "README.md").read_text()
    assert "![The training curve](curve.png)" in page and "lr: 0.002" in page and "| seconds | 12.5 |" in page
    assert "curve.png" not in (made / "video" / "README.md").read_text()


def test_a_step_logged_twice_counts_once(folders):
    assert [line["step"] for line in read_curve(folders["image"] / "metrics.jsonl")] == [10, 20]
    assert read_curve(folders["image"] / "nowhere.jsonl") == []


def test_a_missing_package_is_one_clear_error(folders, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "find_spec", lambda name: None if name == "matplotlib" else True)
    with pytest.raises(TokenizerError, match=r"matplotlib: pip install 'anytoken\[eval\]'"):
        make_card(folders["text"], sets, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_the_command_prints_figures_or_writes_a_card(folders, sets, tmp_path):
    words = ["tokenizer", "eval", str(folders["text"]), "--data", str(sets), "--count", "3"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "codebook usage" in shown.stdout and "{" not in shown.stdout
    printed = CliRunner().invoke(app, [*words, "--json"])
    assert printed.exit_code == 0 and json.loads(printed.stdout)["exact"] == 1.0
    written = CliRunner().invoke(app, [*words, "--card", str(tmp_path / "card")])
    assert written.exit_code == 0 and written.stdout.strip().endswith("README.md")
    assert (tmp_path / "card" / "figures.json").is_file()
    missing = CliRunner().invoke(app, ["tokenizer", "eval", str(tmp_path), "--data", str(sets)])
    assert missing.exit_code == 2


@pytest.mark.parametrize(
    ("value", "text"), [(1, "100 %"), (0.99999, "99.9 %"), (0.5, "50.0 %"), (0, "0.0 %")]
)
def test_only_all_is_a_hundred_percent(value, text):
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (999.6, "1,000"), (638.2, "638"), (64, "64"), (12345, "12,345")]
)
def test_numbers_have_three_digits_that_matter(value, text):
    assert number(value) == text


def test_the_overview_has_a_line_for_each_card_and_fills_a_page(made, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tokenizers -->\nold\n<!-- /tokenizers -->\nafter\n")
    done = CliRunner().invoke(app, ["tokenizer", "overview", str(made), "--fill", str(page)])
    assert done.exit_code == 0, done.output
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    links = [re.match(r"\| \[(\w+)\]\(([^)]+)\)", row).groups() for row in rows]
    assert [kind for kind, _ in links] == sorted(KINDS)
    assert all((tmp_path / target / "figures.json").is_file() for _, target in links)
    figures = json.loads((made / "image" / "figures.json").read_text())
    row = next(row for row in rows if row.startswith("| [image]"))
    assert f"{figures['psnr_db']:.2f}" in row and f"{figures['thumbnail_psnr_db']:.2f}" in row
    assert "old" not in page.read_text() and page.read_text().startswith("before\n")
    with pytest.raises(TokenizerError, match=r"no figures\.json"):
        cards.overview(tmp_path)


def test_the_overview_says_which_tokenizers_a_model_has(made, folders, save_tiny, tmp_path):
    model = save_tiny(tmp_path / "model", {"image": load_tokenizer(folders["image"])}, 64)
    cards_of = tmp_path / "cards"
    shutil.copytree(made / "image", cards_of / "image")
    shutil.copytree(made / "speech", cards_of / "speech" / "25hz")
    done = CliRunner().invoke(app, ["tokenizer", "overview", str(cards_of), "--model", str(model)])
    assert done.exit_code == 0, done.output
    cells = [line.split(" | ")[:2] for line in done.stdout.splitlines()]
    assert cells == [
        ["| tokenizer", "part of"],
        ["| ---", "---"],
        ["| image", str(model)],
        ["| speech/25hz", ""],
    ]


def test_the_pages_of_this_repository_hold_the_overview_of_its_cards(monkeypatch):
    monkeypatch.chdir(ROOT)
    prints = json.loads((ROOT / "anytoken/pretrained/mini/fingerprints.json").read_text()).values()
    for name in ("docs/results.md", "tokenizers/README.md"):
        assert cards.overview(Path("tokenizers"), {"mini": prints}, Path(name)) in Path(name).read_text()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Photographs and recordings of a user, in other sizes and rates than the sets have."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for n in range(3):
        Image(np.full((110, 220, 3), 9 * n, np.uint8)).save(folder / f"fox|{n}.png")
        Speech(rng.uniform(-0.5, 0.5, 40_000).astype(np.float32), 44_100).save(folder / f"{n}.wav")
    return folder


@pytest.mark.parametrize(("kind", "files"), [("image", "*.png"), ("speech", ".")])
def test_own_files_take_the_place_of_the_sets(kind, files, folders, own, tmp_path):
    words = ["tokenizer", "eval", str(folders[kind]), "--data", str(own), "--files", files]
    done = CliRunner().invoke(app, [*words, "--card", str(tmp_path)])
    assert done.exit_code == 0, done.output
    figures, page = json.loads((tmp_path / "figures.json").read_text()), (tmp_path / "README.md").read_text()
    assert (figures["items"], figures["files"], figures["bars"], figures["data"]) == (3, files, [], [])
    assert "chosen by the author of this card" in page and f"--files {shlex.quote(files)}" in page
    if kind == "image":  # at most 200 pixels wide each
        assert Picture.open(tmp_path / "samples.png").size == (3 * (200 + GAP_PX) - GAP_PX, 2 * 100 + GAP_PX)
    assert "licences" not in page and "never saw in any style" not in page and "words" not in figures
    compared = CliRunner().invoke(app, ["tokenizer", "compare", *words[2:]])
    assert compared.exit_code == 0 and f"| tokenizer | {kind} |" in compared.stdout


def test_files_that_are_not_there_are_an_error(folders, own):
    for kind, files, says in [
        ("image", "*.jpg", "holds no image files; expected .png, .jpg"),
        ("text", "*.txt", "measured on texts of the built sets"),
    ]:
        words = ["tokenizer", "eval", str(folders[kind]), "--data", str(own), "--files", files]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 2 and says in " ".join(done.stderr.split())


def test_a_bar_in_a_name_does_not_break_a_table():
    assert table([("says",), ("a|b",)]) == "| says |\n| --- |\n| a\\|b |"


def test_tokenizers_of_one_modality_are_compared_side_by_side(folders, sets, tmp_path):
    from anytoken.tokenizers.dna.kmer_bpe import DNAKmerTokenizer

    kmer = DNAKmerTokenizer(3).save_pretrained(tmp_path / "kmer")
    words = ["tokenizer", "compare", str(folders["dna"]), str(kmer), "--data", str(sets), "--count", "3"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == [folders["dna"].name, "kmer"]
    rows = {
        row[0]: row[1:]
        for row in (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
        if row[1:]
    }
    assert rows["tokenizer"] == ["dna", "dna_kmer"] and rows["codebooks"] == ["256", "69"]
    assert (
        0.33 < float(rows["codes per base"][0]) < 0.36
        and rows["genes reconstructed exactly"] == ["100 %"] * 2
    )
    assert all(one["genome_exact"] for one in figures.values())
    other = CliRunner().invoke(
        app, ["tokenizer", "compare", str(kmer), str(folders["text"]), "--data", str(sets)]
    )
    assert other.exit_code == 2 and "one modality" in other.stderr


MINI = ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers"
CARDS = {MINI / "image": "image/layered", MINI / "video": "video/layered", MINI / "speech": "speech/content"}
CARDS |= {path: path.parent.relative_to(ROOT / "tokenizers") for path in ROOT.glob("tokenizers/*/*/weights")}


@pytest.mark.parametrize(
    ("weights", "card"), sorted(CARDS.items()), ids=map(str, dict(sorted(CARDS.items())).values())
)
def test_published_weights_are_those_of_their_card_and_recipe(weights, card):
    tokenizer, card = load_tokenizer(weights), ROOT / "tokenizers" / card
    figures = json.loads((card / "figures.json").read_text(encoding="utf-8"))
    recipe = TokenizerRecipe.load(card / "recipe.yaml")
    assert tokenizer.fingerprint() == figures["fingerprint"]
    assert (recipe.kind, figures["training"]["recipe"]["steps"]) == (tokenizer.kind, recipe.steps)
    assert tokenizer.config.items() >= recipe.config.items()
