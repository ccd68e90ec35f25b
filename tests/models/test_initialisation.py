"""How training starts: weights as in the official distributed runs, norms' settings, drop path."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ssaseg.models import Segmenter, build_model, list_models
from ssaseg.models.build import build_outline
from ssaseg.models.layers import DropPath
from ssaseg.models.networks.efficientformer import ConvMLP, RelativeBias, Residual
from ssaseg.models.networks.resnet import Bottleneck
from ssaseg.models.networks.seaformer import AxialAttention, SeaAttention


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def close_to(expected: float, values: Tensor) -> bool:
    """Is the deviation within five of its own standard errors? Those are a Gaussian's; a bounded draw's are smaller."""
    return abs(float(values.detach().std()) / expected - 1) < 5 / math.sqrt(2 * values.numel())


def convolutions(*parts: nn.Module) -> Iterator[nn.Conv2d]:
    return (module for part in parts for module in part.modules() if isinstance(module, nn.Conv2d))


def he(layer: nn.Conv2d, knows_groups: bool) -> None:
    """Asserts He initialisation over the fan-out, bias 0; mmcv's `ConvModule` does not know groups."""
    fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // (layer.groups if knows_groups else 1)
    assert close_to(math.sqrt(2 / fan_out), layer.weight)
    assert layer.bias is None or not layer.bias.any()


def torchs_own(layer: nn.Conv2d) -> None:
    """Asserts uniform weights and biases within 1/√fan-in."""
    bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
    for drawn in (layer.weight, layer.bias):
        assert drawn is None or (drawn.abs().max() <= bound and close_to(bound / math.sqrt(3), drawn))


def truncated(weight: Tensor, bias: Tensor | None) -> None:
    """Asserts a deviation of 0.02 and bias 0."""
    assert close_to(0.02, weight)
    assert bias is not None
    assert not bias.any()


HEAVY = (
    "fcn_r101", "ocrnet_hr48", "segformer_b3", "segformer_b4", "segformer_b5", "upernet_swin_b", "upernet_swin_l",
    *(f"segformer_nvidia_b{k}" for k in range(1, 6)), "upernet_vit_adapter_b", "upernet_vit_adapter_l",
)  # as their smaller ones, and seconds each  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(list_models()) - set(HEAVY)))
def test_norms_and_classifier_start(name: str) -> None:
    """Norms at the identity, with the official eps and momentum; the classifier by its own rules."""
    model = build_model(name, 150)
    silent = {id(m.project.norm) for m in model.modules() if isinstance(m, AxialAttention | SeaAttention)}
    if name.startswith("fcn"):  # HRNet's blocks are not silent
        silent = {id(m.expand.norm) for m in model.modules() if isinstance(m, Bottleneck)}
        assert len(silent) == 16
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            assert (module.weight == (id(module) not in silent)).all()
            assert not module.bias.any()
            small = isinstance(module, nn.LayerNorm) and name.startswith(("afformer", "segformer_b", "upernet_vit"))
            lite = name == "lite0" and key.startswith("backbone.")
            assert module.eps == (1e-3 if lite else 1e-6 if small else 1e-5)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.affine, module.track_running_stats) == (0.01 if lite else 0.1, True, True)
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32
    classifier = model.classifier
    assert classifier.dropout.p == (0.0 if name.startswith("ocrnet") else 0.1)
    assert close_to(0.01, classifier.conv_seg.weight)
    assert not classifier.conv_seg.bias.any()
    assert close_to(1.0, classifier.spatial_prototypes)


def test_seaformer_starts() -> None:
    """As the official distributed run: silent attention projections, each part's own rule for convolutions."""
    model = build_model("seaformer_b", 150)
    attentions = [m for m in model.modules() if isinstance(m, AxialAttention | SeaAttention)]
    assert len(attentions) == 3 * 8
    for attention in attentions:
        assert not attention.project.norm.weight.any()
        if isinstance(attention, AxialAttention):
            assert close_to(1.0, attention.query_position)
            assert close_to(1.0, attention.key_position)
    for layer in convolutions(model.backbone):
        he(layer, knows_groups=True)
    for layer in convolutions(model.decoder):
        he(layer, knows_groups=False)


@pytest.mark.parametrize("name", ["afformer_b", "segnext_t"])
def test_afformer_and_segnext_start(name: str) -> None:
    model = build_model(name, 150)
    for layer in convolutions(model.backbone):
        he(layer, knows_groups=True)
    for layer in convolutions(model.decoder):
        he(layer, knows_groups=False)
    linear = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == (4 * (2 + 6 + 2) if name == "afformer_b" else 0)
    for layer in linear:
        truncated(layer.weight, layer.bias)
    scales = [p for key, p in model.named_parameters() if key.endswith("_scale")]
    assert len(scales) == (0 if name == "afformer_b" else 2 * 13)
    assert all((scale == 0.01).all() for scale in scales)


def test_cgrseg_starts() -> None:
    model = build_model("cgrseg_b", 150, "linear")
    drawn = {id(layer) for m in model.modules() if isinstance(m, ConvMLP) for layer in (m.expand.conv, m.project.conv)}
    for layer in convolutions(model.backbone):
        if id(layer) in drawn:
            truncated(layer.weight, layer.bias)
        else:
            torchs_own(layer)
    residuals = [module for module in model.backbone.modules() if isinstance(module, Residual)]
    assert len(residuals) == 28 + 8
    assert all((residual.scale == 1e-5).all() for residual in residuals)
    biases = [module for module in model.backbone.modules() if isinstance(module, RelativeBias)]
    assert len(biases) == 8 + 1
    assert not any(bias.table.any() for bias in biases)
    decoder, classifier = model.decoder, model.classifier
    for layer in convolutions(decoder.fuse, decoder.output):
        he(layer, knows_groups=False)
    for layer in convolutions(decoder.context, decoder.rebuild, decoder.descend):
        torchs_own(layer)
    assert all((block.scale == 1e-6).all() for block in (*decoder.context, *decoder.rebuild))
    torchs_own(classifier.enter)
    assert close_to(math.sqrt(2 / 256), classifier.weigh.weight)
    assert not any(zero.any() for zero in (classifier.weigh.bias, classifier.leave.weight, classifier.leave.bias))


@pytest.mark.parametrize("name", ["fcn_r50", "ocrnet_hr18", "segformer_b0", "upernet_swin_t"])
def test_general_networks_start(name: str) -> None:
    model = build_model(name, 150)
    for layer in convolutions(model.decoder, *(head.decoder for head in model.auxiliary.values())):
        if layer.bias is None:  # before a norm
            he(layer, knows_groups=False)
    for layer in convolutions(model.backbone):
        if name.startswith("upernet"):
            torchs_own(layer)
        else:
            he(layer, knows_groups=name.startswith("segformer"))
    linear = [module for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == {"segformer_b0": 8, "upernet_swin_t": 4 * 12 + 3}.get(name, 0)
    for layer in linear:
        assert close_to(0.02, layer.weight)
        assert layer.bias is None or not layer.bias.any()


def test_vit_adapter_starts() -> None:
    """The adapter by its authors' rules, the transformer as PyTorch makes it."""
    backbone = build_model("upernet_vit_adapter_t", 150, "linear").backbone
    for layer in convolutions(backbone.prior, backbone.interactions):
        he(layer, knows_groups=True)
    assert close_to(math.sqrt(2 / (2 * 2 * 192)), backbone.up.weight)
    assert not backbone.up.bias.any()
    assert close_to(1.0, backbone.levels)
    assert not backbone.positions.any()
    for block in backbone.blocks:
        bound = 1 / math.sqrt(192)
        assert close_to(bound / math.sqrt(3), block.expand.weight)
        assert (block.attention_scale == 1).all()
    for interaction in backbone.interactions:
        assert not interaction.injector.scale.any()
        for extractor in interaction.extractors:
            truncated(extractor.expand.weight, extractor.expand.bias)
            assert not extractor.attention.offsets.weight.any()
            assert not extractor.attention.weights.weight.any()
    rates = [sorted({m.rate for m in block.modules() if isinstance(m, DropPath)}) for block in backbone.blocks]
    assert rates == [[pytest.approx(0.1 * k / 11)] for k in range(12)]
    assert {m.rate for m in backbone.interactions.modules() if isinstance(m, DropPath)} == {0.1}


@pytest.mark.parametrize(
    ("name", "depths", "rate"),
    [
        ("segformer_b0", (2, 2, 2, 2), 0.1),
        ("upernet_swin_t", (2, 2, 6, 2), 0.3),
        ("afformer_b", (2, 6, 2), 0.0),
        ("cgrseg_t", (3, 3, 9, 6), 0.0),
        ("cgrseg_b", (4, 4, 12, 8), 0.02),
        ("cgrseg_l", (5, 5, 15, 10), 0.1),
        ("segnext_t", (3, 3, 5, 2), 0.1),
        ("segnext_s", (2, 2, 4, 2), 0.1),
        ("segnext_b", (3, 3, 12, 3), 0.1),
        ("segnext_l", (3, 5, 27, 3), 0.3),
    ],
)
def test_drop_path_rates(name: str, depths: tuple[int, ...], rate: float) -> None:
    """Growing evenly over all blocks, whose residual branches share one rate; the recipe's rate goes before."""
    blocks = sum(depths)
    for given, last in ((None, rate), (0.5, 0.5)):
        model = build_outline(name, 5, drop_path=given)
        found = [sorted({m.rate for m in block.modules() if isinstance(m, DropPath)}) for block in blocks_of(model)]
        # AFFormer's first stage has no block, but counts as one.
        first = 1 if name.startswith("afformer") else 0
        expected = [[pytest.approx(last * (first + i) / (first + blocks - 1))] for i in range(blocks)]
        assert found == expected
        assert sum(isinstance(m, DropPath) for m in model.decoder.modules()) == 0


def blocks_of(model: Segmenter) -> list[nn.Module]:
    """Residual blocks of the backbone, in order."""
    stages = model.backbone.stages
    lists = [stage.encoder.blocks for stage in stages[1:]] if model.name.startswith("afformer") else stages
    return [block for stage in lists for block in getattr(stage, "blocks", stage)]


@pytest.mark.parametrize(("name", "depth", "stages"), [("seaformer_b", 4, 2), ("seaformer_l", 3, 3)])
def test_seaformer_drop_path_rates(name: str, depth: int, stages: int) -> None:
    """The rate grows from 0 in each stage."""
    rates = [m.rate for m in build_model(name, 5).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1 * i / (depth - 1) for i in range(depth)] * stages)
