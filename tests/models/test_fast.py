"""The fast path gives the results of the network, and does not change it. benchmarks/networks.py measures its speed."""

from collections.abc import Iterator

import pytest
import torch
from networks import tiny_networks
from torch import Tensor, nn

import ssaseg.models.build as networks
from ssaseg.models import Segmenter, build_model, fast
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.fast import Accelerated, accelerate, has_compiler
from ssaseg.models.layers import ConvNorm

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each family the smallest; of those whose smallest takes seconds, one of its parts with next to no blocks.
SMALLEST = (
    "afformer_t", "cgrseg_t", "lite0_x", "seaformer_t", "segnext_t",
    "fcn_x", "ocrnet_x", "segformer_x", "segformer_nvidia_x", "upernet_swin_x", "upernet_vit_adapter_x",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


@torch.no_grad()
def network(name: str, classifier: str = "ssa") -> Segmenter:
    """A network whose norms do something: they weigh at random and know two images, as those of a trained one.

    Statistics that fit nothing would let activations grow until rounding decides. `tests/weights/test_export.py` has
    folding in double precision, without rounding.
    """
    torch.manual_seed(1)
    model = build_model(name, 5, classifier).eval()
    for key, norm in model.named_modules():
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        # The last norm of a residual branch weighs less: sums of many blocks would let rounding grow with the depth.
        share = 0.2 if key.endswith((".expand.norm", ".second.norm")) else 1.0
        nn.init.uniform_(norm.weight, 0.5 * share, 1.5 * share)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.train().momentum = 1.0
    model(images(128, 128, batch=2))
    nn.init.normal_(model.classifier.conv_seg.weight, std=0.05)
    return model.eval()


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """`tolerance` is a share of the largest logit; the logits are no constant."""
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def test_every_family_is_there() -> None:
    families = {name.rpartition("_")[0] or name for name in networks.list_models()}
    assert {name.rpartition("_")[0] or name for name in SMALLEST} == families


@pytest.mark.parametrize("classifier", ["linear", "ssa"])
@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_float32_gives_the_same_logits(name: str, classifier: str) -> None:
    model = network(name, classifier)
    quick = accelerate(model, torch.float32, compiled=False)
    for pixels in (images(64, 96, batch=2), images(75, 101)):
        assert_close(quick(pixels), model(pixels), 1e-5 if name.endswith("_t") else 3e-5)


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_bfloat16_gives_nearly_the_same(name: str) -> None:
    model = network(name)
    quick = accelerate(model, torch.bfloat16, compiled=False)
    pixels = images(96, 128)
    found, expected = quick(pixels), model(pixels)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not torch.equal(found, expected)  # it did compute in bfloat16
    assert_close(found, expected, 0.2)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9


def test_the_model_stays_as_it_is() -> None:
    model = network("seaformer_t").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = accelerate(model, torch.bfloat16, compiled=False)
    logits = quick(images(64, 64))
    assert model.training
    assert all(value.dtype == before[key].dtype for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not logits.requires_grad
    held = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not held & {tensor.data_ptr() for tensor in quick.state_dict().values() if tensor.numel()}


@torch.no_grad()
def test_images_of_any_layout() -> None:
    model = network("seaformer_t")
    pixels = images(64, 96, batch=2)
    for dtype in (torch.float32, torch.bfloat16):
        quick = accelerate(model, dtype, compiled=False)
        assert torch.equal(quick(pixels), quick(pixels.to(memory_format=torch.channels_last)))


@torch.no_grad()
def test_it_stays_in_evaluation() -> None:
    """As part of a larger module, `train()` reaches it."""
    quick = accelerate(network("cgrseg_t"), torch.float32, compiled=False)
    expected = quick(images(64, 64))
    assert not any(module.training for module in quick.train().modules())
    assert torch.equal(quick(images(64, 64)), expected)


def test_only_of_a_network_of_ours() -> None:
    quick = accelerate(network("seaformer_t"), torch.float32, compiled=False)
    with pytest.raises(TypeError, match="got Accelerated"):
        accelerate(quick)  # type: ignore[arg-type]


def test_what_the_machine_has_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bfloat16 and a compiler there is still a fast path."""
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(fast, "has_bfloat16", lambda device, has=has: has)
        monkeypatch.setattr(fast, "has_compiler", lambda device: False)
        quick = accelerate(network("seaformer_t"))
        assert isinstance(quick, Accelerated)
        assert quick.dtype == dtype
        assert isinstance(quick.network, Segmenter)  # and not a compiled one


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    monkeypatch.delenv("CXX", raising=False)
    assert has_compiler(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler(CPU)


@pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler for torch.compile")
@torch.no_grad()
def test_compiled() -> None:
    """Two layers: a compiler takes its time with a whole network."""
    head = LinearClassifier(8, 5)
    model = Segmenter(ConvNorm(3, 8, 3, stride=8), nn.ReLU(), head).eval()
    quick = accelerate(model, torch.float32, compiled=True)
    assert isinstance(quick, Accelerated)
    assert not isinstance(quick.network, Segmenter)
    for pixels in (images(64, 64), images(96, 64, batch=2), images(64, 64)):
        assert_close(quick(pixels), model(pixels), 1e-5)
