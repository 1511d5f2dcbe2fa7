"""Old names of modules still load: in a plug-in that a checkpoint carries, in a pickle, in a saved configuration."""

import json
import pickle
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import anytoken
from anytoken.moved import MOVED, OldNames
from anytoken.tokenizers.base import load_tokenizer
from anytoken.tokenizers.dna import DNATokenizer

PLUGIN = """
from anytoken import DNA, ModalityTokenizer, register_modality
from anytoken.tokenizers.dna_letters import MAX_TOKENS
from anytoken.tokenizers import quantizers


@register_modality
class OldTokenizer(ModalityTokenizer):
    kind = "written_long_ago"
    segment_type = DNA
    quantizer_class = quantizers.Quantizer
    most = MAX_TOKENS
"""


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_free_and_leads_to_a_module(old):
    assert find_spec(f"anytoken.{MOVED[old]}") is not None
    assert isinstance(find_spec(f"anytoken.{old}").loader, OldNames)


def test_an_old_name_gives_the_very_module_and_says_so():
    new = import_module("anytoken.tokenizers.modules.quantizer")
    spec = new.__spec__
    sys.modules.pop("anytoken.tokenizers.quantizers", None)
    with pytest.warns(DeprecationWarning, match=r"is now anytoken\.tokenizers\.modules\.quantizer"):
        old = import_module("anytoken.tokenizers.quantizers")
    assert old is new and new.__spec__ is spec
    with pytest.raises(ModuleNotFoundError):
        import_module("anytoken.tokenizers.never_was")


@pytest.mark.filterwarnings("ignore:.*is now:DeprecationWarning")
def test_a_plug_in_of_old_imports_runs(tmp_path):
    (tmp_path / "old.py").write_text(PLUGIN)
    cls = anytoken.load_modality(tmp_path / "old.py")
    assert cls.quantizer_class.__module__ == "anytoken.tokenizers.modules.quantizer" and cls.most > 0


@pytest.mark.filterwarnings("ignore:.*is now:DeprecationWarning")
def test_a_pickle_with_old_names_loads():
    from anytoken.inference.outputs import Reply

    written = pickle.dumps(Reply, protocol=0).replace(
        b"anytoken.inference.outputs", b"anytoken.inference.reply"
    )
    assert b"inference.reply" in written and pickle.loads(written) is Reply


def test_a_tokenizer_folder_with_an_old_class_path_loads(tmp_path):
    folder = DNATokenizer(width=8, code_dim=4).save_pretrained(tmp_path / "dna", allow_lossy=True)
    header = json.loads((folder / "config.json").read_text())
    header["class"] = "anytoken.tokenizers.dna:DNATokenizer"
    (folder / "config.json").write_text(json.dumps(header))
    assert isinstance(load_tokenizer(folder), DNATokenizer)
