"""The house rules that a machine can hold: who imports whom, how long a file or function may be, what the wheel has."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
from places import PROJECT

# The first, "", is the package itself.
FOLDERS = {"": "ssaseg", "cli": "ssaseg_cli", **{part: part for part in ("models", "datasets", "recipes", "files")}}
# Only the commands and the package itself see more than themselves: a recipe holds names, the command looks them up.
MAY_IMPORT = {
    "files": {"ssaseg.files"},
    "models": {"torch", "safetensors", "ssaseg.files", "ssaseg.models"},
    "datasets": {"torch", "numpy", "cv2", "PIL", "pycocotools", "scipy", "yaml", "tifffile", "ssaseg.files"}
    | {"ssaseg.datasets"},
    "recipes": {"yaml", "pydantic", "pydantic_core", "ssaseg.files", "ssaseg.recipes"},
    "": {"torch", "numpy", "PIL", "ssaseg.predictor"}
    | {f"ssaseg.{part}" for part in ("files", "models", "datasets", "recipes", "cli")},
    "cli": {
        "torch",
        "numpy",
        "cv2",
        "PIL",
        "pycocotools",
        "safetensors",
        "click",
        "rich",
        "tqdm",
        "matplotlib",
        "packaging",
        "jinja2",
        "av",
        "fsspec",
        "rasterio",
    }
    | {f"ssaseg.{part}" for part in ("files", "models", "datasets", "recipes", "cli")},
}
# From the lowest up: what stands in a room may import the rooms before it, and the room itself. A file that is named
# here is a room of its own; "" is what else lies directly in the folder.
ROOMS = {
    "cli": ["printing", "signals", "errors", "sharding", "importing", "device", "cluster", "console", "help_tables",
            "recipe_page", "completion", "options", "drawing", "ranks", "scoring", "weights", "model_card", "engine",
            "evaluation", "places", "results", "tiling", "prediction", "merging", "serving", "video", "curation",
            "data", "quantization", "profiling", "training", "comparison", "explanation", "diagnosis", ""],
    "models": ["rows", "layers", "stem", "classifiers", "decoder", "segmenter", "networks", "masks", "build",
               "official", "header", "checkpoint", ""],
}  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, FULLEST_ROOM = 400, 80, 22  # lines, lines, files


def files_of(part: str) -> list[Path]:
    return sorted((PROJECT / FOLDERS[part]).rglob("*.py"))


def module_of(file: Path) -> str:
    folder, *parts = file.relative_to(PROJECT).with_suffix("").parts
    part = next(part for part, name in FOLDERS.items() if name == folder)
    return ".".join(name for name in ("ssaseg", part, *parts) if name not in ("", "__init__"))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Modules that a file imports anywhere, and the names it takes out of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or "", [alias.name for alias in node.names]


def own_imports() -> dict[str, set[str]]:
    """Each module of the project and those of the project that it imports anywhere, inside functions too."""
    files = {module_of(file): file for part in FOLDERS for file in files_of(part)}
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for source, names in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
            targets = {f"{source}.{name}" if f"{source}.{name}" in files else source for name in names} or {source}
            graph[module] |= {target for target in targets if target in files} - {module}
    return graph


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_folders_import_only_what_they_may(part: str) -> None:
    files = files_of(part)
    assert any(file.name == "__init__.py" for file in files)
    for file in files:
        for module, names in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
            rooms = {".".join([module, name][:2]) for name in names} if module == "ssaseg" else {module}
            for room in rooms:
                top = ".".join(room.split(".")[: 2 if room.startswith("ssaseg") else 1])
                assert top in MAY_IMPORT[part] or top in sys.stdlib_module_names, f"{file.name} imports {room}"
                assert find_spec(room) is not None, f"{file.name} imports {room}, which is not there"


# Calls that only some files may make: what reads files of others is limited, what is printed has no control characters.
# With a dot in front: methods of any object.
NEVER = ("print", "click.secho", "tqdm.write", "sys.stderr.write", "torch.load", "np.load", "np.fromfile", "cv2.imread")
RESERVED: dict[str, set[str]] = {
    **{name: set() for name in NEVER},
    "click.echo": {"printing.py"},
    "sys.stdout.write": {"console.py"},  # JSON, in which control characters are escaped
    "pickle.load": {"coco.py"},  # from memory that this process has filled
    "open": {"errors.py"},  # /dev/null
    # An image in memory; a new file; videos, by FFmpeg; objects at addresses; tars; GDAL.
    ".open": {"formats.py", "recipes.py", "streams.py", "objects.py", "archives.py", "library.py"},
    ".read_text": {"labels.py"},  # of the package itself
    ".read_bytes": {"rendezvous.py"},  # of the ranks' own folder
}


def calls_of(file: Path) -> Iterator[tuple[str, int]]:
    """What a file calls, with the lines: the name as it is written, and of a method `.name`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name, node.lineno
            if isinstance(node.func, ast.Attribute) and name != "os.open":  # which files/ has the flags for
                yield f".{node.func.attr}", node.lineno


@pytest.mark.parametrize("part", FOLDERS)
def test_links_in_a_circle_are_no_traceback(part: str) -> None:
    """Path.resolve() raises RuntimeError for them before Python 3.13; os.path.realpath() raises nothing."""
    assert [str(file) for file in files_of(part) if any(name == ".resolve" for name, _ in calls_of(file))] == []


@pytest.mark.parametrize("part", [part for part in FOLDERS if part != "files"])
def test_files_are_read_and_text_is_printed_in_one_place(part: str) -> None:
    wrong = [
        f"{file.name}:{line} {name}"
        for file in files_of(part)
        for name, line in calls_of(file)
        if name in RESERVED and file.name not in RESERVED[name]
    ]
    assert wrong == [], "use ssaseg.files.reading and ssaseg.cli.printing"


def test_no_circle_of_imports() -> None:
    circle: list[str] = []
    try:
        TopologicalSorter(own_imports()).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


@pytest.mark.parametrize("part", ROOMS)
def test_rooms_see_only_those_below_them(part: str) -> None:
    order = ROOMS[part]

    def room(module: str) -> str:
        name = [*module.split("."), ""][2]
        return name if name in order else ""

    graph = own_imports()
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if module.startswith(f"ssaseg.{part}.") and target.startswith(f"ssaseg.{part}.")
        if order.index(room(target)) > order.index(room(module))
    ]
    assert wrong == []
    assert {room(module) for module in graph if module.startswith(f"ssaseg.{part}.")} == set(order)
    full = Counter(file.parent for file in files_of(part))
    assert max(full.values()) <= FULLEST_ROOM, full


def test_files_and_functions_stay_readable() -> None:
    benchmarks = sorted((PROJECT / "benchmarks").glob("*.py"))
    too_long = []
    for file in [*(file for part in MAY_IMPORT for file in files_of(part)), *benchmarks]:
        text = file.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONGEST_FILE:
            too_long.append(f"{file.parent.name}/{file.name}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    too_long.append(f"{file.parent.name}/{file.name}:{node.lineno} {node.name}")
    assert too_long == []


def test_the_file_map_is_current() -> None:
    """CONTRIBUTING.md has one line for each Python file, except empty `__init__.py` files."""
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`: .", text.partition("## File map")[2], flags=re.MULTILINE)
    files = [file for part in FOLDERS for file in files_of(part)]
    existing = [str(file.relative_to(PROJECT)) for file in files if file.name != "__init__.py" or file.stat().st_size]
    assert sorted(listed) == sorted(existing)


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    """Every module and data file of all folders: sub-packages are listed by hand."""
    copy = tmp_path / "project"
    for folder in FOLDERS.values():
        shutil.copytree(PROJECT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, copy)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = copy.glob("*.whl")
    found = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(Path("ssaseg", part, file.relative_to(copy / folder)))
        for part, folder in FOLDERS.items()
        for file in (copy / folder).rglob("*.*")
        if file.is_file()
    }
    assert found == expected
