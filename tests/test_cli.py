"""The command line: quick help, one red line and exit code 2 for a mistake, prompt parts in order, recipes."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from anytoken import recipes
from anytoken.cli import app
from anytoken.segments import Image

ROOT = Path(__file__).parents[1]
TOKENIZERS = ROOT / "anytoken" / "pretrained" / "mini" / "tokenizers"


@pytest.fixture(scope="module")
def checkpoint(save_tiny, tmp_path_factory):
    """A random model of text and pictures, saved as a checkpoint folder."""
    import torch

    from anytoken.tokenizers.image import ImageTokenizer

    torch.manual_seed(0)
    image = ImageTokenizer(
        width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, levels=[4, 3], side_px=16
    )
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", {"image": image}, 128)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    Image(np.full((16, 16, 3), 200, np.uint8)).save(path)
    return path


def run(*words, **options):
    return CliRunner().invoke(app, list(map(str, words)), **options)


def complaint(result) -> str:
    """The one red line of a failed command; fails unless there is exactly one, no traceback, and exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("anytoken: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("anytoken: ").strip()


def test_help_names_every_command_and_answers_at_once():
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-m", "anytoken", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0 and time.perf_counter() - began < 5
    names = "demo chat generate tokenize detokenize tokenizer data train eval info recipes"
    for command in names.split(" "):
        assert re.search(rf"\b{command}\b", found.stdout), command


def test_help_imports_nothing_heavy():
    code = (
        "import sys, anytoken.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bogus"], "bogus"),
        (["train"], "stage"),
        (["generate", "hello", "--bogus"], "--bogus"),
        (["generate", "--image"], "--image needs a value"),
        (["generate", "no-such-cat.png"], "no-such-cat.png"),
        (["generate", "no-such-cat.bmp"], "no-such-cat.bmp"),
        (["generate", "no-such-cat.mkv"], "no-such-cat.mkv"),
        (["generate", "--image", "no-such-cat.png"], "no-such-cat.png"),
        (["generate", "hello", "--model", "no-such-model"], "no-such-model"),
        (["train", "stages/no_such_stage.yaml"], "stages/no_such_stage.yaml"),
        (["train", "stages/lora.yaml", "bogus=1"], "bogus"),
        (["train", "stages/lora.yaml", "stepz=1"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (["train", "stages/lora.yaml", "steps=-1"], "steps must be greater than 0, got -1"),
        (["trian", "stages/lora.yaml"], "Did you mean 'train'?"),
        (["generate", "hello", "--temprature", "1"], "--temperature"),
        (["generate", "hello", "--seed", "x"], "'--seed': it must be a valid integer"),
        (["generate", "hello", "--device", "cudda"], "'cudda' is not usable here (did you mean 'cuda'?)"),
        (["generate", "hello", "-m", "minni"], "(did you mean 'mini'?)"),
        (["init", "--backbone", "no/such", "--tokenizers", TOKENIZERS, "--out", "o"], "no folder 'no/such'"),
        (["plan", "stages/lora.yaml", "--gpu", "h10"], "did you mean 'h100'?"),
        (["plan", "stages/lora.yaml", "init_from=mni"], "did you mean 'mini'?"),
        (["serve", "--set", "max_waitin=3"], "did you mean 'max_waiting'?"),
        (["serve", "--set", "max_waiting=-3"], "max_waiting must be greater than or equal to 0, got '-3'"),
        (["detokenize", "no-such-ids.json"], "no-such-ids.json"),
        (["tokenizer", "train", "no-such-recipe", "--data", "d", "--out", "o"], "no-such-recipe"),
        (["data", "tokenize", "no-such.jsonl", "--tokenizers", "t", "--out", "o"], "t holds no tokenizer"),
        (["recipes", "copy", "stages/1_aligment.yaml"], "stages/1_alignment.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in complaint(run(*words))
    assert not list(tmp_path.iterdir()), "a failed command left something behind"


def test_debug_shows_the_traceback():
    found = run("detokenize", "no-such-ids.json", "--debug")
    assert isinstance(found.exception, ValueError) and "no-such-ids.json" in str(found.exception)


def test_a_bare_call_shows_help_and_complains_of_nothing():
    found = run()
    assert found.exit_code == 2 and "Usage" in found.stdout and not found.stderr


def test_generate_writes_media_and_json_that_detokenizes_to_the_same(checkpoint, picture, tmp_path):
    out = tmp_path / "out"
    words = ["generate", picture, "what is this?", "-m", checkpoint, "--out", out, "--seed", 3, "--json"]
    found = run(*words, "-o", "text, image", "--max-new-tokens", 60)
    assert found.exit_code == 0, found.stderr
    reply = json.loads(found.stdout)
    assert [part["type"] for part in reply["segments"]] == ["text", "image"]
    assert reply["usage"]["new_tokens"] == len(reply["ids"]) <= 60
    # Random weights may have their text cut, never the picture.
    assert reply["finish_reason"] in ("stop", "length")
    made = Image.open(reply["segments"][1]["image"])
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(reply["ids"][:-1]))
    again = run("detokenize", ids, "-m", checkpoint, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert Image.open(again.stdout.splitlines()[-1]) == made


def test_several_replies_are_several_lines_and_files(checkpoint, tmp_path):
    found = run(
        "generate", "a red apple", "-m", checkpoint, "-o", "image", "--num-return", 2, "--out", tmp_path / "o"
    )
    assert [Path(line).name for line in found.stdout.split()] == ["image-000.png", "image-001.png"]


def test_generate_reads_what_is_piped_in_and_gives_the_likeliest(checkpoint, tmp_path):
    words = [
        "generate",
        "-m",
        checkpoint,
        "-o",
        "image",
        "--seed",
        3,
        "--json",
        "--out",
        tmp_path,
        "--min-p",
        0.1,
    ]
    piped = run(*words, input="a red apple")
    assert piped.exit_code == 0, piped.stderr
    ids = json.loads(piped.stdout)["ids"]
    assert ids == json.loads(run(*words, "a red apple").stdout)["ids"]
    several = [
        json.loads(line)["ids"] for line in run(*words, "a red apple", "--num-return", 4).stdout.splitlines()
    ]
    ranked = run(*words, "a red apple", "--num-return", 4, "--best-of", 4).stdout.splitlines()
    best = json.loads(run(*words, "a red apple", "--best-of", 4).stdout)["ids"]
    assert best == json.loads(ranked[0])["ids"] and several[0] == ids
    assert sorted(json.loads(line)["ids"] for line in ranked) == sorted(several)


def test_tokenize_prints_ids_that_detokenize_reads(checkpoint, picture, tmp_path):
    found = run("tokenize", "what is this?", picture, "-m", checkpoint)
    assert found.exit_code == 0, found.stderr
    again = run("detokenize", "-", "-m", checkpoint, "--out", tmp_path / "o", input=found.stdout)
    assert again.stdout.splitlines() == ["what is this?", str(tmp_path / "o" / "image-000.png")]


def test_a_stream_is_the_reply_line_by_line(checkpoint, tmp_path):
    words = [
        "generate",
        "-",
        "-m",
        checkpoint,
        "-o",
        "text,image",
        "--seed",
        0,
        "--max-new-tokens",
        60,
        "--json",
    ]
    streamed = run(*words, "--stream", "--out", tmp_path / "a", input="a red apple\n")
    assert streamed.exit_code == 0, streamed.stderr
    *events, last = map(json.loads, streamed.stdout.splitlines())
    whole = json.loads(run(*words, "--out", tmp_path / "b", input="a red apple\n").stdout)
    assert last["ids"] == whole["ids"] and last["event"] == "Reply"
    assert "".join(event.get("text", "") for event in events) == whole["segments"][0]["text"]
    assert Image.open(tmp_path / "a/image-000.png") == Image.open(tmp_path / "b/image-000.png")
    assert "num-return" in complaint(run(*words, "--stream", "--num-return", 2))


def test_chat_goes_on_where_it_was_saved(checkpoint, picture, tmp_path):
    words = ["chat", "-m", checkpoint, "--out", tmp_path / "o", "--seed", 0, "--max-new-tokens", 20]
    first = run(
        *words, input=f"/image '{picture}'\nwho?\n/regenerate 3\n/edit what?\n/save {tmp_path / 'kept'}\n"
    )
    assert first.exit_code == 0, first.stderr
    again = run(*words, "--load", tmp_path / "kept", input="/undo\n/undo\n/load nowhere\n")
    assert "user: Image(16x16) what?" in again.stdout and "0 messages are left" in again.stdout
    assert "Nothing has been said" in again.stdout and "nowhere" in again.stdout
    assert "give only one of them" in complaint(run(*words, "--load", tmp_path / "kept", "--system", "hi"))
    assert "nowhere" in complaint(run(*words, "--load", tmp_path / "nowhere"))


def test_chat_runs_from_a_pipe(checkpoint, picture, tmp_path):
    lines = f"/image {picture}\n/draw again\n/save {tmp_path / 'kept'}\n"
    found = run("chat", "-m", checkpoint, "--out", tmp_path / "chat", "--seed", 0, input=lines)
    assert found.exit_code == 0, found.stderr
    assert (tmp_path / "chat/image-000.png").is_file() and (tmp_path / "kept/chat.json").is_file()


def test_info_shows_the_id_space(checkpoint):
    found = run("info", checkpoint)
    assert found.exit_code == 0 and "image" in found.stdout and "transformers" in found.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "hi", "-o", "smell"], "smell"),
        (["generate", "hi", "-o", "speech"], "speech"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--num-return", "0"], "num_return"),
        (["generate", "word " * 400, "-o", "text"], "128"),
        (["generate", "--image", "EMPTY"], "EMPTY"),
        (["generate", "--image", "CORRUPT"], "CORRUPT"),
        (["tokenize", "--dna", "ACGT"], "dna"),
        (["detokenize", "IDS"], "999999"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_bytes(b"")
    Path("CORRUPT").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    Path("IDS").write_text("[999999]")
    assert says in complaint(run(*words, "-m", checkpoint))
    assert {path.name for path in tmp_path.iterdir()} == {"EMPTY", "CORRUPT", "IDS"}


@pytest.mark.parametrize(
    "file", ["model.safetensors", "token_space.json", "sampling.json", "tokenizers/image/model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_one_line(file, damage, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    path = folder / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    complaint(run("generate", "hi", "-m", folder, "-o", "text"))


def run_program(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_path(str(ROOT / "inference" / name), run_name="__main__")


def test_the_generate_program_takes_words_longer_than_a_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="context is 128"):
        run_program("generate.py", monkeypatch, "word " * 400, "--model", checkpoint)


def test_the_chat_program_ends_with_its_input(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO("@no-such.png what?\n"))
    run_program("chat.py", monkeypatch, "--model", checkpoint)


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from anytoken.cli import main; import sys; sys.argv[1:] = ['recipes', 'list']; main()"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    found = subprocess.run(
        [sys.executable, "-u", "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert (found.returncode, found.stderr) == (1, "")


def test_recipes_are_listed_found_and_copied(tmp_path, monkeypatch):
    listed = run("recipes", "list").stdout
    assert "stages/1_alignment.yaml" in listed and "tokenizers/image/recipe.yaml" in listed
    assert "inference/generate.py" in listed and "Stage 1" in listed
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "stages/lora.yaml").stdout.strip() == "lora.yaml"
    assert Path("lora.yaml").read_bytes() == (ROOT / "stages/lora.yaml").read_bytes()
    assert "exists" in complaint(run("recipes", "copy", "stages/lora.yaml"))
    assert run("recipes", "copy", "tokenizers/image", "mine").exit_code == 0
    assert (tmp_path / "mine/recipe.yaml").is_file()


def test_a_wheel_carries_the_recipes_and_no_second_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"anytoken"}
        archive.extractall(tmp_path / "site")
    (tmp_path / "site/pyproject.toml").touch()  # some package is careless, and it is no checkout for that
    code = (
        "import sys; sys.path.insert(0, 'site'); from anytoken import recipes; print('\\n'.join(recipes.names()));"
        "assert (recipes.assets() / 'images.jsonl').is_file()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == recipes.names()


def test_score_and_classify_print_the_best_first(checkpoint, picture, tmp_path):
    options = ["--model", str(checkpoint), "--json"]
    scored = CliRunner().invoke(app, ["score", str(picture), "-a", "a red apple", "-a", "what", *options])
    rows = [json.loads(line) for line in scored.stdout.splitlines()]
    assert scored.exit_code == 0 and {row["answer"] for row in rows} == {"a red apple", "what"}
    assert rows[0]["score"] > rows[1]["score"]
    names = tmp_path / "names.txt"
    names.write_text("a red apple\nwhat\n\nthis\nwhat\n")
    found = CliRunner().invoke(
        app, ["classify", str(picture), "-l", "this", "--labels", str(names), "--top", "9", *options]
    )
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.exit_code == 0 and sum(row["probability"] for row in rows) == pytest.approx(1)
    assert sorted(row["label"] for row in rows) == ["a red apple", "this", "what"]  # each once
    assert rows[0]["probability"] >= rows[1]["probability"] >= rows[2]["probability"]
    top = CliRunner().invoke(app, ["classify", str(picture), "--labels", str(names), "--top", "2", *options])
    assert len(top.stdout.splitlines()) == 2


def test_classify_without_labels_is_an_error(checkpoint):
    result = CliRunner().invoke(app, ["classify", "a fox", "--model", str(checkpoint)])
    assert result.exit_code == 2 and "needs labels" in result.output


def test_commands_that_write_checkpoints_replace_nothing_unasked(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    import anytoken

    other = anytoken.load(checkpoint, "cpu")
    get_peft_model(other.lm, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    other = anytoken.load(checkpoint, "cpu")
    other.lm.lm_head.weight.data *= 0.5
    other.save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    merge = ("merge", checkpoint, tmp_path / "other", "--out", out, "--weights")
    commands = [
        (*merge, 0.5, 0.5),
        (*merge, 0.25, 0.75),
        ("merge-adapter", checkpoint, tmp_path / "adapter", "--out", out),
        ("export", checkpoint, out, "--to", "qwen3_moe"),
    ]
    for number, words in enumerate(commands):
        if number:  # after another one wrote there
            before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            said = complaint(run(*words))
            assert "holds another checkpoint" in said and "--overwrite" in said
            assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        result = run(*words, *(["--overwrite"] if number else []))
        assert result.exit_code == 0, result.output
        assert run(*words).exit_code == 0  # the same again changes nothing
        if not number:
            (out / "metrics.jsonl").write_text("mine")
    assert (out / "metrics.jsonl").read_text() == "mine"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").touch()
    for words in commands:
        words = [tmp_path / "photos" if word == out else word for word in words]
        said = complaint(run(*words))
        assert "holds something else (holiday.jpg)" in said and "--overwrite" in said


def test_copies_of_one_greedy_reply_are_refused(checkpoint):
    said = complaint(
        run("generate", "hi", "-m", checkpoint, "-o", "text", "--temperature", 0, "--num-return", 2)
    )
    assert "2 copies" in said and "temperature" in said


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    lines = [{"text": f"a red apple {n}", "label": ("one", "two")[n % 2]} for n in range(4)]
    (folder / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "name: pick\ndata: set.jsonl\nprompt: '{text}'\nanswer: '{label}'\ndecoding: classify\n"
    text += "metrics: [mcc, auroc]\n"
    (folder / "pick.yaml").write_text(text)
    return folder / "pick.yaml"


def test_eval_of_tasks_runs_compares_and_resumes(checkpoint, task_file, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    words = ["eval", checkpoint, "--task", task_file, "--out", tmp_path / "o"]
    found = run(*words, "--compare", other)
    assert found.exit_code == 0, found.stderr
    assert "paired bootstrap" in found.stdout and found.stdout.count("auroc") == 3
    lines = (tmp_path / "o/other/pick.jsonl").read_text()
    assert run(*words, "--compare", other).exit_code == 0
    assert (tmp_path / "o/other/pick.jsonl").read_text() == lines and lines.count("\n") == 5
    pair = run("compare", tmp_path / "o/tiny", tmp_path / "o/other", "--json")
    assert json.loads(pair.stdout)["pick"]["mcc"]["value"] == 0
    assert run(*words, "--count", 2, "--overwrite").exit_code == 0
    assert (tmp_path / "o/tiny/pick.jsonl").read_text().count("\n") == 3
    assert "goes with the built-in directions" in complaint(run(*words, "--directions", "text->image"))
    assert "two models have the same name" in complaint(run(*words, "--compare", checkpoint))
    assert "needs --task" in complaint(run("eval", checkpoint, "--compare", other))
