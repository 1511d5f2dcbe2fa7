"""POST /v1/embeddings through the openai client: floats, base64, dimensions, any modality, clear errors."""

import base64
import io
import threading

import httpx
import numpy as np
import openai
import pytest
import torch

import anytoken
from anytoken.inference.score import PART
from anytoken.model.embedding_head import EmbeddingHead
from anytoken.segments import Image
from anytoken.serving import embeddings_api


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
        ({"input": [[{"type": {}}]]}, "has the type {}"),
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


def test_many_inputs_hold_up_nobody(embedding_model, start, monkeypatch):
    """They are embedded in parts, between which a reply goes on; media are decoded away from the model's thread."""
    parts, threads = [], set()
    real_ids, real_read = embedding_model.embed_ids, embeddings_api.read_part

    def embed_ids(prompts, **options):
        parts.append(sum(map(len, prompts)))
        return real_ids(prompts, **options)

    def read(*given):
        threads.add(threading.current_thread().name)
        return real_read(*given)

    monkeypatch.setattr(embedding_model, "embed_ids", embed_ids)
    monkeypatch.setattr(embeddings_api, "read_part", read)
    inputs = [f"a fox and {n} owls" for n in range(200)]
    with start(embedding_model) as (url, _):
        body = {"model": "mini", "input": inputs}
        found = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()
    assert len(parts) > 2 and max(parts) <= PART and threads and "anytoken-worker" not in threads
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert np.abs(vectors - embedding_model.embed(inputs)).max() < 1e-5


def test_embeddings_have_a_deadline_and_a_longest_text(embedding_model, start):
    with start(embedding_model, deadline=0.01, max_text=50) as (url, _):
        late = httpx.post(
            f"{url}/v1/embeddings", json={"model": "mini", "input": ["a fox"] * 500}, timeout=60
        )
        long = httpx.post(f"{url}/v1/embeddings", json={"model": "mini", "input": "x" * 51}, timeout=60)
    assert late.status_code == 504
    assert long.status_code == 400 and "at most 50 are taken" in long.text
