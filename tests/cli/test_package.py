"""What the package says about itself is the same everywhere."""

import re
from pathlib import Path

import yaml
from places import PROJECT

import ssaseg

PROJECT_FILE = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")


def value(key: str) -> str:
    (found,) = re.findall(rf'^{key} = "(.*)"', PROJECT_FILE, flags=re.MULTILINE)
    return str(found)


def test_version_and_licence() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == value("version") == ssaseg.__version__
    assert citation["license"] == value("license") == "MIT"
    assert (PROJECT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_each_listed_python_is_allowed() -> None:
    """And the lowest is the one that ruff and mypy check for."""
    listed = re.findall(r"Python :: 3\.(\d+)", PROJECT_FILE)
    assert value("requires-python") == f">=3.{min(listed, key=int)}"
    assert value("target-version") == f"py3{min(listed, key=int)}"
    assert value("python_version") == f"3.{min(listed, key=int)}"


def test_all_public_names_can_be_imported() -> None:
    assert set(ssaseg.__all__) == {"Predictor", "__version__", "load_model"}
    assert all(hasattr(ssaseg, name) for name in ssaseg.__all__)
    assert (Path(ssaseg.__path__[0]) / "py.typed").is_file()


def test_constraints_are_for_each_python() -> None:
    """A package has one version for each Python: a line without a marker, or two with opposite ones."""
    lines = [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    split = [line.partition("; ")[::2] for line in lines]
    for name in {requirement.partition("==")[0] for requirement, _ in split}:
        markers = sorted(marker for requirement, marker in split if requirement.partition("==")[0] == name)
        assert markers in ([""], ['python_version < "3.11"', 'python_version >= "3.11"']), name
