"""The losses: against plain formulations written out here, and what they promise about memory, waiting and groups."""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssaseg.models import CLASSIFIERS, LossOptions
from ssaseg.models.classifiers import losses, upsampled
from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.classifiers.ssa import SSAClassifier
from ssaseg.models.classifiers.upsampled import Branch, full_resolution_terms

LOSSES = SSAClassifier.LOSSES


def build(
    name: str = "ssa", channels: int = 12, classes: int = 7, group: int = 4, weights: dict[str, float] | None = None
) -> Classifier:
    """A classifier in training mode, without dropout: what it computes is a function of its input."""
    torch.manual_seed(0)
    classifier = CLASSIFIERS[name](channels, classes, 0.0, LossOptions(weights=weights or {}), group)
    # Larger than its initialisation, so that softmaxes are not flat.
    torch.nn.init.normal_(classifier.conv_seg.weight, 0.0, 0.5)
    return classifier


def batch(
    images: int = 4, channels: int = 12, classes: int = 7, size: int = 128, small: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A feature (N,C,small,small) that takes a gradient and blocky labels (N,size,size), a tenth of them ignored."""
    seeded = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images, 8, 8), generator=seeded).repeat_interleave(-(-size // 8), 1)
    labels = labels.repeat_interleave(-(-size // 8), 2)[:, :size, :size].clone()
    labels[torch.rand(labels.shape, generator=seeded) < 0.1] = losses.IGNORE
    feature = torch.randn(images, channels, small, small, generator=seeded).relu()
    return feature.requires_grad_(), labels


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


# ---- boundary ----------------------------------------------------------------------------------------------------


def opencv_boundary(label: np.ndarray) -> np.ndarray:
    """As the official code makes it, by OpenCV, one map at a time."""
    edges = cv2.Canny(label, 0.1, 0.2)
    framed = np.zeros_like(edges)
    framed[6:-6, 6:-6] = edges[6:-6, 6:-6]
    return cv2.dilate(framed, np.ones((3, 3), np.uint8)) > 0


def label_maps(count: int) -> Iterator[np.ndarray]:
    """Half noise, half blocks, sides 13 to 160, up to 171 classes, a third with ignored pixels; some of one value."""
    rng = np.random.default_rng(0)
    for index in range(count):
        height, width = rng.integers(13, 161, 2)
        classes = rng.integers(1, 172)
        side = 1 if index % 2 else rng.integers(2, 20)
        label = rng.integers(0, classes, (height // side + 1, width // side + 1)).repeat(side, 0).repeat(side, 1)
        label = label[:height, :width].astype(np.uint8)
        if index % 3 == 0:
            label[rng.random(label.shape) < 0.1] = losses.IGNORE
        if index % 50 == 0:
            label[:] = (classes - 1, losses.IGNORE)[index // 50 % 2]
        yield np.ascontiguousarray(label)


def test_boundary_is_opencvs() -> None:
    shapes, edges = set(), 0
    for index, label in enumerate(label_maps(1000)):
        expected = opencv_boundary(label)
        found = losses.boundary_map(torch.from_numpy(label)[None])[0].numpy()
        assert (found == expected).all(), f"map {index} of size {label.shape}: {(found != expected).sum()} pixels"
        shapes.add(label.shape)
        edges += int(expected.any())
    assert len(shapes) > 900
    assert edges > 900


def test_boundary_of_a_batch_and_of_labels_of_any_integer_type() -> None:
    maps = np.stack([label[:13, :13] for label in label_maps(50) if min(label.shape) >= 13])
    expected = np.stack([opencv_boundary(np.ascontiguousarray(label)) for label in maps])
    assert expected.any()
    for kind in (torch.uint8, torch.int64):
        assert (losses.boundary_map(torch.from_numpy(maps).to(kind)).numpy() == expected).all()


@pytest.mark.parametrize("size", [(12, 160), (160, 12), (12, 12), (1, 1), (3, 40)])
def test_small_maps_have_no_boundary(size: tuple[int, int]) -> None:
    labels = torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(0))
    assert losses.boundary_map(labels).shape == (2, *size)
    assert not losses.boundary_map(labels).any()


# ---- full-resolution terms ---------------------------------------------------------------------------------------


def plain_terms(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and dice per image, on all upsampled logits together; loops over images and classes."""
    large = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    entropy = F.cross_entropy(large, labels, ignore_index=losses.IGNORE, reduction="none").sum(dim=(1, 2))
    dices = []
    for image, label in zip(large, labels, strict=True):
        dice = torch.zeros((), dtype=logits.dtype)
        for k in label.unique().tolist():
            if k != losses.IGNORE:
                p, t = image[k].sigmoid(), (label == k).to(logits.dtype)
                dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        dices.append(dice)
    return entropy, torch.stack(dices)


@pytest.mark.parametrize("band", [1, 7 * 61 * 5, 1 << 30])  # elements: one row, five rows, or all together
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(53, 61), (16, 16), (9, 11)])  # odd; as large as the logits; smaller
def test_full_resolution_terms(
    monkeypatch: pytest.MonkeyPatch, band: int, align_corners: bool, size: tuple[int, int]
) -> None:
    """Equal to the plain formulation, in values and gradients, to 1e-5; absent classes and an all-ignored image too."""
    monkeypatch.setattr(upsampled, "BAND_ELEMENTS", band)
    monkeypatch.setattr(upsampled, "BAND_ROWS", band)
    seeded = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(3, 7, 16, 16, generator=seeded)).requires_grad_()
    labels = torch.randint(0, 5, (3, *size), generator=seeded)
    labels[torch.rand(labels.shape, generator=seeded) < 0.3] = losses.IGNORE
    labels[2] = losses.IGNORE
    terms = full_resolution_terms([Branch(logits, align_corners, dice=True)], labels)[0]
    double = logits.detach().double().requires_grad_()
    entropy, dices = plain_terms(double, labels, align_corners)
    assert relative(terms.cross_entropy.double(), entropy) < 1e-5
    assert relative(terms.dice.double(), dices) < 1e-5
    assert terms.valid.tolist() == (labels != losses.IGNORE).sum(dim=(1, 2)).tolist()
    assert terms.pairs.tolist() == [5, 5, 0]
    # Each term's gradient apart, weighed differently per image.
    weights = torch.tensor([1.0, 2.0, 3.0])
    for found, expected in ((terms.cross_entropy, entropy), (terms.dice, dices)):
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits, retain_graph=True)
        (reference,) = torch.autograd.grad((expected * weights.double()).sum(), double, retain_graph=True)
        assert relative(gradient.double(), reference) < 1e-5


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("scale", [40.0, 400.0])
def test_extreme_logits(scale: float, align_corners: bool) -> None:
    """Neighbours whose classes exclude each other by more than float32's exponents: nothing becomes 0/0 or infinite."""
    seeded = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(2, 5, 8, 8, generator=seeded)).requires_grad_()
    labels = torch.randint(0, 5, (2, 61, 53), generator=seeded)
    (terms,) = full_resolution_terms([Branch(logits, align_corners)], labels)
    double = logits.detach().double().requires_grad_()
    large = F.interpolate(double, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(large, labels, reduction="none").sum(dim=(1, 2))
    assert relative(terms.cross_entropy, expected) < 1e-6
    (gradient,) = torch.autograd.grad(terms.cross_entropy.sum(), logits)
    (reference,) = torch.autograd.grad(expected.sum(), double)
    assert relative(gradient, reference) < 1e-5


def test_full_resolution_terms_without_dice() -> None:
    feature, labels = batch(classes=12)
    terms = full_resolution_terms([Branch(feature, align_corners=True)], labels)[0]
    assert not terms.dice.any()
    (gradient,) = torch.autograd.grad(terms.cross_entropy.sum(), feature)
    (reference,) = torch.autograd.grad(plain_terms(feature, labels, True)[0].sum(), feature)
    assert relative(gradient, reference) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a tensor made by any operation had, views and integers counted too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.elements:
                self.elements, self.operation = leaf.numel(), str(func)
        return result


@pytest.mark.parametrize("name", ["ssa", "linear"])
@pytest.mark.parametrize("band", [upsampled.BAND_ELEMENTS, 1 << 30])
def test_no_tensor_is_larger_than_one_image(monkeypatch: pytest.MonkeyPatch, name: str, band: int) -> None:
    """Forward and backward of the training step; on a GPU there is one band, hence the second size."""
    monkeypatch.setattr(upsampled, "BAND_ELEMENTS", band)
    monkeypatch.setattr(upsampled, "BAND_ROWS", band)
    classes, size = 21, 128
    classifier = build(name, channels=16, classes=classes)
    feature, labels = batch(channels=16, classes=classes, size=size)
    with LargestTensor() as largest:
        sum(classifier.training_step(feature, labels).losses.values()).backward()
    assert feature.grad is not None
    assert 0 < largest.elements <= classes * size * size, largest.operation
    with LargestTensor() as largest:
        sum(sum(terms) for terms in plain_terms(classifier(feature), labels, True)).sum().backward()
    assert largest.elements > classes * size * size


# ---- no wait for the device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_losses_run_on_fake_tensors(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a GPU nothing reads a value: no `.item()`, no copy, no shape that data decides. Fails for `.unique()`."""
    monkeypatch.setattr(upsampled, "_can_look", lambda tensor: False)  # as on a GPU
    with FakeTensorMode():
        classifier = CLASSIFIERS[name](12, 7)
        feature = torch.randn(4, 12, 16, 16, requires_grad=True)
        labels = torch.randint(0, 7, (4, 128, 128))
        totals = classifier.step_totals(labels) if classifier.needs_totals else None
        step = classifier.training_step(feature, labels, totals)
        sum(step.losses.values()).backward()
        assert feature.grad is not None
        assert set(step.losses) == (set(LOSSES) if name == "ssa" else {"main_ce"})
        with pytest.raises(Exception, match=r"[Dd]ata.?dependent|DynamicOutputShape|unique"):
            labels.unique()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_losses_never_wait_for_the_gpu(name: str) -> None:
    classifier = build(name).cuda()
    feature, labels = batch()
    feature, labels = feature.detach().cuda().requires_grad_(), labels.cuda()
    sum(classifier.training_step(feature, labels).losses.values()).backward()  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(classifier.training_step(feature, labels).losses.values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert feature.grad is not None


# ---- groups, weights, precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssa", "linear"])
@pytest.mark.parametrize("labels", ["batch", "one image"])
def test_ignored_pixels_alone_give_finite_losses(name: str, labels: str) -> None:
    classifier = build(name)
    feature, target = batch()
    target[0 if labels == "one image" else slice(None)] = losses.IGNORE
    found = classifier.training_step(feature, target).losses
    sum(found.values()).backward()
    assert all(value.isfinite() for value in found.values())
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in classifier.parameters())
    if labels == "batch":
        assert all(found[term] == 0 for term in found if term not in ("semantic", "spatial"))


@pytest.mark.parametrize(("group", "images"), [(2, 4), (2, 2), (4, 4)])
def test_losses_do_not_depend_on_how_a_step_is_cut(group: int, images: int) -> None:
    """Micro-batches of `images` out of a step of 8: every term, and the gradient of every term, as of one batch."""
    classifier = build(group=group)
    feature, labels = batch(images=8)
    labels[5, :64] = losses.IGNORE  # unequal shares of ignored pixels and of classes
    labels[6] = 3
    whole = classifier.training_step(feature, labels).losses
    parts = list(zip(feature.split(images), labels.split(images), strict=True))
    # What the loop does: the pairs of the whole step as their mean over micro-batches.
    pairs = torch.stack([classifier.step_totals(part) for _, part in parts]).mean()
    steps = [classifier.training_step(part, label, pairs).losses for part, label in parts]
    tensors = [feature, *classifier.parameters()]
    for term, expected in whole.items():
        found = torch.stack([step[term] for step in steps]).mean()
        assert torch.allclose(found, expected, rtol=1e-5), term
        gradients = [
            torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True) for value in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            assert one is None or relative(one, other) < 1e-4 or (one - other).abs().max() < 1e-7, term


def test_groups_matter() -> None:
    """The test above can fail: class means over 4 images are others than over 2."""
    feature, labels = batch(images=4)
    two, four = (build(group=group).training_step(feature, labels).losses for group in (2, 4))
    assert abs(two["teacher_ce"] / four["teacher_ce"] - 1) > 1e-4


@pytest.mark.parametrize("term", LOSSES)
def test_a_weight_of_zero_switches_a_term_off(term: str) -> None:
    feature, labels = batch()
    everything = build().training_step(feature, labels).losses
    without = build(weights={term: 0.0}).training_step(feature, labels).losses
    assert list(everything) == list(LOSSES)
    assert set(everything) - set(without) == {term}
    rest = sum(everything.values()) - everything[term]
    assert torch.allclose(sum(without.values()), rest, rtol=1e-6)
    double = build(weights={term: 2 * LOSSES[term].weight}).training_step(feature, labels).losses
    assert torch.allclose(double[term], 2 * everything[term])


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_autocast_leaves_losses_in_float32(name: str) -> None:
    """As computed without autocast, from the same feature rounded to bfloat16."""
    classifier = build(name)
    feature, labels = batch()
    rounded = feature.detach().bfloat16()
    expected = classifier.training_step(rounded.float(), labels).losses
    with torch.autocast("cpu", torch.bfloat16):
        step = classifier.training_step(rounded, labels)
        logits = classifier(rounded)
    assert all(value.dtype == torch.float32 for value in step.losses.values())
    if name == "ssa":
        assert logits.dtype == torch.float32
        assert torch.equal(logits, classifier(rounded.float()))
    # The plain classifier's one convolution is the network's, and runs in bfloat16 as it does.
    tolerance = 1e-6 if name == "ssa" else 1e-2
    for term, value in expected.items():
        assert torch.allclose(step.losses[term], value, rtol=tolerance), term


# ---- the distillation terms, as the specification reads -------------------------------------------------------------


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-12)
    return rows @ (columns / (columns.norm(dim=1, keepdim=True) + 1e-12)).T


def plain_distillation(classifier: SSAClassifier, feature: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All terms of one group, float64, with loops over images and classes and OpenCV's edges; weighted as published."""
    classes = classifier.num_classes
    small = labels[:, :: labels.shape[1] // feature.shape[2], :: labels.shape[2] // feature.shape[3]]
    spatial_feature = classifier.spatial_conv(feature)
    coarse = classifier.conv_seg(feature)
    S, P = classifier.conv_seg.weight.flatten(1), classifier.spatial_prototypes
    finals, teachers, terms = [], [], {"semantic": [], "spatial": []}
    S_gt = torch.stack(
        [feature.movedim(1, 3)[small == k].mean(dim=0) if (small == k).any() else S[k].detach() for k in range(classes)]
    )
    for n in range(len(feature)):
        f, fp, m = feature[n].flatten(1), spatial_feature[n].flatten(1), coarse[n].flatten(1)  # (C,P), (C,P), (K,P)
        W, A = m.softmax(dim=0), m.softmax(dim=1)
        S_adapted = classifier.student.semantic(torch.cat([W @ f.T / (W.sum(dim=1, keepdim=True) + 1e-12), S], dim=1))
        P_adapted = classifier.student.spatial(torch.cat([P, A @ fp.T], dim=1))
        final = 15 * cosines(classifier.student.merge(S_adapted + P_adapted), (f + fp).T)
        own = small[n].flatten()
        P_gt = torch.stack([fp[:, own == k].mean(dim=1) if (own == k).any() else P[k].detach() for k in range(classes)])
        S_taught = classifier.teacher.semantic(torch.cat([S_gt, S], dim=1))
        P_taught = classifier.teacher.spatial(torch.cat([P_gt, P], dim=1))
        teachers.append(15 * cosines(classifier.teacher.merge(S_taught + P_taught), (f + fp).T))
        finals.append(final)
        R = [(15 * cosines(X, X.detach())).softmax(dim=1) for X in (S_adapted, S_taught.detach())]
        excess = [(R[0][i, j] - R[1][i, j]).clamp(min=0) for i in range(classes) for j in range(classes) if i != j]
        terms["semantic"].append(10 * torch.stack(excess).sum() / classes)
        soft = P_taught.detach().softmax(dim=1) * P_adapted.log_softmax(dim=1)
        terms["spatial"].append(-0.4 * soft.sum(dim=1).mean())
    found = {name: torch.stack(values).mean() for name, values in terms.items()}
    final, teacher = (torch.stack(maps).unflatten(2, small.shape[1:]) for maps in (finals, teachers))
    found["response"] = plain_response(final, teacher.detach(), small)
    branches = {"main": final, "coarse": coarse, "teacher": teacher}
    pairs = sum(len(set(label.unique().tolist()) - {losses.IGNORE}) for label in labels)
    for name, logits in branches.items():
        entropy, dices = plain_terms(logits, labels, align_corners=True)
        pixels = labels.numel() if name == "main" else int((labels != losses.IGNORE).sum())
        found[f"{name}_ce"] = entropy.sum() / pixels
        if name != "coarse":
            found[f"{name}_dice"] = dices.sum() / pairs
    return found


def plain_response(final: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Per present class, entropy-weighted means over its boundary and its interior; an empty side counts as 0."""
    valid = labels != losses.IGNORE
    one_hot = F.one_hot(torch.where(valid, labels, 0), final.shape[1]).movedim(3, 1)
    probability = teacher.softmax(dim=1)
    target = 0.5 * probability + 0.5 * one_hot
    loss = -(target * final.log_softmax(dim=1)).sum(dim=1)
    entropy = -(probability * (probability + 1e-12).log()).sum(dim=1) * valid
    edges = torch.from_numpy(
        np.stack([opencv_boundary(np.ascontiguousarray(m)) for m in labels.numpy().astype(np.uint8)])
    )
    per_class = []
    for k in set(labels.unique().tolist()) - {losses.IGNORE}:
        sides = [(labels == k) & edges, (labels == k) & ~edges]
        means = [(loss * entropy)[side].sum() / (entropy[side].sum() + 1e-12) for side in sides]
        per_class.append(sum(means) / 2)
    return torch.stack(per_class).mean()


def test_all_terms_against_the_specification_written_out() -> None:
    """Values to 1e-5, and the gradient of the sum with respect to the feature and every parameter."""
    classifier = build(classes=9).double()
    feature, labels = batch(classes=8, size=96, small=24)  # class 8 is absent, and others from some images
    labels[1][labels[1] == 2] = 3
    feature = feature.detach().double().requires_grad_()
    expected = plain_distillation(classifier, feature, labels)
    tensors = [feature, *classifier.parameters()]
    reference = torch.autograd.grad(sum(expected.values()), tensors, retain_graph=True)
    classifier.float()
    single = feature.detach().float().requires_grad_()
    found = classifier.training_step(single, labels).losses
    assert set(found) == set(expected)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-5), term
    gradients = torch.autograd.grad(sum(found.values()), [single, *classifier.parameters()])
    for one, other in zip(gradients, reference, strict=True):
        assert relative(one.double(), other) < 1e-4
