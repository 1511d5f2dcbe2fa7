"""Miniature versions of recipes: tiny random models, codecs and a few generated files.

The code path is the recipe's own: language model and codecs are read from checkpoints as if from the hub, the
vocabulary is extended, raw records are tokenized, packed, trained on and saved, with the recipe's engine. Only sizes,
paths and numbers of steps differ. Nothing is downloaded. A recipe without a backbone uses the bundled model's
tokenizers; if it starts from another run, the bundled model replaces it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from anytoken import recipes
from anytoken.data.mixture import SourceSpec
from anytoken.segments import Image, Speech, Video
from anytoken.tokenizers.pretrained import CODECS as KNOWN
from anytoken.tokenizers.text import TextTokenizer
from anytoken.training.config import BackboneSpec, DistributedSpec, TrainConfig
from anytoken.training.distributed.fsdp import mesh_settings
from anytoken.training.initialize import checkpoint_folder
from anytoken.utils.errors import ConfigError

NAMES = ("ant", "bee", "cow", "dog", "elk")
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 290,
}  # fmt: skip
CODECS: dict[str, dict[str, Any]] = {
    "mimi": {
        "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [8, 4], "codebook_size": 32, "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8, "upsample_groups": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "num_quantizers": 8,
    },
    "emu3_vqgan": {
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8,
        "codebook_size": 32, "attn_resolutions": [1], "hidden_size": 32, "num_attention_heads": 1,
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "speech": {"max_seconds": 1.0},
    "image": {"side_px": 12},
    "video": {"side_px": 12, "max_steps": 1},
}
STEPS, CONTEXT = 4, 256
OWN_STEPS, OWN_CONTEXT = 2, 512  # of recipes without a backbone, whose tokenizers are full-sized


def tiny(stage: TrainConfig) -> TrainConfig:
    """The miniature recipe, for the number of processes that torchrun started.

    Its output folder is the recipe's with the suffix ``-tiny``; generated files are in its subfolder ``tiny``.
    """
    output = Path(f"{stage.output}-tiny")
    if stage.backbone is None:
        return _tiny_of_own(stage, output)
    made, processes = output / "tiny", int(os.environ.get("WORLD_SIZE", 1))
    if not made.is_dir():
        _make(stage, made)
    few: dict[str, Any] = {
        "steps": STEPS,
        "save_every": 2,
        "log_every": 1,
        "context": CONTEXT,
        "precision": "fp32",
        "data_root": "",
        "report_to": [],
    }
    return TrainConfig.from_dict(
        stage.model_dump()
        | few
        | {
            "output": str(output),
            "init_from": str(made / "start"),
            "backbone": json.loads((made / "backbone.json").read_text()),
            "tokens_per_batch": 2 * CONTEXT * stage.gradient_accumulation_steps * processes,
            "data": [_own(one, made) for one in stage.data],
            "eval": stage.eval.model_dump()
            | {"batches": 1, "data": [_own(one, made) for one in stage.eval.data]},
            "schedule": stage.schedule.model_dump() | {"warmup_steps": 1},
            "samples": {},
            "distributed": _engine(stage.distributed, processes),
        },
        "the recipe in miniature",
    )


def _tiny_of_own(stage: TrainConfig, output: Path) -> TrainConfig:
    """The miniature version of a recipe without a backbone: the same views over a few files of every kind."""
    made = output / "tiny"
    if not made.is_dir():
        made.mkdir(parents=True)
        _make_data(made, made, (8, 64, 64, 3), (8000, 16_000), own=True)
    shrunk: dict[str, Any] = {
        "output": str(output), "data_root": "", "steps": OWN_STEPS, "max_minutes": None, "save_every": OWN_STEPS,
        "log_every": 1, "context": OWN_CONTEXT, "precision": "fp32", "compile": False, "modalities": {},
        "tokens_per_batch": OWN_CONTEXT * stage.gradient_accumulation_steps, "replace_tokenizers": {}, "samples": {},
        "report_to": [], "weights_folder": stage.weights_folder and f"{stage.weights_folder}-tiny",
        "reference": None, "data": [_own_pairs(one, made) for one in stage.data],
        "eval": stage.eval.model_dump() | {"batches": 1, "data": [_own_pairs(one, made) for one in stage.eval.data]},
        "schedule": stage.schedule.model_dump() | {"warmup_steps": 1},
        "sampling": stage.sampling.model_dump() | {"workers": 0, "max_bad": 1.0},
    }  # fmt: skip
    if stage.init_from != "scratch":
        return TrainConfig.from_dict(
            stage.model_dump() | shrunk | {"init_from": "mini"}, "the recipe in miniature"
        )
    own = checkpoint_folder("mini")
    folders = {name: str(own / "tokenizers" / name) for name in stage.tokenizers if name != "text"}
    sizes = {name: size for name, size in SIZES.items() if name in stage.model}
    shrunk |= {"tokenizers": {"text": str(own / "text_tokenizer"), **folders}, "model": stage.model | sizes}
    return TrainConfig.from_dict(stage.model_dump() | shrunk, "the recipe in miniature")


def _own_pairs(source: SourceSpec, made: Path) -> dict[str, Any]:
    """A source over the generated records, including joined ones."""
    file = _own(source, made)
    pair = source.pair_with
    if pair is not None:
        file["pair_with"] = pair.model_dump() | {"path": str(made / "things.jsonl"), "where": {}}
    return file


def _own(source: SourceSpec, made: Path) -> dict[str, Any]:
    file = "talk.jsonl" if "messages" in source.views else "things.jsonl"
    return source.model_dump() | {"path": str(made / file), "where": {}, "pair_with": None}


def _engine(distributed: DistributedSpec, processes: int) -> dict[str, Any]:
    """The recipe's engine for this number of processes; a single process without a launcher needs none."""
    if "WORLD_SIZE" not in os.environ:
        return {}
    engine = distributed.model_dump() | {"world_size": processes}
    if distributed.mesh is not None:
        mesh = mesh_settings(distributed.mesh)
        engine["mesh"] = mesh | ({"ep_size": processes} if "ep_size" in mesh else {})
    return engine


def _make(stage: TrainConfig, made: Path) -> None:
    """Write all input files of the run, then rename the folder; of several processes, the first to finish wins."""
    assert stage.backbone is not None
    scratch = made.with_name(f"{made.name}.{os.getpid()}")
    torch.manual_seed(0)
    _make_backbone(stage.backbone, scratch)
    codecs: dict[str, Any] = {}
    for kind, codec in stage.backbone.codecs.items():
        if codec.config["model_type"] not in CODECS:
            raise ConfigError(
                f"--tiny has no sizes for {codec.config['model_type']}; there are {', '.join(CODECS)}"
            )
        config = codec.config | CODECS[codec.config["model_type"]]
        _make_codec(config, scratch / kind)
        settings = {**codec.settings, **SETTINGS[kind]}
        codecs[kind] = {"source": str(made / kind), "config": config, "settings": settings}
    backbone = {"model": str(made / "model"), "config": str(made / "model.json"), "codecs": codecs}
    (scratch / "backbone.json").write_text(json.dumps(backbone))
    _make_data(scratch, made, (4, 12, 12, 3), (480, 24_000))
    try:
        scratch.rename(made)
    except OSError:
        if not made.is_dir():
            raise
        shutil.rmtree(scratch)


def _make_backbone(spec: BackboneSpec, folder: Path) -> None:
    settings = json.loads(recipes.find(spec.config).read_text(encoding="utf-8"))
    settings.update({name: size for name, size in SIZES.items() if name in settings}, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    model.save_pretrained(folder / "model")
    text = TextTokenizer.train([*NAMES, "What is this?"], 280)
    PreTrainedTokenizerFast(tokenizer_object=text._bpe).save_pretrained(folder / "model")
    (folder / "model.json").write_text(json.dumps(settings))


@torch.no_grad()
def _make_codec(config: dict[str, Any], folder: Path) -> None:
    model_class = getattr(transformers, KNOWN[config["model_type"]].model)
    model = model_class(model_class.config_class(**config))
    for name, tensor in model.state_dict().items():
        if name.endswith("embed_sum"):  # codebooks of random codecs are zero, and every code the same
            tensor.normal_(std=0.1)
        elif name.endswith("cluster_usage"):
            tensor.fill_(1)
    model.save_pretrained(folder)


def _make_data(
    folder: Path, made: Path, frames: tuple[int, ...], audio: tuple[int, int], own: bool = False
) -> None:
    """Records in every kind and conversations about them; the last one is held out. Paths are those after the move to
    `made`.

    frames: shape of a clip [T, H, W, 3]. audio: samples, and how many per second. own: in all kinds of the bundled
    model.
    """
    rng = np.random.default_rng(0)
    things: list[dict[str, Any]] = []
    talk: list[dict[str, Any]] = []
    for name in NAMES:
        pixels = rng.integers(0, 256, frames, dtype=np.uint8)
        Image(pixels[0]).save(folder / f"{name}.png")
        Video(pixels).save(folder / f"{name}.webp")
        Speech(rng.uniform(-0.5, 0.5, audio[0]), audio[1]).save(folder / f"{name}.wav")
        place, words = (made / name).resolve(), {"text": name}
        if own:
            dna = "ATG" + "".join(rng.choice(list("ACGT"), 57))
            words |= {"name": name, "voice": "slt", "product": "enzyme", "dna": dna}
        media = {"image": f"{place}.png", "video": f"{place}.webp", "speech": f"{place}.wav"}
        split = "test" if name == NAMES[-1] else "train"
        things.append({**words, **media, "split": split})
        question = [{"type": "image", "image": media["image"]}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": name}]
        talk.append({"messages": messages, "split": split})
    for file, records in {"things": things, "talk": talk}.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
