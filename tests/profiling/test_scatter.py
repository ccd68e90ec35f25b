"""The picture of latency and mIoU: where scores come from, and that names can be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call
from matplotlib.figure import Figure
from PIL import Image

from ssaseg.cli.drawing import scatter as drawing
from ssaseg.cli.drawing.scatter import Point, draw_scatter
from ssaseg.cli.errors import CommandError
from ssaseg.cli.profiling.scatter import names_of, read_source, remarks
from ssaseg.models import build_model, save_model

WORDS = ("--size", "32", "32", "--runs", "1", "--device", "cpu")


def report(path: Path, checkpoint: str, **changes: Any) -> Path:
    interval = {"low": 60.0, "high": 63.0, "level": 95, "resamples": 1000}
    content = {"checkpoint": checkpoint, "mIoU": 61.0, "mIoU_interval": interval, "statement": "val split"}
    path.write_text(json.dumps(content | changes))
    return path


def test_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """A run folder and a report: one figure each in table, JSON and picture."""
    other = tmp_path / "other.safetensors"
    save_model(other, build_model("seaformer_t", 5, "ssa", memory=False), {})
    scores = report(tmp_path / "scores.json", "other.safetensors", mIoU=63.25)
    out, file = tmp_path / "x.png", tmp_path / "x.json"
    result = call("profile", "--scatter", checkpoint.parent, scores, "--out", out, "--json", file, *WORDS)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert sorted((p["classifier"], p["mIoU"]) for p in found["points"]) == [("linear", 61.5), ("ssa", 63.25)]
    assert [p["latency_ms"] for p in found["points"]] == sorted(p["latency_ms"] for p in found["points"])
    assert found["points"][0]["front"]
    assert found["size"] == [32, 32]
    assert "61.50" in result.stdout
    assert f"wrote {out}" in result.stdout
    with Image.open(out) as image:
        assert image.info["Software"] == "ssaseg profile"


def test_scores_that_cannot_be_compared_are_named(checkpoint: Path, tmp_path: Path) -> None:
    (run,) = read_source(checkpoint)
    (other,) = read_source(report(tmp_path / "scores.json", str(checkpoint), statement="the first 3 of 9 images"))
    assert remarks([run]) == remarks([run, run]) == []
    (note,) = remarks([run, other])
    assert "measured in different ways" in note
    fewer = run.opened.metadata | {"classes": ["a", "b"]}
    (note,) = remarks([run, run._replace(opened=run.opened._replace(metadata=fewer))])
    assert "different classes" in note


def test_a_report_finds_its_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(checkpoint, tmp_path / "best.safetensors")
    (tmp_path / "sub").mkdir()
    for name in ("best.safetensors", "runs/gone/best.safetensors"):
        (found,) = read_source(report(tmp_path / "scores.json", name))
        assert found.opened.path == tmp_path / "best.safetensors"
        assert found[1:] == (61.0, (60.0, 63.0), "val split")
    with pytest.raises(CommandError, match="does not exist\nrun the command in the folder where"):
        read_source(report(tmp_path / "sub/scores.json", "best.safetensors"))
    monkeypatch.chdir(tmp_path)
    (found,) = read_source(report(tmp_path / "sub/scores.json", "best.safetensors"))
    assert found.opened.path == Path("best.safetensors")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "no checkpoint with an mIoU"),
        ('{"checkpoint": 3, "mIoU": 1}', "no checkpoint with an mIoU"),
        ('{"checkpoint": "x", "mIoU": null}', "no checkpoint with an mIoU"),
        ('{"checkpoint": "x", "mIoU": NaN}', "no checkpoint with an mIoU"),
        ('{"checkpoint": "x", "mIoU": true}', "no checkpoint with an mIoU"),
        ('{"checkpoint": "x", "mIoU": 101}', "no checkpoint with an mIoU"),
    ],
)
def test_reports_that_are_none(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CommandError, match=said) as error:
        read_source(tmp_path / "x.json")
    assert "expected a run folder" in str(error.value)


def test_sources_without_a_score(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CommandError, match=r"no such file|no best\.safetensors in it"):
            read_source(source)
    save_model(tmp_path / "x.safetensors", build_model("seaformer_t", 5, "linear", memory=False), {})
    with pytest.raises(CommandError, match=r"no mIoU in its header\nscore it first: ssaseg eval"):
        read_source(tmp_path / "x.safetensors")


def test_files_of_the_same_network_are_told_apart(network: Any) -> None:
    files = [network._replace(path=Path("runs") / name / "best.safetensors") for name in ("a", "b")]
    assert names_of(files) == ["seaformer_t (a/best.safetensors)", "seaformer_t (b/best.safetensors)"]
    other = network._replace(metadata={**network.metadata, "classifier": "linear"})
    assert names_of([network, other]) == ["seaformer_t", "seaformer_t"]


def test_names_cover_neither_each_other_nor_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many close points: boxes of the names as they are drawn in the end."""
    boxes: list[tuple[float, float, float, float]] = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, *_: boxes.extend(boxes_of(figure)))
    draws = np.random.default_rng(0)
    points = [
        Point(30 + 8 * x, 60 + 5 * y, f"segformer_b{index}, ssa", "ab"[index % 2], (58 + 5 * y, 62 + 5 * y))
        for index, (x, y) in enumerate(draws.random((12, 2)))
    ]
    draw_scatter(points, points[:1], ("x", "y"), "title", tmp_path / "x.png", {})
    assert len(boxes) == 24
    shared = [drawing._shared(one, other) for index, one in enumerate(boxes) for other in boxes[:index]]
    near = sorted(area for area in shared if area)
    assert not near or near[-1] < 40  # a corner of a letter's line height; a name has 1500 square pixels


def boxes_of(figure: Figure) -> list[tuple[float, float, float, float]]:
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()  # type: ignore[attr-defined]
    names = [tuple(text.get_window_extent(renderer).extents) for text in axes.texts if text.get_text()]
    dots = [axes.transData.transform(xy) for each in axes.collections for xy in each.get_offsets()]
    return [*names, *((x - 5, y - 5, x + 5, y + 5) for x, y in dots)]  # type: ignore[list-item]


@pytest.mark.parametrize("times", [(5.0,), (5.0, 5.0), (5.0, 80.0)])
def test_one_point_equal_ones_and_a_wide_range(times: tuple[float, ...], tmp_path: Path) -> None:
    points = [Point(time, 50.0, f"$net{index}\x1b", "linear") for index, time in enumerate(times)]
    draw_scatter(points, points, ("x", "y"), "a\nb", tmp_path / "x.png", {"Software": "x"})
    assert (tmp_path / "x.png").stat().st_size > 1000
