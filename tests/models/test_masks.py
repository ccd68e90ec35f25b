"""The mask methods against figures of the official code: see `golden/README.md`.

The whole networks are compared by `make parity`. The tests compare PEM and YOSO on a small image, with figures that
this code computed while the whole networks equalled the official ones.
"""

import functools
import hashlib
import itertools
import json
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import INPUTS, filled_masks
from masks import in_detectron2
from places import GOLDEN
from torch import Tensor

from ssaseg.cli.profiling.counting import EVERY_OPERATION, count
from ssaseg.cli.profiling.mask_table import KNOWN
from ssaseg.models import LossOptions, build_model, facts, list_mask_models, list_models
from ssaseg.models.build import family_of
from ssaseg.models.fast import accelerate
from ssaseg.models.masks import deform, peers, pem
from ssaseg.models.masks.base import MASKS, Masks, MaskScores, MaskSegmenter
from ssaseg.models.official import layout_of, official_entries

FIGURES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "masks.json").read_text())
OURS = ("pem_r50", "yoso_r50")
HEAVY = pytest.mark.skipif(not os.environ.get("SSASEG_PARITY"), reason="takes seconds: `make parity`")
EACH = [pytest.param(name, marks=[] if name in OURS else HEAVY) for name in FIGURES]
# Of the official code, with the product of masks and classes, by fvcore, which also counts norms and upsampling.
GMACS = {"maskformer_r50": 54.97, "mask2former_r50": 70.60, "yoso_r50": 40.93, "pem_r50": 34.67}


def stored(name: str) -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / "masks.npz")[name])


def test_all_mask_methods_are_known() -> None:
    assert sorted(FIGURES) == list_mask_models() == sorted(KNOWN)
    assert not set(FIGURES) & set(list_models())


@pytest.fixture(scope="module")
def golden() -> Any:
    """Networks with the figures' weights, two at a time."""
    return functools.lru_cache(maxsize=2)(filled_masks)


@pytest.mark.parametrize("name", EACH)
def test_names_and_shapes_are_the_official_ones(name: str, golden: Any) -> None:
    model = golden(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == FIGURES[name]["params"]
    state = model.state_dict()
    given = [(key, value) for entry in official_entries(model) for key, value in entry.give(state).items()]
    text = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in given))
    assert hashlib.sha256(text.encode()).hexdigest() == FIGURES[name]["keys"]
    (layout,) = family_of(name).layouts
    theirs = [key for entry in official_entries(model, layout=layout.name) for key in entry.theirs]
    assert theirs == [in_detectron2(name, key) for key, _ in given]
    assert layout_of(theirs) == layout.name


@pytest.mark.parametrize("name", OURS)
def test_scores_of_a_small_image(name: str, golden: Any) -> None:
    """Its sides are padded to 96 and 128."""
    model = golden(name)
    images = torch.randn(1, 3, 75, 101, generator=torch.Generator().manual_seed(1234))
    with torch.inference_mode():
        scores = model(images)
        assert scores.shape == (1, 150, 75, 101)
        assert float((scores[:, ::7, ::8, ::8] - stored(f"{name}/scores_75x101")).abs().max()) < 1e-4
        twice = model(torch.cat((images, images.flip(3))))  # an image does not depend on the others
    assert float((twice[:1] - scores).abs().max()) < 1e-4


@HEAVY
@pytest.mark.parametrize("name", FIGURES)
def test_scores_equal_the_official_ones(name: str, golden: Any) -> None:
    model = golden(name)
    for size in ("512", "480x640"):
        seed, _, sides = INPUTS[f"logits_{size}"]
        images = torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            feature = model.feature(images)
            scores = model.classifier(feature)
        assert float((scores[:, ::7, ::32, ::32] - stored(f"{name}/scores_{size}")).abs().max()) < 1e-4
        assert float((feature.classes[:, ::9, ::7] - stored(f"{name}/classes_{size}")).abs().max()) < 1e-3


@HEAVY
@pytest.mark.parametrize("name", FIGURES)
def test_operations(name: str, golden: Any) -> None:
    """MaskFormer's official code computes the masks of five layers more, which are 2.1 GMACs."""
    found = count(golden(name).requires_grad_(False), torch.zeros(1, 3, 512, 512))["gmacs"][EVERY_OPERATION]
    assert found + 2.1 * (name == "maskformer_r50") == pytest.approx(GMACS[name], rel=0.01)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def naive(x: Tensor, offsets: Tensor, weights: Tensor, kernel: Tensor) -> Tensor:
    """Deformable convolution, number by number; offsets (N,18,H,W): down and right of each tap in turn."""
    n, channels, height, width = x.shape

    def at(image: int, channel: int, y: float, right: float) -> float:
        total = 0.0
        for row, column in itertools.product(*((math.floor(p), math.floor(p) + 1) for p in (y, right))):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - row)) * (1 - abs(right - column)) * x[image, channel, row, column].item()
        return total

    result = torch.zeros(n, len(kernel), height, width)
    for image, out, row, column in itertools.product(range(n), range(len(kernel)), range(height), range(width)):
        for tap, channel in itertools.product(range(9), range(channels)):
            y = row + tap // 3 - 1 + offsets[image, 2 * tap, row, column].item()
            right = column + tap % 3 - 1 + offsets[image, 2 * tap + 1, row, column].item()
            factor = weights[image, tap, row, column] * kernel[out, channel, tap // 3, tap % 3]
            result[image, out, row, column] += factor * at(image, channel, y, right)
    return result


def test_deformable_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of maps with a side of 1, and with offsets that reach outside.

    torchvision, if installed, gets what it expects; where operations are counted it is not used.
    """
    torch.manual_seed(0)
    for size in ((3, 4), (1, 3)):
        given = torch.randn(2, 2, *size), 2 * torch.randn(2, 18, *size), torch.rand(2, 9, *size)
        kernel = torch.randn(2, 2, 3, 3)
        with deform.countable():
            torch.testing.assert_close(deform.deformable(*given, kernel), naive(*given, kernel))
    calls: list[Any] = []

    def library(x: Tensor, offset: Tensor, weight: Tensor, bias: None = None, stride: int = 1, **more: Any) -> str:
        calls.append((x, offset, weight, more))
        return "result"

    monkeypatch.setattr(deform, "operator", lambda: library)
    assert deform.deformable(*given, kernel) == "result"
    assert all(a is b for a, b in zip(calls[0][:3], (given[0], given[1], kernel), strict=True))
    assert calls[0][3] == {"padding": 1, "mask": given[2]}
    with deform.countable():
        torch.testing.assert_close(deform.deformable(*given, kernel), naive(*given, kernel))
    assert deform.deformable(*given, kernel) == "result"


def test_prototypes() -> None:
    """A query with all keys hidden takes the first; if that is so for all queries, nothing is hidden."""
    keys = torch.zeros(1, 3, pem.HEADS)
    keys[0, :, :] = torch.tensor([1.0, 3.0, 2.0])[:, None]
    queries = torch.ones(1, 2, pem.HEADS)
    queries[0, 1] = -1

    def chosen(*hidden: list[bool]) -> list[float]:
        found = pem.prototypes(keys, queries, torch.tensor([hidden]))
        assert (found == found[..., :1]).all()
        return found[0, :, 0].tolist()

    shown = [False] * 3
    assert chosen(shown, shown) == [3, 1]
    assert chosen([False, True, False], [True, False, False]) == [2, 2]
    assert chosen([True] * 3, [True, False, False]) == [1, 2]
    assert chosen([True] * 3, [True] * 3) == [3, 1]


def test_scores_leave_out_no_object_and_the_padding() -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(1, 2, 4), torch.randn(1, 2, 16, 24)
    scores = MaskScores(0, 3)(Masks(classes, masks, (50, 70)))
    shares = classes[0].softmax(1)
    whole = torch.nn.functional.interpolate(masks, (64, 96), mode="bilinear", align_corners=False)[0].sigmoid()
    expected = sum(shares[query, :3, None, None] * whole[query, :50, :70] for query in range(2))
    torch.testing.assert_close(scores[0], expected)


def test_no_training_and_no_classifier(golden: Any) -> None:
    model = golden("yoso_r50")
    assert isinstance(model, MaskSegmenter)
    with pytest.raises(ValueError, match="yoso_r50 is a mask method, which ssaseg does not train"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64).long())
    with pytest.raises(ValueError, match="does not train"):
        facts("pem_r50", "ssa")
    with pytest.raises(ValueError, match="it has no classifier to choose, got ssa"):
        build_model("pem_r50", 2)
    changes: dict[str, Any] = {
        "drop_path": 0.1,
        "dropout": 0.0,
        "loss": LossOptions(),
        "options": {"a": 1},
        "compat": True,
    }
    for key, value in changes.items():
        with pytest.raises(ValueError, match=f"it takes no {key}: leave"):
            build_model("pem_r50", 2, MASKS, **{key: value})
    with pytest.raises(ValueError, match="'masks' is not known"):
        build_model("seaformer_t", 2, MASKS)
    with pytest.raises(ValueError, match="num_classes is 0"):
        build_model("pem_r50", 0, MASKS)
    with pytest.raises(TypeError, match="yoso_r50 is a mask method"):
        accelerate(model)


def test_transformers_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for name in ("maskformer_r50", "mask2former_r50"):
        with pytest.raises(ValueError, match=rf"{name} needs .* not found: transformers, scipy\n.*ssaseg\[peers\]"):
            build_model(name, 2, MASKS)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "scipy" else True)
    with pytest.raises(ValueError, match="not found: scipy\n"):
        build_model("maskformer_r50", 2, MASKS)
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    monkeypatch.setattr(peers, "import_module", lambda name: SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(ValueError, match=r"transformers 5 or later, found 4\.57\.1\n"):
        build_model("maskformer_r50", 2, MASKS)
