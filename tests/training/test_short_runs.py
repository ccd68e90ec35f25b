"""First trials and short runs: passes in place of steps, warm-ups that are too long, estimates, and what is printed."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny import TINY

from ssaseg.cli.console import about
from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.printing import echo
from ssaseg.cli.training.folder import open_run
from ssaseg.cli.training.log import PrintedLog, keep_printed
from ssaseg.cli.training.preflight import describe
from ssaseg.cli.training.saving import save
from ssaseg.cli.training.window import WIDTH, log_line, terms_table
from ssaseg.recipes import RecipeError, dump_recipe, load_recipe

PASSES = ["train.steps=null", "train.epochs=2.5"]  # TINY_RUN has train.steps
MakeJob = Callable[..., Any]


# ---- passes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("epochs", "images", "steps"), [(1, 8, 1), (1, 9, 2), (0.001, 3, 1), (40, 367, 1835)])
def test_steps_are_rounded_up(epochs: float, images: int, steps: int) -> None:
    recipe = load_recipe("demo", [f"train.epochs={epochs}", "train.batch=8"])
    assert recipe.train.steps is None
    counted = recipe.with_steps(images)
    assert (counted.train.steps, counted.train.epochs) == (steps, None)
    assert counted.with_steps(5) is counted
    assert load_recipe("demo").with_steps(5) == load_recipe("demo")


def test_the_nearer_of_steps_and_epochs_decides(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("extends: demo\ntrain: {epochs: 7}\n")
    second.write_text("extends: first.yaml\ntrain: {steps: 3}\n")

    def length(*words: Any) -> tuple[int | None, float | None]:
        train = load_recipe(str(words[0]), words[1:]).train
        return train.steps, train.epochs

    assert length(first) == (None, 7)
    assert length(second) == (3, None)
    assert length(second, "train.epochs=2") == (None, 2)
    assert length(first, "train.steps=9") == (9, None)
    assert length(first, "train.epochs=null", "train.steps=9") == (9, None)
    third = tmp_path / "third.yaml"
    third.write_text(dump_recipe(load_recipe(str(first))))
    assert length(third) == (None, 7)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.epochs=2", "train.steps=5"], "train.epochs: expected null, as train.steps is 5, got 2.0"),
        (["train.steps=null"], "train.steps: expected a whole number, got nothing"),
        (["train.epochs=0"], "train.epochs: expected a number above 0"),
        (["train.epochs=ten"], "train.epochs: expected a number"),
        (["train.epochs=.inf"], "train.epochs: expected a finite number"),
    ],
)
def test_lengths_that_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", words)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_run_keeps_the_steps_of_its_passes(
    tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, *PASSES)
    assert job.steps == 10
    assert "train.epochs=2.5: 10 steps of 2 images, with 8 training images" in capsys.readouterr().err
    assert job.recipe.train.epochs is None
    job.progress.step = job.progress.skipped = 1  # as after a step without an update
    save(job)
    (tmp_path / "metrics.jsonl").unlink()
    recipe = job.recipe.model_copy(update={"train": job.recipe.train.model_copy(update={"steps": None, "epochs": 2.5})})
    with open_run(tmp_path, recipe, resume=True) as run:
        assert run.recipe.train.steps == 10
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3.0})})
    with pytest.raises(CommandError, match=r"train\.steps 10 → 12"), open_run(tmp_path, other, resume=True):
        pass


# ---- warm-up -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("warmup", "warned"), [(5, False), (6, True), (600, True)])
def test_a_run_that_ends_inside_its_warm_up(
    tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str], warmup: int, warned: bool
) -> None:
    job = make_job(tmp_path, f"optim.warmup={warmup}")
    capsys.readouterr()
    describe(job)
    lines = capsys.readouterr().err.splitlines()
    assert any(f"6 steps, optim.warmup is {warmup}" in line for line in lines) == warned
    assert any("not optim.lr=0.002; use optim.warmup=0" in line for line in lines) == warned


# ---- what is printed ---------------------------------------------------------------------------------------------
def test_a_line_of_the_log_fits() -> None:
    line = log_line(159950, 160000, 12.3456, 6e-05, 1234.5, 1.0, 123 * 3600 + 45 * 60 + 56)
    assert line == "step 159950/160000 loss 12.346 lr 6.0e-05 1234 images/s wait 100% ETA 123:45:56"
    assert len(line) <= WIDTH == 80
    assert "ETA 0:00:07" in log_line(1, 2, 1.0, 1e-3, 9.96, 0.0, 7.4)


def test_terms_are_a_table() -> None:
    terms = {f"term_{k}": 1.5 * k for k in range(9)}
    lines = list(terms_table(terms))
    assert all(len(line) <= WIDTH for line in lines)
    assert " ".join(lines).split() == [word for name, value in terms.items() for word in (name, f"{value:.3f}")]
    assert list(terms_table({})) == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "1 second"), (42, "40 seconds"), (95, "95 seconds"), (120, "2 minutes"), (5000, "85 minutes"),
     (7000, "2 hours"), (50 * 3600, "50 hours"), (4.2 * 86400, "4 days")],
)  # fmt: skip
def test_times_are_rounded(seconds: float, said: str) -> None:
    assert about(seconds) == f"about {said}"


def test_a_dry_run_times_steps_after_a_first_one(tmp_path: Path) -> None:
    words = ["train", "demo", *TINY, "train.workers=0", "--device", "cpu", "--dry-run", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.stderr
    assert "(mean of 3; the first took " in result.stdout
    assert "all 6 steps: about " in result.stdout
    result = CliRunner().invoke(cli, [*words, "train.steps=1"])
    assert "(the only one; " in result.stdout


def test_what_is_printed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.log"
    with contextlib.suppress(CommandError), keep_printed() as log:
        echo("before", err=True)
        assert not file.exists(), "a run that is refused leaves no file"
        log.start(file, None)
        echo("\x1b[31mred", label="warning:", colour="red", err=True)
        raise CommandError("no images\nexpected some")
    echo("after")
    first, *lines = file.read_text().splitlines()
    assert first.startswith("# 20")
    assert "+00:00 ssaseg" in first
    assert lines == ["before", "warning: \\x1b[31mred", "error: no images", "expected some"]
    with keep_printed() as log:
        log.start(file, None)
        echo("again")
    assert file.read_text().splitlines()[: len(lines) + 1] == [first, *lines], "a run that resumes appends"
    assert file.read_text().endswith("\nagain\n")


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").touch()
    (tmp_path / "train.log").symlink_to("other")
    with keep_printed() as log:
        log.start(tmp_path / "train.log", None)
        echo("one")
        echo("two")
    printed = capsys.readouterr()
    assert printed.out == "one\ntwo\n"
    assert printed.err.count("warning: ") == 1
    assert (tmp_path / "other").read_text() == ""


def test_nothing_is_written_into_another_folder(tmp_path: Path) -> None:
    class Replaced:
        def check(self) -> None:
            raise OSError("replaced")

    log = PrintedLog()
    log.start(tmp_path / "train.log", Replaced())  # type: ignore[arg-type]
    log.write("text")
    assert not (tmp_path / "train.log").exists()
