"""A classifier's own state in a run: saved and resumed, held back with a bad step, left alone by guard and average."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bank
import pytest
import torch

from ssaseg.cli.training.saving import save
from ssaseg.cli.training.state import load_state
from ssaseg.cli.training.step import train_step
from ssaseg.models.build import CLASSIFIERS
from ssaseg.models.layers import norm_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
MakeJob = Callable[..., Any]
WORDS = ("model.classifier=bank", "train.micro_batch=2", "train.batch=4", "data.synthetic.train=16")
RIVALS = {
    "protoseg": "{prototypes: 3}",
    "gmmseg": "{components: 2, width: 8, memory: 30, samples: 5, interval: 1}",
    "dnc": "{prototypes: 3, memory: 30, samples: 10, momentum: 0.5}",
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSIFIERS, "bank", bank.BankClassifier)


def step(job: Any) -> None:
    train_step(job, [next(job.batches) for _ in range(job.micro_batches)])
    job.progress.step += 1


def own_state(job: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.model.classifier.named_buffers() if name != "class_weights"}


def test_state_moves_and_resumes_bit_for_bit(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_job(tmp_path / "run", *WORDS, "optim.ema=0.9")
    before = own_state(job)
    for _ in range(2):
        step(job)
    assert all(not torch.equal(value, before[name]) for name, value in own_state(job).items())
    save(job)
    for _ in range(2):
        step(job)
    again = make_job(tmp_path / "again", *WORDS, "optim.ema=0.9", stored=load_state(tmp_path / "run"))
    for _ in range(2):
        step(again)
    found = again.model.state_dict()
    for key, value in job.model.state_dict().items():
        assert torch.equal(value, found[key]), key
    assert all(torch.equal(a, b) for a, b in zip(job.average.values, again.average.values, strict=True))


@pytest.mark.parametrize(("kind", "options"), RIVALS.items())
def test_rivals_resume_bit_for_bit_and_are_held_back(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, kind: str, options: str
) -> None:
    words = (f"model.classifier={kind}", f"model.options={options}", *WORDS[1:], "train.nonfinite=skip")
    words = (*words, "distill.group=2", "optim.ema=0.9")
    job = make_job(tmp_path / "run", *words)
    before = own_state(job)
    step(job)
    save(job)
    after = own_state(job)
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    step(job)
    again = make_job(tmp_path / "again", *words, stored=load_state(tmp_path / "run"))
    step(again)
    found = again.model.state_dict()
    for key, value in job.model.state_dict().items():
        assert torch.equal(value, found[key]), key
    classifier, real = type(job.model.classifier), type(job.model.classifier).training_step

    def spoilt(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        return found._replace(losses={name: loss * float("nan") for name, loss in found.losses.items()})

    monkeypatch.setattr(classifier, "training_step", spoilt)
    before = own_state(job)
    step(job)
    assert job.guard.held == 1
    assert all(torch.equal(value, before[name]) for name, value in own_state(job).items())
    averaged = {name for name in job.average.names if name.startswith("classifier.")}
    assert not any(name.removeprefix("classifier.") in before for name in averaged if ".norm." not in name)


def test_a_step_that_is_held_back_leaves_the_state_as_it_was(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, *WORDS, "train.nonfinite=skip")
    step(job)
    before, statistics = own_state(job), {k: v.clone() for k, v in norm_statistics(job.model).items()}
    real = bank.BankClassifier.training_step

    def spoilt(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        return found._replace(losses={name: loss * float("nan") for name, loss in found.losses.items()})

    with monkeypatch.context() as patch:
        patch.setattr(bank.BankClassifier, "training_step", spoilt)
        step(job)
    assert job.guard.held == 1
    assert all(torch.equal(value, before[name]) for name, value in own_state(job).items())
    assert all(torch.equal(value, statistics[name]) for name, value in norm_statistics(job.model).items())
    step(job)
    assert not torch.equal(job.model.classifier.prototypes, before["prototypes"])


def test_neither_guard_nor_average_copies_a_bank(tmp_path: Path, make_job: MakeJob) -> None:
    job = make_job(tmp_path, *WORDS, "optim.ema=0.9", "model.options={slots: 100}")
    job.guard.start()
    copied = sum(each.numel() for each in job.guard.before)
    assert copied == sum(each.numel() for each in norm_statistics(job.model).values())
    assert copied < job.model.classifier.bank.numel()
    averaged = {name.removeprefix("classifier.") for name in job.average.names if name.startswith("classifier.")}
    assert averaged == {"conv_seg.weight", "conv_seg.bias", "spare"}
    assert any(name.endswith("running_var") for name in job.average.names)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("slots=0", ["model.options.slots: expected 1 or more, got 0", "slots: features kept of each class"]),
        ("slots=101", ["expected 100 or less"]),
        ("slots=2.5", ["expected a whole number, got 2.5"]),
        ("slots=true", ["expected a whole number, got True"]),
        ("momentum=low", ["expected a number, got 'low'"]),
        ("pull=best", ["expected one of mean, last, got 'best'"]),
        ("pull=3", ["expected text, got 3"]),
        ("slot=3", ["did you mean model.options.slots?"]),
    ],
)
def test_options_are_checked_by_what_the_classifier_says(words: str, parts: list[str]) -> None:
    from ssaseg.models import facts
    from ssaseg.recipes import RecipeError, load_recipe

    with pytest.raises(RecipeError) as caught:
        load_recipe("demo", ["model.classifier=bank", f"model.options.{words}"], facts)
    assert str(caught.value).startswith("command line: model.options.") or "key=value" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    for part in parts:
        assert part in str(caught.value)
