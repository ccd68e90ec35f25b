"""Deploy forms: folding is exact, exports give what PyTorch gives, and what does not is not written."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from click.testing import Result
from converting import convert
from networks import BUILT, TINY, tiny_networks
from torch import Tensor, nn
from torch.nn import functional as F

from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.weights import export
from ssaseg.cli.weights.export import DIFFERING, TOLERANCE, Difference, difference
from ssaseg.datasets import DataError
from ssaseg.datasets.exporting import export_scenes
from ssaseg.models import Segmenter, build_model, list_models, load_model, save_model
from ssaseg.models import deploy as deploy_module
from ssaseg.models.checkpoint import write_tensors
from ssaseg.models.classifiers import losses
from ssaseg.models.classifiers.adaptation import semantic_means
from ssaseg.models.deploy import Deployed, Normalize, PoolByProducts, fold, pool_by_products, smallest, trace
from ssaseg.models.layers import ConvNorm
from ssaseg.models.networks import seaformer, segnext

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each family one with every part and next to no blocks.
SMALLEST = (
    "afformer_x", "cgrseg_x", "seaformer_x", "segnext_x",
    "fcn_x", "lite0_x", "ocrnet_x", "segformer_x", "segformer_nvidia_x", "upernet_swin_x", "upernet_vit_adapter_x",
)  # fmt: skip
# Besides SeaFormer, the tests trace the quickest of the general networks.
SLOW_TO_TRACE = (
    "afformer_x", "cgrseg_x", "fcn_x", "lite0_x", "segformer_nvidia_x", "segformer_x", "segnext_x", "upernet_swin_x",
    "upernet_vit_adapter_x",
)  # fmt: skip
CLASSES = 5


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


def network(name: str, classifier: str = "ssa", seed: int = 1) -> Segmenter:
    """A network whose every norm does something: its weights and statistics are those of no fresh one.

    Large weights liven up a small network's labels; a deep network they make amplify rounding.
    """
    low, high = (1.5, 3.0) if name in TINY and name != "lite0_x" else (0.5, 1.0)
    torch.manual_seed(seed)
    model = build_model(name, CLASSES, classifier)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, low, high)
            nn.init.uniform_(layer.bias, -0.2, 0.4)
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.normal_(model.classifier.conv_seg.weight, std=0.05)
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run_onnx(path: Path, taken: Tensor) -> Tensor:
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": taken.numpy()})[0])


def run_pt2(path: Path, taken: Tensor) -> Tensor:
    return torch.export.load(path).module()(taken)


RUN: dict[str, Callable[[Path, Tensor], Tensor]] = {".onnx": run_onnx, ".pt2": run_pt2}


# ---- folding -----------------------------------------------------------------------------------------------------


def test_every_family_is_there() -> None:
    families, small = (
        {name.rpartition("_")[0] or name for name in names} for names in (list_models(), [*TINY, *BUILT])
    )
    assert {name.rpartition("_")[0] or name for name in SMALLEST} == small == families


@pytest.mark.parametrize("classifier", ["linear", "ssa"])
@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_folded_network_gives_the_same_logits(name: str, classifier: str) -> None:
    model = network(name, classifier)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold(model.train())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    assert not folded.training
    assert not any(isinstance(layer, ConvNorm) for layer in folded.modules())
    assert not any(key.startswith("classifier.teacher.") for key in folded.state_dict())
    for size in ((64, 96), (75, 101)):
        pixels = images(2, *size)
        expected = model(pixels)
        assert expected.std() > 1e-3
        torch.testing.assert_close(folded(pixels), expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_folding_is_exact_but_for_rounding(name: str) -> None:
    """In double precision nothing is left of the difference; the norms' part in the result is not small."""
    model = network(name, "linear").backbone.double()
    whole = network(name, "linear")
    folded = fold(whole.double()).backbone
    found, expected = (each(images(1, 64, 64).double()) for each in (folded, model))
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_fold_keeps_norms_that_follow_no_convolution() -> None:
    """MSCAN's are read by an attention and by the shortcut around it."""
    folded = fold(network("segnext_t"))
    kept = [key for key, layer in folded.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(kept) == 2 * sum(segnext.VARIANTS["segnext_t"].depths)
    assert all(key.endswith(("attention_norm", "mlp_norm")) for key in kept)


@pytest.mark.parametrize("size", [(1, 1), 6, (4, 7), (5, 11)])
def test_pooling_by_products(size: Any) -> None:
    maps = images(2, 11, 17)
    expected = F.adaptive_avg_pool2d(maps, size)
    with PoolByProducts():
        torch.testing.assert_close(F.adaptive_avg_pool2d(maps, size), expected)
        assert not torch.equal(F.adaptive_avg_pool2d(maps, (3, 5)), pool_by_products(maps, (5, 3)))


def test_outputs_and_inputs() -> None:
    model = network("seaformer_x")
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    mean, std = [120.0, 110.0, 100.0], [60.0, 55.0, 50.0]
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        logits = model(normal)
        full = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)
        prepare = Normalize(mean, std)
        assert torch.equal(Deployed(model, "logits", prepare)(pixels), logits)
        assert torch.equal(Deployed(model, "logits-full", prepare)(pixels), full)
        labels = Deployed(model, "labels")(normal)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), full.argmax(1))
    assert len(labels.unique()) > 1
    with pytest.raises(ValueError, match="known: logits, logits-full, labels"):
        Deployed(model, "probabilities")
    with pytest.raises(ValueError, match="at most 256 classes"):
        Deployed(build_model("seaformer_x", 257), "labels")


# ---- exports -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    path = tmp_path_factory.mktemp("deploy") / "model.safetensors"
    classes = ["sky", "road", "tree", "car", "wall"]
    save_model(path, network("seaformer_x"), {"classes": classes, "palette": [[k, k, k] for k in range(5)]})
    return path


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    """A checkpoint for what depends on no network."""
    path = tmp_path_factory.mktemp("light") / "model.safetensors"
    save_model(path, network("seaformer_y", "linear"), {})
    return path


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.slow)])
def test_export_of_any_size(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    """Labels from bytes: every part of `Deployed`, at sizes and batches that no case of the verification has."""
    export_scenes(tmp_path / "scenes", 2, split="val", height=80, width=100)
    path = tmp_path / f"made{suffix}"
    result = convert(
        checkpoint, path, "--output", "labels", "--input", "rgb", "--verify", tmp_path / "scenes" / "images"
    )
    assert result.exit_code == 0, result.output
    for line in (
        "any size",
        "random 2x3x96x160",
        "scene val_00001 1x3x192x256",
        "val_00001.png 1x3x80x100",
        "any batch",
    ):
        assert line in result.output
    model, metadata = load_model(checkpoint)
    plain = Deployed(model, "labels", Normalize(metadata["mean"], metadata["std"])).eval()
    for batch, height, width in ((1, 70, 200), (4, 128, 128)):
        pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        got = RUN[suffix](path, pixels)
        assert (got.dtype, got.shape) == (torch.uint8, (batch, height, width))
        assert difference(plain, pixels, got).passes
    with pytest.raises(CommandError, match="--output logits"):
        open_file(path)
    content = path.read_bytes()
    assert str(Path(deploy_module.__file__).parent).encode() not in content
    header = read_header(path)
    assert header["classes"] == ["sky", "road", "tree", "car", "wall"]
    assert (header["format"], header["input"], header["output"]) == ("ssaseg-deploy-1", "rgb", "labels")
    assert (header["model"], header["classifier"], header["size"]) == ("seaformer_x", "ssa", None)
    assert (header["mean"], header["std"], header["protocol"]) == (
        metadata["mean"], metadata["std"], metadata["protocol"],
    )  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """What an export says of itself, read as a user would."""
    if path.suffix == ".pt2":
        extra = {"ssaseg.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["ssaseg.json"])
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [each.name for each in session.get_outputs()] == ["labels"]
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


@pytest.mark.parametrize(
    ("suffix", "output"), [pytest.param(".onnx", "logits", marks=pytest.mark.slow), (".pt2", "logits-full")]
)
def test_export_of_one_size(checkpoint: Path, tmp_path: Path, suffix: str, output: str) -> None:
    """The batch stays free; folder and all are made."""
    path = tmp_path / "new" / f"made{suffix}"
    result = convert(checkpoint, path, "--size", 64, 96, "--output", output)
    assert result.exit_code == 0, result.output
    assert "random 3x3x64x96" in result.output
    pixels = images(5, 64, 96)
    with torch.no_grad():
        expected = Deployed(load_model(checkpoint)[0], output)(pixels)
    torch.testing.assert_close(RUN[suffix](path, pixels), expected, rtol=0, atol=TOLERANCE * 15)
    if suffix == ".pt2":
        with pytest.raises((AssertionError, RuntimeError)):
            run_pt2(path, images(1, 96, 96))
    engine = make_engine(open_file(path), torch.device("cpu"))
    torch.testing.assert_close(engine.logits(pixels).final, expected, rtol=0, atol=TOLERANCE * 15)
    with pytest.raises(DataError, match="only 64 x 96 pixels"):
        engine.logits(images(1, 96, 96))


def skip_if_slow(name: str) -> None:
    if name in SLOW_TO_TRACE and not os.environ.get("SSASEG_PARITY"):
        pytest.skip("takes half a minute: `make parity`")


@pytest.mark.parametrize(("name", "classifier"), [("afformer_x", "ssa"), ("cgrseg_x", "linear"), ("segnext_x", "ssa")])
def test_every_family_exports_for_any_size(name: str, classifier: str, tmp_path: Path) -> None:
    """At 192 and 512 pixels some resizings meet the size that is there, as they do not in the example."""
    skip_if_slow(name)
    model = network(name, classifier)
    save_model(tmp_path / "model.safetensors", model, {})
    result = convert(tmp_path / "model.safetensors", tmp_path / "made.pt2")
    assert result.exit_code == 0, result.output
    run = torch.export.load(tmp_path / "made.pt2").module()
    engine = make_engine(open_file(tmp_path / "made.pt2"), torch.device("cpu"))
    for pixels in (images(1, 192, 192), images(1, 512, 512), images(3, 99, 130)):
        with torch.no_grad():
            expected = model(pixels)
        for found in (run(pixels), engine.logits(pixels).final):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", [*BUILT, "segformer_x"])
def test_graph_of_any_size_of_general_networks(name: str) -> None:
    """With sides that are no multiples of windows and strides, with some that are, and with one window alone."""
    skip_if_slow(name)
    model = fold(network(name, "linear"))
    program = trace(Deployed(model), torch.zeros(2, 3, *export.EXAMPLE))
    assert max(smallest(program)) <= 64
    run = program.module()
    for pixels in (images(1, 192, 448), images(3, 99, 130), images(1, 64, 64)):
        with torch.no_grad():
            expected = model(pixels)
        torch.testing.assert_close(
            run(pixels), expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item())
        )


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["cac", "protoseg", "gmmseg", "dnc"])
def test_rival_classifiers_export_to_onnx(classifier: str, tmp_path: Path) -> None:
    """The command compares the results."""
    torch.manual_seed(0)
    options = {"memory": 20} if classifier == "gmmseg" else {}
    model = build_model("seaformer_y", CLASSES, classifier, options=options).eval()
    if classifier == "gmmseg":
        model.classifier.stds.fill_(0.2)  # of new ones the densities differ too little
    save_model(tmp_path / "model.safetensors", model, {})
    result = convert(tmp_path / "model.safetensors", tmp_path / "made.onnx")
    assert result.exit_code == 0, result.output
    pixels = images(2, 96, 128)
    with torch.no_grad():
        expected = model(pixels)
    found = run_onnx(tmp_path / "made.onnx", pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


class Pieces(nn.Module):
    """What is hard to export, in one graph, as a graph's time is mostly the exporter's start; each (N,3,·).

    Two poolings: to a grid that depends on the image, as CGRSeg's, and to a fixed one, as AFFormer's; pixels divided by
    their norms, and the means of classes.
    """

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        grid = F.adaptive_avg_pool2d(images, ((height + 1) // 2, (width + 1) // 2))
        pieces = [grid, F.adaptive_avg_pool2d(images, 3), losses.pixel_directions(images).mT]
        pieces += [semantic_means(images, 300 * images.flatten(2))]
        return torch.cat([each.flatten(2) for each in pieces], dim=2)


@torch.no_grad()
def test_pieces_are_the_same_in_onnx_at_any_size(tmp_path: Path) -> None:
    """Also a pixel of norm 0, and a class whose softmax is 0 everywhere, which give 0 and not NaN."""
    with PoolByProducts():
        program = trace(Pieces(), images(2, 12, 10))  # type: ignore[arg-type]
    (tmp_path / "made.onnx").write_bytes(export.onnx_bytes(program, {"output": "pieces"}))
    zeros = images(2, 12, 10)
    zeros[0, :, 3, 4] = 0
    zeros[1, 0] = -10
    assert (semantic_means(zeros, 300 * zeros.flatten(2))[1, 0] == 0).all()
    for pixels in (images(1, 7, 9), images(2, 12, 5), images(3, 31, 64), zeros):
        found = run_onnx(tmp_path / "made.onnx", pixels)
        assert found.isfinite().all()
        torch.testing.assert_close(found, Pieces()(pixels))


# ---- what is not written -----------------------------------------------------------------------------------------


def assert_refused(result: Result, folder: Path, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) <= 3
    for part in parts:
        assert part in result.stderr
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_wrong_graph_is_not_written(light: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(model: Segmenter) -> Segmenter:
        folded = fold(model)
        with torch.no_grad():
            folded.classifier.conv_seg.weight.copy_(folded.classifier.conv_seg.weight.flip(0))
        return folded

    monkeypatch.setattr(export, "fold", damaged)
    result = convert(light, tmp_path / "made.pt2", "--size", 64, 64, "--output", output)
    assert_refused(result, tmp_path, 3, "made.pt2: not written", "random 1x3x64x64", "allowed")
    assert "largest difference" in result.stdout


def test_graph_that_does_not_run_is_not_written(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(content: bytes) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            raise AssertionError("Guard failed\nmore")

        return run

    monkeypatch.setattr(export, "pt2_runner", fails)
    result = convert(light, tmp_path / "made.pt2", "--size", 64, 64)
    assert_refused(result, tmp_path, 3, "does not run on random 1x3x64x64", "Guard failed")


@pytest.mark.parametrize(
    ("axis", "told"),
    [
        (0, ("PyTorch cannot trace its graph", "--size H W")),
        pytest.param(2, ("PyTorch computes another result", "random 1x3x65x65"), marks=pytest.mark.slow),
    ],
)
def test_network_bound_to_its_example(
    checkpoint: Path, tmp_path: Path, axis: int, told: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks for a number where there is only a symbol; PyTorch does not notice that each time."""
    forward = seaformer.LightHead.forward
    monkeypatch.setattr(
        seaformer.LightHead, "forward", lambda self, maps: forward(self, maps) * int(maps[0].shape[axis])
    )
    assert_refused(convert(checkpoint, tmp_path / "made.pt2"), tmp_path, 3, *told)


def test_differences_that_fail() -> None:
    assert Difference(1e-5, TOLERANCE).passes
    assert not Difference(2e-4, TOLERANCE).passes
    assert not Difference(float("nan"), TOLERANCE).passes
    assert Difference(0.0, TOLERANCE, DIFFERING).passes
    assert not Difference(0.0, TOLERANCE, 2 * DIFFERING).passes


@torch.no_grad()
def test_compare_sees_every_kind_of_wrong_result() -> None:
    plain = Deployed(network("seaformer_x"), "labels").eval()
    pixels = images(1, 64, 64)
    labels = plain(pixels)
    assert difference(plain, pixels, labels) == Difference(0.0, difference(plain, pixels, labels).allowed, 0.0)
    wrong = labels.clone()
    wrong[0, 5, 5] = (wrong[0, 5, 5] + 1) % CLASSES
    assert not difference(plain, pixels, wrong).passes
    for bad in (labels[:, :-1], torch.full_like(labels, CLASSES), plain.model(pixels) * float("nan")):
        assert not difference(plain, pixels, bad).passes
    logits = Deployed(plain.model)
    assert difference(logits, pixels, logits(pixels)).largest == 0
    assert not difference(logits, pixels, logits(pixels) + 0.1).passes


def test_bad_input(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made.onnx"
    backbone = checkpoint.with_name("backbone.safetensors")
    write_tensors(backbone, {"backbone.x": torch.zeros(1)}, {"format": "ssaseg-backbone-1", "model": "seaformer_t"})
    assert_refused(convert(backbone, made), tmp_path, 2, "ssaseg-backbone-1", "model.pretrained")
    assert_refused(convert(checkpoint, made, "--output", "probabilities"), tmp_path, 2, "'logits-full'")
    assert_refused(convert(checkpoint, made, "--size", 16, 64), tmp_path, 2, "--size")
    assert_refused(convert(checkpoint, made, "--verify", tmp_path / "no"), tmp_path, 2, "--verify", "no image found")
    refused = convert(checkpoint, tmp_path / "made.pth", "--output", "labels")
    assert_refused(refused, tmp_path, 2, "--output", ".onnx and .pt2")
    for words in (("--model", "segnext_t"), ("--classifier", "linear"), ("--dataset", "ade20k"), ("--allow-partial",)):
        assert_refused(convert(checkpoint, made, *words), tmp_path, 2, words[0], "leave")
    broken = checkpoint.with_name("broken.safetensors")
    model, metadata = load_model(checkpoint)
    model.classifier.conv_seg.weight.data[1, 2] = float("nan")
    save_model(broken, model, metadata)
    assert_refused(convert(broken, made), tmp_path, 2, "broken.safetensors: classifier.conv_seg.weight has 1 of")
    (checkpoint.parent / "file").touch()
    assert_refused(convert(checkpoint, checkpoint.parent / "file" / "made.onnx"), tmp_path, 2, "file")
    monkeypatch.setattr(export.os, "access", lambda path, mode: mode == export.os.R_OK)
    assert_refused(convert(checkpoint, made), tmp_path, 2, "made.onnx: its folder cannot be written")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert_refused(convert(checkpoint, made), tmp_path, 2, "needs onnxscript", "pip install onnxscript")
