"""A checkpoint goes to a hub and comes back the same: through huggingface_hub's own client and a small local hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys

import pytest
from local_server import listening
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anytoken.inference.hub import pull, push
from anytoken.utils.errors import CheckpointError

TOKEN = "hf_test"


class Hub:
    """What the client needs of a hub: repositories of one branch, their files in memory."""

    def __init__(self):
        self.files, self.private = {}, {}
        repo = "/api/models/{owner}/{name}"
        self.app = Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(f"{repo}/preupload/{{branch}}", self.preupload, methods=["POST"]),
                Route(f"{repo}/commit/{{branch}}", self.commit, methods=["POST"]),
                Route(f"{repo}/revision/{{branch}}", self.info),
                Route(f"{repo}/tree/{{branch}}", self.tree),
                Route("/{owner}/{name}/resolve/{branch}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
            ]
        )

    @staticmethod
    def name(request):
        return f"{request.path_params['owner']}/{request.path_params['name']}"

    async def create(self, request):
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid credentials"}, 401)
        body = await request.json()
        name = "/".join(filter(None, (body.get("organization"), body["name"])))
        self.files.setdefault(name, {})
        self.private[name] = body.get("private") or body.get("visibility") == "private"
        return JSONResponse({"url": f"{request.base_url}{name}", "id": name, "name": name})

    async def validate(self, request):
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request):
        wanted = (await request.json())["files"]
        found = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in wanted]
        return JSONResponse({"files": found})

    async def commit(self, request):
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        for line in lines:
            if line["key"] == "file":
                value = line["value"]
                self.files[self.name(request)][value["path"]] = base64.b64decode(value["content"])
        address = f"{request.base_url}{self.name(request)}/commit/{self.revision(request)}"
        return JSONResponse({"success": True, "commitUrl": address, "commitOid": self.revision(request)})

    def revision(self, request):
        return hashlib.sha1(repr(sorted(self.files[self.name(request)].items())).encode()).hexdigest()

    async def info(self, request):
        if self.name(request) not in self.files:
            return JSONResponse(
                {"error": "Repository not found"}, 404, headers={"X-Error-Code": "RepoNotFound"}
            )
        files = [{"rfilename": path} for path in self.files[self.name(request)]]
        return JSONResponse({"id": self.name(request), "sha": self.revision(request), "siblings": files})

    async def tree(self, request):
        files = self.files[self.name(request)].items()
        return JSONResponse(
            [{"type": "file", "path": path, "size": len(data), "oid": blob(data)} for path, data in files]
        )

    async def resolve(self, request):
        data = self.files[self.name(request)][request.path_params["path"]]
        headers = {"ETag": f'"{blob(data)}"', "X-Repo-Commit": self.revision(request)}
        return Response(data, headers=headers, media_type="application/octet-stream")


def blob(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub():
    """A running hub and its address."""
    hub = Hub()
    with listening(hub.app) as url:
        yield hub, url


@pytest.fixture(scope="module")
def folder(save_tiny, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", {}, 64)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "optimizer.pt").write_text("no part of a checkpoint")
    return folder


def run(code, hub, cache):
    """Python in a process of its own, since the client reads its environment once."""
    env = {**os.environ, "HF_ENDPOINT": hub[1], "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_TOKEN": TOKEN,
           "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_there_and_back(hub, folder, tmp_path):
    """Pushed by the command and by the model, pulled by the command, opened by `load`: the same bytes each time."""
    code = f"""
import os
from typer.testing import CliRunner
import anytoken, torch
from anytoken.cli import app

def command(*words):
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()

assert "/commit/" in command("push", {str(folder)!r}, "me/tiny", "--private")
command("pull", "me/tiny", {str(tmp_path / "back")!r})
model = anytoken.load("me/tiny", device="cpu")
model.push_to_hub("me/again")
again = anytoken.load("me/again", device="cpu")
ids = torch.arange(3, 20)[None]
assert torch.equal(model.lm(ids).logits, again.lm(ids).logits)
gone = CliRunner().invoke(app, ["pull", "me/nothing", {str(tmp_path / "nothing")!r}])
assert gone.exit_code == 2 and "The hub did not provide me/nothing" in gone.stderr, gone.stderr
os.environ["HF_TOKEN"] = "hf_wrong"
refused = CliRunner().invoke(app, ["push", {str(folder)!r}, "me/x"])
assert refused.exit_code == 2 and refused.stderr.count("\\n") == 1, refused.stderr
assert "rejected me/x" in refused.stderr and "HF_TOKEN" in refused.stderr
"""
    done = run(code, hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-2000:]
    sent = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    del sent["optimizer.pt"]
    back = {
        path.relative_to(tmp_path / "back").as_posix(): path.read_bytes()
        for path in (tmp_path / "back").rglob("*")
        if path.is_file()
    }
    assert hub[0].files["me/tiny"] == sent == back and hub[0].private["me/tiny"]
    assert not (tmp_path / "nothing").exists()


def test_mistakes_before_anything_is_sent(folder, tmp_path):
    for repo in ("tiny", "me/tiny/more", "me/ti ny"):
        with pytest.raises(CheckpointError, match="owner/name"):
            push(folder, repo)
        with pytest.raises(CheckpointError, match="owner/name"):
            pull(repo, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else"):
        pull("me/tiny", tmp_path / "other")
    incomplete = tmp_path / "half"
    incomplete.mkdir()
    (incomplete / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        push(incomplete, "me/tiny")
