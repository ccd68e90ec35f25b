"""What newcomers type: run folders, options that are keys, narrow terminals, the folder of the data elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from calling import call
from click.testing import CliRunner

from ssaseg.cli.console import fit_lines, print_table
from ssaseg.cli.engine import exports
from ssaseg.cli.engine.opening import open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import open_dataset
from ssaseg.cli.main import COMMANDS, Context, cli
from ssaseg.cli.options import run_checkpoint
from ssaseg.cli.training.preflight import find_start
from ssaseg.cli.weights import fetching
from ssaseg.datasets import DataError
from ssaseg.recipes import load_recipe
from ssaseg.recipes.messages import likely_keys


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run of the demo, with empty files in the place of checkpoints."""
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").write_text(call("train", "demo", "optim.lr=0.25", "--print-config").stdout)
    (folder / "last.safetensors").touch()
    return folder


# ---- run folders -------------------------------------------------------------------------------------------------
VERBS = {
    "eval": ("evaluation.report", "run_eval", "files", []),
    "predict": ("prediction.predict", "run_predict", "checkpoint", ["x", "--out", "y"]),
    "explain": ("explanation.explain", "run_explain", "checkpoint", ["x", "--out", "y"]),
    "convert": ("weights.convert", "run_convert", "source", ["x.pth"]),
    "quantize": ("quantization.quantize", "run_quantize", "request", ["x.onnx"]),
}


@pytest.mark.parametrize("command", VERBS)
def test_the_checkpoint_of_a_run_folder_is_taken(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    room, function, argument, words = VERBS[command]
    module: ModuleType = import_module(f"ssaseg.cli.{room}")
    got: list[Any] = []

    def note(*positional: Any, **given: Any) -> int:
        got.append(given.get(argument, positional[:1]))
        return 0

    monkeypatch.setattr(module, function, note)
    for name in ("last.safetensors", "best.safetensors"):
        (run_folder / name).touch()
        result = call(command, run_folder, *words)
        assert result.exit_code == 0, result.output
        assert str(run_folder / name) in str(got[-1])
        assert f"my run is a run folder: {name} is used" in result.stderr


def test_a_run_folder_in_other_places(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_checkpoint(run_folder) == run_folder / "last.safetensors"
    assert find_start(str(run_folder), "seaformer_t") == run_folder / "last.safetensors"
    with pytest.raises(ValueError, match=r"my run/last\.safetensors"):  # it is empty
        open_file(run_folder)
    assert load_recipe(str(run_folder)).optim.lr == 0.25
    monkeypatch.chdir(run_folder.parent)
    assert load_recipe("my run").optim.lr == 0.25
    (run_folder / "config.json").touch()
    assert run_checkpoint(run_folder) == run_folder, "a folder of transformers"


def test_train_resumes_a_run_folder(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = call("train", run_folder)
    assert refused.exit_code == 2
    assert f"to continue it: ssaseg train '{run_folder}' --resume" in refused.stderr
    got: dict[str, Any] = {}
    monkeypatch.setattr("ssaseg.cli.training.loop.run_train", lambda **given: got.update(given) or 0)
    assert call("train", "--resume", run_folder, "train.workers=3").exit_code == 0
    assert (got["out"], got["resume"]) == (run_folder, True)
    assert (got["recipe"].optim.lr, got["recipe"].train.workers) == (0.25, 3)


def test_other_folders_in_the_place_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    result = call("train", "photos")
    assert "photos: a folder, expected a recipe's name or file" in result.stderr
    assert "`ssaseg data init` writes a recipe" in result.stderr
    (tmp_path / "photos" / "a.yaml").touch()
    assert "files in it: a.yaml" in call("train", "./photos").stderr
    (tmp_path / "own.yaml").touch()
    assert "did you mean the file own.yaml?" in call("recipes", "show", "own").stderr


# ---- keys and options --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("train demo --lr 0.1", "'--lr'; keys of the recipe have no dashes: optim.lr=0.1\n"),
        ("train demo --batch-size=4 --out x", ": train.batch=4\n"),
        ("train demo --train.epochs 3", ": train.epochs=3\n"),
        ("train demo --epochs --out x", ": train.epochs=VALUE\n"),
        ("data check demo --root x", ": data.root=x\n"),
        ("train demo --frobnicate 3", "No such option '--frobnicate'.\n"),
        ("train demo --devices cpu", "Did you mean '--device'?"),
        ("train demo device=cpu", "device=cpu: this is an option: --device cpu\n"),
        ("train demo max-hours=2", "this is an option: --max-hours 2\n"),
        ("train optim.lr=0.1 demo", "expected a recipe first, then key=value\n"),
        ("trian demo", "did you mean `cli train`?"),
        ("init photos", "did you mean `cli data init`?"),
        ("data chek photos", "did you mean `cli data check`?"),
        ("test x", "did you mean `cli eval`?"),
        ("data foo", "expected one of: check, export, init, pick, prepare, suspects"),
        ("eval", "for example: ssaseg eval runs/demo/best.safetensors\n"),
        ("eval nothere", "'nothere' does not exist; expected a checkpoint such as runs/demo/best.safetensors"),
        ("eval data.root=x", "keys are changed in `ssaseg train` only; for data: --data RECIPE or --root DIR"),
    ],
)
def test_options_and_keys_that_were_mixed_up(words: str, part: str) -> None:
    result = call(*words.split())
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "section", "keys"),
    [
        ("lr", "train", ["optim.lr"]),
        ("epoch", "train", ["train.epochs"]),
        ("epochs", "", ["train.epochs"]),
        ("batch", "data", ["train.batch"]),
        ("Batch_Size", "", ["train.batch"]),
        ("learning_rate", "optim", ["optim.lr"]),
        ("weightdecay", "optim", ["optim.weight_decay"]),
        ("scale", "", ["augment.scale", "test.scale"]),
        ("crops", "test", ["test.crop"]),
        ("lrr", "optim.rules.head", ["optim.rules.head.lr"]),
        ("frobnicate", "", []),
    ],
)
def test_the_likely_key_is_looked_for_in_all_sections(name: str, section: str, keys: list[str]) -> None:
    assert likely_keys(name, section) == keys


# ---- data that are elsewhere -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "what"), [("a.JPG", "an image"), ("a.yaml", "a recipe or another YAML file"), ("a.txt", "a text file")]
)
def test_other_files_in_the_place_of_a_checkpoint(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).touch()
    assert f"{name} is {what}, expected a checkpoint" in call("predict", tmp_path / name, "x", "--out", "y").stderr


def test_missing_data_are_noticed_before_networks_are_loaded(run_folder: Path) -> None:
    for words, part in (
        (["--data", "nothere"], "nothere: no shipped recipe has this name"),
        (["--data", "camvid-seaformer_b-ssa", "--root", run_folder / "config.yaml"], "config.yaml: a file (--root)"),
        (["--data", "demo", "--root", "x"], "--root x: recipe demo uses built-in scenes"),
    ):
        assert part in call("eval", run_folder, *words).stderr  # its checkpoint is an empty file


def test_missing_data_name_the_option_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("ade20k-seaformer_b-ssa")
    with pytest.raises(CommandError, match=r"data\.root of recipe ade20k.*\n.*--root DIR; other data: --data RECIPE"):
        open_dataset(recipe, "val", None)
    with pytest.raises(DataError, match=r"or set its folder: --root DIR") as caught:
        open_dataset(recipe, "val", tmp_path)
    assert "data.root=DIR" not in str(caught.value)
    with pytest.raises(DataError, match="check --root and the folders below it"):
        open_dataset(load_recipe("camvid-seaformer_b-ssa"), "val", tmp_path)


# ---- narrow terminals --------------------------------------------------------------------------------------------
def all_commands(command: click.Command = cli, name: str = "ssaseg") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below in command.list_commands(Context(command)):
            found = command.get_command(Context(command), below)
            assert found is not None
            yield from all_commands(found, f"{name} {below}")


@pytest.mark.parametrize("width", [58, 78])
def test_help_breaks_no_word_and_hides_none(width: int) -> None:
    listed = dict(all_commands())
    assert len(listed) > len(COMMANDS)

    def text(name: str, width: int) -> str:
        return listed[name].get_help(Context(listed[name], info_name=name, terminal_width=width))

    for name in listed:
        narrow = text(name, width)
        assert max(map(len, narrow.splitlines())) <= width + 2, name
        assert set(narrow.replace(" \\\n", "\n").split()) >= set(text(name, 400).split()), name


@pytest.mark.parametrize("width", [60, 80])
def test_tables_break_no_word_and_hide_none(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = ("run", "model", "step", "best mIoU [%]", "last mIoU [%]", "images/s", "hours")
    rows = [("camvid-seaformer_b-ssa-lr0.0005", "seaformer_b", "16000/16000", "71.23", "71.01", "12.3", "3.20"),
            ("[void]", "–", "16/16000", "–", "–", "–", "–")]  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(heads, rows, "all runs")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    assert set(printed.split()) >= {word for cells in (heads, *rows) for cell in cells for word in cell.split()}
    assert printed.count("[void]") == printed.count("run\n") + printed.count("run ") > 1  # the names stand in each part
    monkeypatch.delenv("COLUMNS")
    print_table(heads, rows)  # to a pipe: whole rows
    assert capsys.readouterr().out.count("[void]") == 1


def test_lists_of_recipes_and_keys_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {words: call(*words.split()).stdout for words in ("recipes list", "recipes keys")}
    assert max(map(len, wide["recipes list"].splitlines())) > 80, "to a pipe, a line for each recipe"
    for width in (60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        for words, whole in wide.items():
            printed = call(*words.split()).stdout
            assert printed.split() == whole.split(), words
            long = [line for line in printed.splitlines() if len(line) > width]
            assert all(re.fullmatch(r"\s*\S+", line) for line in long), long  # a single word


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("short", ["short"]),
        ("  ssaseg eval " + "x" * 30 + " --flip", ["  ssaseg eval \\", f"      {'x' * 30} \\", "      --flip"]),
        ("  name      " + "word " * 9, ["  name      word word word word word", "            word word word word"]),
        ("  " + "n" * 30 + "  what it is for", ["  " + "n" * 30, "      what it is for"]),
    ],
)
def test_long_lines(line: str, parts: list[str]) -> None:
    assert [part.rstrip() for part in fit_lines(line, 40).splitlines()] == parts
    assert fit_lines(line, None) == line


def test_named_data_sets_show_what_is_in_force(tmp_path: Path) -> None:
    for name, parts in (
        ("ade20k-seaformer_b-ssa", ["  reduce_zero_label: true", "150 classes", "images/training", "kitchen island"]),
        ("demo", ["13 classes", "buoy"]),
    ):
        text = call("train", name, "--print-config").stdout
        assert not any(part in text for part in ("reduce_zero_label: false", "classes: []"))
        assert all(part in text for part in parts)
        (tmp_path / f"{name}.yaml").write_text(text)
        assert load_recipe(str(tmp_path / f"{name}.yaml")) == load_recipe(name)


def test_commands_are_listed_with_whole_sentences() -> None:
    assert "..." not in re.sub(r"(COMMAND|ARGS\])\.\.\.|\[ARGS\]\.\.\.", "", call("--help").stdout)


def test_colour_is_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, coloured in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", value)
        result = CliRunner().invoke(cli, ["trian"], color=True)
        assert ("\x1b[" in result.stderr) == coloured


def test_a_home_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "SSASEG_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="set HOME, or SSASEG_CACHE"):
        exports.cache_folder()
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(CommandError, match="set HOME, or TORCH_HOME"):
        fetching.folder()
