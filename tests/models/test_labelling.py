"""The label map against the plain way: both bilinear steps of all classes, then the arg-max."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssaseg.models import labelling
from ssaseg.models.labelling import confidence_map, cut_axis, find_candidates, label_map

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-5  # of the largest logit: what float32 may mistake
RARE = 1e-4  # share of pixels that it may mistake

SIZES = [  # logits, network's input, image
    ((64, 64), (512, 512), (512, 512)),
    ((45, 60), (360, 480), (360, 480)),
    ((40, 64), (320, 512), (427, 683)),
    ((64, 40), (512, 320), (375, 234)),
    ((17, 33), (135, 263), (101, 499)),
    ((32, 32), (128, 128), (128, 128)),
    ((30, 30), (90, 90), (271, 271)),
    ((20, 20), (20, 20), (160, 160)),
    ((20, 20), (320, 320), (20, 20)),
    ((16, 16), (16, 16), (16, 16)),
    ((64, 64), (9, 13), (200, 300)),
    ((64, 64), (20, 20), (7, 5)),
    ((1, 1), (8, 8), (50, 40)),
    ((1, 12), (8, 96), (61, 70)),
    ((12, 1), (1, 64), (300, 2)),
    ((2, 3), (512, 512), (511, 513)),
]


def trained_like(classes: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Logits (1,K,h,w) of smooth regions with clear winners."""
    generator = torch.Generator().manual_seed(seed)
    field = 3 * F.interpolate(torch.randn(1, classes, 6, 6, generator=generator), (height, width), mode="bicubic")
    winner = F.one_hot(field.argmax(1), classes).movedim(3, 1)
    return field + 4 * winner + 0.3 * torch.randn(1, classes, height, width, generator=generator)


def white_noise(classes: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, classes, height, width, generator=torch.Generator().manual_seed(seed))


def full_size(logits: Tensor, middle: Sequence[int], size: Sequence[int]) -> Tensor:
    """(1,K,h,w) → (K,H,W), the plain way."""
    for length in (middle, size):
        logits = F.interpolate(logits, tuple(length), mode="bilinear", align_corners=False)
    return logits[0]


def assert_same_labels(labels: Tensor, maps: Tensor, classes: int) -> None:
    """`labels` win in `maps` (K,H,W) wherever float32 can decide, and are equal nearly everywhere."""
    assert labels.dtype == torch.uint8
    assert labels.shape == maps.shape[1:]
    assert int(labels.max()) < classes
    best, winner = maps.max(dim=0)
    behind = best - maps.gather(0, labels[None].long())[0]
    assert behind.max() <= CLOSE * maps.abs().max()
    assert (labels != winner).float().mean() <= RARE


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each label map went."""
    taken: list[str] = []
    for name in ("running_maximum", "label_blocks"):
        original = getattr(labelling, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Tensor:
            taken.append(name)
            return original(*args)

        monkeypatch.setattr(labelling, name, noted)
    return taken


@pytest.mark.parametrize(("source", "middle", "size"), SIZES)
@pytest.mark.parametrize("logits", [trained_like, white_noise])
def test_labels_are_those_of_the_full_size_logits(
    monkeypatch: pytest.MonkeyPatch, paths: list[str], logits: Any, source: Any, middle: Any, size: Any
) -> None:
    given = logits(19, *source)
    maps = full_size(given, middle, size)
    assert_same_labels(label_map(given, middle, size), maps, 19)
    # The way by candidates is also correct where it is not faster.
    monkeypatch.setattr(labelling, "affordable", lambda *_: float("inf"))
    assert_same_labels(label_map(given, middle, size), maps, 19)
    assert paths[-1] == "label_blocks"


def test_random_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "affordable", lambda *_: float("inf"))
    generator = torch.Generator().manual_seed(0)

    def draw(limit: int) -> tuple[int, int]:
        height, width = torch.randint(1, limit, (2,), generator=generator).tolist()
        return height, width

    for seed in range(60):
        source, middle, size = draw(24), draw(130), draw(200)
        classes = int(torch.randint(1, 40, (), generator=generator))
        given = (trained_like, white_noise)[seed % 2](classes, *source, seed)
        assert_same_labels(label_map(given, middle, size), full_size(given, middle, size), classes)


@pytest.mark.parametrize("classes", [1, 2, 150, 255, 256])
def test_any_number_of_classes(paths: list[str], classes: int) -> None:
    given = trained_like(classes, 20, 24)
    assert_same_labels(label_map(given, (160, 192), (160, 192)), full_size(given, (160, 192), (160, 192)), classes)
    assert classes < 150 or paths == ["label_blocks"]


def test_the_way_follows_the_candidates(paths: list[str]) -> None:
    label_map(trained_like(150, 64, 64), (512, 512), (683, 512))
    label_map(white_noise(150, 64, 64), (512, 512), (512, 512))
    label_map(trained_like(19, 64, 64), (64, 64), (64, 64))
    assert paths == ["label_blocks", "running_maximum", "running_maximum"]


@pytest.mark.parametrize("elements", [1, 5000, 2**30])
def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, paths: list[str], elements: int) -> None:
    monkeypatch.setattr(labelling, "affordable", lambda *_: float("inf"))
    given = trained_like(11, 26, 30)
    whole = label_map(given, (208, 240), (100, 350))
    monkeypatch.setattr(labelling, "CPU_ELEMENTS", elements)
    torch.testing.assert_close(label_map(given, (208, 240), (100, 350)), whole, rtol=0, atol=0)
    assert paths == ["label_blocks"] * 2


@pytest.mark.parametrize("elements", [1, 2**30])
def test_confidence_is_the_highest_probability(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(labelling, "CPU_ELEMENTS", elements)
    middle, size = (40, 48), (33, 70)
    for given in (trained_like(7, 10, 12), 300 * white_noise(7, 10, 12), white_noise(1, 10, 12)):
        expected = full_size(given, middle, size).softmax(dim=0).amax(dim=0)
        torch.testing.assert_close(confidence_map(given, middle, size), expected, rtol=0, atol=1e-4)
        maps = full_size(given.abs(), middle, size)
        share = maps.amax(dim=0) / maps.sum(dim=0)
        torch.testing.assert_close(confidence_map(given.abs(), middle, size, scores=True), share, rtol=0, atol=1e-5)


def test_of_equal_classes_the_lower_wins(paths: list[str]) -> None:
    given = trained_like(11, 32, 32)
    doubled = given.repeat_interleave(2, dim=1)
    labels = label_map(doubled, (256, 256), (340, 256))
    assert paths == ["label_blocks"]
    assert (labels % 2 == 0).all()
    torch.testing.assert_close(labels // 2, label_map(given, (256, 256), (340, 256)), rtol=0, atol=0)


@pytest.mark.parametrize(("source", "middle", "size"), SIZES)
def test_no_winner_is_left_out(source: Any, middle: Any, size: Any) -> None:
    """Every pixel's winner is a candidate of the window under it, and pixels are where the axes say."""
    given = trained_like(7, *source)
    rows, columns = (cut_axis(*each, "cpu") for each in zip(source, middle, size, strict=True))
    for axis, matrix in ((rows, (source[0], middle[0], size[0])), (columns, (source[1], middle[1], size[1]))):
        dense = full_size(torch.eye(matrix[0])[None, None], (matrix[0], matrix[1]), (matrix[0], matrix[2]))[0]
        T, P, B = axis.weights.shape
        block = axis.places // P
        found = torch.zeros_like(dense)
        for t in range(T):
            weight = axis.weights[t].T.reshape(B * P)[axis.places]
            found[axis.starts[block] + t, torch.arange(matrix[2])] += weight
        torch.testing.assert_close(found, dense, rtol=0, atol=0)
        assert axis.starts.max() < axis.windows == matrix[0] - T + 1
    pairs = find_candidates(given[0], rows, columns)
    if pairs is None:
        return
    allowed = torch.zeros(rows.windows * columns.windows, 7, dtype=torch.bool)
    allowed[pairs] = True
    down = rows.starts[rows.places // rows.weights.shape[1]]
    across = columns.starts[columns.places // columns.weights.shape[1]]
    winner = full_size(given, middle, size).argmax(dim=0)
    assert allowed[down[:, None] * columns.windows + across, winner].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_logits_that_are_not_finite_do_no_harm(value: float, everywhere: bool) -> None:
    given = trained_like(7, 16, 16)
    if everywhere:
        given[:] = value
    else:
        given[0, 3, 5:7, 5:7] = value
    labels = label_map(given, (128, 128), (128, 128))
    assert labels.shape == (128, 128)
    assert labels.max() < 7
    if not everywhere:  # far away nothing changes
        torch.testing.assert_close(labels[80:], label_map(trained_like(7, 16, 16), (128, 128), (128, 128))[80:])


@pytest.mark.parametrize("logits", [trained_like, white_noise])
def test_full_size_logits_never_exist(logits: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, list | tuple) else [out]:
                # Views that repeat one number in many places hold it once.
                held = tensor.untyped_storage().nbytes() if isinstance(tensor, Tensor) else 0
                self.largest = max(self.largest, held)
            return out

    given = logits(60, 40, 40)
    with Watch() as watch:
        label_map(given, (320, 320), (700, 800))
    assert watch.largest <= 700 * 800 * 8  # one class's; PyTorch finds indices in int64


@pytest.mark.gpu
@pytest.mark.parametrize("logits", [trained_like, white_noise])
def test_labels_on_a_gpu(logits: Any) -> None:
    given = logits(150, 64, 48).cuda()
    labels = label_map(given, (512, 384), (683, 512))
    assert labels.is_cuda
    assert_same_labels(labels, full_size(given, (512, 384), (683, 512)), 150)
