"""An evaluation holds one image at a time, however many there are."""

import contextlib
import gc
import tracemalloc

import pytest
import torch

from ssaseg.cli.scoring.evaluate import evaluate_model
from ssaseg.datasets.synthetic import CLASSES, SyntheticScenes
from ssaseg.models import build_model
from ssaseg.recipes import load_recipe

IMAGES, SIDE = 24, 128
PROTOCOL = load_recipe("demo").test.model_dump() | {"scale": None, "multiple": None}


def held() -> int:
    """Bytes in this process's tensors, and in what Python and NumPy have allocated since the start of tracing."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            with contextlib.suppress(RuntimeError):  # what compilers leave behind has no memory
                storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
def test_evaluation_keeps_no_image() -> None:
    """What is kept grows by less than one map of labels over all images, but for the counts that an interval needs."""
    model = build_model("seaformer_t", len(CLASSES))
    seen: list[int] = []
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    tracemalloc.start()
    try:
        evaluate_model(
            model,
            SyntheticScenes(IMAGES, SIDE, SIDE),
            PROTOCOL,
            mean,
            std,
            torch.device("cpu"),
            progress=lambda _: seen.append(held()),
        )
    finally:
        tracemalloc.stop()
    assert len(seen) == IMAGES
    # The first images fill caches: OpenCV's, PyTorch's, Python's.
    assert max(seen[4:]) - seen[4] < 2 * SIDE * SIDE
