"""A wrong detail of a general network shows, also in those whose own figures only `make parity` compares.

The figures here are those of tiny networks with every part of their family, computed at a time when the whole networks
equalled the official code: see `golden/README.md`. The norms' eps is in `test_initialisation`.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from golden_weights import filled
from networks import BUILT, tiny_networks
from places import GOLDEN
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.models import Segmenter
from ssaseg.models.layers import DropPath
from ssaseg.models.networks import hrnet, ocrnet, segformer, swin, upernet, vit_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "tiny.json").read_text())
NAMES = (*BUILT, "segformer_x")
Patch = Callable[[pytest.MonkeyPatch, Any], None]


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


def figures(model: Segmenter) -> dict[str, Any]:
    """Some logits of an image of 155×221; losses and the norm of all gradients of a training step at 64×64; the norm of
    the main loss's gradient in a first stage's classifier.

    The image has ten times the usual contrast, so that no softmax stays flat.
    """
    seeded = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        logits = model.eval()(10 * torch.randn(1, 3, 155, 221, generator=seeded))
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d | nn.Dropout2d | DropPath)
    labels = torch.randint(0, 150, (2, 64, 64), generator=seeded)
    losses = model(10 * torch.randn(2, 3, 64, 64, generator=seeded), labels)
    first = [each for key, each in model.named_parameters() if key.startswith("decoder.classifier.")]
    reached = torch.autograd.grad(losses["main_ce"], first, retain_graph=True, allow_unused=True) if first else ()
    gradients = torch.autograd.grad(sum(losses.values()), [*model.parameters()], allow_unused=True)
    return {
        "logits": logits[0, ::30, ::7, ::11].flatten().tolist(),
        "losses": {name: loss.item() for name, loss in losses.items()},
        "gradient": total_norm(gradients),
        "reached": total_norm(reached),
    }


def total_norm(gradients: Sequence[Tensor | None]) -> float:
    return math.hypot(*(each.norm().item() for each in gradients if each is not None))


def differs(name: str, found: dict[str, Any]) -> bool:
    expected = FIGURES[name]
    scale = max(map(abs, expected["logits"]))
    return (
        found["logits"] != pytest.approx(expected["logits"], rel=0, abs=2e-5 * scale)
        or found["losses"] != pytest.approx(expected["losses"], rel=1e-4)
        or any(found[key] != pytest.approx(expected[key], rel=1e-3) for key in ("gradient", "reached"))
    )


@pytest.mark.parametrize("name", NAMES)
def test_figures(name: str) -> None:
    assert not differs(name, figures(filled(name, "linear")))


# ---- wrong details -------------------------------------------------------------------------------------------------

INTERPOLATE, SAMPLE, GELU = F.interpolate, F.grid_sample, F.gelu


def layers(model: Any, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, change(getattr(owner, name)))


def dilation(stage: int, block: int, value: int) -> Patch:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        conv = model.backbone.stages[stage][block].spatial.conv
        patch.setattr(conv, "dilation", (value, value))
        patch.setattr(conv, "padding", (value, value))

    return change


def stride_on_the_first(patch: pytest.MonkeyPatch, model: Any) -> None:
    """Caffe's style."""
    block = model.backbone.stages[1][0]
    patch.setattr(block.reduce.conv, "stride", (2, 2))
    patch.setattr(block.spatial.conv, "stride", (1, 1))


def to_corners(patch: pytest.MonkeyPatch, model: Any) -> None:
    patch.setattr(
        F,
        "interpolate",
        lambda x, **more: INTERPOLATE(x, **more | ({"align_corners": True} if more.get("mode") == "bilinear" else {})),
    )


def tanh_gelu(patch: pytest.MonkeyPatch, model: Any) -> None:
    patch.setattr(F, "gelu", partial(GELU, approximate="tanh"))


def reversed_cat(at: int) -> Patch:
    """The at-th concatenation is in the other order, if it has several equal parts."""

    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        cat, calls = torch.cat, [0]

        def other(tensors: Any, dim: int = 0) -> Tensor:
            calls[0] += 1
            return cat(list(tensors)[::-1] if calls[0] % at == 0 else list(tensors), dim=dim)

        patch.setattr(torch, "cat", other)

    return change


def no_top_down(patch: pytest.MonkeyPatch, model: Any) -> None:
    """Every level gets the one above it before that has its own: not one after the other."""

    def forward(maps: Any) -> Tensor:
        decoder = model.decoder
        own = [F.relu(lateral(each)) for lateral, each in zip(decoder.laterals, maps[:-1], strict=True)]
        own.append(decoder.pool(maps[-1]))
        size = own[0].shape[-2:]
        levels = [
            each + upernet.resize_bilinear(own[k + 1], each.shape[-2:]) if k < 3 else each for k, each in enumerate(own)
        ]
        smooth = [F.relu(conv(each)) for conv, each in zip(decoder.smooth, levels[:-1], strict=True)]
        return F.relu(
            decoder.merge(torch.cat([upernet.resize_bilinear(x, size) for x in [*smooth, levels[-1]]], dim=1))
        )

    patch.setattr(model.decoder, "forward", forward)


def swapped_index(patch: pytest.MonkeyPatch, model: Any) -> None:
    for layer in layers(model, swin.WindowAttention):
        patch.setitem(layer._buffers, "index", layer.index.T)


def merged_by_position(patch: pytest.MonkeyPatch, model: Any) -> None:
    """The four positions one after the other, as in the original Swin."""
    for merge in layers(model, swin.Merge):
        wrap(patch, merge.norm, "forward", lambda forward: lambda x: forward(x.unflatten(3, (-1, 4)).mT.flatten(3)))


def detached(patch: pytest.MonkeyPatch, model: Any) -> None:
    wrap(patch, model.decoder, "second", lambda second: lambda x, logits: second(x, logits.detach()))


def regions_over_classes(patch: pytest.MonkeyPatch, model: Any) -> None:
    def second(x: Tensor, logits: Tensor) -> Tensor:
        decoder = model.decoder
        feature = F.relu(decoder.squeeze(x))
        shares = logits.flatten(2).softmax(dim=1)
        return decoder.context(feature, (shares @ feature.flatten(2).mT).mT.unsqueeze(3))

    patch.setattr(model.decoder, "second", second)


def once_resized(patch: pytest.MonkeyPatch, model: Any) -> None:
    """HRNet's maps come directly to their size, where the official code first takes the factor."""
    wrap(
        patch, hrnet, "resize_bilinear",
        lambda resize: lambda x, size: resize(x, size) if tuple(size) in EXACT else x,
    )  # fmt: skip


EXACT = {(39, 56), (20, 28), (10, 14), (5, 7), (16, 16), (8, 8), (4, 4), (2, 2)}


def attributes(kind: type[nn.Module], **values: Any) -> Patch:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        for layer in layers(model, kind):
            for name, value in values.items():
                patch.setattr(layer, name, value)

    return change


def padded_before_the_norm(patch: pytest.MonkeyPatch, model: Any) -> None:
    """Positions of the padding take no part."""
    for block in layers(model, swin.Block):
        patch.setitem(block.attention.qkv._parameters, "bias", None)


def sampled(**options: Any) -> Patch:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        patch.setattr(F, "grid_sample", lambda maps, grid, **more: SAMPLE(maps, grid, **more | options))

    return change


def swapped_places(patch: pytest.MonkeyPatch, model: Any) -> None:
    wrap(patch, vit_adapter, "centres", lambda centres: lambda sizes, device: centres(sizes, device).flip(1))


def class_token_used(patch: pytest.MonkeyPatch, model: Any) -> None:
    values = model.backbone.positions.data
    patch.setattr(model.backbone.positions, "data", values.roll(1, dims=1))


def bilinear_positions(patch: pytest.MonkeyPatch, model: Any) -> None:
    patch.setattr(
        F, "interpolate", lambda x, **more: INTERPOLATE(x, **more | ({"mode": "bilinear"} if "mode" in more else {}))
    )


def silent(path: str) -> Patch:
    def change(patch: pytest.MonkeyPatch, model: Any) -> None:
        wrap(patch, model.get_submodule(path), "forward", lambda forward: lambda *given: 0 * forward(*given))

    return change


def aux_of_other_channels(patch: pytest.MonkeyPatch, model: Any) -> None:
    decoder = model.auxiliary["aux"].decoder
    wrap(patch, decoder, "forward", lambda forward: lambda maps: forward([*maps[:2], maps[2].flip(1)]))


UPER: dict[str, Patch] = {
    "no_top_down": no_top_down,
    "other_pools": lambda patch, model: patch.setattr(model.decoder.means[3], "output_size", 5),
    "aux_of_other_channels": aux_of_other_channels,
    "to_corners": to_corners,
    "tanh_gelu": tanh_gelu,
    "level_missing": silent("decoder.smooth.1"),
    "pool_missing": silent("decoder.pools.2"),
    "reversed_cat": reversed_cat(2),
}
DETAILS: dict[str, dict[str, Patch]] = {
    "fcn_x": {
        "third_stage_starts_dilated": dilation(2, 0, 2),
        "third_stage_not_dilated": dilation(2, 1, 1),
        "fourth_stage_starts_as_it_goes_on": dilation(3, 0, 4),
        "fourth_stage_less_dilated": dilation(3, 1, 2),
        "stride_on_the_first": stride_on_the_first,
        "input_and_output_swapped": lambda patch, model: wrap(
            patch, model.decoder.merge, "forward", lambda f: lambda x: f(torch.cat(x.split((32, 16), 1)[::-1], 1))
        ),
        "aux_of_other_channels": aux_of_other_channels,
        "aux_weight": lambda patch, model: patch.setattr(model, "weights", {"aux_ce": 0.2}),
    },
    "segformer_x": {
        "reversed_cat": reversed_cat(1),
        "to_corners": to_corners,
        "tanh_gelu": tanh_gelu,
        "keys_not_normed": lambda patch, model: [
            patch.setattr(layer.norm, "forward", lambda x: x)
            for layer in layers(model, segformer.Attention)
            if layer.reduction > 1
        ],
        "stage_not_normed": lambda patch, model: patch.setattr(model.backbone.stages[1].norm, "forward", lambda x: x),
        "mlp_without_depthwise": lambda patch, model: [
            patch.setattr(layer.depthwise, "forward", lambda x: x) for layer in layers(model, segformer.MLP)
        ],
    },
    "ocrnet_x": {
        "first_stage_detached": detached,
        "softmax_over_classes": regions_over_classes,
        "not_scaled": attributes(ocrnet.RegionContext, scale=1.0),
        "first_weight": lambda patch, model: patch.setattr(model, "weights", {"first_ce": 1.0}),
        "reversed_cat": reversed_cat(1),
        "once_resized": once_resized,
        "to_corners": to_corners,
        "a_path_missing": silent("backbone.stages.2.0.fuse.0.3"),
    },
    "upernet_swin_x": {
        **UPER,
        "swapped_index": swapped_index,
        "merged_by_position": merged_by_position,
        "never_shifted": attributes(swin.Block, shifted=False),
        "always_shifted": attributes(swin.Block, shifted=True),
        "not_masked": lambda patch, model: patch.setattr(swin, "MASKED", 0.0),
        "shifted_by_2": lambda patch, model: patch.setattr(swin, "SHIFT", 2),
        "padding_without_bias": padded_before_the_norm,
        "output_not_normed": lambda patch, model: patch.setattr(model.backbone.norms[1], "forward", lambda x: x),
    },
    "upernet_vit_adapter_x": {
        **UPER,
        "sampled_to_corners": sampled(align_corners=True),
        "sampled_at_the_border": sampled(padding_mode="border"),
        "swapped_places": swapped_places,
        "class_token_used": class_token_used,
        "bilinear_positions": bilinear_positions,
        "no_level_embedding": lambda patch, model: patch.setattr(
            model.backbone.levels, "data", torch.zeros_like(model.backbone.levels)
        ),
        "no_second_extractor": lambda patch, model: wrap(
            patch, model.backbone.interactions[3].extractors[1], "forward", lambda f: lambda branch, *rest: branch
        ),
        "injector_silent": lambda patch, model: patch.setattr(
            model.backbone.interactions[1].injector.scale, "data", torch.zeros(16)
        ),
        "finest_without_up": silent("backbone.up"),
    },
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name in DETAILS for wrong in DETAILS[name]])
def test_a_wrong_detail_shows(
    name: str, wrong: str, known: Callable[[str], Segmenter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = known(name)
    DETAILS[name][wrong](monkeypatch, model)
    assert differs(name, figures(model))


@pytest.fixture(scope="module")
def known() -> Callable[[str], Segmenter]:
    return functools.cache(lambda name: filled(name, "linear"))
