"""`ssaseg data prepare KIND` on folders that are not of this kind, and with options that the kind does not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import call
from owndata import photo

from ssaseg.datasets.conventions import CONVENTIONS

KINDS = {each.kind: each for each in CONVENTIONS}


def wrong(path: Path) -> Path:
    """An image, JSON, XML, YAML and text files of something else."""
    photo(path / "images/a.jpg")
    (path / "images/a.json").write_text(json.dumps({"learning_rate": 1}))
    (path / "data.yaml").write_text("epochs: 3\n")
    (path / "meta.json").write_text("[]")
    (path / "annotations.xml").write_text("<project></project>")
    return path


@pytest.mark.parametrize("folder", ["wrong", "empty"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, kind: str, folder: str) -> None:
    source = tmp_path / folder
    source.mkdir()
    if folder == "wrong":
        wrong(source)
    result = call("data", "prepare", kind, "--source", source, "--root", tmp_path / "out", "--workers", "0")
    assert result.exit_code
    lines = result.stderr.strip().splitlines()
    assert lines[0].startswith("searching")
    error = lines[1:]
    assert 2 <= len(error) <= 3, error
    assert str(source) in error[0]
    assert "None" not in error[0]
    assert "No such file" not in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["table", "background"])
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_a_kind_ignores_are_refused(tmp_path: Path, kind: str, option: str) -> None:
    """The error for the option comes where the kind does not take it, that for the folder elsewhere."""
    table = tmp_path / "names.txt"
    table.write_text("road,1,2,3\ncar,3,4,5\n")
    given = table if option == "table" else "rest"
    source = wrong(tmp_path / "data")
    result = call("data", "prepare", kind, "--source", source, "--root", tmp_path / "out", f"--{option}", given)
    assert result.exit_code
    assert (f"--{option}: not for {kind}" in result.stderr) == (option not in KINDS[kind].takes), result.stderr


def test_which_options_kinds_take() -> None:
    groups = {
        (): ["kitti", "grey"],
        ("background",): ["coco_panoptic", "supervisely", "cvat"],
        ("table",): ["colours"],
        ("background", "table"): ["labelme", "via", "yolo", "layers", "binary"],
    }
    expected = {kind: options for options, kinds in groups.items() for kind in kinds}
    assert {kind: tuple(sorted(each.takes)) for kind, each in KINDS.items()} == expected


def test_yolo_without_data_yaml_reads_names_from_the_table(tmp_path: Path) -> None:
    source = tmp_path / "data"
    photo(source / "a.jpg")
    (source / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (tmp_path / "names.txt").write_text("road\n")
    call_it = ("data", "prepare", "yolo", "--source", source, "--root", tmp_path / "out", "--workers", "0")
    assert "no data.yaml" in call(*call_it).stderr
    assert call(*call_it, "--table", tmp_path / "names.txt").exit_code == 0
