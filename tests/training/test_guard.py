"""What is not finite: held back on the device, told late, and nothing of it left in what is saved."""

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssaseg.cli.errors import print_error
from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.training import loop as train
from ssaseg.cli.training import state as state_module
from ssaseg.cli.training.faults import advice
from ssaseg.cli.training.guard import Guard
from ssaseg.cli.training.job import Job
from ssaseg.cli.training.nonfinite import broken_terms, low_scale, replay
from ssaseg.cli.training.window import Window

CPU = Ranks(torch.device("cpu"))
EMA = "optim.ema=0.9"
MakeJob = Callable[..., Job]

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")


class _Explode(torch.autograd.Function):
    """The value as it is, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def spoil_loss(model: torch.nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**losses, "coarse_ce": losses["coarse_ce"] * torch.nan}


def spoil_gradient(model: torch.nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**losses, "coarse_ce": _Explode.apply(losses["coarse_ce"])}


def spoil_statistic(model: torch.nn.Module, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    model.get_buffer("backbone.stem.norm.running_var").data[3] = torch.nan  # behind autograd
    return losses


class Spoiled(torch.nn.Module):
    """A network, of whose steps those numbered in `when` (from 1) are spoiled."""

    def __init__(self, model: torch.nn.Module, spoil: Callable[..., dict[str, Tensor]], when: set[int]) -> None:
        super().__init__()
        self.model, self.spoil, self.when, self.calls = model, spoil, when, 0

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        losses: dict[str, Tensor] = self.model(*inputs)
        return self.spoil(self.model, losses) if self.calls in self.when else losses


def run(job: Job) -> int:
    return train.train(job, Window(job, bar=False))


def walk(job: Job, steps: int, leave_out: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Trains by hand, as if there were no guard; steps in `leave_out` are not made."""
    for step in range(steps):
        train.set_learning_rate(job, step)
        batches = [next(job.batches) for _ in range(job.micro_batches)]
        if step + 1 not in leave_out:
            train.train_step(job, batches)
        job.progress.step += 1


def assert_same(state: dict[str, Any], job: Job) -> None:
    """Weights, statistics, optimiser and average, bit for bit."""
    ours = job.model.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in state["model"].items())
    stored, own = state["optimizer"]["state"], job.optimizer.state_dict()["state"]
    assert stored.keys() == own.keys()
    assert all(torch.equal(stored[k][name], value) for k in own for name, value in own[k].items())
    assert job.average is not None
    averages = job.average.state_dict()
    assert all(torch.equal(averages[key], value) for key, value in state["extra"]["ema"].items())


@pytest.fixture(scope="module")
def before_step_3(tmp_path_factory: pytest.TempPathFactory, make_job: MakeJob) -> Job:
    """A run after two steps that nothing disturbed."""
    job: Job = make_job(tmp_path_factory.mktemp("before"), EMA)
    walk(job, 2)
    return job


@pytest.mark.parametrize("at_once", [False, True], ids=["told at the log", "told at once"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_loss, "loss coarse_ce is not finite (coarse_ce nan); "),
        (spoil_gradient, "the gradient is not finite (norm nan); "),
        (spoil_statistic, "a norm's statistic is not finite; "),
    ],
)
def test_a_run_stops_with_the_state_before_the_bad_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_job: MakeJob,
    before_step_3: Job,
    spoil: Callable[..., dict[str, Tensor]],
    named: str,
    at_once: bool,
) -> None:
    if not at_once:  # as on a GPU: two steps more are taken before anybody looks
        monkeypatch.setattr(train, "READY", set())
    job = make_job(tmp_path, EMA)
    job.network = spoiled = Spoiled(job.model, spoil, {3})
    with pytest.raises(FloatingPointError) as caught:
        run(job)
    assert spoiled.calls == (3 if at_once else 5)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"step 3: {named}")
    assert lines[0].endswith("the state from before this step was saved")
    assert "safetensors" not in lines[2], "nothing was evaluated: no weights are known to be good"
    assert lines[1].startswith("images: ")
    assert "nonfinite-step-3.pt" in lines[1]
    assert [path.name for path in tmp_path.glob("state-*.pt")] == ["state-2.pt"]
    state = torch.load(tmp_path / "state-2.pt", weights_only=True)
    assert_same(state, before_step_3)
    assert state["progress"]["step"] == 2
    content = torch.load(tmp_path / "nonfinite-step-3.pt", weights_only=True)
    assert all(torch.equal(state["model"][key], value) for key, value in content["weights"].items())
    for name in content["names"]:
        assert name in lines[1]


def test_at_most_three_terms_are_named() -> None:
    losses = dict.fromkeys("abcde", torch.nan)
    assert broken_terms(losses, torch.nan) == "every loss is not finite (a nan, b nan, c nan and 2 more)"
    assert broken_terms({"fine": 1.0, **losses}, 1.0).startswith("loss a, b, c and 2 more is not finite (a nan, ")
    assert broken_terms({"fine": 1.0, "e": torch.inf}, 1.0) == "loss e is not finite (e inf)"


def test_only_weights_that_were_evaluated_are_advised(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(folder=tmp_path, guard=SimpleNamespace(limit=0))
    (tmp_path / "last.safetensors").touch()
    assert "model.pretrained" not in advice(job)
    (tmp_path / "best.safetensors").touch()
    assert f"model.pretrained={tmp_path / 'best.safetensors'}, a lower optim.lr" in advice(job)


def test_what_is_stored_gives_the_same_loss_again(tmp_path: Path, make_job: MakeJob) -> None:
    """A real one: weights so large that the network's products overflow."""
    job = make_job(tmp_path, EMA, "optim.lr=1e30", "train.batch=4", "train.micro_batch=2", "model.dropout=0.3")
    with pytest.raises(FloatingPointError, match="step 2"):
        run(job)
    path = tmp_path / "nonfinite-step-2.pt"
    content = torch.load(path, weights_only=True)
    assert content["images"].shape == (4, 3, 64, 64)
    losses, norm = replay(path)
    stored = torch.tensor(list(content["losses"].values()), dtype=torch.float64)
    assert not stored.isfinite().all()
    again = torch.tensor([losses[name] for name in content["losses"]], dtype=torch.float64)
    torch.testing.assert_close(again, stored, rtol=1e-6, atol=0, equal_nan=True)
    assert not torch.tensor(norm).isfinite()


@pytest.mark.parametrize("frozen", ["[]", "[backbone]", "[norm]"])
def test_what_is_stored_gives_the_same_finite_loss_again(tmp_path: Path, make_job: MakeJob, frozen: str) -> None:
    words = [EMA, "train.batch=4", "train.micro_batch=2", "model.dropout=0.3", f"optim.freeze={frozen}"]
    job = make_job(tmp_path / "run", *words)
    job.network = Spoiled(job.model, spoil_gradient, {3})  # the first micro-batch of the second step
    with pytest.raises(FloatingPointError, match="step 2: the gradient"):
        run(job)
    content = torch.load(tmp_path / "run" / "nonfinite-step-2.pt", weights_only=True)
    losses, norm = replay(tmp_path / "run" / "nonfinite-step-2.pt")
    assert losses == pytest.approx(content["losses"], rel=1e-6)
    # The file has the batch, not what this test does to the gradient.
    undisturbed = make_job(tmp_path / "other", *words)
    walk(undisturbed, 1)
    record, _ = train.train_step(undisturbed, [next(undisturbed.batches) for _ in range(2)])
    assert norm == pytest.approx(record.norm.item(), rel=1e-5)


def test_a_full_disk_hides_no_bad_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_job: MakeJob
) -> None:
    job = make_job(tmp_path, EMA)
    job.network = Spoiled(job.model, spoil_loss, {3})

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(state_module, "write_atomic", refuse)
    with pytest.raises(FloatingPointError) as caught:
        run(job)
    assert print_error(caught.value) == 3
    told = capsys.readouterr().err.splitlines()[-3:]
    assert told[0].startswith("error: step 3: loss coarse_ce is not finite (coarse_ce nan); ")
    assert "the state from before this step could not be saved: " in told[0]
    assert "No space left on device" in told[0]
    assert told[1].startswith("images: ")


def test_skip_leaves_out_one_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_job: MakeJob
) -> None:
    monkeypatch.setattr(train, "READY", set())
    job = make_job(tmp_path / "run", EMA, "train.nonfinite=skip", "train.max_skipped=2")
    job.network = Spoiled(job.model, spoil_loss, {2, 4})
    monkeypatch.setattr(train, "evaluate", lambda job: True)
    assert run(job) == 0
    state = torch.load(tmp_path / "run" / "state-6.pt", weights_only=True)
    assert state["progress"]["skipped"] == 2
    undisturbed = make_job(tmp_path / "other", EMA)
    walk(undisturbed, 6, leave_out={2, 4})
    assert_same(state, undisturbed)
    told = capsys.readouterr().err
    assert "step 2: not finite, update skipped" in told
    assert "coarse_ce nan" in told
    assert "2 updates skipped, of at most 2" in told
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(record["loss"]).isfinite() for record in records)


def test_more_than_max_skipped_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: MakeJob) -> None:
    monkeypatch.setattr(train, "READY", set())
    job = make_job(tmp_path / "run", EMA, "train.nonfinite=skip", "train.max_skipped=1")
    job.network = Spoiled(job.model, spoil_gradient, {2, 4})
    with pytest.raises(FloatingPointError, match=r"step 4 \(after 1 step skipped by train.nonfinite=skip\)") as caught:
        run(job)
    assert "--resume with train.max_skipped above 1 skips more such updates" in str(caught.value)
    state = torch.load(tmp_path / "run" / "state-3.pt", weights_only=True)
    assert (state["progress"]["step"], state["progress"]["skipped"]) == (3, 1)
    undisturbed = make_job(tmp_path / "other", EMA)
    walk(undisturbed, 3, leave_out={2})
    assert_same(state, undisturbed)


def test_a_resumed_run_goes_on_counting() -> None:
    model, scaler = torch.nn.Linear(1, 1), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    bad, fine = torch.tensor([torch.nan]), torch.tensor(1.0)
    guard = Guard(model, scaler, CPU, limit=2, skipped=1)
    guard.judge(bad, fine, optimizer)
    guard.judge(bad * 0 + 1, fine, optimizer)
    assert bool(guard.held), "NaN times 0 is NaN"
    guard = Guard(model, scaler, CPU, limit=2, skipped=1)
    guard.judge(bad, fine, optimizer)
    guard.judge(fine.view(1), fine, optimizer)
    assert not bool(guard.held)
    stopped_before = Guard(model, scaler, CPU, limit=0, skipped=7)  # the policy was skip, and is stop now
    stopped_before.judge(fine.view(1), fine, optimizer)
    assert not bool(stopped_before.held)


def make_scaled_job(folder: Path, make_job: MakeJob, *words: str) -> Job:
    """A job that trains with fp16's loss scale, which grows after each second step; its arithmetic is float32."""
    job = make_job(folder, *words)
    job.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    job.guard = Guard(job.model, job.scaler, job.ranks, job.guard.limit)
    return job


def state_of(job: Job) -> Any:
    optimizer = job.optimizer.state_dict()["state"]
    return copy.deepcopy((job.model.state_dict(), optimizer, job.scaler.state_dict()))


def test_overflow_in_fp16_is_the_scalers_business(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_scaled_job(tmp_path, make_job)
    job.network = Spoiled(job.model, spoil_gradient, {2})
    weight = job.model.get_parameter("classifier.conv_seg.weight")
    walk(job, 1)
    before = weight.detach().clone()
    record, _ = train.train_step(job, [next(job.batches)])
    assert not record.norm.isfinite()
    assert not bool(record.bad)
    assert not bool(job.guard.held)
    assert torch.equal(weight, before)
    assert job.scaler.get_scale() == 512
    record, _ = train.train_step(job, [next(job.batches)])
    assert not bool(record.bad)
    assert not torch.equal(weight, before)


def test_a_loss_that_is_not_finite_in_fp16_leaves_the_scale_alone(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_scaled_job(tmp_path, make_job)
    job.network = Spoiled(job.model, spoil_loss, {2})
    walk(job, 1)
    before = state_of(job)
    verdicts = [bool(train.train_step(job, [next(job.batches)])[0].bad) for _ in range(4)]
    assert verdicts == [True, False, False, False], "held until somebody looks"
    torch.testing.assert_close(state_of(job), before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_low_loss_scale_is_told(scale: float) -> None:
    job: Any = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    assert low_scale(job) == (None if scale == 1 else scale)


def test_a_loss_scale_that_collapses_ends_the_run_with_its_state(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_scaled_job(tmp_path, make_job)
    walk(job, 1)
    job.scaler.update(2.0**-25)
    with pytest.raises(FloatingPointError, match=r"step 1: in fp16 .*; the state was saved") as caught:
        low_scale(job)
    assert "nonfinite=skip" not in str(caught.value), "no update was made that could be left out"
    state = torch.load(tmp_path / "state-1.pt", weights_only=True)
    assert all(torch.equal(state["model"][key], value) for key, value in job.model.state_dict().items())
