"""A recipe for many GPUs in miniature: a random backbone and codecs and a few files, all made on the spot.

What runs is the recipe's own path: language model and codecs are read from checkpoints as they are from the hub, the
vocabulary grows, raw records are tokenized, packed, trained on and saved, by the recipe's engine. Only sizes, paths
and numbers of steps are others. Nothing is downloaded.
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
from anytoken.training.config import (
    BackboneSpec,
    DistributedSpec,
    TrainConfig,
)
from anytoken.training.distributed.fsdp import mesh_settings
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


def tiny(stage: TrainConfig) -> TrainConfig:
    """The recipe in miniature, for as many processes as torchrun started; ConfigError if it has no ``backbone``.

    Its output is that of the recipe with ``-tiny``; what is made for it lies in the folder ``tiny`` in there.
    """
    if stage.backbone is None:
        raise ConfigError("--tiny shrinks a recipe with a backbone, such as those of stages/scale")
    output = Path(f"{stage.output}-tiny")
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


def _own(source: SourceSpec, made: Path) -> dict[str, Any]:
    file = "talk.jsonl" if "messages" in source.views else "things.jsonl"
    return source.model_dump() | {"path": str(made / file), "where": {}, "pair_with": None}


def _engine(distributed: DistributedSpec, processes: int) -> dict[str, Any]:
    """The recipe's engine for so many processes; a lone one, which nothing launched, needs none."""
    if "WORLD_SIZE" not in os.environ:
        return {}
    engine = distributed.model_dump() | {"world_size": processes}
    if distributed.mesh is not None:
        mesh = mesh_settings(distributed.mesh)
        engine["mesh"] = mesh | ({"ep_size": processes} if "ep_size" in mesh else {})
    return engine


def _make(stage: TrainConfig, made: Path) -> None:
    """Write all that the run reads, then move it in place: of several processes, the first to finish wins."""
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
    _make_data(scratch, made)
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


def _make_data(folder: Path, made: Path) -> None:
    """Things in every kind and talk about them; the last thing is held out. Paths are those after the move."""
    rng = np.random.default_rng(0)
    things: list[dict[str, Any]] = []
    talk: list[dict[str, Any]] = []
    for name in NAMES:
        pixels = rng.integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
        Image(pixels[0]).save(folder / f"{name}.png")
        Video(pixels).save(folder / f"{name}.webp")
        Speech(rng.uniform(-0.5, 0.5, 480), 24_000).save(folder / f"{name}.wav")
        split = "test" if name == NAMES[-1] else "train"
        media = {
            "image": f"{made / name}.png",
            "speech": f"{made / name}.wav",
            "video": f"{made / name}.webp",
        }
        things.append(
            {
                "text": name,
                **{kind: str(Path(path).resolve()) for kind, path in media.items()},
                "split": split,
            }
        )
        question = [
            {"type": "image", "image": things[-1]["image"]},
            {"type": "text", "text": "What is this?"},
        ]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": name}]
        talk.append({"messages": messages, "split": split})
    for file, records in {"things": things, "talk": talk}.items():
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
