"""The house rules that a machine can hold: who imports whom, and how long a file or a function may be."""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Only the commands see more than themselves: a recipe holds names, the command looks them up.
MAY_IMPORT = {
    "models": {"torch", "safetensors", "ssaseg.models"},
    "datasets": {"torch", "numpy", "cv2", "PIL", "pycocotools", "scipy", "ssaseg.datasets"},
    "recipes": {"yaml", "pydantic", "pydantic_core", "ssaseg.recipes"},
    "cli": {"torch", "numpy", "cv2", "PIL", "pycocotools", "safetensors", "click", "rich", "tqdm", "matplotlib"}
    | {f"ssaseg.{part}" for part in ("models", "datasets", "recipes", "cli")},
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines


def files_of(part: str) -> list[Path]:
    spec = find_spec(f"ssaseg.{part}")
    assert spec is not None
    assert spec.origin is not None
    return sorted(Path(spec.origin).parent.glob("*.py"))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Modules that a file imports anywhere, and the names it takes out of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or "", [alias.name for alias in node.names]


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


def test_files_and_functions_stay_readable() -> None:
    benchmarks = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
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
