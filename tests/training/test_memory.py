"""micro_batch=auto and the advice after memory ran out, with a network that refuses more than so many images."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from parts import Unchanged

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.training.memory import explain, fit_micro_batch, fits, micro_batch_sizes
from ssaseg.models import CLASSIFIERS, Segmenter
from ssaseg.recipes import load_recipe

CROP = ["augment.crop=[64,64]", "train.batch=12", "distill.group=2", "train.micro_batch=auto"]
tried: list[int] = []


class Small(Segmenter):
    """Has memory for `room` images."""

    room = 0

    def forward(self, images: torch.Tensor, labels: Any = None, totals: Any = None) -> Any:
        tried.append(len(images))
        if len(images) > self.room:
            if self.classifier.needs_totals:
                self.classifier.step_totals(labels)
            raise torch.OutOfMemoryError("no room")
        return super().forward(images, labels, totals)


def make_job(room: int, *words: str, classifier: str = "ssa") -> Any:
    recipe = load_recipe("demo", [*CROP, f"model.classifier={classifier}", *words])
    head = CLASSIFIERS[classifier](8, 5, 0.1, group=recipe.distill.group)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.BatchNorm2d(8))
    model = Small(backbone, Unchanged(8), head, name="small", classifier_name=classifier)
    model.room = room
    device = torch.device("cpu")
    tried.clear()
    return SimpleNamespace(
        recipe=recipe,
        model=model,
        device=device,
        ranks=Ranks(device),
        optimizer=torch.optim.AdamW(model.parameters()),
    )


@pytest.mark.parametrize(("room", "found"), [(100, 12), (11, 6), (5, 4), (3, 2)])
def test_the_largest_part_that_fits(room: int, found: int) -> None:
    assert fit_micro_batch(make_job(room)) == found
    assert tried == [size for size in (12, 6, 4, 2) if size >= found]


def test_parts_are_whole_groups_and_divide_a_ranks_share() -> None:
    job = make_job(0)
    assert micro_batch_sizes(job) == [12, 6, 4, 2]
    job.ranks.size = 3
    assert micro_batch_sizes(job) == [4, 2]
    job.ranks.size = 1
    assert micro_batch_sizes(make_job(0, classifier="linear")) == [12, 6, 4, 3, 2, 1]
    # The whole share may be less than a group, or no multiple of it.
    assert micro_batch_sizes(make_job(0, "distill.group=5")) == [12]


def test_nothing_fits() -> None:
    with pytest.raises(CommandError) as caught:
        fit_micro_batch(make_job(1))
    lines = str(caught.value).splitlines()
    assert "cannot train on 2 images in one pass at augment.crop=[64, 64]" in lines[0]
    assert len(lines) == 3


def test_a_rank_with_less_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(100)
    monkeypatch.setattr(job.ranks, "any", lambda flag: flag or tried[-1] > 4)  # another rank refuses more than 4
    assert fit_micro_batch(job) == 4


def test_one_image_without_a_variance_does_not_fit() -> None:
    """Where a feature map is one pixel."""
    job = make_job(1, "augment.crop=[32,32]", "train.batch=2", classifier="linear")
    job.model.backbone[0] = torch.nn.Conv2d(3, 8, 32, stride=32)
    with pytest.raises(CommandError) as caught:
        fit_micro_batch(job)
    assert tried == [2, 1]
    assert "cannot train on 1 image in one pass" in str(caught.value)
    assert "cannot train on 1 image in one pass" in str(explain(job, torch.OutOfMemoryError("no room")))


def test_a_trial_leaves_no_trace() -> None:
    job = make_job(5)
    model = job.model.eval()
    model.memories = ["kept"]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert fit_micro_batch(job) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert model.memories == ["kept"]
    assert not any(module.training for module in model.modules())
    assert not job.optimizer.state


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(100)
    monkeypatch.setattr(job.model.classifier, "step_totals", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fits(job, 2)


def broken_step(job: Any, kept: list[Any]) -> None:
    activations = torch.zeros(1000)
    kept.append(weakref.ref(activations))
    job.model(torch.zeros(12, 3, 64, 64), torch.zeros(12, 64, 64, dtype=torch.uint8))


def test_the_message_says_what_would_fit() -> None:
    job = make_job(5, "train.micro_batch=6")
    kept: list[Any] = []
    try:
        broken_step(job, kept)
    except torch.OutOfMemoryError as error:
        message = str(explain(job, error))
        gc.collect()
        assert kept[0]() is None, "what the broken step held was still held while others were tried"
    assert tried == [12, 4], "what is not smaller need not be tried"
    assert "out of memory with 6 images in one pass at augment.crop=[64, 64]" in message
    assert "a step still has all 12 images" in message
    assert message.endswith("use train.micro_batch=4"), "a dry run has no folder to go on in"
    assert len(message.splitlines()) == 3


def test_the_message_where_nothing_smaller_fits() -> None:
    message = str(explain(make_job(1, "train.micro_batch=null"), torch.OutOfMemoryError("no room")))
    assert "cannot train on 2 images in one pass" in message
    assert "smaller augment.crop" in message


def test_a_run_that_finds_its_micro_batch_and_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Memory that all of a step fits into for two steps, and then half of it: as where others use the GPU, too."""
    real, calls = Segmenter.forward, []

    def forward(self: Segmenter, images: torch.Tensor, labels: Any = None, totals: Any = None) -> Any:
        calls.append(len(images))
        if labels is not None and len(images) > 4 and len(calls) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(self, images, labels, totals)

    monkeypatch.setattr(Segmenter, "forward", forward)
    scenes = "data.synthetic={height: 64, width: 64, train: 8, val: 1, seed: 0}"
    words = ["train", "demo", scenes, "augment.scale=[64,64]", "augment.crop=[64,64]", "distill.group=2",
             "train.batch=8", "train.steps=4", "train.workers=0", "--device", "cpu",
             "--out", str(tmp_path / "run")]  # fmt: skip
    told = CliRunner().invoke(cli, words)
    assert told.exit_code == 2
    assert "cpu: out of memory with 8 images in one pass" in told.stderr
    assert told.stderr.endswith("use train.micro_batch=4; --resume continues from state-2.pt\n")
    assert torch.load(tmp_path / "run" / "state-2.pt", weights_only=True)["recipe"]["train"]["micro_batch"] is None
    found = CliRunner().invoke(cli, [*words, "--resume", "train.micro_batch=auto"])
    assert found.exit_code == 0, found.stderr
    assert "4 images fit in one pass; a rank has 8 per step" in found.stderr
    assert load_recipe(str(tmp_path / "run" / "config.yaml")).train.micro_batch == 4
    state = torch.load(tmp_path / "run" / "state-4.pt", weights_only=True)
    assert state["recipe"]["train"]["micro_batch"] == 4
