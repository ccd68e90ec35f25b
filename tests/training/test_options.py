"""What can be asked of the training: averaging, freezing, stopping early, compiling, determinism, time limits."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import tiny_networks
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from ssaseg.cli.errors import CommandError
from ssaseg.cli.evaluation.report import Request, run_eval
from ssaseg.cli.training import build as jobs
from ssaseg.cli.training import faults, window
from ssaseg.cli.training import loop as train
from ssaseg.cli.training import state as state_module
from ssaseg.cli.training.average import Average
from ssaseg.cli.training.job import Job
from ssaseg.cli.training.preflight import describe, deterministic
from ssaseg.cli.training.state import load_state
from ssaseg.cli.training.window import Window
from ssaseg.datasets.prefetch import Preparer
from ssaseg.models.checkpoint import read_checkpoint

MakeJob = Callable[..., Job]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(job: Job) -> int:
    return train.train(job, Window(job, bar=False))


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# ---- averages, time limits and resuming ----------------------------------------------------------------------------

AVERAGED = ["optim.ema=0.7", "train.eval_every=3", "train.save_every=2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_job: MakeJob) -> Job:
    job = make_job(tmp_path_factory.mktemp("undisturbed"), *AVERAGED)
    assert run(job) == 0
    return job


def test_the_average_is_what_the_formula_says() -> None:
    model = torch.nn.BatchNorm1d(2)
    average = Average(model, 0.5)
    expected = model.running_mean.clone()  # type: ignore[union-attr]
    for step, values in enumerate(([1.0, 2.0], [3.0, -1.0], [0.5, 0.25]), start=1):
        model.running_mean = model.running_mean.copy_(torch.tensor(values))  # type: ignore[union-attr]
        average.update(step, torch.zeros(()))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * torch.tensor(values)
    torch.testing.assert_close(average.state_dict()["running_mean"], expected)
    average.update(4, torch.ones(()))  # a step that was held back
    torch.testing.assert_close(average.state_dict()["running_mean"], expected)
    assert "num_batches_tracked" not in average.state_dict()


def test_the_average_is_scored_and_kept_as_best(undisturbed: Job) -> None:
    assert undisturbed.average is not None
    best, header = read_checkpoint(undisturbed.folder / "best.safetensors")
    last, of_last = read_checkpoint(undisturbed.folder / "last.safetensors")
    state: Any = load_state(undisturbed.folder)
    assert all(torch.equal(last[key], value) for key, value in state["model"].items())
    averages = state["extra"]["ema"]
    assert not torch.equal(averages["backbone.stem.conv.weight"], last["backbone.stem.conv.weight"])
    if header["step"] == 6:
        assert all(torch.equal(best[key], value) for key, value in averages.items())
    assert header["scores"]["mIoU"] == undisturbed.progress.best_miou
    report = undisturbed.folder / "report.json"
    with tiny_networks():
        assert run_eval([undisturbed.folder / "best.safetensors"], Request(), str(report), "cpu") == 0
    printed = json.loads(report.read_text())
    assert {key: printed[key] for key in header["scores"]} == header["scores"], "the same arithmetic"
    assert of_last["scores"] == {}, "they are the average's"


def test_out_of_time_and_resumed(
    tmp_path: Path, make_job: MakeJob, undisturbed: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three parts, ended by the clock: weights, average and best are those of a run in one part."""
    for steps in (1, 2):
        job = make_job(tmp_path, *AVERAGED, stored=load_state(tmp_path))
        job.deadline = time.monotonic() - 1  # it is over after each step
        assert run(job) == 1
        assert f"stopped after step {steps} because --max-hours is over; state saved, continue with --resume" in (
            capsys.readouterr().err
        )
    job = make_job(tmp_path, *AVERAGED, stored=load_state(tmp_path))
    job.deadline = time.monotonic() + 3600
    assert run(job) == 0
    assert job.average is not None
    assert undisturbed.average is not None
    assert_equal(job.average.state_dict(), undisturbed.average.state_dict())
    assert_equal(job.model.state_dict(), undisturbed.model.state_dict())
    for name in ("best", "last"):
        ours, theirs = (load_file(each / f"{name}.safetensors") for each in (tmp_path, undisturbed.folder))
        assert_equal(ours, theirs)


def test_patience_ends_a_run_that_no_longer_gains(
    tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.eval_every=1", "train.patience=2", "optim.lr=1e-12", "model.drop_path=0"]
    job = make_job(tmp_path, *words, "optim.freeze=[norm]")
    assert run(job) == 0
    assert job.progress.step == 3, "the first evaluation is the best, and two more gain nothing"
    assert "no better mIoU in 2 evaluations (train.patience)" in capsys.readouterr().err
    again = make_job(tmp_path, *words, "optim.freeze=[norm]", stored=load_state(tmp_path))
    assert run(again) == 0
    assert again.progress.step == 3


# ---- freezing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["backbone", "norm"])
def test_what_is_frozen_stays(tmp_path: Path, make_job: MakeJob, what: str) -> None:
    job = make_job(tmp_path, f"optim.freeze=[{what}]", "train.steps=2", "optim.weight_decay=0.1")
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    norms = tuple(f"{key}." for key, module in job.model.named_modules() if isinstance(module, _BatchNorm))
    train.set_learning_rate(job, 0)
    train.train_step(job, [next(job.batches)])
    same = {key for key, value in job.model.state_dict().items() if torch.equal(value, before[key])}
    prefixes = norms if what == "norm" else ("backbone.",)
    assert same >= {key for key in before if key.startswith(prefixes)}
    trained = {key for key, parameter in job.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for group in job.optimizer.param_groups for name in group["names"]}
    assert trained.isdisjoint(key for key in before if key.startswith(prefixes))
    assert len(trained - same) > 0.5 * len(trained)


def test_what_is_frozen_is_said(tmp_path: Path, make_job: MakeJob, capsys: pytest.CaptureFixture[str]) -> None:
    describe(make_job(tmp_path, "model.name=seaformer_t", "optim.freeze=[backbone,norm]"))
    assert "frozen: backbone, norm; 0.1" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_batch_prepared_beside_the_step_is_the_same(tmp_path: Path, make_job: MakeJob) -> None:
    job, cuda = make_job(tmp_path), torch.device("cuda")
    batch = next(job.batches)
    mean, std = job.recipe.data.mean, job.recipe.data.std
    torch.randn(2000, 2000, device=cuda).matmul(torch.randn(2000, 2000, device=cuda))  # something to overtake
    beside, behind = (Preparer(mean, std, cuda, word)(batch) for word in (True, False))
    assert_equal(beside, behind)


# ---- losses --------------------------------------------------------------------------------------------------------


def test_changes_of_the_losses_reach_the_classifier(tmp_path: Path, make_job: MakeJob) -> None:
    ohem = "loss.ohem={threshold: 0.6, min_kept: 50}"
    job = make_job(tmp_path, "loss.class_weights={car: 3, sky: 0.5}", "loss.label_smoothing=0.1", ohem)
    loss, classes = job.model.classifier.loss, job.train_set.classes
    assert loss.class_weights is not None
    named = dict(zip(classes, loss.class_weights, strict=True))
    assert (named["car"], named["sky"], named["tree"]) == (3.0, 0.5, 1.0)
    assert (loss.label_smoothing, loss.ohem_threshold, loss.ohem_min_kept) == (0.1, 0.6, 50)
    with pytest.raises(CommandError, match=r"loss.class_weights.lorry: no such class\n.*sky, "):
        make_job(tmp_path, "loss.class_weights={lorry: 2}")


# ---- compiling, determinism, memory ----------------------------------------------------------------------------------


def test_compiled_training_has_the_same_losses_and_names(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is tested is which part is compiled, and where; not the compiler.
    monkeypatch.setattr(jobs, "COMPILER", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of tests before this one
    found = []
    for word in ("false", "true"):
        job = make_job(tmp_path / word, f"train.compile={word}", "train.steps=1", "model.drop_path=0")
        train.set_learning_rate(job, 0)
        record, _ = train.train_step(job, [next(job.batches)])
        found.append((record.losses, record.norm, job.model.state_dict()))
        graphs = dict(torch._dynamo.utils.counters["stats"])
        assert train.evaluate(job)
        assert dict(torch._dynamo.utils.counters["stats"]) == graphs, (
            "an evaluation, whose images differ, is not compiled"
        )
    assert graphs["unique_graphs"] == 2, "backbone and decoder are one graph each"
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_that_ends_the_compiler_too_is_no_broken_compiler(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    """Ctrl-C in a terminal also reaches g++."""
    job = make_job(tmp_path)

    def compiler(*_: Any) -> Any:
        job.stop.number = signal.SIGINT if asked else None
        raise OSError("g++ ended with signal 2")

    monkeypatch.setattr(jobs, "COMPILER", compiler)
    train_section = job.recipe.train.model_copy(update={"compile": True})
    job.recipe = job.recipe.model_copy(update={"train": train_section})
    jobs.assemble(job)
    if asked:
        with pytest.raises(SystemExit) as stopped:
            run(job)
        assert stopped.value.code == 130
        told = capsys.readouterr().err
        assert "stopped while step 1 was compiled; --resume starts again: no state was saved yet" in told
    else:
        with pytest.raises(CommandError, match=r"train.compile: torch.compile failed \(BackendCompilerFailed"):
            run(job)
    torch._dynamo.reset()


def test_deterministic_mode_ends_with_the_run() -> None:
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_deterministic_form_is_named(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_job(tmp_path, "train.deterministic=true")
    with deterministic(True), pytest.raises(CommandError) as caught, faults.explained(job):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long), 2)
    message = str(caught.value)
    assert message.startswith("train.deterministic: on this device PyTorch has no deterministic form of max_unpool")
    assert len(message.splitlines()) == 3


class Full:
    """`function`, for which memory runs out in the third step; half a step's trace is left before."""

    def __init__(self, job: Job, function: Callable[..., Any], trace: bool = False) -> None:
        self.job, self.function, self.trace = job, function, trace

    def __call__(self, *inputs: Any) -> Any:
        if self.job.progress.step < 2:
            return self.function(*inputs)
        if self.trace:
            self.job.model.get_buffer("backbone.stem.norm.running_mean").fill_(7)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory: pytest.TempPathFactory, make_job: MakeJob) -> Any:
    """The weights of a run that nothing disturbed."""
    job = make_job(tmp_path_factory.mktemp("two"), "train.batch=4")
    for step in range(2):
        train.set_learning_rate(job, step)
        train.train_step(job, [next(job.batches)])
        job.progress.step += 1
    return job.model.state_dict()


@pytest.mark.parametrize("where", ["forward", "start"])
def test_memory_that_does_not_suffice_is_told_after_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, after_two_steps: Any, where: str
) -> None:
    job = make_job(tmp_path, "train.batch=4")
    if where == "forward":
        job.network = torch.nn.Module()
        job.network.forward = Full(job, job.model, trace=True)  # type: ignore[assignment]
    else:
        start, real = job.guard.start, torch.cat

        def without_memory() -> None:  # for the copies that it makes; else there is enough
            with monkeypatch.context() as patch:
                patch.setattr(torch, "cat", Full(job, real))
                start()

        monkeypatch.setattr(job.guard, "start", without_memory)
    with pytest.raises(CommandError, match=r"train.micro_batch=2; --resume continues from state-2.pt"):
        run(job)
    state: Any = load_state(tmp_path)
    assert state["progress"]["step"] == 2
    assert_equal(state["model"], after_two_steps)


@pytest.mark.parametrize("saved", [1, 0])
@pytest.mark.parametrize("where", ["update", "average"])
def test_weights_that_are_no_steps_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, after_two_steps: Any, where: str, saved: int
) -> None:
    """Memory runs out once the optimiser has begun, or has ended."""
    job = make_job(tmp_path, "train.batch=4", "optim.ema=0.9", f"train.save_every={100 - 99 * saved}")
    owner, name = (job.optimizer, "step") if where == "update" else (job.average, "update")
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, Full(job, function))
    onward = "continues from state-2.pt" if saved else "starts again: no state was saved yet"
    with pytest.raises(CommandError, match=f"train.micro_batch=2; --resume {onward}"):
        run(job)
    assert sorted(path.name for path in tmp_path.glob("state-*")) == ["state-1.pt", "state-2.pt"][: 2 * saved]
    if saved:
        state: Any = load_state(tmp_path)
        assert_equal(state["model"], after_two_steps)


def test_a_full_disk_does_not_hide_why_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tmp_path, "train.batch=4")
    job.network = torch.nn.Module()
    job.network.forward = Full(job, job.model)  # type: ignore[assignment]

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(state_module, "write_atomic", refuse)
    with pytest.raises(CommandError, match=r"out of memory with 4 .*\n.*\n.*starts again: no state was saved yet"):
        run(job)
    told = [line for line in capsys.readouterr().err.splitlines() if "could not be saved" in line]
    assert len(told) == 1
    assert told[0].startswith("the state after step 2 could not be saved: ")
    assert told[0].endswith("No space left on device")


# ---- waiting for data ------------------------------------------------------------------------------------------------


def test_waiting_for_data_is_said_once(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(window, "STEPS", 2)
    monkeypatch.setattr(window, "BOUND", 0.02)  # on a busy machine the steps are long, too
    job = make_job(tmp_path, "train.log_every=1")
    slow = job.batches

    def late() -> Any:
        for batch in slow:
            time.sleep(0.15)
            yield batch

    job.batches = late()
    assert run(job) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "waits for data" in line or line[:5] == "step "]
    assert [line[:8] for line in told[:4]] == ["step 1/6", "step 2/6", "step 3/6", "warning:"]
    assert "(0 workers" in told[3]
    assert sum("waits for data" in line for line in told) == 1


@pytest.mark.parametrize(
    ("cores", "words", "mend"),
    [
        (16, ["train.workers=2"], "use train.workers=4"),
        (2, ["train.workers=2"], "use smaller images on the disk, or more cores"),
        (3, ["train.workers=2"], "use train.workers=3"),
    ],
)
def test_the_remedy_fits_the_machine(monkeypatch: pytest.MonkeyPatch, cores: int, words: list[str], mend: str) -> None:
    from ssaseg.recipes import load_recipe

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    text = window.waiting_warning(load_recipe("demo", words), 0.4)
    assert "40% of the time (2 workers" in text
    assert text.endswith(mend)
