"""POST /v1/embeddings through the openai client: floats, base64, dimensions, any modality, clear errors."""

import base64
import io

import numpy as np
import openai
import pytest
import torch

import anytoken
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image


@pytest.fixture(scope="module")
def embedding_model():
    torch.manual_seed(0)
    model = anytoken.load("mini")
    model.embedding_heads[None] = EmbeddingHead(
        model.lm.config.hidden_size, ["text", "image", "speech"], 32, widths=[8]
    )
    return model


@pytest.fixture(scope="module")
def client(embedding_model, start):
    with start(embedding_model, max_rows=2, max_waiting=4, deadline=60) as (url, _):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def picture():
    return Image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_strings_become_unit_vectors(client, embedding_model):
    found = client.embeddings.create(model="mini", input=["a fox", "an owl"])  # the client asks for base64
    expected = embedding_model.embed(["a fox", "an owl"])
    assert [one.index for one in found.data] == [0, 1] and found.usage.prompt_tokens > 4
    assert np.abs(np.array([one.embedding for one in found.data]) - expected).max() < 1e-5
    plain = client.embeddings.create(model="mini", input="a fox", encoding_format="float", dimensions=8)
    assert np.abs(np.array(plain.data[0].embedding) - embedding_model.embed("a fox", width=8)[0]).max() < 1e-5
    ids = embedding_model.processor.text_tokenizer.encode("a fox")
    same = client.embeddings.create(model="mini", input=ids)
    assert np.abs(np.array(same.data[0].embedding) - expected[0]).max() < 1e-5


def test_content_parts_are_one_prompt(client, embedding_model):
    buffer = io.BytesIO()
    picture().to_pil().save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "make it green"}]
    found = client.embeddings.create(model="mini", input=[parts, "a fox"])
    expected = embedding_model.embed([[picture(), "make it green"], "a fox"])
    assert np.abs(np.array([one.embedding for one in found.data]) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "ada"}, "There is no model 'ada'"),
        ({"input": []}, "input is empty"),
        ({"input": ""}, "empty"),
        ({"input": [[{"type": "smell"}]]}, "smell"),
        ({"input": [3, 10**6]}, "token ids are of text"),
        ({"input": [[{"type": "dna", "dna": "ACGT" * 12}]]}, "knows text, image, speech"),
        ({"dimensions": 5}, "8, 32"),
        ({"extra_body": {"widht": 3}}, "Unknown parameter 'widht'"),
    ],
)
def test_bad_requests_are_one_clear_error(client, change, said):
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        client.embeddings.create(**{"model": "mini", "input": "a fox", **change})
    assert said in error.value.body["message"]


def test_a_model_without_a_head_says_how_to_get_one(embedding_model, client):
    head = embedding_model.embedding_heads.pop(None)
    try:
        with pytest.raises(openai.BadRequestError, match=r"stages/embed\.yaml"):
            client.embeddings.create(model="mini", input="a fox")
        found = client.embeddings.create(model="mini", input="a fox", extra_body={"untrained": True})
        assert len(found.data[0].embedding) == embedding_model.lm.config.hidden_size
    finally:
        embedding_model.embedding_heads[None] = head
