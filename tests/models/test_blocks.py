"""Blocks written out plainly, for what the official figures of `test_fidelity` cannot see, and at sizes without any."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssaseg.models.classifiers.ssa import SSAClassifier
from ssaseg.models.layers import Depthwise
from ssaseg.models.networks import segnext
from ssaseg.models.networks.efficientformer import HEADS, Attention
from ssaseg.models.networks.seaformer import SeaBlock


def stirred(module: nn.Module) -> nn.Module:
    """In evaluation mode, with parameters and statistics that leave no part silent."""
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                draw = torch.randn(value.shape, generator=seeded)
                spread = math.sqrt(1 / math.prod(value.shape[1:])) if value.dim() > 1 else 0.1
                shift = 1.0 if key.endswith(("norm.weight", "running_var")) else 0.0
                value.copy_((draw * spread + shift).clamp_min(0.2 if key.endswith("running_var") else -math.inf))
    return module.eval()


def plain_sea_block(block: SeaBlock, x: Tensor, bounded: Callable[[str, Tensor], Tensor]) -> Tensor:
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


def test_sea_block() -> None:
    """With inputs that pass ReLU6's bound at all five places: equal, and not when one of them is a ReLU.

    In the figures none of these ever sees more than 4.2, not even at amplitude 80.
    """
    block = stirred(SeaBlock(192, 16, 8, 2, 0.0))
    x = 60 * torch.randn(2, 192, 5, 7, generator=torch.Generator().manual_seed(0))
    largest: dict[str, float] = {}

    def relu6(place: str, x: Tensor) -> Tensor:
        largest[place] = x.max().item()
        return x.clamp(0, 6)

    with torch.no_grad():
        found, expected = block(x), plain_sea_block(block, x, relu6)
        tolerance = 1e-5 * expected.abs().max()
        assert (found - expected).abs().max() < tolerance
        assert set(largest) == {"detail", "row", "column", "project", "mlp"}
        assert min(largest.values()) > 6, largest
        for wrong in largest:
            other = plain_sea_block(block, x, lambda place, x, wrong=wrong: x.clamp(0, None if place == wrong else 6))
            assert (found - other).abs().max() > 10 * tolerance, wrong


def plain_factorisation(x: Tensor, bases: Tensor, updates: int, eps: float) -> Tensor:
    """Multiplicative updates with every sum over an index written out, for one image: x (C,P), bases (C,R)."""
    weights = torch.softmax(torch.einsum("cp,cr->pr", x, bases), dim=1)
    for update in range(updates + 1):
        overlap = torch.einsum("cr,cs->rs", bases, bases)
        weights = weights * torch.einsum("cp,cr->pr", x, bases) / (torch.einsum("ps,rs->pr", weights, overlap) + eps)
        if update < updates:
            overlap = torch.einsum("pr,ps->rs", weights, weights)
            bases = bases * torch.einsum("cp,pr->cr", x, weights) / (torch.einsum("cs,rs->cr", bases, overlap) + eps)
    return torch.einsum("cr,pr->cp", bases, weights)


def test_factorisation() -> None:
    """With values so small that its eps counts: equal, and not with another eps."""
    seeded = torch.Generator().manual_seed(0)
    x = 1e-3 * torch.rand(2, 12, 20, generator=seeded, dtype=torch.float64)
    bases = F.normalize(torch.rand(2, 12, 4, generator=seeded, dtype=torch.float64), dim=1)
    found = segnext.factorize(x, bases, 3)
    plain = [
        torch.stack([plain_factorisation(*pair, 3, eps) for pair in zip(x, bases, strict=True)]) for eps in (1e-6, 1e-7)
    ]
    assert torch.allclose(found, plain[0], rtol=1e-9, atol=0)
    assert not torch.allclose(found, plain[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("stride", "size"), [(2, (23, 30)), (2, (32, 32)), (1, (12, 15)), (1, (3, 1))])
def test_attention_at_any_size(stride: int, size: tuple[int, int]) -> None:
    """EfficientFormerV2's, query by query; at the odd sizes of the first case the official code fails."""
    attention = stirred(Attention(24, stride))
    x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = attention(x)
        coarse = attention.reduce(x)
        height, width = coarse.shape[-2:]
        assert (height, width) == (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        q, k, v = (layer(coarse).flatten(2) for layer in (attention.query, attention.key, attention.value))
        # The stored table by |Δy| and |Δx| of a 16×16 grid; its 256×256 matrix is resized as an image.
        table = attention.bias.table.view(HEADS, 16, 16)
        rows, columns = torch.arange(256) // 16, torch.arange(256) % 16
        matrix = table[:, (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()]
        bias = F.interpolate(matrix[None], size=(height * width,) * 2, mode="bicubic", align_corners=False)
        scores = torch.einsum("nhdq,nhdp->nhqp", q.unflatten(1, (HEADS, 32)), k.unflatten(1, (HEADS, 32))) / 32**0.5
        before, after = attention.talk_before, attention.talk_after
        scores = torch.einsum("gh,nhqp->ngqp", before.weight[..., 0, 0], scores + bias) + before.bias[:, None, None]
        weights = scores.softmax(dim=3)
        weights = torch.einsum("gh,nhqp->ngqp", after.weight[..., 0, 0], weights) + after.bias[:, None, None]
        mixed = torch.einsum("nhqp,nhdp->nhdq", weights, v.unflatten(1, (HEADS, 128)))
        out = mixed.reshape(2, -1, height, width) + attention.local(v.unflatten(2, (height, width)))
        out = F.interpolate(out, size=size, mode="bilinear", align_corners=False)
        expected = attention.project(F.gelu(out))
    assert found.shape == x.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class Storages(TorchDispatchMode):
    """Collects the addresses of storages that operations make with at least as many float32 values as `elements`."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.made = elements, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= 4 * self.elements:
            self.made.append(result)  # kept, so that no address is used twice
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ssa_without_gradients_makes_one_tensor_as_large_as_the_feature(layout: torch.memory_format) -> None:
    """And gives the same bits as with gradients; the feature, which other heads may read, keeps its values."""
    torch.manual_seed(0)
    classifier = SSAClassifier(64, 5).eval()
    feature = torch.randn(2, 64, 9, 11).contiguous(memory_format=layout)
    given, expected = feature.clone(), classifier(feature)
    with torch.no_grad(), Storages(feature.numel()) as large:
        found = classifier(feature)
    assert torch.equal(found, expected)
    assert torch.equal(feature, given)
    own = {each.untyped_storage().data_ptr() for each in large.made} - {feature.untyped_storage().data_ptr()}
    assert len(own) <= 2  # the adapted feature, and the squares or copies of a single operation


@pytest.mark.parametrize("length", [3, 7])
def test_strips_that_are_trained_on_a_cpu(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as columns: the same output and gradient of the input; that of the weight except for rounding."""
    torch.manual_seed(0)
    strip = Depthwise(16, (1, length))
    x = torch.randn(2, 16, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(2, 16, 6, 8)
    shapes: list[tuple[int, ...]] = []
    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *words, **more: shapes.append(words[1].shape) or convolve(*words, **more))

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        result = run(x)
        return [result, *torch.autograd.grad((result * weights).sum(), [x, strip.weight, strip.bias])]

    turned, plain = gradients(strip), gradients(lambda x: torch.nn.Conv2d.forward(strip, x))
    assert shapes == [(16, 1, length, 1), (16, 1, 1, length)]
    torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-5)
    assert turned[0].is_contiguous(memory_format=torch.channels_last)
    strip.eval()(x)
    with torch.no_grad():
        strip.train()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        strip(x)
    assert set(shapes[2:]) == {(16, 1, 1, length)}, "inference and bf16 stay as they were"
