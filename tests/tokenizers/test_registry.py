"""Where a class comes from: entry points of installed packages, files by consent, and what is refused."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.tokenizers.base import MODALITIES, TokenizerError, load_tokenizer, register_modality
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.registry import load_modality, modality_class

CLASS = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from anytoken import ModalityTokenizer, Segment, register_modality
from anytoken.tokenizers.base import Codes, CodeSequence

@dataclass(frozen=True)
class Dial(Segment):
    digits: str
    kind: ClassVar[str] = "{kind}"

{decorator}
class DialTokenizer(ModalityTokenizer):
    kind = "{kind}"
    segment_type = Dial

    def __init__(self):
        super().__init__(shape=CodeSequence(1, 9), codebook_sizes=[10], config={{}})

    def encode(self, segment):
        self.check_segment(segment)
        return Codes(np.array([[int(digit)] for digit in segment.digits]))

    def decode(self, codes):
        self.check_codes(codes)
        return Dial("".join(str(code) for code in codes.values[:, 0]))
"""


def source(kind: str, decorator: str = "@register_modality") -> str:
    return CLASS.format(kind=kind, decorator=decorator)


@pytest.fixture(autouse=True)
def _forget_what_a_test_registers():
    kinds, modules = set(MODALITIES), set(sys.modules)
    yield
    for kind in set(MODALITIES) - kinds:
        del MODALITIES[kind]
    for name in [
        name for name in set(sys.modules) - modules if name.startswith(("anytoken_modality", "dial_"))
    ]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dial").mkdir()
    (tmp_path / "dial" / "dial.py").write_text(source("dial"))
    return tmp_path / "dial"


def forget(kind: str) -> None:
    """As in another process: the class is not known, its file was never run."""
    del sys.modules[MODALITIES.pop(kind).__module__]


def test_a_file_or_its_folder_gives_the_class_and_registers_it(folder):
    cls = load_modality(folder)
    assert cls is MODALITIES["dial"] is modality_class("dial") is load_modality(folder / "dial.py")


def test_the_same_content_elsewhere_is_the_same_class_and_another_one_is_refused(folder, tmp_path):
    cls, copy = load_modality(folder), tmp_path / "copy.py"
    copy.write_bytes((folder / "dial.py").read_bytes())
    other = tmp_path / "dial.py"
    other.write_text(source("dial") + "# another edition\n")
    assert load_modality(copy) is cls
    with pytest.raises(TokenizerError, match=r"'dial' is already registered by anytoken_modality_"):
        load_modality(other)
    assert MODALITIES["dial"] is cls


def test_a_saved_tokenizer_carries_the_file_and_runs_it_only_by_consent(folder, tmp_path):
    tokenizer = load_modality(folder)()
    saved = tokenizer.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text())["code"] == "dial.py"
    assert (saved / "dial.py").read_text() == source("dial")
    forget("dial")
    with pytest.raises(
        TokenizerError, match=r"read .*saved/dial\.py, then call anytoken\.load_modality\('.*dial.py'"
    ):
        load_tokenizer(saved)
    assert "dial" not in MODALITIES
    load_modality(saved)
    codes = load_tokenizer(saved).encode(MODALITIES["dial"].segment_type("0123"))
    assert np.array_equal(codes.values[:, 0], [0, 1, 2, 3])


def test_a_worker_process_gets_the_class_with_the_tokenizer(folder):
    import copy
    import pickle

    tokenizer = load_modality(folder)()
    assert type(copy.deepcopy(tokenizer)) is type(tokenizer)
    data = pickle.dumps(tokenizer)
    forget("dial")
    there = pickle.loads(data)
    assert type(there) is MODALITIES["dial"] and there.codebook_sizes == (10,)


def test_a_folder_cannot_point_at_code_outside_of_it(folder, tmp_path):
    saved = load_modality(folder)().save_pretrained(tmp_path / "saved")
    header = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**header, "code": "../../evil.py"}))
    forget("dial")
    with pytest.raises(TokenizerError, match=r"saved/evil\.py"):
        load_tokenizer(saved)


def test_the_command_line_takes_a_file_for_every_command(folder, tmp_path):
    saved = load_modality(folder)().save_pretrained(tmp_path / "saved")
    forget("dial")
    words = ["tokenizer", "eval", str(saved), "--data", str(tmp_path)]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "--modality" in refused.stderr
    allowed = CliRunner().invoke(app, ["--modality", str(saved), *words])
    assert allowed.exit_code == 2 and "does not say what is held out" in allowed.stderr, (
        "the class is known now"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero"),
        ("x = 1", r"it registers no class; put @register_modality on one"),
        ("def", r"SyntaxError"),
        (source("dial") + source("dial2"), r"it registers dial, dial2"),
        (source("image"), r"'image' is already registered by anytoken\.tokenizers\.image"),
    ],
)
def test_a_file_that_is_no_modality_is_an_error_and_leaves_nothing(text, says, tmp_path):
    before, modules = set(MODALITIES), {name for name in sys.modules if "anytoken_modality" in name}
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(TokenizerError, match=rf"wrong\.py does not load as a modality: .*{says}"):
        load_modality(tmp_path / "wrong.py")
    assert (
        set(MODALITIES) == before and {name for name in sys.modules if "anytoken_modality" in name} == modules
    )


def test_a_folder_with_no_file_or_several_is_an_error(tmp_path):
    with pytest.raises(TokenizerError, match="found none"):
        load_modality(tmp_path)
    for name in ("a.py", "b.py"):
        (tmp_path / name).touch()
    with pytest.raises(TokenizerError, match=r"found a\.py, b\.py"):
        load_modality(tmp_path)


def install(tmp_path, monkeypatch, entry: str, text: str) -> None:
    """A package on the path with an entry point, as pip would leave it."""
    (tmp_path / "dial_package.py").write_text(text)
    info = tmp_path / "dial_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dial-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[anytoken.modalities]\n{entry}\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("decorator", ["@register_modality", ""])
def test_an_installed_package_brings_its_class_by_an_entry_point(tmp_path, monkeypatch, decorator):
    install(tmp_path, monkeypatch, "dial = dial_package:DialTokenizer", source("dial", decorator))
    cls = modality_class("dial")
    assert cls.__module__ == "dial_package" and MODALITIES["dial"] is cls
    saved = cls().save_pretrained(tmp_path / "saved")
    assert not list(saved.glob("*.py")), "a package's code stays in the package"
    del MODALITIES["dial"]
    assert type(load_tokenizer(saved)) is cls


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("dial = dial_package:Nothing", r"'dial_package:Nothing' of dial-package does not load"),
        ("dial = no_such_package:Dial", r"of dial-package does not load: No module named 'no_such_package'"),
        ("dial = dial_package:Dial", r"is not a ModalityTokenizer of that kind"),
        ("tone2 = dial_package:DialTokenizer", r"tone2 = .* is not a ModalityTokenizer of that kind"),
    ],
)
def test_a_wrong_entry_point_names_its_package(tmp_path, monkeypatch, entry, says):
    install(tmp_path, monkeypatch, entry, source("dial", ""))
    with pytest.raises(TokenizerError, match=says):
        modality_class(entry.split()[0])


def test_an_unknown_kind_lists_what_is_known(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "dial = dial_package:DialTokenizer", source("dial"))
    with pytest.raises(TokenizerError, match=r"Unknown tokenizer kind 'smell'; known: .*dial, dna, .*image"):
        modality_class("smell")


def test_a_built_in_kind_is_taken_even_before_it_is_used():
    class Mine(ImageTokenizer):
        pass

    with pytest.raises(
        TokenizerError, match=r"already registered by anytoken\.tokenizers\.image\.ImageTokenizer"
    ):
        register_modality(Mine)
    Mine.kind = "my_image"
    assert register_modality(Mine) is MODALITIES["my_image"] and Mine(width=8, levels=[4, 3]).name == "image"
