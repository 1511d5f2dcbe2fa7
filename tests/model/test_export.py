"""The exported folder: stock Qwen3-MoE with equal logits, a tokenizer with equal ids, and clear refusals."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from anytoken import AnyToken, Image
from anytoken.cli import app
from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.export import (
    NO_EFFECT,
    export_qwen3_moe,
    plain_config,
    serving_name,
)
from anytoken.processor import Processor
from anytoken.utils.errors import CheckpointError

Make = Callable[..., AnyToken]
BLOCKING = {
    "expert_bias": True, "expert_groups": {"common": 2, "text": 1, "image": 1}, "num_null_experts": 1,
    "qk_norm": "none", "shared_expert_intermediate_size": 16, "grid_positions": {"row": 8, "column": 8},
}  # fmt: skip
PLAIN = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "norm_topk_prob": True, "router_jitter_noise": 0.1},
    "dense and sliding": {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5},
    "another rope": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "attention_bias": True,
    },
}


def exported(model: AnyToken, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """The model saved and exported; the exported folder."""
    out = folder / "out"
    out.mkdir()
    export_qwen3_moe(model.save_pretrained(folder / "checkpoint", dtype), out)
    return out


@pytest.fixture(scope="module")
def plain(make_whole_model: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[AnyToken, Path]:
    model = make_whole_model()
    return model, exported(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def tokenizer(plain: tuple[AnyToken, Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(plain[1])


@pytest.mark.parametrize("variant", PLAIN)
def test_stock_qwen3_moe_loads_it_with_equal_logits(
    make_whole_model: Make, tmp_path: Path, variant: str
) -> None:
    model = make_whole_model(**PLAIN[variant])
    stock = Qwen3MoeForCausalLM.from_pretrained(exported(model, tmp_path), dtype=torch.float32).eval()
    ids = torch.randint(model.token_space.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock(ids).logits, model.lm(ids).logits)
    assert stock.generation_config.eos_token_id == model.token_space.end


def test_names_are_per_expert_and_the_stored_precision_stays(make_whole_model: Make, tmp_path: Path) -> None:
    out = exported(make_whole_model(), tmp_path, torch.bfloat16)
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("model.layers.0.mlp.experts.3.down_proj.weight").dtype == torch.bfloat16
    parts = {name.split("experts.3.")[1] for name in names if "layers.1.mlp.experts.3." in name}
    assert parts == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["model_type"] == "qwen3_moe"
    assert config["num_experts"] == config["num_local_experts"] == 4  # transformers 4 and 5


@given(text=st.text(max_size=40).filter(lambda text: "<|" not in text))
@settings(max_examples=60, deadline=None)
def test_text_has_the_ids_of_the_model(
    plain: tuple[AnyToken, Path], tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == plain[0].processor.text_tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_every_other_id_has_a_name_of_its_own(
    plain: tuple[AnyToken, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    space = plain[0].token_space
    assert len(tokenizer) == space.vocab_size
    others = range(space.text_size, space.vocab_size)
    names = [serving_name(space, token) for token in others]
    assert tokenizer.convert_tokens_to_ids(names) == list(others)
    assert tokenizer("".join(names))["input_ids"] == list(others)
    assert {"<|bos|>", "<|size:8|>", "<|image|>", "<|/image|>", "<|image:3|>"} <= set(names)
    mixed = [*tokenizer("red")["input_ids"], *others]
    assert tokenizer.decode(mixed, skip_special_tokens=True) == "red"


def test_the_chat_template_is_the_models_format(
    plain: tuple[AnyToken, Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = [{"type": "text", "text": " what"}, {"type": "text", "text": " is\n"}]
    messages = [{"role": "system", "content": "red  "}, {"role": "user", "content": parts}]
    for prompt in (True, False):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == plain[0].processor.encode_chat(messages, add_generation_prompt=prompt)
    picture = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]
    with pytest.raises(Exception, match="as token ids"):
        tokenizer.apply_chat_template(picture)


def test_ids_in_ids_out_codes_decoded_outside(plain: tuple[AnyToken, Path]) -> None:
    """What docs/serving.md does with an engine, with stock transformers as the engine."""
    stock, processor = Qwen3MoeForCausalLM.from_pretrained(plain[1]), Processor.from_pretrained(plain[1])
    space = processor.token_space
    prompt = processor.encode_chat("a red apple")
    opening = [space.open_token("image"), space.size_token(2), space.size_token(2)]
    span = space.code_range("image")
    ids = stock.generate(
        torch.tensor([prompt + opening]), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        prefix_allowed_tokens_fn=lambda *_: list(range(span.start, span.stop)),
    )[0, len(prompt) :].tolist()  # fmt: skip
    (image,) = processor.detokenize([*ids, space.close_token("image")])
    assert isinstance(image, Image)


def test_the_exported_folder_still_opens_here(plain: tuple[AnyToken, Path]) -> None:
    model, out = plain
    opened = AnyToken.from_pretrained(out, device="cpu")
    assert opened.generate("red", "image", seed=0).ids == model.generate("red", "image", seed=0).ids


@pytest.mark.parametrize("setting", BLOCKING)
def test_a_setting_that_qwen3_moe_lacks_is_named(make_whole_model: Make, setting: str) -> None:
    with pytest.raises(CheckpointError, match=f"no {setting}=.*docs/serving"):
        plain_config(make_whole_model(num_experts_per_tok=1, **{setting: BLOCKING[setting]}).lm.config)


def test_no_setting_of_ours_is_forgotten() -> None:
    """A new one must either be refused or be known to have no say in the logits."""
    names = [{field.name for field in fields(config)} for config in (AnyTokenConfig, Qwen3MoeConfig)]
    assert names[0] - names[1] == {"head_dim", *NO_EFFECT, *BLOCKING}


def test_names_that_the_text_tokenizer_has_itself_are_refused(make_whole_model: Make, tmp_path: Path) -> None:
    folder = make_whole_model().save_pretrained(tmp_path / "checkpoint")
    path = folder / "text_tokenizer" / "tokenizer.json"
    data = json.loads(path.read_text())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"]["<|user|>"] = data["model"]["vocab"].pop(last)
    data["model"]["merges"].pop()
    path.write_text(json.dumps(data))
    (folder / "fingerprints.json").unlink()  # or the change would be noticed first
    with pytest.raises(CheckpointError, match=r"<\|user\|> of its own"):
        export_qwen3_moe(folder, tmp_path)


def test_the_command(make_whole_model: Make, tmp_path: Path) -> None:
    good = make_whole_model().save_pretrained(tmp_path / "good")
    bad = make_whole_model(shared_expert_intermediate_size=16).save_pretrained(tmp_path / "bad")
    words = ["export", str(good), str(tmp_path / "out"), "--to", "qwen3_moe"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    failed = CliRunner().invoke(app, ["export", "--to", "qwen3_moe", str(bad), str(tmp_path / "no")])
    assert failed.exit_code == 2 and "shared_expert_intermediate_size=16" in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]
    assert CliRunner().invoke(app, ["export", str(good), str(tmp_path / "no"), "--to", "gguf"]).exit_code == 2


def test_the_client_of_the_docs_draws_and_answers(
    plain: tuple[AnyToken, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is run as printed, with stock transformers behind the endpoint."""
    import io
    import urllib.request

    stock = Qwen3MoeForCausalLM.from_pretrained(plain[1])

    def urlopen(request: urllib.request.Request) -> io.BytesIO:
        body = json.loads(request.data)
        ids = stock.generate(
            torch.tensor([body["prompt"]]), max_new_tokens=min(body["max_tokens"], 8), do_sample=False,
            min_new_tokens=body.get("min_tokens"), prefix_allowed_tokens_fn=lambda *_: body["allowed_token_ids"],
        )[0, len(body["prompt"]) :].tolist()  # fmt: skip
        return io.BytesIO(json.dumps({"choices": [{"token_ids": ids}]}).encode())

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace('"DIR"', repr(str(plain[1])))
    client: dict[str, object] = {}
    exec(compile(code, "docs/serving.md", "exec"), client)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    image = client["draw"]("a red apple", (2, 2))
    assert isinstance(image, Image) and isinstance(client["answer"]([image, "what is this?"]), str)
