"""The command line's shell: help, errors, exit codes, files. What the verbs do is tested beside each of them."""

import ast
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from places import HELPERS

from ssaseg.cli.console import json_target, print_table, write_json
from ssaseg.cli.data import check, init
from ssaseg.cli.device import select_device
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation import report
from ssaseg.cli.explanation import explain
from ssaseg.cli.main import cli
from ssaseg.cli.prediction import predict
from ssaseg.cli.profiling import profile as profiling
from ssaseg.cli.training import loop
from ssaseg.cli.weights import convert
from ssaseg.models.build import build_outline
from ssaseg.recipes import RecipeError, list_recipes, load_recipe

COMMAND = (sys.executable, "-m", "ssaseg")
HEAVY = ("torch", "numpy", "cv2", "pydantic", "yaml", "rich", "matplotlib", "tqdm", "PIL")


def subcommands(group: click.Group) -> dict[str, click.Command]:
    """A group's commands by name, those too that are imported only when they are asked for."""
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def paths_of(group: click.Group, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command as the words that call it, groups included."""
    found = [above]
    for name, command in subcommands(group).items():
        words = (*above, name)
        found += paths_of(command, words) if isinstance(command, click.Group) else [words]
    return found


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def assert_told(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str, Any], None]:
    """Puts a function in a verb's place."""

    def put(module: ModuleType, function: str, does: Any) -> None:
        monkeypatch.setattr(module, function, does)

    return put


@pytest.mark.parametrize("words", paths_of(cli), ids=" ".join)
def test_help_answers_with_an_example(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"ssaseg {' '.join(words)}".strip() in result.output.partition("Example:")[2]


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    output = subprocess.check_output([sys.executable, HELPERS / "heavy.py", *HEAVY], text=True)
    quick, light, package = map(ast.literal_eval, output.splitlines())
    assert (quick, package) == ([], [])
    assert not {"torch", "cv2", "matplotlib"} & set(light)

    def seconds() -> float:
        """Of processor time: a busy machine stretches the clock's."""
        before = os.times()
        subprocess.run([*COMMAND, "train", "--help"], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.3


def test_version_and_bare_call() -> None:
    assert run("--version").output.startswith("ssaseg, version ")
    assert "Commands:" in run().output
    assert "Traceback" not in run().output


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["tarin"], "No such command 'tarin'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "demo", "--devise", "cpu"], "--devise"),
        (["train", "demo", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["train", "demo", "optim.lrr=1", "--print-config"], "did you mean optim.lr?"),
        (["train", "dmo"], "did you mean demo?"),
        (["eval", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["predict", __file__, "x", "--out", "y", "--save", "index,colour"], "'colour' is not one of index, color"),
        (["predict", __file__, "x", "--out", __file__], "is a file"),
        (["profile", "seaformer_t", "--size", "512"], "--size"),
        (["profile", "seaformer_t", "--classes", "1"], "--classes"),
        (["convert", "gone.pth", "x.safetensors"], "'gone.pth' does not exist"),
        (["recipes", "show", "dmo"], "did you mean demo?"),
    ],
)
def test_wrong_words_are_told_in_three_lines(words: list[str], part: str) -> None:
    assert_told(run(*words), 2, part)


class LibraryError(RecipeError):
    """Stands for an error of the library that the command does not know itself."""


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (CommandError("bad\nworse\nmend\nmore"), 2, "mend"),
        (CommandError("out of tolerance", exit_code=3), 3, "out of tolerance"),
        (LibraryError("train.steps is missing"), 2, "train.steps"),
        (FloatingPointError("step 7: loss is nan"), 3, "step 7"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/last"), 2, "runs/last: No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "train.micro_batch"),
    ],
)
def test_errors_become_three_lines_and_a_code(
    fake: Callable[[ModuleType, str, Any], None], error: Exception, code: int, part: str
) -> None:
    def fail(**_: object) -> int:
        raise error

    fake(loop, "run_train", fail)
    assert_told(run("train", "demo"), code, part)


def test_ctrl_c_a_bug_and_the_debug_switch(
    fake: Callable[[ModuleType, str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_(error: BaseException) -> None:
        raise error

    def swallow() -> None:  # as a library in C++ that is interrupted
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("could not determine the shape")

    before = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        fake(loop, "run_train", lambda **_: raise_(KeyboardInterrupt()))
        assert run("train", "demo").exit_code == 130
        signal.raise_signal(signal.SIGINT)  # a second one, while the process ends
        fake(loop, "run_train", lambda **_: swallow())
        assert run("train", "demo").exit_code == 143
        signal.raise_signal(signal.SIGTERM)
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    fake(loop, "run_train", lambda **_: raise_(SystemExit(143)))
    assert run("train", "demo").exit_code == 143
    fake(loop, "run_train", lambda **_: raise_(ZeroDivisionError("a bug")))
    assert isinstance(run("train", "demo").exception, ZeroDivisionError)
    monkeypatch.setenv("SSASEG_DEBUG", "1")
    fake(loop, "run_train", lambda **_: raise_(CommandError("told in full")))
    assert isinstance(run("train", "demo").exception, CommandError)


def test_exit_code_and_run_folder(fake: Callable[[ModuleType, str, Any], None]) -> None:
    calls: list[dict[str, Any]] = []

    def note(**values: object) -> int:
        calls.append(values)
        return 1

    fake(loop, "run_train", note)
    assert run("train", "demo", "train.steps=7", "--resume").exit_code == 1
    assert run("train", "demo", "--out", "elsewhere", "--device", "cpu", "--dry-run", "--check", "all").exit_code == 1
    recipe = load_recipe("demo", ["train.steps=7"])
    first = {
        "out": Path("runs/demo"),
        "resume": True,
        "device": "auto",
        "verbose": False,
        "dry_run": False,
        "check": "sample",
    }
    assert calls[0] == {"recipe": recipe, **first, "max_hours": None, "track": ()}
    second = {
        "out": Path("elsewhere"),
        "resume": False,
        "device": "cpu",
        "verbose": False,
        "dry_run": True,
        "check": "all",
    }
    assert second.items() <= calls[1].items()


@pytest.mark.parametrize(
    ("words", "verb", "function"),
    [
        (["train", "demo"], loop, "run_train"),
        (["eval", __file__], report, "run_eval"),
        (["predict", __file__, "x", "--out", "new", "--save", "index,rle"], predict, "run_predict"),
        (["explain", __file__, "x", "--out", "new"], explain, "run_explain"),
        (["profile", "seaformer_t"], profiling, "run_profile"),
        (["convert", __file__, "x.pth"], convert, "run_convert"),
        (["data", "check", "demo", "data.root=x", "--split", "val"], check, "run_check"),
        (["data", "init", "x", "--out", "x.yaml"], init, "run_init"),
    ],
)
def test_each_command_calls_its_verb_as_the_verb_is_written(
    monkeypatch: pytest.MonkeyPatch, words: list[str], verb: ModuleType, function: str
) -> None:
    signature = inspect.signature(getattr(verb, function))
    bound: list[inspect.BoundArguments] = []

    def note(**values: object) -> int:
        bound.append(signature.bind(**values))
        return 0

    monkeypatch.setattr(verb, function, note)
    assert run(*words).exit_code == 0
    assert len(bound) == 1


def test_print_config_is_a_recipe_that_loads_back_equal(tmp_path: Path) -> None:
    result = run("train", "camvid-seaformer_b-ssa", "optim.lr=1e-3", "--print-config")
    assert result.exit_code == 0
    file = tmp_path / "resolved.yaml"
    file.write_text(result.stdout, encoding="utf-8")
    assert load_recipe(str(file)) == load_recipe("camvid-seaformer_b-ssa", ["optim.lr=1e-3"])


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    listed = run("recipes", "list").stdout
    names = [line.split()[0] for line in listed.splitlines() if line]
    assert names == list_recipes()
    assert len(names) - 1 > listed.count("\n\n") > 2  # an empty line between data sets
    assert "demo " in listed
    assert "_camvid" not in listed
    assert run("recipes", "show", "demo").stdout.startswith("# ")

    copy = tmp_path / "mine.yaml"
    assert run("recipes", "copy", "camvid-seaformer_b-linear", str(copy)).exit_code == 0
    assert load_recipe(str(copy)).model.classifier == "linear"
    before = copy.read_bytes()
    assert_told(run("recipes", "copy", "demo", str(copy)), 2, "mine.yaml: already exists")
    assert copy.read_bytes() == before
    assert_told(run("recipes", "copy", "demo", str(tmp_path / "zz")), 2, "zz.yaml")
    assert_told(run("recipes", "copy", "demo", str(tmp_path / "no/x.yaml")), 2, "make it first")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_built_in_scenes_are_exported_in_the_layout_of_a_recipe(tmp_path: Path) -> None:
    result = run("data", "export", str(tmp_path), "--count", "2", "--split", "train", "--size", "64", "80")
    assert result.exit_code == 0
    assert "2 scenes" in result.stdout
    images, masks = (sorted((tmp_path / kind / "train").iterdir()) for kind in ("images", "annotations"))
    assert [path.name for path in images] == [path.name for path in masks]
    assert [Image.open(path).size for path in [*images, *masks]] == [(80, 64)] * 4


def test_a_closed_pipe_is_no_error() -> None:
    command = [*COMMAND, "recipes", "show", "demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 1


def test_select_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    with pytest.raises(CommandError, match="--device auto"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda")


def test_json_that_cannot_be_written_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "scores.json"
    assert json_target(str(file)) == str(file)
    assert (json_target(None), json_target("-"), json_target("/dev/stdout")) == (None, "-", "-")
    for given, said in {"": "is empty", str(tmp_path): "is a folder", str(file / "x"): "no such folder"}.items():
        with pytest.raises(CommandError, match=f"--json.*{said}\ngive a file"):
            json_target(given)
    (circle := tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CommandError, match="no such folder"):
        json_target(str(circle / "x"))
    write_json(json_target(str(circle)), {"a": 1})
    assert json.loads(circle.read_text()) == {"a": 1}
    monkeypatch.setattr(os, "access", lambda *_: False)  # modes do not bind root
    with pytest.raises(CommandError, match="its folder cannot be written"):
        json_target(str(file))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full here")
def test_json_to_a_device() -> None:
    assert json_target("/dev/full") == "/dev/full"
    with pytest.raises(OSError, match=r"No space left on device .*: '/dev/full'"):
        write_json("/dev/full", {"mIoU": 1})
    write_json("/dev/null", {"mIoU": 1})
    assert Path("/dev/null").is_char_device()


def test_tables_keep_long_rows_and_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["class", "IoU [%]"], [["[void] " + "x" * 100, "12.30"]], title="scores")
    row = next(line for line in capsys.readouterr().out.splitlines() if "[void]" in line)
    assert row.split() == ["[void]", "x" * 100, "12.30"]


def test_every_recipe_builds() -> None:
    networks = {(recipe.model.name, recipe.model.classifier) for recipe in map(load_recipe, list_recipes())}
    assert len(networks) > 30
    for name, classifier in networks:
        assert all(parameter.is_meta for parameter in build_outline(name, 2, classifier).parameters())


@pytest.mark.parametrize("command", ["predict", "eval", "explain"])
def test_a_folder_in_the_place_of_a_checkpoint(command: str, tmp_path: Path) -> None:
    words = [command, str(tmp_path), *(["x", "--out", "y"] if command == "predict" else [])]
    for file, part in (
        ("other.pth", "expected a file, a run folder" if command != "explain" else "expected a file or a run folder"),
        ("config.yaml", "a run folder, but it has no best.safetensors yet"),
    ):
        (tmp_path / file).touch()
        result = run(*words)
        assert result.exit_code == 2
        assert part in result.stderr
        assert ("in it: other.pth" in result.stderr) == (file == "other.pth")
        assert len(result.stderr.splitlines()) <= 3
    (tmp_path / "config.json").touch()
    if command == "explain":
        assert f"convert it first: ssaseg convert {tmp_path} OURS.safetensors" in run(*words).stderr
