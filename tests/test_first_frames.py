"""First frames of videos as images: prompts and training data agree, and nothing else changes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from anytoken.cli import app
from anytoken.data.mixture import Mixture, SourceSpec
from anytoken.data.shards import Shards, tokenize_records
from anytoken.inference.chains import prompt_kind
from anytoken.processor import Processor
from anytoken.segments import Image, Video
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.tokenizers.video import VideoTokenizer
from anytoken.training.config import TrainConfig
from anytoken.training.pairs import PairMixture
from anytoken.training.trainer import train
from anytoken.utils.errors import DataError, TokenSpaceError


@pytest.fixture(scope="module")
def reader() -> Processor:
    """A processor that reads first frames."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "side_px": 16}
    image = ImageTokenizer(**size, refine_width=8, refine_depth=1).eval()
    video = VideoTokenizer(**size, levels=[4, 3]).eval()
    text = TextTokenizer.train(["red apple"] * 9, 300)
    space = TokenSpace(text.vocab_size, 16)
    for one in (image, video):
        space.append_modality(one.kind, one.codebook_sizes, one.shape, one.global_codebook_size)
    return Processor(space, text, {"image": image, "video": video}, first_frames=True)


@pytest.fixture
def plain(reader: Processor) -> Processor:
    """The same, without first frames."""
    return Processor(reader.token_space, reader.text_tokenizer, reader.tokenizers)


def clip(seed: int = 0) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8), 4.0)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    for seed in range(3):
        clip(seed).save(tmp_path / f"{seed}.webp")
    content = [{"type": "text", "text": "What?"}, {"type": "video", "video": "2.webp"}]
    talk = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "video", "video": "1.webp"}]},
    ]
    Image(clip(9).frames[0]).save(tmp_path / "still.png")
    still = {"image": "still.png"}
    lines: list[dict[str, object]] = [{"text": f"clip {n}", "video": f"{n}.webp", **still} for n in range(2)]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*lines, {"messages": talk}]))
    return path


def test_a_prompt_holds_the_frame_before_its_video(reader: Processor, plain: Processor) -> None:
    video = clip()
    shown = [Image(video.frames[0]), video]
    assert reader.encode_chat(["What?", video]) == plain.encode_chat(["What?", *shown])
    assert reader.encode_chats([[video], "x"]) == [plain.encode_chat(shown), plain.encode_chat("x")]
    assert reader.encode_chat(shown) == plain.encode_chat(shown)  # it is there already
    assert reader.encode_chat([shown[0], "x", video]) == plain.encode_chat([shown[0], "x", *shown])
    assert reader.encode_chat("x") == plain.encode_chat("x")
    [message] = reader.messages([video])
    assert message["content"] == [video]  # a history shows what was given


def test_replies_hold_no_frame(reader: Processor, plain: Processor) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [clip()]}]
    assert reader.encode_training(chat) == plain.encode_training(chat)
    assert reader.encode_reply(clip()) == plain.encode_reply(clip())


def test_views_and_conversations_train_on_what_prompts_hold(
    reader: Processor, records: Path, tmp_path: Path
) -> None:
    out = tokenize_records(records, reader.tokenizers, tmp_path / "out", progress=False, first_frames=True)
    views: dict[str, Any] = {
        "video->text": 1.0,
        "text->video": 1.0,
        "messages": 1.0,
        "image,video->text": 1.0,
        'image,"x",video->text': 1.0,
    }
    mixture = Mixture([SourceSpec(path=str(out), views=views)], reader, 500, cfg_dropout=0)
    drawn = {tuple(mixture.sample(index).ids.tolist()) for index in range(200)}
    opened = [Video.open(tmp_path / f"{n}.webp") for n in range(3)]
    still = Image.open(tmp_path / "still.png")
    wanted: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": [reply]}]
        for number, video in enumerate(opened[:2])
        for prompt, reply in list[tuple[list[Any], Any]](
            [
                ([video], f"clip {number}"),
                ([f"clip {number}"], video),
                ([still, video], f"clip {number}"),
                ([still, "x", video], f"clip {number}"),
            ]
        )
    ]
    wanted.append(
        [{"role": "user", "content": ["What?", opened[2]]}, {"role": "assistant", "content": [opened[1]]}]
    )
    assert drawn == {tuple(reader.encode_training(one)[0]) for one in wanted}


def test_pairs_of_an_embedding_head_are_prompts_on_both_sides(
    reader: Processor, records: Path, tmp_path: Path
) -> None:
    out = tokenize_records(records, reader.tokenizers, tmp_path / "out", progress=False, first_frames=True)
    mixture = PairMixture([SourceSpec(path=str(out), views={"text->video": 1.0})], reader, 500)
    _, pairs = mixture.draw(0, 2)
    found = {(tuple(one.left), tuple(one.right)) for one in pairs}
    wanted = [(f"clip {n}", Video.open(tmp_path / f"{n}.webp")) for n in range(2)]
    assert found == {tuple(tuple(reader.encode_chat(side)) for side in one) for one in wanted}


def test_shards_without_frames_are_refused_and_others_read_both(
    reader: Processor, plain: Processor, records: Path, tmp_path: Path
) -> None:
    spec = {"views": {"text->video": 1.0}}
    bare = tokenize_records(records, reader.tokenizers, tmp_path / "bare", progress=False)
    with pytest.raises(DataError, match=r"lacks the first frames of its videos.* --first-frames"):
        Mixture([SourceSpec(path=str(bare), **spec)], reader, 500)  # type: ignore[arg-type]
    full = tokenize_records(records, reader.tokenizers, tmp_path / "full", progress=False, first_frames=True)
    one, other = (
        Mixture([SourceSpec(path=str(path), **spec)], plain, 500)  # type: ignore[arg-type]
        for path in (bare, full)
    )
    assert [one.sample(i).ids.tolist() for i in range(9)] == [other.sample(i).ids.tolist() for i in range(9)]
    found = Shards(full, reader.tokenizers)
    assert found.first_frame(1) == reader.tokenizers["image"].encode(Image(clip(1).frames[0]))


def test_an_image_tokenizer_is_needed(reader: Processor, records: Path, tmp_path: Path) -> None:
    video = {"video": reader.tokenizers["video"]}
    with pytest.raises(DataError, match="first_frames needs tokenizers of image and video; there are video"):
        tokenize_records(records, video, tmp_path / "out", progress=False, first_frames=True)
    assert not (tmp_path / "out").exists()
    space = TokenSpace(reader.text_tokenizer.vocab_size, 8)
    with pytest.raises(TokenSpaceError, match="first_frames reads frames of videos as images"):
        Processor(space, reader.text_tokenizer, {}, first_frames=True)


def test_a_saved_processor_reads_them_as_before(reader: Processor, plain: Processor, tmp_path: Path) -> None:
    for name, processor in (("reader", reader), ("plain", plain)):
        found = Processor.from_pretrained(processor.save_pretrained(tmp_path / name))
        assert found.first_frames == processor.first_frames
    (tmp_path / "plain" / "prompts.json").unlink()  # as in older checkpoints
    assert not Processor.from_pretrained(tmp_path / "plain").first_frames
    (tmp_path / "reader" / "prompts.json").write_text("[]")
    with pytest.raises(TokenSpaceError, match=r"prompts\.json is damaged"):
        Processor.from_pretrained(tmp_path / "reader")


def test_a_video_with_its_frame_is_a_prompt_of_video(reader: Processor) -> None:
    space = reader.token_space
    assert prompt_kind(reader.encode_chat([clip(), "What?"]), space) == "video"
    assert prompt_kind(reader.encode_chat([Image(clip().frames[0]), "and", clip()]), space) is None
    assert prompt_kind(reader.encode_chat([Image(clip().frames[0])]), space) == "image"


def test_a_recipe_turns_them_on_and_the_command_writes_them(
    reader: Processor, records: Path, tmp_path: Path
) -> None:
    before = reader.save_pretrained(tmp_path / "before")
    tokenizers = {kind: str(before / "tokenizers" / kind) for kind in ("image", "video")}
    command = ["data", "tokenize", str(records), "--tokenizers", str(before / "tokenizers")]
    for name, more in (("shards", []), ("bare", ["--no-first-frames"])):  # by default as the checkpoint
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / name), *more])
        assert done.exit_code == 0, done.output
        assert Shards(tmp_path / name, reader.tokenizers).lack_first_frames == bool(more)
    for name in ("shards", records.name):  # tokenized before, or by the run
        recipe = {
            "init_from": "scratch", "output": str(tmp_path / "runs" / name), "first_frames": True,
            "tokenizers": {"text": str(before / "text_tokenizer"), **tokenizers},
            "model": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
                "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            },
            "data": [{"path": str(tmp_path / name), "views": {"video->text": 1}}],
            "steps": 1, "tokens_per_batch": 512, "context": 512,
        }  # fmt: skip
        folder = train(TrainConfig.from_dict(recipe))
        assert Processor.from_pretrained(folder).first_frames
