"""The run folder: one run at a time, states that can and cannot be read, and what is remembered of a run."""

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from changes import hold_run
from forked import Forked
from states import DATA, RECIPE, save

from ssaseg.cli.errors import CommandError, print_error
from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.training import environment as records
from ssaseg.cli.training import log
from ssaseg.cli.training import loop as train
from ssaseg.cli.training.folder import open_run, write_start
from ssaseg.cli.training.job import Job, StepRecord
from ssaseg.cli.training.nonfinite import stop_before
from ssaseg.cli.training.pictures import write_batch
from ssaseg.cli.training.saving import save_best
from ssaseg.cli.training.state import load_state, refuse_changes, state_files
from ssaseg.cli.training.window import Window
from ssaseg.datasets.pairs import PairDataset
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.recipes import load_recipe
from ssaseg.recipes.resuming import FREE_KEYS, flat

MakeJob = Callable[..., Job]


def step_of(state: dict[str, Any] | None) -> int:
    """The step that both the progress and the weight tell."""
    assert state is not None
    assert state["model"]["weight"].item() == state["progress"]["step"]
    return state["progress"]["step"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_states_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (8, 9, 10, 10, 11):
        save(tmp_path, step, keep=keep)
    assert [path.name for path in state_files(tmp_path)] == [f"state-{step}.pt" for step in (11, 10, 9)[:keep]]
    state = load_state(tmp_path)
    assert step_of(state) == 11
    assert state is not None
    assert state["extra"] == {"data": DATA}


def cut(content: bytes) -> bytes:
    return content[:1000]


def damage(content: bytes) -> bytes:
    """A byte of the weight changed: PyTorch would load it."""
    at = content.index(torch.tensor([9.0]).numpy().tobytes())
    return content[:at] + b"\1" + content[at + 1 :]


@pytest.mark.parametrize(
    "spoil", [cut, damage, lambda _: b"", lambda content: bytes(len(content)), lambda content: content[:-10]],
    ids=["truncated", "damaged", "empty", "zeros", "no-end"],
)  # fmt: skip
def test_a_state_that_cannot_be_read(tmp_path: Path, spoil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 8, 9):
        save(tmp_path, step)
    newest = tmp_path / "state-9.pt"
    newest.write_bytes(spoil(newest.read_bytes()))
    assert step_of(load_state(tmp_path)) == 8
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "state-9.pt cannot be read" in told
    assert "continuing from the last good state, state-8.pt" in told
    # It takes no good state's place among those that are kept.
    save(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["state-10.pt", "state-8.pt", "state-9.pt.unreadable"]
    assert step_of(load_state(tmp_path)) == 10
    assert capsys.readouterr().err == ""


def test_no_state_can_be_read(tmp_path: Path) -> None:
    for step in (8, 9):
        save(tmp_path, step)
        (tmp_path / f"state-{step}.pt").write_bytes(b"")
    with pytest.raises(CommandError, match=r"state-9\.pt: the training state cannot be read.*no older state"):
        load_state(tmp_path)
    assert names(tmp_path) == ["state-8.pt", "state-9.pt"]


def test_a_file_that_is_no_state(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "state-3.pt")
    with pytest.raises(CommandError, match="it has no optimizer, progress, recipe, scaler"):
        load_state(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(CommandError) as caught:
            save(tmp_path, 3, keep=1)
    lines = str(caught.value).splitlines()
    assert os.strerror(number) in lines[0]
    assert lines[1] == "state-2.pt is still the last good state"
    assert len(lines) == 3
    assert names(tmp_path) == ["state-1.pt", "state-2.pt"]
    assert step_of(load_state(tmp_path)) == 2


def test_a_limit_of_the_system(tmp_path: Path) -> None:
    """A write that really fails in its middle, as on a full disk."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CommandError, match=r"state-1\.pt is still the last good state"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["state-1.pt"]
    assert step_of(load_state(tmp_path)) == 1


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".state-5.pt.partial").write_bytes(b"half")
    save(tmp_path, 6)
    assert names(tmp_path) == ["state-6.pt"]


# ---- recipes -------------------------------------------------------------------------------------------------------


def changed(*words: str) -> dict[str, Any]:
    return load_recipe("demo", words).model_dump(mode="json")


def test_harmless_changes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_changes(changed(), changed("train.workers=5", "train.micro_batch=4", "train.keep=9"), tmp_path)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "train.workers 1 → 5" in told
    assert "train.keep 2 → 9" in told
    assert "train.micro_batch None → 4 (BatchNorm sees other groups" in told
    refuse_changes(changed(), changed(), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "word",
    ["train.steps=5", "train.batch=4", "train.seed=1", "train.amp=bf16", "optim.ema=0.9", "optim.freeze=[norm]",
     "loss.label_smoothing=0.1", "loss.weights={spatial: 0}", "data.synthetic.train=500", "test.flip=true"],
)  # fmt: skip
def test_other_changes_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(CommandError) as caught:
        refuse_changes(changed(), changed(word, "train.keep=9"), tmp_path)
    assert word.partition("=")[0] in str(caught.value)
    assert "train.keep" not in str(caught.value)


def test_the_way_back_is_a_whole_command(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "best.safetensors").touch()
    with pytest.raises(CommandError) as caught:
        refuse_changes(changed(), changed("train.steps=5"), folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1] == f"resume it with: ssaseg train '{folder}' --resume"
    assert f"model.pretrained='{folder}/best.safetensors'" in lines[2]
    with pytest.raises(CommandError) as caught:
        refuse_changes(changed(), changed("train.seed=5"), folder)
    assert "pretrained" not in str(caught.value)


def test_free_keys_are_keys() -> None:
    assert FREE_KEYS.keys() <= flat(load_recipe("camvid-seaformer_b-ssa").model_dump()).keys()


@pytest.mark.parametrize(
    ("found", "ranks", "then"),
    [(4, 1, 4), (3, 2, 3), (4, 2, "auto"), (12, 2, "auto"), (None, 1, "auto")],
    ids=["stays", "cuts the smaller share", "does not cut it", "is more", "none was looked for"],
)
def test_a_micro_batch_that_was_found_stays_where_it_fits(tmp_path: Path, found: Any, ranks: int, then: Any) -> None:
    recipe = load_recipe("demo", ["model.classifier=linear", "train.micro_batch=auto", "train.batch=12"])
    save(tmp_path, 3, recipe, micro_batch=found)
    (tmp_path / "config.yaml").touch()
    with open_run(tmp_path, recipe, True, ranks=ranks) as run:
        assert run.recipe.train.micro_batch == then
        assert step_of(run.stored) == 3


# ---- one run at a time ---------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    held = tmp_path / "held"
    other = Forked(hold_run, out, held, errors=tmp_path / "errors")
    try:
        other.wait_until(held.exists)
        with pytest.raises(CommandError) as caught, open_run(out, RECIPE, False):
            pass
        assert f"process {other.pid} on " in str(caught.value)
        assert len(str(caught.value).splitlines()) == 2
    finally:
        other.kill()
        other.wait()
    assert names(out) == [".lock"], "a killed run leaves the name of its lock"
    with open_run(out, RECIPE, False) as run:  # which locks nothing any more, and is no content
        assert run.stored is None
    assert names(out) == []


def test_a_lock_that_is_a_link_or_waits(tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("my key")
    out.mkdir()
    makers: list[Callable[[Path], object]] = [
        lambda lock: lock.symlink_to("../victim"), lambda lock: lock.hardlink_to(victim), os.mkfifo,
        lambda lock: lock.symlink_to("../new"), lambda lock: lock.symlink_to(lock), Path.mkdir,
    ]  # fmt: skip
    for make in makers:
        make(out / ".lock")
        for resume in (False, True):
            save(out, 3)
            with pytest.raises(CommandError) as caught, open_run(out, RECIPE, resume):
                pass
            assert str(out) in str(caught.value)
            assert len(str(caught.value).splitlines()) == 2
        assert victim.read_text() == "my key"
        assert names(tmp_path) == ["run", "victim"]
        (out / ".lock").rmdir() if (out / ".lock").is_dir() else (out / ".lock").unlink()


FILES = (
    "config.yaml", "env.json", "metrics.jsonl", "last.safetensors", "best.safetensors", "state-3.pt", "batch.png",
    "curves.png", "iou.png", "confused.png", "confused.json", "predictions.png", "nonfinite-step-2.pt",
)  # fmt: skip


def test_links_in_a_run_folder_are_not_followed_out_of_it(tmp_path: Path, make_job: MakeJob) -> None:
    """All that a run writes: a folder from elsewhere may have a link under each name."""
    out, outside = tmp_path / "run", tmp_path / "outside"
    job = make_job(out, "train.steps=3", "train.log_every=1", "train.batch=2")
    outside.mkdir()
    for name in FILES:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(outside / name)
        (outside / name).write_text("mine")
    (out / "predictions").symlink_to(outside, target_is_directory=True)
    write_start(job)
    train.open_log(job, [])
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    (out / "batch.png").unlink()
    (out / "batch.png").symlink_to(outside / "nothing.png")
    write_batch(job)
    window = Window(job, bar=False)
    assert train.train(job, window) == 0
    losses = torch.full((len(window.names),), torch.nan)
    stop_before(job, StepRecord(2, ["a"], losses, torch.ones(()), torch.ones(()), None), window.names)
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}
    assert sorted(path.name for path in outside.iterdir()) == sorted(FILES)
    assert not (out / "state-3.pt").is_symlink()


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_was_deleted_or_made_anew(tmp_path: Path, make_job: MakeJob, anew: bool) -> None:
    """Nothing more is written into it, and the run ends with an error."""
    out = tmp_path / "run"
    with open_run(out, RECIPE, False) as run:
        job = make_job(out, "train.steps=3", "train.save_every=2", "train.log_every=100")
        job.lock = run.lock
        write_start(job)
        shutil.rmtree(out)
        if anew:
            (out / "predictions").mkdir(parents=True)
            (out / ".lock").write_text("process of another run")
            (out / "config.yaml").write_text("of another run")
        with pytest.raises(OSError, match="deleted or replaced") as caught:
            train.train(job, Window(job, bar=False))
        assert print_error(caught.value) == 2
        for write in (lambda: save_best(job), lambda: write_start(job), lambda: log.MetricsLog.write(job.log, {})):
            job.log.lock = run.lock
            with pytest.raises(OSError, match="deleted or replaced"):
                write()
    assert names(tmp_path) == (["run"] if anew else [])
    if anew:
        assert names(out) == [".lock", "config.yaml", "predictions"]


def test_what_does_not_fit_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no run to resume"), open_run(tmp_path / "new", RECIPE, True):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CommandError, match="not empty\nchoose another --out"), open_run(tmp_path, RECIPE, False):
        pass
    with pytest.raises(CommandError, match="name the run's folder"), open_run(tmp_path, RECIPE, True):
        pass
    assert names(tmp_path) == ["notes.txt"]
    # torchrun starts again what was refused: it must not go on with what it finds there.
    with pytest.raises(CommandError, match="not empty"), open_run(tmp_path, RECIPE, False, restarted=True):
        pass


def test_a_state_alone_suffices_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 3)
    with pytest.raises(CommandError, match="continue its run with --resume"), open_run(tmp_path, RECIPE, False):
        pass
    with open_run(tmp_path, RECIPE, True) as run:
        assert step_of(run.stored) == 3
    assert "config.yaml: was missing; it was written again from the state" in capsys.readouterr().err
    assert load_recipe(str(tmp_path / "config.yaml")).model_dump() == RECIPE.model_dump()


def test_a_restart_goes_on_with_the_run_that_failed(tmp_path: Path) -> None:
    seen = []

    def fail(restarted: bool) -> None:
        with open_run(tmp_path, RECIPE, False, restarted) as run:
            seen.append(run.stored)
            (tmp_path / "config.yaml").touch()
            if restarted:
                save(tmp_path, 3)
            raise ZeroDivisionError

    for restarted in (False, True):
        with pytest.raises(ZeroDivisionError):
            fail(restarted)
    assert seen == [None, None], "nothing was saved before"
    with open_run(tmp_path, RECIPE, False, restarted=True) as run:
        assert step_of(run.stored) == 3
    assert names(tmp_path) == ["config.yaml", "state-3.pt"]


def test_a_run_that_fails_before_it_writes_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, RECIPE, False):
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with pytest.raises(SystemExit), open_run(tmp_path / "new", RECIPE, False):
        raise SystemExit(143)
    assert names(tmp_path) == [], "nor the folder that it made"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    (tmp_path / "config.yaml").touch()

    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CommandError, match="cannot be written") as caught, open_run(tmp_path, RECIPE, resume):
        pass
    assert "Read-only file system" in str(caught.value)


# ---- records -------------------------------------------------------------------------------------------------------


def make_job(**changes: Any) -> Any:
    scenes = {split: SyntheticScenes(3, 64, 64, 0, split) for split in ("train", "val")}
    cpu = torch.device("cpu")
    parts = {
        "recipe": RECIPE,
        "device": cpu,
        "ranks": Ranks(cpu),
        "fingerprints": records.fingerprints(*scenes.values()),
    }
    return SimpleNamespace(**(parts | {"train_set": scenes["train"], "val_set": scenes["val"]} | changes))


def test_what_is_remembered_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "env.json"
    now = records.environment(make_job())
    records.write_environment(path, now, 0)
    first = json.loads(path.read_text())
    assert first["torch"] == torch.__version__
    assert first["ssaseg"] == first["packages"]["ssaseg"] == metadata.version("ssaseg")
    assert {"torch", "numpy", "pydantic", "safetensors", "click"} <= first["packages"].keys()
    assert {"python", "cuda", "cudnn", "device", "threads", "seed", "command", "ranks", "cpu", "time"} <= first.keys()
    assert first["data"]["train"]["images"] == 3
    assert "resumed" not in first

    records.write_environment(path, now, 5)
    assert capsys.readouterr().err == ""
    records.write_environment(path, now | {"torch": "9.9", "seed": 0}, 7)
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert f"torch {torch.__version__} → 9.9" in told
    again = json.loads(path.read_text())
    assert {key: again[key] for key in first} == first, "the first record stays"
    assert [(entry["step"], entry.get("torch")) for entry in again["resumed"]] == [(5, None), (7, "9.9")]

    capsys.readouterr()
    for damaged in ("{cut", "[1]", '{"resumed": 3}'):
        path.write_text(damaged)
        records.write_environment(path, now, 9)
        anew = json.loads(path.read_text())
        assert (anew["torch"], anew["step"]) == (torch.__version__, 9)
        assert (tmp_path / "env.json.unreadable").read_text() == damaged
        assert capsys.readouterr().err.count("cannot be read, kept as env.json.unreadable") == 1


def pairs(root: Path, files: dict[str, int]) -> PairDataset:
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (root / kind).mkdir(parents=True)
        for name, size in files.items():
            (root / kind / f"{name}.{suffix}").write_bytes(bytes(size))
    return PairDataset(root / "images", root / "masks", ["a", "b"])


def test_a_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    files = {"x": 10, "y": 20}
    base = records.fingerprint(pairs(tmp_path / "1", files))
    assert base["images"] == 2
    # Runs of earlier versions resume only where these sums stay as they are.
    assert base["names"] == hashlib.sha256(b"x\ny").hexdigest()
    assert base["content"] == hashlib.sha256(b"10\n20\n10\n20").hexdigest()
    assert records.fingerprint(pairs(tmp_path / "2", files)) == base, "where the data lie does not count"
    others = [{"x": 10}, {"x": 10, "z": 20}, {"x": 10, "y": 21}]
    sums = [records.fingerprint(pairs(tmp_path / f"other{k}", other)) for k, other in enumerate(others)]
    told = []
    for other in sums:
        with pytest.raises(CommandError) as caught:
            records.require_same_data({"val": base}, {"val": other}, tmp_path)
        assert len(str(caught.value).splitlines()) == 3
        told.append(str(caught.value).splitlines()[0])
    assert "the val split is not" in told[0]
    assert "1 images now, 2 when" in told[0]
    assert "other names" in told[1]
    assert "other file sizes" in told[2]
    with pytest.raises(CommandError, match="class 1 is c, was b"):
        records.require_same_data({"val": base}, {"val": base | {"classes": ["a", "c"]}}, tmp_path)
    records.require_same_data({"val": base}, {"val": dict(base)}, tmp_path)
    records.require_same_data(None, {"val": base}, tmp_path)  # a run of an older version


def test_drawn_scenes_have_a_fingerprint() -> None:
    kinds = [(3, 64, 64, 0, "train"), (3, 64, 64, 1, "train"), (3, 64, 96, 0, "train")]
    assert len({records.fingerprint(SyntheticScenes(*kind))["content"] for kind in kinds}) == 3


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_run_folder_that_every_user_can_write_to(
    tmp_path: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others could add a newer state: the user is warned before it is read."""
    run = tmp_path / "my run"
    run.mkdir()
    run.chmod(mode)
    with open_run(run, load_recipe("demo"), resume=False):
        pass
    expected = f"warning: every user of this machine can write to {run}, and so change what --resume reads from {run}\n"
    assert capsys.readouterr().err == (f"{expected}take this right away: chmod o-w '{run}'\n" if mode == 0o777 else "")
