"""SeaFormer with both classifiers against figures of the official code: see `golden/README.md`."""

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models import Segmenter, build_model
from ssaseg.models.layers import ConvNorm, DropPath
from ssaseg.models.seaformer import AxialAttention, SeaAttention, SeaBlock
from ssaseg.models.upstream import LEFT_OUT, official_keys

GOLDEN = Path(__file__).parent / "golden"
FIGURES: dict[str, Any] = json.loads((GOLDEN / "seaformer_base.json").read_text())
TOLERANCE = 5e-5  # absolute, of logits of magnitude 0.3 to 4; float32's noise is below 1e-5
INPUTS = {
    "logits_512": (1234, 1.0, (512, 512)),
    "logits_480x640": (1235, 1.0, (480, 640)),
    "logits_512_amp80": (1236, 80.0, (512, 512)),
}


def official_shapes(classifier: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Official key → shape and type, in order."""
    rows = (line.split() for line in (GOLDEN / "seaformer_base_keys.txt").read_text().splitlines())
    return {
        key: (tuple(int(size) for size in re.findall(r"\d+", shape)), getattr(torch, kind))
        for network, key, shape, kind in rows
        if network == "both" or classifier == "ssa"
    }


def weight(key: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """The value that the figures were computed with: a draw seeded by the official key, scaled by its role."""
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    seeded = torch.Generator().manual_seed(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    if key.endswith("running_var"):
        return torch.rand(shape, generator=seeded) + 0.5
    draw = torch.randn(shape, generator=seeded)
    if key.endswith("running_mean"):
        return draw * 0.1
    if "pos_embed" in key:
        return draw
    if len(shape) <= 1:
        return draw * 0.1 + 0.8 if key.endswith("weight") else draw * 0.05
    return draw * math.sqrt(1 / math.prod(shape[1:]))


def golden_model(classifier: str) -> Segmenter:
    model = build_model("seaformer_b", 150, classifier)
    shapes = official_shapes(classifier)
    model.load_state_dict({ours: weight(key, *shapes[key]) for ours, key in official_keys(model).items()})
    return model.eval()


@pytest.fixture(scope="module", params=["linear", "ssa"])
def model(request: pytest.FixtureRequest) -> Segmenter:
    """Golden weights, in evaluation mode; tests leave them as they are."""
    return golden_model(request.param)


def difference(model: Segmenter, name: str) -> float:
    """Largest absolute difference of logits to the stored ones."""
    seed, scale, size = INPUTS[name]
    images = scale * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    stored = np.load(GOLDEN / f"seaformer_base{'_ssa' if model.classifier_name == 'ssa' else ''}.npz")[name]
    with torch.no_grad():
        return float((model(images)[:, ::7, ::4, ::4] - torch.from_numpy(stored)).abs().max())


def test_keys_are_the_official_ones(model: Segmenter) -> None:
    """The table reaches every official key but those that it declares left out, each once and in its shape."""
    official, shapes = official_keys(model), official_shapes(model.classifier_name)
    assert len(set(official.values())) == len(official)
    assert set(shapes) - set(official.values()) == set(LEFT_OUT[model.classifier_name])
    assert all(shapes[official[key]][0] == tuple(value.shape) for key, value in model.state_dict().items())


def test_weights_are_those_of_the_figures(model: Segmenter) -> None:
    shapes = official_shapes(model.classifier_name)
    total = sum(weight(key, *shape).double().abs().sum().item() for key, shape in shapes.items())
    assert total == pytest.approx(FIGURES[model.classifier_name]["checksum"]["abs_sum"], rel=1e-9)


@pytest.mark.parametrize("name", INPUTS)
def test_logits(model: Segmenter, name: str) -> None:
    assert difference(model, name) < TOLERANCE


@pytest.mark.parametrize("size", [128, 256])
def test_losses_and_gradients(model: Segmenter, size: int) -> None:
    """Every loss to 1e-4 relative, every gradient norm to 1e-3."""
    figures = FIGURES[model.classifier_name]["train"][str(size)]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4321))
    labels = torch.from_numpy(np.load(GOLDEN / "labels.npz")[f"labels_{size}"]).long()
    for module in model.modules():
        # As the figures were made: training mode, but for BatchNorm; nothing dropped.
        module.training = not isinstance(module, nn.BatchNorm2d | nn.Dropout2d | DropPath)
    model.zero_grad()
    losses = model(images, labels)
    sum(losses.values()).backward()
    model.eval()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(figures["losses"], rel=1e-4)
    assert sum(value.item() for value in losses.values()) == pytest.approx(figures["total"], rel=1e-4)
    theirs = official_keys(model)
    norms = {theirs[key]: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert {key: norms[key] for key in figures["grad_norm"]} == pytest.approx(figures["grad_norm"], rel=1e-3)
    assert math.hypot(*norms.values()) == pytest.approx(figures["grad_norm_total"], rel=1e-3)


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("kind", ["query_position", "key_position"])
def test_a_zeroed_position_embedding_shows(side: str, kind: str) -> None:
    """One of 32 embeddings: the comparison above is sharp enough to see it."""
    model = golden_model("linear")
    with torch.no_grad():
        getattr(getattr(model.backbone.sea[0][0].attention, side), kind).zero_()
    assert any(difference(model, name) > TOLERANCE for name in INPUTS)


def test_a_relu_instead_of_relu6_shows(monkeypatch: pytest.MonkeyPatch, model: Segmenter) -> None:
    """The one ReLU6 whose upper bound a stored input reaches: in the hard sigmoid (ReLU6(x + 3) / 6) of the first gate.

    Those of the transformer blocks never see more than 4.2, not even at amplitude 80; `test_block` is about them.
    """
    fusion = model.decoder.fuse[0]
    forward = fusion.forward

    def without_bound(fine: Tensor, coarse: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(F, "hardsigmoid", lambda x: F.relu(x + 3) / 6)
            return forward(fine, coarse)

    monkeypatch.setattr(fusion, "forward", without_bound)
    assert difference(model, "logits_512_amp80") > TOLERANCE


# ---- one block, against the paper's figure written out ------------------------------------------------------------


def plain_block(block: SeaBlock, x: Tensor, bounded: Callable[[str, Tensor], Tensor]) -> Tensor:
    """`SeaBlock` head by head, in matrices; `bounded(place, x)` is each of its five ReLU6."""
    a = block.attention
    value = a.value(x)
    qkv = [a.query(x), a.key(x), value]
    detail = a.detail_pointwise(bounded("detail", a.detail_depthwise(torch.cat(qkv, dim=1))))
    context = value
    for axis, attention, across in (("row", a.row, 3), ("column", a.column, 2)):
        q, k, v = (t.mean(dim=across) for t in qkv)  # (N, C, L)
        length = q.shape[2]
        q, k = (
            t + F.interpolate(table, size=length, mode="linear")
            for t, table in ((q, attention.query_position), (k, attention.key_position))
        )
        heads = zip(*(t.chunk(8, dim=1) for t in (q, k, v)), strict=True)
        scale = math.sqrt(q.shape[1] // 8)
        out = torch.cat([torch.softmax(hq.mT @ hk / scale, dim=2) @ hv.mT for hq, hk, hv in heads], dim=2)
        projected = attention.project(bounded(axis, out.mT.unsqueeze(3)))  # (N, C, L, 1)
        context = context + (projected if axis == "row" else projected.mT)
    x = x + (a.project(bounded("project", context)) + 3).clamp(0, 6) / 6 * detail
    return x + block.project(bounded("mlp", block.depthwise(block.expand(x))))


def test_block() -> None:
    """With inputs that pass ReLU6's bound at all five places: equal, and not when one of them is a ReLU."""
    block = golden_model("linear").backbone.sea[0][0]
    x = 60 * torch.randn(2, 192, 5, 7, generator=torch.Generator().manual_seed(0))
    largest: dict[str, float] = {}

    def relu6(place: str, x: Tensor) -> Tensor:
        largest[place] = x.max().item()
        return x.clamp(0, 6)

    with torch.no_grad():
        found, expected = block(x), plain_block(block, x, relu6)
        tolerance = 1e-5 * expected.abs().max()
        assert (found - expected).abs().max() < tolerance
        assert set(largest) == {"detail", "row", "column", "project", "mlp"}
        assert min(largest.values()) > 6, largest
        for wrong in largest:
            other = plain_block(block, x, lambda place, x, wrong=wrong: x.clamp(0, None if place == wrong else 6))
            assert (found - other).abs().max() > 10 * tolerance, wrong


# ---- what no figure shows ----------------------------------------------------------------------------------------


def parameters(name: str, classifier: str) -> int:
    return sum(p.numel() for p in build_model(name, 150, classifier).parameters())


def test_parameter_counts() -> None:
    """B to the last parameter; L as the official code counts it, T and S as the paper's tables round them [M]."""
    for classifier in ("linear", "ssa"):
        model, figures = build_model("seaformer_b", 150, classifier), FIGURES[classifier]["params"]
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        assert sum(counts.values()) == figures["params"]
        assert counts["backbone"] == figures["params_backbone"]
        prefixes = tuple(f"classifier.{prefix}" for prefix in model.classifier.training_only())
        teacher = [p.numel() for key, p in model.named_parameters() if prefixes and key.startswith(prefixes)]
        assert sum(teacher) == figures["params_gt"]
    assert round(parameters("seaformer_l", "linear") / 1e6, 4) == 13.9515
    assert round(parameters("seaformer_l", "ssa") / 1e6, 4) == 14.2779
    # The backbones of seaformer-cls/seaformer.py (SeaFormer 9718d05), without the ImageNet classifier.
    official = {"seaformer_t": 1620096, "seaformer_s": 3912656, "seaformer_b": 8485664, "seaformer_l": 13725504}
    for name, backbone in official.items():
        assert sum(p.numel() for p in build_model(name, 2).backbone.parameters()) == backbone


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("seaformer_t", (97, 130)),
        ("seaformer_t", (33, 32)),
        ("seaformer_s", (32, 32)),
        ("seaformer_t", (513, 511)),
        ("seaformer_l", (32, 257)),
    ],
)
def test_any_size_from_32(name: str, size: tuple[int, int]) -> None:
    model = build_model(name, 5).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    assert logits.isfinite().all()


def test_an_image_does_not_see_its_batch(model: Segmenter) -> None:
    images = torch.randn(3, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)


def close_to(expected: float, samples: int) -> Callable[[float], bool]:
    """Is a sample's standard deviation within five of its own standard errors?"""
    return lambda found: abs(found / expected - 1) < 5 / math.sqrt(2 * samples)


def test_initialisation() -> None:
    """As the official distributed run starts: silent attention projections, each part's own rule for convolutions."""
    torch.manual_seed(0)
    model = build_model("seaformer_b", 150)
    attentions = [m for m in model.modules() if isinstance(m, AxialAttention | SeaAttention)]
    assert len(attentions) == 3 * 8
    for attention in attentions:
        assert not attention.project.norm.weight.any()
        if isinstance(attention, AxialAttention):
            for table in (attention.query_position, attention.key_position):
                assert close_to(1.0, table.numel())(table.std().item())
    silent = {id(attention.project.norm) for attention in attentions}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and id(m) not in silent]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
    # Backbone: He over the fan-out, which knows groups; decoder: mmcv's, which does not.
    for part, knows_groups in ((model.backbone, True), (model.decoder, False)):
        for layer in (m for m in part.modules() if isinstance(m, nn.Conv2d)):
            fan_out = layer.kernel_size[0] ** 2 * layer.out_channels // (layer.groups if knows_groups else 1)
            assert close_to(math.sqrt(2 / fan_out), layer.weight.numel())(layer.weight.std().item())
            assert layer.bias is None or not layer.bias.any()
    assert isinstance(model.decoder.output, ConvNorm)
    classifier = model.classifier
    assert close_to(0.01, classifier.conv_seg.weight.numel())(classifier.conv_seg.weight.std().item())
    assert not classifier.conv_seg.bias.any()
    assert close_to(1.0, classifier.spatial_prototypes.numel())(classifier.spatial_prototypes.std().item())
