"""Every program of inference/ and the notebook run, on a tiny random model; with the bundled one in the slow tests."""

import ast
import json
import runpy
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from anytoken.inference import checkpoint
from anytoken.segments import Image, Speech, open_segment

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "generate.py": [["a fox", "PICTURE", "--output", "text", "image", "speech"]],
    "stream.py": [["a fox", "--output", "text", "image", "speech", "dna"]],
    "batch.py": [
        ["a fox", "PROMPTS.txt", "--output", "image", "--num-return", "2", "--temperature", "image=0.5"],
        ["a fox", "--output", "text"],
    ],
    "transformers_generate.py": [
        ["a fox", "a red apple", "--output", "text", "image", "--max-new-tokens", "90"],
        ["a fox", "--output", "text", "--num-beams", "2", "--max-new-tokens", "20"],
    ],
    "chat.py": [[]],
}


@pytest.fixture(scope="module")
def tiny(save_tiny, tmp_path_factory):
    """A folder that holds a random model named mini, of text, pictures, speech and DNA."""
    from anytoken.tokenizers.base import load_tokenizer
    from anytoken.tokenizers.image import ImageTokenizer
    from anytoken.tokenizers.speech import SpeechTokenizer

    torch.manual_seed(0)
    tokenizers = {
        "image": ImageTokenizer(8, 1, 1, 4, 1, levels=[4, 3], side_px=32),
        "speech": SpeechTokenizer(8, 1, 1, levels=[4, 3], max_frames=40),
        "dna": load_tokenizer(
            ROOT / "anytoken/pretrained/mini/tokenizers/dna"
        ),  # an untrained one is not saved
    }
    folder = tmp_path_factory.mktemp("pretrained")
    save_tiny(folder / "mini", tokenizers, 384)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a picture and a file of prompts."""
    monkeypatch.chdir(tmp_path)
    Image(np.full((32, 32, 3), 200, np.uint8)).save("cat.png")
    Path("PROMPTS.txt").write_text("a cat\n\na dog\n")
    return tmp_path


def run_program(name, words, monkeypatch):
    words = ["cat.png" if word == "PICTURE" else word for word in words]
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(sys, "stdin", StringIO("@cat.png What is this?\nagain\nundo\nundo\n"))
    runpy.run_path(str(ROOT / "inference" / name), run_name="__main__")


def run_notebook():
    """Run the code cells in order, and show what a cell's last line gives as a notebook would."""
    cells = json.loads((ROOT / "inference/notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "notebook", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)
            html = getattr(value, "_repr_html_", None)
            shown.append(html() if html else repr(value))
    return shown


@pytest.mark.parametrize(
    ("name", "words"),
    [(name, words) for name, runs in PROGRAMS.items() for words in runs],
    ids=lambda value: str(value)[:24],
)
def test_a_program_runs(name, words, tiny, workplace, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tiny)
    run_program(name, words, monkeypatch)
    assert capsys.readouterr().out
    made = [
        path
        for path in workplace.rglob("*.*")
        if "out" in path.parts and path.suffix not in (".json", ".jsonl")
    ]
    for path in made:
        open_segment(path)
    assert made or "text" in words or name == "chat.py"


def test_every_program_has_a_test():
    assert {path.name for path in (ROOT / "inference").glob("*.py")} == set(PROGRAMS)


def test_sound_that_is_written_while_it_is_made_is_the_clip(tiny, workplace, monkeypatch):
    import anytoken

    monkeypatch.setattr(checkpoint, "PRETRAINED", tiny)
    run_program("stream.py", ["a", "--output", "speech", "--seed", "4"], monkeypatch)
    clip = anytoken.load("mini").generate("a", "speech", seed=4).speech[0]
    written = Speech.open("out/stream/speech.wav")
    assert np.abs(written.samples - clip.samples).max() <= 1.5 / 2**15


def test_the_notebook_runs_and_holds_no_output(tiny, workplace, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRETRAINED", tiny)
    shown = run_notebook()
    assert len(shown) >= 10 and "data:audio/wav" in "".join(shown)
    cells = json.loads((ROOT / "inference/notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
def test_programs_and_notebook_run_on_mini(workplace, monkeypatch):
    for name, runs in PROGRAMS.items():
        for words in runs:
            run_program(name, words, monkeypatch)
    assert "data:audio/wav" in "".join(run_notebook())
