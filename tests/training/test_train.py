"""Training as a user starts, stops and resumes it, on tiny built-in scenes."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import Change, as_it_is, command, killed_in_step, slow_steps
from click.testing import CliRunner, Result
from forked import Forked
from safetensors.torch import load_file
from tiny import TINY

from ssaseg.cli.main import cli
from ssaseg.cli.training import loop as train
from ssaseg.cli.training.optimiser import learning_rate, param_groups
from ssaseg.cli.training.step import step_totals
from ssaseg.models import CLASSIFIERS, build_model
from ssaseg.models.checkpoint import read_checkpoint
from ssaseg.recipes import load_recipe


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["train", "demo", *TINY, "--device", "cpu", *arguments])


def start(out: Path, *arguments: str, change: Change | None = None) -> Forked:
    """`ssaseg train` in a process of its own, after the change."""
    words = ["train", "demo", *TINY, "--device", "cpu", "--out", str(out), *arguments]
    return Forked(command, words, *([change] if change else []), errors=out.with_suffix(".errors"))


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, errors = start(out, change=as_it_is).finish()
    assert code == 0, errors
    return out


def test_run_folder(undisturbed: Path) -> None:
    files = {path.name for path in undisturbed.iterdir()}
    assert files == {
        "config.yaml", "metrics.jsonl", "curves.png", "batch.png", "predictions.png", "last.safetensors",
        "best.safetensors", "best.md", "train.log", "state-4.pt", "state-6.pt", "env.json", "iou.png", "confused.png",
        "confused.json", "predictions",
    }  # fmt: skip
    records = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]
    assert [record["step"] for record in records if "mIoU" in record] == [3, 6]
    terms = {"main_ce", "coarse_ce", "teacher_ce", "main_dice", "teacher_dice", "response", "semantic", "spatial"}
    assert all(terms <= record.keys() for record in records if "loss" in record)
    total = sum(records[0][term] for term in terms)
    assert records[0]["loss"] == pytest.approx(total)
    printed = (undisturbed / "train.log").read_text().splitlines()
    assert printed[0].startswith("# 20")
    assert printed[1].startswith("demo: seaformer_t ssa, ")
    assert [line.split()[1] for line in printed if line.startswith("step ") and " lr " in line] == ["2/6", "4/6", "6/6"]
    assert all(len(line) <= 80 for line in printed if " lr " in line)
    assert printed[-2] == f"next: ssaseg eval {undisturbed / 'best.safetensors'}"
    assert printed[-1].endswith(" IMAGES --out labels")
    # The resolved recipe runs itself.
    assert load_recipe(str(undisturbed / "config.yaml")).train.steps == 6


def test_a_killed_run_ends_where_an_undisturbed_one_ends(undisturbed: Path, tmp_path: Path) -> None:
    """With workers; `test_never_lost` has the other moments."""
    out = tmp_path / "run"
    code, _ = start(out, change=partial(killed_in_step, 4)).finish()
    assert code == -signal.SIGKILL
    code, errors = start(out, "--resume").finish()
    assert code == 0, errors
    assert_same_weights(out / "last.safetensors", undisturbed / "last.safetensors")
    assert_same_weights(out / "best.safetensors", undisturbed / "best.safetensors")
    assert not list(out.glob(".*")), "temporary files were left behind"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "mIoU" in record] == [3, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_first(undisturbed: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    process = start(out, "train.save_every=1000", change=partial(slow_steps, 0.5))  # a signal comes before the last
    log = out / "metrics.jsonl"
    process.wait_until(lambda: log.exists() and log.read_text() != "")
    process.send_signal(number)
    got, errors = process.finish()
    assert got == code, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    got, errors = start(out, "--resume").finish()
    assert got == 0, errors
    assert_same_weights(out / "last.safetensors", undisturbed / "last.safetensors")


def test_a_folder_in_use_is_not_overwritten(undisturbed: Path) -> None:
    before = (undisturbed / "last.safetensors").read_bytes()
    result = run("--out", str(undisturbed))
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert (undisturbed / "last.safetensors").read_bytes() == before


def test_resume_refuses_what_would_change_the_result(undisturbed: Path, tmp_path: Path) -> None:
    result = run("optim.lr=0.5", "--out", str(undisturbed), "--resume")
    assert result.exit_code == 2
    assert "optim.lr" in result.stderr
    result = run("--out", str(tmp_path / "nothing"), "--resume")
    assert result.exit_code == 2


def test_resume_of_a_finished_run_changes_nothing(undisturbed: Path) -> None:
    before = (undisturbed / "last.safetensors").read_bytes()
    assert run("--out", str(undisturbed), "--resume").exit_code == 0
    assert (undisturbed / "train.log").read_text().count("\n# 20") >= 1, "a resumed run appends"
    assert (undisturbed / "last.safetensors").read_bytes() == before


def test_unreadable_state(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_bytes((undisturbed / "config.yaml").read_bytes())
    (out / "state-6.pt").write_bytes((undisturbed / "state-6.pt").read_bytes()[:1000])
    result = run("--out", str(out), "--resume")
    assert result.exit_code == 2
    assert "state-6.pt" in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_a_loss_that_is_not_finite_names_step_and_images(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("optim.lr=1e30", "optim.warmup=0", "train.save_every=1", "train.workers=0", "--out", str(out))
    assert result.exit_code == 3
    message = result.stderr[result.stderr.index("error:") :]
    assert "step 2" in message
    assert "images: " in message
    assert len(message.splitlines()) <= 3
    assert all(value.isfinite().all() for value in load_file(out / "last.safetensors").values())


def test_disk_full_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    replace, saves = os.replace, []

    def full(source: str, destination: Path) -> None:
        if Path(destination).name.startswith(("state-", "last.safetensors")):
            saves.append(destination)
            if len(saves) > 2:
                raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", full)
    result = run("train.workers=0", "train.eval_every=1000", "--out", str(out))
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr
    state = torch.load(out / "state-2.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert not list(out.glob(".state*"))
    assert "state-2.pt is still the last good state" in result.stderr


def test_a_norm_that_is_not_finite_reaches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    step = train.train_step

    def poisoned(job: train.Job, batches: list[object]) -> Any:
        record = step(job, batches)
        if job.progress.step == 2:  # behind the guard's back
            job.model.get_buffer("backbone.stem.norm.running_var").fill_(float("nan"))
        return record

    monkeypatch.setattr(train, "train_step", poisoned)
    result = run("train.workers=0", "--out", str(out))
    assert result.exit_code == 3
    assert "step 3" in result.stderr
    assert [path.name for path in out.glob("state*")] == ["state-2.pt"]
    assert not (out / "best.safetensors").exists()
    assert all(value.isfinite().all() for value in load_file(out / "last.safetensors").values())


def test_scores_belong_to_the_weights_beside_them(undisturbed: Path) -> None:
    _, last = read_checkpoint(undisturbed / "last.safetensors")
    assert last["step"] == 6
    assert last["scores"]["mIoU"] == json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[-1])["mIoU"]


def test_scores_name_their_protocol(undisturbed: Path) -> None:
    for name in ("last", "best"):
        _, header = read_checkpoint(undisturbed / f"{name}.safetensors")
        assert header["scores"]["statement"].startswith("val split, 2 images, not resized; whole image, single scale")
        assert header["protocol"] == load_recipe("demo", TINY).test.model_dump(mode="json")
        assert header["protocol"]["ratios"] == [1.0]


def test_a_run_begun_before_a_key_existed_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    state = torch.load(out / "state-6.pt", weights_only=True)
    state["recipe"]["test"] = {"scale": None, "multiple": None}
    torch.save(state, out / "state-6.pt")
    assert run("--out", str(out), "--resume").exit_code == 0
    changed = run("test.flip=true", "--out", str(out), "--resume")
    assert changed.exit_code == 2
    assert "test.flip False → True" in changed.stderr


def test_resume_without_state_does_not_start_over(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for path in out.glob("state-*.pt"):
        path.unlink()
    before = (out / "last.safetensors").read_bytes()
    result = run("--out", str(out), "--resume")
    assert result.exit_code == 2
    assert "state-*.pt" in result.stderr
    assert (out / "last.safetensors").read_bytes() == before


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_on_a_gpu(tmp_path: Path, amp: str) -> None:
    arguments = ["train", "demo", *TINY, f"train.amp={amp}", "--device", "cuda", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.stderr
    (tmp_path / "run" / "state-6.pt").unlink()
    result = CliRunner().invoke(cli, [*arguments, "--resume"])
    assert result.exit_code == 0, result.stderr
    assert "step 6" in result.stderr


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("--out", str(tmp_path / "file" / "run"))
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run("train.workers=0", "--dry-run", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_time_limit_saves_and_says_how_to_go_on(
    torchrun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    result = run("train.workers=0", "--max-hours", "1e-9", "--out", str(tmp_path / "run"))
    assert result.exit_code == (0 if torchrun else 1)  # which torchrun would begin anew
    assert "stopped after step 1 because --max-hours is over; state saved, continue with --resume" in result.stderr
    assert (tmp_path / "run" / "state-1.pt").exists()


def test_only_a_dice_makes_a_step_look_at_its_labels_first(make_job: Callable[..., Any], tmp_path: Path) -> None:
    for kind, asked in (("ssa", True), ("linear", False)):
        job = make_job(tmp_path / kind, f"model.classifier={kind}", "train.batch=4", "train.micro_batch=2")
        batches = [next(job.batches) for _ in range(job.micro_batches)]
        assert len(batches) == 2
        assert (step_totals(job, batches) is not None) == asked


def test_linear_classifier_and_bf16_train(tmp_path: Path) -> None:
    words = ("model.classifier=linear", "train.amp=bf16", "train.workers=0", "train.steps=2")
    result = run(*words, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == pytest.approx(records[0]["main_ce"])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.name=seaformer_x", "seaformer_b"),
        ("model.classifier=best", "linear"),
        ("train.amp=fp16", "bf16"),
        ("train.seed=4294967296", "train.seed"),
        (f"loss.weights={{{', '.join(f'{name}: 0' for name in CLASSIFIERS['ssa'].LOSSES)}}}", "loss.weights.main_ce"),
        ("loss.weights.respones=0", "did you mean loss.weights.response?"),
        ("model.options.memory=3", "no key in model.options for seaformer_t with ssa"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path: Path, override: str, word: str) -> None:
    result = run(override, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) <= 3


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train.batch=1", "train.micro_batch=null"], "train.batch"),
        (["train.micro_batch=1", "distill.group=1"], "train.micro_batch"),
    ],
)
def test_one_image_too_small_for_the_norms(tmp_path: Path, words: list[str], key: str) -> None:
    result = run("--out", str(tmp_path / "run"), *words)
    assert result.exit_code == 2, result.output
    error = result.stderr[result.stderr.index("error: ") :]
    assert len(error.splitlines()) <= 3
    assert f"{key}: 1 image in one pass, with augment.crop=[64, 64]" in error
    assert not (tmp_path / "run").exists()


def test_learning_rate_is_mmcvs() -> None:
    optim = load_recipe("demo", ["optim.warmup=1500", "optim.lr=2e-4"]).optim
    # Written out by hand: the decayed rate, and in warm-up a line from 1e-6 of it.
    assert learning_rate(2e-4, 0, 160000, optim) == pytest.approx(2e-10)
    assert learning_rate(2e-4, 750, 160000, optim) == pytest.approx(2e-4 * (1 - 750 / 160000) * 0.5000005)
    assert learning_rate(2e-4, 1500, 160000, optim) == pytest.approx(2e-4 * (1 - 1500 / 160000))
    assert learning_rate(2e-4, 159999, 160000, optim) == pytest.approx(2e-4 / 160000)


def test_parameter_groups_match_official_names() -> None:
    model = build_model("seaformer_b", 150)
    optim = load_recipe("camvid-seaformer_b-ssa", ["optim.lr=1e-4", "optim.weight_decay=0.01"]).optim
    groups = param_groups(model, optim)
    where = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert len(where) == len(list(model.parameters()))
    # Everything behind the backbone learns ten times as fast and keeps its decay, its norms too.
    head = {value for name, value in where.items() if not name.startswith("backbone.")}
    assert head == {(1e-4 * 10, 0.01)}
    # The backbone's norms are called `bn` officially, so `norm` does not free them of decay.
    assert where["backbone.stem.norm.weight"] == (1e-4, 0.01)
    positions = [value for name, value in where.items() if name.endswith("_position")]
    assert len(positions) == 32
    assert set(positions) == {(1e-4, 0.0)}
