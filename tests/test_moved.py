"""Old names of modules still load: in a plug-in that a checkpoint carries, in a pickle, in a saved configuration."""

import json
import pickle
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest

import anytoken
from anytoken.moved import MOVED, RECIPE_KEYS, RENAMED, OldNames, fingerprinted_settings
from anytoken.tokenizers.base import CodeSequence, ModalityTokenizer, code_shape_from_dict, load_tokenizer
from anytoken.tokenizers.dna import DNATokenizer
from anytoken.tokenizers.speech import SpeechTokenizer
from anytoken.training.config import TrainConfig
from anytoken.training.tokenizer.recipe import TokenizerRecipe
from anytoken.utils.errors import ConfigError

PLUGIN = """
from anytoken import DNA, ModalityTokenizer, register_modality
from anytoken.tokenizers.dna_letters import MAX_TOKENS
from anytoken.tokenizers import quantizers
from anytoken.tokenizers.base import Grid, Run


@register_modality
class OldTokenizer(ModalityTokenizer):
    kind = "written_long_ago"
    segment_type = DNA
    quantizer_class = quantizers.Quantizer
    most = MAX_TOKENS
    shapes = Grid, Run
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


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_a_plug_in_of_old_imports_runs(tmp_path):
    (tmp_path / "old.py").write_text(PLUGIN)
    cls = anytoken.load_modality(tmp_path / "old.py")
    assert cls.quantizer_class.__module__ == "anytoken.tokenizers.modules.quantizer" and cls.most > 0


@pytest.mark.filterwarnings("ignore:.* is now :DeprecationWarning")
def test_a_pickle_with_old_names_loads():
    written = pickle.dumps(anytoken.GenerationOutput, protocol=0)
    written = written.replace(b"inference.outputs", b"inference.reply").replace(b"GenerationOutput", b"Reply")
    assert b"inference.reply" in written and pickle.loads(written) is anytoken.GenerationOutput


@pytest.mark.parametrize(
    ("module", "old", "new"), [(m, *pair) for m, names in RENAMED.items() for pair in names.items()]
)
def test_an_old_name_in_a_module_gives_the_new_one_and_says_so(module, old, new):
    room = import_module(f"anytoken.{module}".rstrip("."))
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        found = getattr(room, old)
    assert found is getattr(room, new)
    with pytest.raises(AttributeError, match="never_was"):
        room.never_was  # noqa: B018


def test_a_plug_in_that_weighs_its_losses_by_the_old_name():
    class Old(ModalityTokenizer):
        def weigh_losses(self, weights):
            return dict(weights)

    with pytest.warns(DeprecationWarning, match="configure_losses"):
        assert Old.configure_losses(Old.__new__(Old), {"pixel": 1.0}) == {"pixel": 1.0}


def test_a_tokenizer_folder_with_an_old_class_path_loads(tmp_path):
    folder = DNATokenizer(width=8, code_dim=4).save_pretrained(tmp_path / "dna", allow_lossy=True)
    header = json.loads((folder / "config.json").read_text())
    header["class"] = "anytoken.tokenizers.dna:DNATokenizer"
    (folder / "config.json").write_text(json.dumps(header))
    assert isinstance(load_tokenizer(folder), DNATokenizer)


RECIPE = {
    "init_from": "somewhere",
    "output": "out",
    "steps": 4,
    "data": [{"path": "a", "views": {"text->image": 1}}],
}


def test_a_recipe_with_the_old_keys_is_read_with_a_warning_for_each():
    old = {"accumulate": 2, "prompt_drop": 0.0, "harmonise_gradients": True, "replace": {"image": "there"},
           "loss": {"learn": "everything"}, "eval": {"integration": True}}  # fmt: skip
    with pytest.warns(FutureWarning) as said:
        stage = TrainConfig.from_dict(RECIPE | old)
    assert {str(one.message).split()[3] for one in said} == set(RECIPE_KEYS)
    assert (stage.gradient_accumulation_steps, stage.cfg_dropout, stage.pcgrad) == (2, 0.0, True)
    assert stage.replace_tokenizers == {"image": "there"} and stage.loss.loss_on == "all"
    assert stage.eval.modality_integration_rate


OLD_SETTINGS = {
    "width": 16, "encoder_depth": 1, "decoder_depth": 1, "codebook_size": 8, "voice_codes": 2, "candidates": 3,
    "quantizer": {"kind": "vq", "residual": 2, "dropout": True, "first": 1, "order": "delayed", "dead_below": 0.5},
}  # fmt: skip
NEW_SETTINGS = {
    "width": 16, "encoder_depth": 1, "decoder_depth": 1, "codebook_size": 8, "num_global_codes": 2,
    "num_candidates": 3,
    "quantizer": {"kind": "vq", "residual": 2, "dropout": True, "num_active_codebooks": 1,
                  "codebook_pattern": "delay", "threshold_ema_dead_code": 0.5},
}  # fmt: skip


def test_old_settings_of_a_tokenizer_become_the_new_ones_with_a_warning():
    with pytest.warns(FutureWarning, match="is now written .*num_candidates"):
        tokenizer = SpeechTokenizer(**OLD_SETTINGS)
    assert {key: tokenizer.config[key] for key in NEW_SETTINGS} == NEW_SETTINGS
    assert tokenizer.shape.order == "delay"
    with pytest.warns(FutureWarning, match="is now written"):
        recipe = TokenizerRecipe(kind="speech", config=OLD_SETTINGS)
    assert recipe.config == NEW_SETTINGS
    with pytest.raises(ValueError, match="by its old and its new name"):
        SpeechTokenizer(candidates=2, num_candidates=3)


def test_a_saved_tokenizer_of_old_settings_loads_without_a_warning_and_keeps_its_fingerprint(tmp_path):
    folder = SpeechTokenizer(**NEW_SETTINGS).save_pretrained(tmp_path / "speech")
    header = json.loads((folder / "config.json").read_text())
    new = load_tokenizer(folder)
    header["config"] = {k: v for k, v in header["config"].items() if k not in NEW_SETTINGS} | OLD_SETTINGS
    (folder / "config.json").write_text(json.dumps(header))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = load_tokenizer(folder)
    assert old.config == new.config and old.fingerprint() == new.fingerprint()


def test_settings_in_a_fingerprint_are_those_of_version_0_1():
    assert fingerprinted_settings(NEW_SETTINGS) == {
        key: value for key, value in OLD_SETTINGS.items() if key != "voice_codes"
    } | {"num_global_codes": 2}


def test_a_shape_of_an_old_pattern_has_the_new_one():
    with pytest.warns(FutureWarning, match="is now written"):
        shape = CodeSequence(1, 9, 2, "delayed")
    assert shape == CodeSequence(1, 9, 2, "delay")
    assert code_shape_from_dict({**shape.to_dict(), "order": "delayed"}) == shape


def test_an_old_keyword_gives_the_new_one_with_a_warning():
    grammar = anytoken.load("mini").processor.grammar
    with pytest.warns(FutureWarning, match="plan of Grammar.reply is now output_kinds"):
        assert grammar.reply(plan=["image"]) == grammar.reply(["image"])


def test_a_plug_in_keeps_its_own_setting_of_an_old_name():
    class Own(ModalityTokenizer):
        kind = "own"

        def __init__(self, order: int = 2, candidates: int = 1) -> None:
            self.read = order, candidates

    made = Own(order=3, candidates=4)
    assert made.read == (3, 4)


@pytest.mark.filterwarnings("ignore:the recipe key:FutureWarning")
def test_an_override_by_an_old_key_wins_over_the_new_key_of_a_recipe():
    recipe = RECIPE | {"cfg_dropout": 0.3, "replace": {"image": "here"}}
    words = ["prompt_drop=0", "replace.speech=there", "loss.learn=everything"]
    with pytest.warns(FutureWarning, match="prompt_drop is now cfg_dropout"):
        stage = TrainConfig.from_dict(TrainConfig.overridden(recipe, words))
    assert stage.cfg_dropout == 0 and stage.loss.loss_on == "all"
    assert stage.replace_tokenizers == {"image": "here", "speech": "there"}


def test_both_names_of_a_key_are_an_error():
    with pytest.raises(ConfigError, match="prompt_drop is now cfg_dropout, and the recipe has both"):
        TrainConfig.from_dict(RECIPE | {"cfg_dropout": 0.3, "prompt_drop": 0.1})


def test_a_recipe_of_a_tokenizer_with_an_old_key_is_read_with_a_warning():
    with pytest.warns(FutureWarning, match="begin_anew is now reinit_prefixes"):
        recipe = TokenizerRecipe.from_dict({"kind": "image", "begin_anew": ["decoder."]})
    assert recipe.reinit_prefixes == ["decoder."]
