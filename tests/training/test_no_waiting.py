"""A training step reads nothing from the device: a GPU would have to be waited for."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssaseg.cli.ranks.ranks import Ranks
from ssaseg.cli.training import loop as train
from ssaseg.cli.training.average import Average
from ssaseg.cli.training.guard import Guard
from ssaseg.cli.training.job import Job
from ssaseg.models.classifiers import upsampled

META = torch.device("meta")
aten = torch.ops.aten
# What Python is given the value of, or what has a shape that values decide.
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

pytestmark = pytest.mark.usefixtures("one_thread", "as_on_a_gpu")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses look at values on a CPU, where this costs nothing."""
    monkeypatch.setattr(upsampled, "_can_look", lambda tensor: False)


class NothingRead(TorchDispatchMode):
    """Fails for operations that would wait for a GPU; of copies between devices only those to the device pass that do
    not wait.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function.overloadpacket not in READING, function
        if function.overloadpacket in INDEXING:
            assert all(each.dtype not in (torch.bool, torch.uint8) for each in args[1] if each is not None), function
        to = kwargs.get("device")
        if function is aten._to_copy.default and to is not None and torch.device(to).type != args[0].device.type:
            assert kwargs.get("non_blocking"), f"a copy from {args[0].device} to {to} that waits"
            assert args[0].device.type == "cpu", f"a copy from {args[0].device} to {to}"
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.__setitem__(x > 0, x[:2, 0].clone()),
        lambda x: x.unique(),
        lambda x: x.to("meta"),
    ],
)
def test_what_reads_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError), NothingRead():
        read(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))


@pytest.mark.parametrize(
    "word", ["train.amp=off", "train.amp=fp16", "optim.grad_clip=1", "train.nonfinite=skip", "optim.freeze=[norm]"]
)
def test_a_step_reads_nothing(tmp_path: Path, make_job: Callable[..., Job], word: str) -> None:
    """With the optimiser that a GPU has, on a CPU."""
    job = make_job(tmp_path, "optim.ema=0.9", word, "train.batch=4", "train.micro_batch=2")
    batches = [next(job.batches) for _ in range(2)]
    prepared = {id(batch): job.prepare(batch) for batch in batches}
    job.prepare = lambda batch: prepared[id(batch)]  # type: ignore[assignment]
    train.set_learning_rate(job, 0)
    with NothingRead():
        train.train_step(job, batches)
        record, _ = train.train_step(job, batches)  # the optimiser's state is there already
    assert not record.bad.item()  # a step that was held back would have had less to read


LOSSES = ("loss.class_weights={car: 3, sky: 0.5}", "loss.label_smoothing=0.1", "loss.ohem={min_kept: 50}")


@pytest.mark.parametrize(
    ("network", "classifier", "words"),
    [
        *((name, "ssa", ()) for name in ("afformer_x", "cgrseg_x", "seaformer_x", "segnext_x")),
        ("cgrseg_x", "linear", ()),  # its decoder works for the classifier
        ("seaformer_x", "ssa", LOSSES),
        ("seaformer_x", "linear", LOSSES),
        ("seaformer_x", "cac", LOSSES),
        ("seaformer_x", "protoseg", ()),
        ("seaformer_x", "gmmseg", ("model.options={memory: 30}",)),
        ("seaformer_x", "dnc", ("model.options={memory: 30, samples: 10}",)),
    ],
)
def test_no_family_reads_anything(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_job: Callable[..., Job],
    network: str,
    classifier: str,
    words: tuple[str, ...],
) -> None:
    """On a device whose tensors have no values: there is nothing that could be read or copied back."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no mode for this device
    kind = [f"model.name={network}", f"model.classifier={classifier}"]
    job = make_job(tmp_path, *kind, *words)
    batches = [next(job.batches)]
    images, labels = job.prepare(batches[0])
    job.prepare = lambda _: (images.to(META, non_blocking=True), labels.to(META, non_blocking=True))  # type: ignore
    job.model.to(META)
    job.ranks = Ranks(META)
    job.guard = Guard(job.model, job.scaler, job.ranks, limit=0)
    job.average = Average(job.model, 0.9)
    job.optimizer = torch.optim.SGD(job.model.parameters())
    job.optimizer.step = lambda: None  # type: ignore[assignment]  # no fused one knows this device
    with NothingRead():
        record, terms = train.train_step(job, batches)
    assert record.losses.device == record.bad.device == META
    assert record.losses.shape == (len(terms),)
