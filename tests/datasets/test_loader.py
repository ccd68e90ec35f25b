"""The stream of samples: decided by seed and position alone, whatever the workers; errors arrive as raised."""

import itertools
import os
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from forked import Forked
from reading import read_on

from ssaseg.datasets import DataError
from ssaseg.datasets.loader import Batch, eval_loader, train_loader
from ssaseg.datasets.transforms import TrainTransform

TRANSFORM = TrainTransform((48, 32), (0.5, 2.0), (24, 32))
DISTORTING = TrainTransform(TRANSFORM.scale, TRANSFORM.ratio, TRANSFORM.crop, distort_here=True)


class Fake:
    """Images that depend on their index; index `broken` has a bad label, index `missing` no file."""

    classes = ("a", "b", "c")
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))

    def __init__(self, count: int, broken: int = -1, missing: int = -1) -> None:
        self.count, self.broken, self.missing = count, broken, missing
        self.label_lut = np.full(256, 255, np.uint8)
        self.label_lut[[5, 6, 7]] = 0, 1, 2
        self.valid_raw = self.label_lut != 255

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"image{index}"

    def load_raw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index == self.missing:
            raise FileNotFoundError(2, "No such file or directory", f"image{index}.jpg")
        rng = np.random.RandomState(index)
        raw = rng.randint(5, 8, (32 + index % 3, 48)).astype(np.uint8)
        raw[0, 0] = 99 if index == self.broken else 5
        return rng.randint(0, 256, (*raw.shape, 3)).astype(np.uint8), raw

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, raw = self.load_raw(index)
        if not self.valid_raw[raw].all():
            raise self.label_error(index)
        image.flags.writeable = False  # as a data set's cache gives it
        return image, self.label_lut[raw]

    def load_image(self, index: int) -> np.ndarray:
        return self.load_raw(index)[0]

    def label_error(self, index: int) -> DataError:
        return DataError(f"image{index}.png: id 99 in 1 pixels\nexpected 5..7")


def sample_index(position: int, count: int, seed: int) -> int:
    """Which of `count` images sample number `position` of the stream shows, as the loader's docstring says."""
    return int(np.random.RandomState([0, seed, position // count]).permutation(count)[position % count])


def take(
    count: int, *, size: int = 4, workers: int = 0, start: int = 0, seed: int = 3, transform: TrainTransform = TRANSFORM
) -> list[Batch]:
    stream = train_loader(Fake(10), transform, seed, size, workers, start)
    batches = list(itertools.islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return batches


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(one[:4], other[:4], strict=True)
    return one[4:] == other[4:] and all(torch.equal(a.nan_to_num(-99), b.nan_to_num(-99)) for a, b in tensors)


@pytest.mark.filterwarnings("error")  # nor is there a warning where there are fewer cores
@pytest.mark.parametrize(("workers", "transform"), [(1, TRANSFORM), (3, TRANSFORM), (2, DISTORTING)])
def test_number_of_workers_changes_nothing(workers: int, transform: TrainTransform) -> None:
    here, there = take(6, transform=transform), take(6, workers=workers, transform=transform)
    assert len(here) == len(there) == 6
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_workers_distort_colours_and_leave_no_draws() -> None:
    plain, distorted = take(2), take(2, transform=DISTORTING)
    assert all(each.draws.isnan().all() for each in distorted)
    for one, other in zip(plain, distorted, strict=True):
        assert torch.equal(one.labels, other.labels)
        changed = (one.images != other.images).flatten(1).any(1)
        assert torch.equal(changed, ~one.draws.isnan().all(1))
        assert changed.any()


def test_stream_can_start_anywhere() -> None:
    whole = take(6)
    assert [batch.positions for batch in whole[:2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    late = take(2, start=16, workers=2)
    assert all(same(a, b) for a, b in zip(whole[4:], late, strict=True))
    # Another batch size cuts the same stream elsewhere.
    single = take(8, size=1, start=3)
    images = torch.cat([batch.images for batch in whole])
    assert torch.equal(torch.cat([batch.images for batch in single]), images[3:11])


def test_batches_hold_what_they_say() -> None:
    batch = take(1)[0]
    assert batch.images.shape == (4, 24, 32, 3)
    assert batch.labels.shape == (4, 24, 32)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert batch.draws.shape == (4, 5)
    assert batch.draws.dtype == torch.float32
    assert set(batch.labels.unique().tolist()) <= {0, 1, 2, 255}
    assert batch.names == [f"image{sample_index(p, 10, 3)}" for p in batch.positions]
    for label, (height, width) in zip(batch.labels, batch.sizes.tolist(), strict=True):
        assert (label[:height, :width] != 255).all()
        assert (label[height:] == 255).all()
        assert (label[:, width:] == 255).all()


def test_every_epoch_shows_every_image_in_a_new_order() -> None:
    epochs = [[sample_index(p, 10, 3) for p in range(first, first + 10)] for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [sample_index(p, 10, 4) for p in range(10)]
    names = list(itertools.chain.from_iterable(batch.names for batch in take(5)))
    assert names == [f"image{i}" for i in epochs[0] + epochs[1]]


def test_same_image_is_drawn_anew_in_the_next_epoch() -> None:
    batches = take(20, size=1)
    first = {batch.names[0]: batch for batch in batches[:10]}
    assert all(not torch.equal(first[batch.names[0]].images, batch.images) for batch in batches[10:])


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.RandomState(0).random_sample()
    torch.manual_seed(0)
    take(2, workers=1)
    take(2)
    assert torch.rand(1) == expected[0]
    assert np.random.random_sample() == expected[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_raised(workers: int) -> None:
    with pytest.raises(DataError, match=r"^image4\.png: id 99 in 1 pixels\nexpected 5\.\.7$"):
        list(itertools.islice(train_loader(Fake(10, broken=4), TRANSFORM, 0, 4, workers), 3))
    with pytest.raises(FileNotFoundError) as caught:
        list(eval_loader(Fake(10, missing=6), None, None, workers))
    assert caught.value.filename == "image6.jpg"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_images_come_in_order(workers: int) -> None:
    dataset = Fake(7)
    seen = list(eval_loader(dataset, (96, 64), 32, workers))
    assert [name for _, _, name in seen] == [dataset.name(i) for i in range(7)]
    for index, ((image,), label, _) in enumerate(seen):
        assert image.shape == (64, 96, 3)
        np.testing.assert_array_equal(label.numpy(), dataset.load(index)[1])
    (image, twice), _, _ = next(iter(eval_loader(dataset, None, None, workers, (1.0, 2.0))))
    np.testing.assert_array_equal(image.numpy(), dataset.load(0)[0])
    assert twice.shape == (2 * image.shape[0], 2 * image.shape[1], 3)


@pytest.mark.parametrize("failing", [False, True])
def test_workers_end_with_the_iterator(failing: bool) -> None:
    children = set(psutil.Process().children())
    last = sample_index(9, 10, seed=0)
    stream = train_loader(Fake(10, broken=last if failing else -1), TRANSFORM, 0, 2, 2)
    next(stream)
    own = set(psutil.Process().children()) - children
    assert len(own) == 2
    if failing:
        with pytest.raises(DataError):
            list(itertools.islice(stream, 5))
    else:
        stream.close()  # type: ignore[attr-defined]
    _, alive = psutil.wait_procs(own, timeout=5)
    assert not alive


def test_workers_live_through_all_epochs_and_keep_nothing() -> None:
    """A worker that kept its batches would grow by 300 MiB here, 3 MiB a batch; the tolerance is a quarter of it."""
    main = psutil.Process()
    children = set(main.children())
    stream = train_loader(Fake(30), TrainTransform((48, 32), (0.5, 2.0), (512, 512)), 0, 3, workers=2)
    for _ in range(40):  # by then each worker has its buffers
        next(stream)
    workers = set(main.children()) - children
    processes = [main, *workers]
    before = [process.memory_info().rss for process in processes]
    alive = [weakref.ref(next(stream).images) for _ in range(200)]
    grown = [process.memory_info().rss - old for process, old in zip(processes, before, strict=True)]
    assert set(main.children()) - children == workers, "other processes than before"
    assert max(grown) < 75 * 2**20
    assert sum(ref() is not None for ref in alive) <= 1
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_group_reach_only_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """The command catches the signal, still reads ten batches, and ends without a word from the workers."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    process = Forked(read_on, int(number), ready, saved, errors=tmp_path / "errors")
    process.wait_until(ready.exists)
    time.sleep(0.1)
    os.killpg(process.pid, number)
    assert process.finish() == (0, "")
    assert saved.exists()
