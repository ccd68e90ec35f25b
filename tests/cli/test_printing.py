"""What is printed: text from outside changes no terminal, and a stdout that fails costs no results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call, put

from ssaseg.cli.console import print_table
from ssaseg.cli.drawing.bars import plain, save_figure, shorten
from ssaseg.cli.drawing.panels import Panel, grid
from ssaseg.cli.errors import CommandError, print_error
from ssaseg.cli.printing import echo
from ssaseg.datasets.synthetic import CLASSES
from ssaseg.models import build_model, save_model
from ssaseg.recipes import load_recipe

EVIL = "\x1b]0;title\a\x1b[31mred\x9b\u202e\udcff"
SHOWN = r"\x1b]0;title\x07\x1b[31mred\x9b\u202e\xff"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with new weights for the built-in scenes, and a recipe of two images of 64×64."""
    path = tmp_path_factory.mktemp("printing") / "model.safetensors"
    recipe = load_recipe("demo", [f"data.synthetic.{key}" for key in ("val=2", "height=64", "width=64")])
    save_model(path, build_model("seaformer_t", 13), {"recipe": recipe.model_dump(mode="json"), "classes": CLASSES})
    return path


def shell(script: str, *given: str | Path, **env: str) -> tuple[int, str]:
    """Exit code and stderr of a shell script, in which "$@" is the command."""
    command = [sys.executable, "-m", "ssaseg", *map(str, given)]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("script", "env"),
    [
        ('"$@" > /dev/null', {"PYTHONIOENCODING": "ascii"}),
        ('"$@" > /dev/full', {}),
    ],
    ids=["ascii", "full disk"],
)
def test_scores_are_written_before_they_are_printed(
    checkpoint: Path, tmp_path: Path, script: str, env: dict[str, str]
) -> None:
    file = tmp_path / "scores.json"
    _, errors = shell(script, "eval", checkpoint, "--json", file, "--device", "cpu", **env)
    assert "Traceback" not in errors
    assert json.loads(file.read_text())["images"] == 2


@pytest.mark.parametrize("command", ["profile", "compare", "data check"])
def test_other_reports_are_written_before_they_are_printed(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, err: bool = False, **__: Any) -> None:
        if not err:
            raise OSError(28, "No space left on device")

    file = tmp_path / "report.json"
    given: dict[str, list[str | Path]] = {
        "profile": ["profile", "seaformer_t", "--size", "32", "32", "--runs", "1", "--device", "cpu"],
        "compare": ["compare", tmp_path / "run", tmp_path / "run", "--out", tmp_path / "x.png"],
        "data check": ["data", "check", "demo", "data.synthetic.val=2", "data.synthetic.train=2"],
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "mIoU": 2.0, "IoU": [2.0]}\n')
    (tmp_path / "run/config.yaml").write_text("")
    for place in ("console.echo", "data.check.echo", "profiling.tables.echo", "comparison.compare.echo"):
        module, _, name = f"ssaseg.cli.{place}".rpartition(".")
        __import__(module)
        monkeypatch.setattr(sys.modules[module], name, fail)
    monkeypatch.setattr("rich.console.Console.print", fail)
    result = call(*given[command], "--json", file)
    assert (result.exit_code, result.stderr.startswith("error: No space left")) == (2, True), result.output
    assert json.loads(file.read_text())


def test_classes_and_files_cannot_change_the_terminal(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / f"images/{split}/a.png")
        put(tmp_path / f"masks/{split}/a.png", (0, 1, 255))
    names = json.dumps([f"{EVIL[:-1]}{k}" for k in range(2)])
    folders = "".join(f"  {split}: {{images: images/{split}, masks: masks/{split}}}\n" for split in ("train", "val"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"extends: demo\ndata:\n  dataset: folder\n  root: {tmp_path}\n{folders}  classes: {names}\n", encoding="utf-8"
    )
    result = call("data", "check", recipe)
    assert SHOWN[:-4] + "0" in result.stdout
    put(tmp_path / "masks/train/a.png", (7, 8))
    other = tmp_path / "images/val/\x1b[31mred\x07.png"
    other.write_bytes(b"")
    result = call("data", "check", recipe)
    assert r"\x1b[31mred\x07.png" in result.output
    for text in (result.stdout, result.stderr):
        assert not {"\x1b", "\a", "\x9b", "\u202e"} & set(text)


@pytest.mark.parametrize(
    "show",
    [
        lambda: echo(EVIL, err=True),
        lambda: echo("text", err=True, label=EVIL),
        lambda: print_error(CommandError(f"{EVIL}: wrong")),
        lambda: print_error(OSError(2, "No such file", EVIL)),
        lambda: print_table([EVIL], [[EVIL]], EVIL),
    ],
    ids=["text", "label", "error", "file", "table"],
)
def test_nothing_prints_control_characters(show: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> None:
    show()
    text = "".join(capfd.readouterr())
    assert SHOWN in text
    assert not {"\x1b", "\a", "\x9b", "\u202e", "\udcff"} & set(text)


def test_a_line_end_in_a_file_name_hides_no_reason(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(OSError(2, "No such file", "a\nb.png"))
    assert capsys.readouterr().err == "error: a\\x0ab.png: No such file\n"


def test_a_folder_whose_name_is_not_unicode_is_printed(checkpoint: Path, tmp_path: Path) -> None:
    put(tmp_path / "in/a.png")
    out = os.fsencode(tmp_path) + b"/out\xff"
    command = [sys.executable, "-m", "ssaseg", "predict", checkpoint, tmp_path / "in", "--out", out]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert r"out\xff" in done.stdout


def test_pictures_show_the_codes_and_no_formulas(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    assert shorten(EVIL) == SHOWN[:23] + "…"
    assert plain("a$b\x1b\n") == "a\\$b\\x1b\n"
    image = np.zeros((8, 8, 3), np.uint8)
    black = (0, 0, 0)
    shown, same = (grid([[Panel("", image)]], [(text, black)]) for text in (EVIL[:-1], SHOWN[:-4]))
    assert (shown == same).all()
    figure = Figure()
    figure.suptitle(plain("run $x^{$"))
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size
