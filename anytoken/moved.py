"""Names of version 0.1: an import of an old one gives what it names now, and says what that is called.

A checkpoint carries the file of its plug-in modality, which was written against the names of its day, and a pickle
names modules; both still load. Nothing in this package imports by an old name. `tokenizers.dna`, `training.losses` and
`training.report` were modules and are packages now, so they are not listed.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

MOVED = {
    "media_files": "media_io",
    "model.processes": "utils.distributed",
    "tokenizers.machine": "utils.device",
    "tokenizers.modalities": "tokenizers.registry",
    "tokenizers.backbone": "tokenizers.modules.convnext",
    "tokenizers.quantizers": "tokenizers.modules.quantizer",
    "tokenizers.candidates": "tokenizers.modules.code_search",
    "tokenizers.picture_losses": "tokenizers.losses.image",
    "tokenizers.sound_losses": "tokenizers.losses.audio",
    "tokenizers.dna_letters": "tokenizers.dna.base",
    "tokenizers.dna_context": "tokenizers.dna.context",
    "tokenizers.dna_variants": "tokenizers.dna.kmer_bpe",
    "tokenizers.bars": "evaluation.tokenizers.thresholds",
    "tokenizers.cards": "evaluation.tokenizers.card",
    "tokenizers.compare": "evaluation.tokenizers.compare",
    "tokenizers.held_out": "evaluation.tokenizers.test_sets",
    "tokenizers.learnability": "evaluation.tokenizers.learnability",
    "tokenizers.measures": "evaluation.tokenizers.evaluate",
    "tokenizers.measures_dna": "evaluation.tokenizers.dna_metrics",
    "tokenizers.measures_pictures": "evaluation.tokenizers.image_metrics",
    "tokenizers.measures_speech": "evaluation.tokenizers.speech_metrics",
    "tokenizers.samples": "evaluation.tokenizers.card_samples",
    "tokenizers.words": "evaluation.keyword_asr",
    "tokenizers.batches": "training.tokenizer.batches",
    "tokenizers.trainer": "training.tokenizer.trainer",
    "data.engines": "data.parallel",
    "data.encoding": "data.shard_worker",
    "data.cards": "data.dataset_card",
    "data.check": "data.validate",
    "data.tables": "data.sources.tables",
    "model.rows": "model.embedding_init",
    "model.modalities": "model.extend_vocab",
    "model.upcycle": "model.backbone",
    "model.packing": "model.packed_attention",
    "training.stage": "training.config",
    "training.start": "training.initialize",
    "training.states": "training.checkpoint",
    "training.stopping": "training.interrupts",
    "training.facts": "training.run_metadata",
    "training.loop": "training.callbacks",
    "training.plan": "training.cost_estimate",
    "training.preference": "training.dpo",
    "training.sources": "training.prepare_data",
    "training.tiny": "training.debug_model",
    "training.cross_entropy": "training.losses.linear_cross_entropy",
    "training.integration": "training.losses.modality_integration_rate",
    "training.harmony": "training.optim.pcgrad",
    "training.muon": "training.optim.muon",
    "training.schedule": "training.optim.lr_schedule",
    "training.trainable": "training.optim.param_groups",
    "training.mesh": "training.distributed.fsdp",
    "training.zero": "training.distributed.deepspeed",
    "training.card": "training.report.adapter_card",
    "training.charts": "training.report.svg",
    "training.page": "training.report.html",
    "training.reference": "training.report.reference",
    "training.samples": "training.report.samples",
    "inference.head": "inference.model_runner",
    "inference.flat_decoder": "inference.fast_decode",
    "inference.reply": "inference.outputs",
    "inference.cache": "inference.kv_cache",
    "inference.stream": "inference.streaming",
    "evaluation.gallery": "emoji_world.demo",
    "evaluation.bench": "benchmarks.harness",
    "terminal.talk": "terminal.repl",
    "terminal.parts": "terminal.prompt_args",
    "terminal.pictures": "terminal.inline_images",
    "terminal.replies": "terminal.render",
    "commands.use": "commands.inference",
}
# The modules of these rooms kept their names.
_ROOMS = {
    ("", "utils."): "atomic autocast json_lines",
    ("data.", "emoji_world."): "dna emoji instruct packages phrases speech splits spoken_words voices",
    ("evaluation.", "emoji_world."): "dialogues directions identity judges products report tasks",
    ("evaluation.bench_", "benchmarks."): "data experts generate model quantize score serve tokenizers train",
}
MOVED |= {old + name: new + name for (old, new), names in _ROOMS.items() for name in names.split()}


RENAMED = {  # a module by its name of today: what in it had another name
    "": {"Reply": "GenerationOutput"},
    "evaluation.suite.lm_harness": {"HarnessError": "EvaluationError"},
    "evaluation.suite.metrics": {"MetricError": "EvaluationError"},
    "evaluation.suite.template": {"TemplateError": "EvaluationError"},
    "inference.index": {"SearchError": "RequestError"},
    "inference.outputs": {"Reply": "GenerationOutput"},
    "model.embedding_head": {"EmbeddingError": "RequestError"},
    "tokenizers": {"Grid": "CodeGrid", "Run": "CodeSequence"},
    "tokenizers.base": {"Grid": "CodeGrid", "Run": "CodeSequence", "writing_order": "codebook_pattern"},
    "tokenizers.losses.audio": {"heard_apart": "perceptual_distance", "log_bands": "log_mel"},
    "tokenizers.losses.image": {"PatchCritic": "PatchDiscriminator"},
    "tokenizers.modules.code_search": {"best_codes": "analysis_by_synthesis"},
    "tokenizers.modules.convnext": {
        "Fold": "Patchify",
        "RowConv": "Conv1dAsConv2d",
        "Trunk": "ConvNeXtStack",
        "Unfold": "Unpatchify",
        "alike": "group_by_shape",
    },
    "training.checkpoint": {"SaveError": "WriteError"},
    "training.config": {"Stage": "TrainConfig"},
}
RECIPE_KEYS = {  # of a stage's recipe, old -> new; a recipe, a saved stage or an override may still have the old ones
    "accumulate": "gradient_accumulation_steps",
    "prompt_drop": "cfg_dropout",
    "harmonise_gradients": "pcgrad",
    "replace": "replace_tokenizers",
    "loss.learn": "loss.loss_on",
    "eval.integration": "eval.modality_integration_rate",
}
TOKENIZER_RECIPE_KEYS = {"begin_anew": "reinit_prefixes"}  # the same of a tokenizer's recipe
SETTINGS = {  # of a built-in tokenizer and its quantizer, old -> new
    "candidates": "num_candidates",
    "dead_below": "threshold_ema_dead_code",
    "first": "num_active_codebooks",
    "order": "codebook_pattern",
    "voice_codes": "num_global_codes",
}
PATTERNS = {"interleaved": "flatten", "delayed": "delay"}  # values of codebook_pattern, old -> new


def current_settings(settings: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """Settings of a tokenizer or a quantizer by their current names, with a FutureWarning if some were old."""
    found = _renamed(settings, SETTINGS, PATTERNS)
    if len(found) < len(settings):
        raise ValueError(f"a setting is given by its old and its new name; received {dict(settings)}")
    if warn and found != settings:
        message = f"{dict(settings)} is now written {found}; the old names go in the next version"
        warnings.warn(message, FutureWarning, stacklevel=3)
    return found


def fingerprinted_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the names in fingerprints, which stay those of version 0.1: shards and checkpoints hold them."""
    old = {new: name for name, new in SETTINGS.items() if name != "voice_codes"}  # had its new name in them
    return _renamed(settings, old, {new: name for name, new in PATTERNS.items()})


def _renamed(
    settings: Mapping[str, Any], names: Mapping[str, str], patterns: Mapping[str, str]
) -> dict[str, Any]:
    found = {names.get(key, key): value for key, value in settings.items()}
    for key, value in found.items():
        if key == "quantizer" and isinstance(value, Mapping):
            found[key] = _renamed(value, names, patterns)
        elif key in ("order", "codebook_pattern") and isinstance(value, str):
            found[key] = patterns.get(value, value)
    return found


def takes_old_settings(init: Callable[..., None]) -> Callable[..., None]:
    """A tokenizer's constructor that also takes the old names of settings, unless it has a parameter of that name."""
    own = inspect.signature(init).parameters

    @functools.wraps(init)
    def constructor(self: Any, *args: Any, **settings: Any) -> None:
        kept = {key: settings.pop(key) for key in [*settings] if key in SETTINGS and key in own}
        init(self, *args, **current_settings(settings), **kept)

    return constructor


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """A function that also takes its keyword `new` by the `old` name, with a FutureWarning."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                message = (
                    f"{old} of {function.__qualname__} is now {new}; the old name goes in the next version"
                )
                warnings.warn(message, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module of `RENAMED`: an old name gives what it names now, and says so."""
    names = RENAMED[module.partition(".")[2]]

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return attribute


class OldNames(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`, and is asked only for what no other finder knows."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "anytoken" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"anytoken.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran when it was imported by its own name, and keeps that name's spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """From now on old names can be imported."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
