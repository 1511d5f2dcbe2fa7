"""`transformers serve` on an exported folder: what it is good for, and what it cannot do for the sidecar."""

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from anytoken.model.export import export_qwen3_moe
from anytoken.serving.app import create_app
from anytoken.serving.remote import RemoteWorker, open_remote
from anytoken.serving.settings import ServerSettings

TOKENS = 12
pytestmark = pytest.mark.slow  # starts a process that loads torch


@pytest.fixture(scope="module")
def folders(mini, save_tiny, tmp_path_factory):
    """A random checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("served")
    kinds = {"image": mini.processor.tokenizers["image"]}
    export = folder / "export"
    export.mkdir()
    checkpoint = save_tiny(folder / "checkpoint", kinds, 256)
    export_qwen3_moe(checkpoint, export)
    return checkpoint, export


@pytest.fixture(scope="module")
def engine(folders, tmp_path_factory):
    """Address of `transformers serve`, a process of its own, offline."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(folders[1]),
        "--device",
        "cpu",
    ]
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=file, stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(30)


def text_only(export):
    """Settings of a greedy reply in text, which random weights would hardly give."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    media = list(range(tokenizer.convert_tokens_to_ids("<|bos|>"), len(tokenizer)))
    return {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": media}


def expected(export, ids):
    """The text of the reply that stock transformers gives."""
    lm, tokenizer = Qwen3MoeForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    made = lm.generate(torch.tensor([ids]), **text_only(export))[0, len(ids) :]
    return tokenizer.decode(made, skip_special_tokens=True)


def test_text_and_chat_are_those_of_the_weights(folders, engine):
    export = folders[1]
    tokenizer = AutoTokenizer.from_pretrained(export)
    client = openai.OpenAI(base_url=engine, api_key="none", max_retries=0)
    options = {"model": str(export), "extra_body": {"generation_config": json.dumps(text_only(export))}}
    prompt = (
        "<|bos|><|user|>a red apple<|image|><|size:1|><|size:1|><|image:7|><|/image|><|end|><|assistant|>"
    )
    written = client.completions.create(prompt=prompt, **options).choices[0].text
    assert written and written == expected(export, tokenizer(prompt)["input_ids"])
    said = [("user", "what is this?"), ("assistant", "a red apple"), ("user", "what is this?")]
    messages = [{"role": role, "content": words} for role, words in said]
    chat = client.chat.completions.create(messages=messages, **options)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.choices[0].message.content == expected(export, ids)


def test_it_is_no_engine_of_the_sidecar_and_that_is_said(folders, engine):
    """It knows neither ids nor sets of allowed ones: an error at once, and the log says why."""
    remote = open_remote(folders[0])
    worker = RemoteWorker(remote, engine, str(folders[1]), 1, 0)
    with TestClient(create_app(remote, "tiny", ServerSettings(), worker)) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "modalities": ["text"]}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 503 and "status 422" in answer.json()["error"]["message"]
