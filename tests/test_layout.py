"""The house: recipe folders are no packages, rooms import only to their left, optional packages stay optional."""

import ast
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = ("tokenizers", "stages", "inference")
ROOMS = (
    "moved",
    "utils",
    "recipes",
    "video_io",
    "media_io",
    "segments",
    "tokenizers",
    "token_space",
    "grammar_tables",
    "grammar",
    "processor",
    "data",
    "model",
    "training",
    "inference",
    "evaluation",
    "serving",
    "emoji_world",
    "benchmarks",
    "terminal",
    "commands",
    "cli",
)


@pytest.mark.parametrize("folder", RECIPES)
def test_recipe_folders_are_never_packages(folder):
    files = list((ROOT / folder).rglob("*"))
    assert files, f"{folder} is empty"
    assert not [path for path in files if path.name == "__init__.py"]
    shadowing = [path for path in files if path.suffix == ".py" and path.stem in sys.stdlib_module_names]
    assert not shadowing


def test_the_working_directory_does_not_shadow_hugging_face_tokenizers(monkeypatch):
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("tokenizers", [str(ROOT), *sys.path])
    assert (
        spec is not None
        and spec.origin is not None
        and not Path(spec.origin).is_relative_to(ROOT / "tokenizers")
    )


def imported_rooms(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in modules if name.startswith("anytoken.")]
    return {part[1] for part in parts}


def room_files() -> list[tuple[str, Path]]:
    found = []
    for room in ROOMS:
        found += [(room, path) for path in [ROOT / "anytoken" / f"{room}.py"] if path.exists()]
        found += [(room, path) for path in sorted((ROOT / "anytoken" / room).rglob("*.py"))]
    return found


@pytest.mark.parametrize(("room", "path"), room_files(), ids=lambda value: getattr(value, "stem", value))
def test_a_room_imports_only_rooms_to_its_left(room, path):
    assert not imported_rooms(path) & set(ROOMS[ROOMS.index(room) + 1 :])


@pytest.mark.parametrize(
    "room", ["tokenizers", "data", "model", "training", "inference", "evaluation", "serving"]
)
def test_generic_rooms_know_nothing_of_the_bundled_models_world(room):
    files = [
        path
        for path in (ROOT / "anytoken" / room).rglob("*")
        if path.suffix in (".py", ".yaml", ".json", ".md")
    ]
    assert files and not [path for path in files if "emoji" in path.read_text(encoding="utf-8").lower()]


def test_error_classes_are_in_one_file():
    found = set()
    for path in (ROOT / "anytoken").rglob("*.py"):
        classes = [
            one for one in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(one, ast.ClassDef)
        ]
        bases = [ast.unparse(base) for one in classes for base in one.bases]
        found |= {path for base in bases if base.endswith("Error")}
    # those of the HTTP server carry a status
    assert found == {ROOT / "anytoken" / name for name in ("utils/errors.py", "serving/errors.py")}


def test_every_module_is_in_a_room():
    found = (ROOT / "anytoken").iterdir()
    names = {path.stem for path in found if path.name != "py.typed" and not path.name.startswith("__")}
    assert names == {*ROOMS, "pretrained"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_on_loading(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules of `modules` that are imported when this one is: not in functions, not for types only."""
    found, bodies = set(), [tree.body]
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in modules else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef | ast.Try | ast.With):
                bodies.append(node.body)
            elif isinstance(node, ast.If):
                bodies += (
                    [node.orelse] if "TYPE_CHECKING" in ast.dump(node.test) else [node.body, node.orelse]
                )
    return found & modules


def test_no_modules_import_each_other_in_a_circle():
    paths = {module_name(path): path for path in (ROOT / "anytoken").rglob("*.py")}
    graph = {
        name: imports_on_loading(ast.parse(path.read_text(encoding="utf-8")), set(paths))
        for name, path in paths.items()
    }
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def test_optional_packages_are_never_imported_at_the_top_of_a_module():
    optional = {
        "datasets",
        "deepspeed",
        "flash_attn",
        "gradio",
        "fastapi",
        "piper",
        "ray",
        "resvg_py",
        "pocketsphinx",
        "matplotlib",
        "trl",
        "webdataset",
        "torchao",
        "vllm",
        "faiss",
        "qdrant_client",
        "psycopg",
    }
    for path in (ROOT / "anytoken").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & optional
            # A whole room may stand on an extra if nothing imports it but its command, inside a function.
            room = path.relative_to(ROOT / "anytoken").parts[:-1]
            extras = {("serving",): {"fastapi"}, ("serving", "web"): {"gradio"}}
            assert found <= extras.get(room, set()), path
            assert room[:1] == ("serving",) or not [name for name in names if "anytoken.serving" in name], (
                path
            )


def test_every_dependency_has_a_pin_that_its_range_admits():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["eval"] + extras["data"] + extras["quantize"]
    wanted += extras["search"] + extras["qdrant"] + extras["docs"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "anytoken":
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} does not admit the pin {pin}"
