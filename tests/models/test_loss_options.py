"""Class weights, label smoothing and hard examples: against plain PyTorch, and mmsegmentation's rule written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ssaseg.cli.errors import CommandError
from ssaseg.cli.training.build import build_network
from ssaseg.models import CLASSIFIERS, LossOptions, build_model, load_model, save_model
from ssaseg.models.classifiers import distillation, losses
from ssaseg.models.classifiers.base import Classifier
from ssaseg.models.classifiers.upsampled import Branch, Weighing, full_resolution_terms
from ssaseg.recipes import load_recipe

CLASSES = 7
WEIGHTS = (0.5, 2.0, 0.0, 1.0, 3.5, 0.25, 1.0)
OPTIONS = {
    "weights": LossOptions(class_weights=WEIGHTS),
    "smoothing": LossOptions(label_smoothing=0.1),
    "both": LossOptions(class_weights=WEIGHTS, label_smoothing=0.3),
    "ohem": LossOptions(ohem_threshold=0.4, ohem_min_kept=300),
    "all": LossOptions(class_weights=WEIGHTS, label_smoothing=0.2, ohem_threshold=0.4, ohem_min_kept=4000),
}


def build(name: str, options: LossOptions | None, group: int = 4) -> Classifier:
    """A classifier of 12 channels in training mode, without dropout."""
    torch.manual_seed(0)
    classifier = CLASSIFIERS[name](12, CLASSES, 0.0, options, group)
    torch.nn.init.normal_(classifier.conv_seg.weight, 0.0, 0.5)
    return classifier


def batch(images: int = 4, size: int = 64, small: int = 16) -> tuple[Tensor, Tensor]:
    """Logits or a feature's worth of noise (N,12,small,small) that takes a gradient, and labels, a tenth ignored."""
    seeded = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (images, 8, 8), generator=seeded)
    labels = labels.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
    labels[torch.rand(labels.shape, generator=seeded) < 0.1] = losses.IGNORE
    return torch.randn(images, 12, small, small, generator=seeded).requires_grad_(), labels


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


# ---- the plain side ----------------------------------------------------------------------------------------------


def class_weights(options: LossOptions) -> Tensor | None:
    return None if options.class_weights is None else torch.tensor(options.class_weights, dtype=torch.float64)


def upsampled(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=align_corners)


def plain_pixels(large: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Cross entropy of each pixel (N,H,W), 0 if it is ignored or not a hard example; logits at the labels' size."""
    pixels = F.cross_entropy(
        large,
        labels,
        weight=class_weights(options),
        label_smoothing=options.label_smoothing,
        ignore_index=losses.IGNORE,
        reduction="none",
    )
    if options.ohem_threshold is None:
        return pixels
    return pixels * plain_kept(large, labels, options.ohem_threshold, options.ohem_min_kept)


def plain_kept(large: Tensor, labels: Tensor, threshold: float, min_kept: int) -> Tensor:
    """mmsegmentation's rule, an image at a time: sort what is not ignored, raise the threshold, keep what is below."""
    kept = torch.zeros(labels.shape, dtype=large.dtype)
    for image, label, keep in zip(large.softmax(1), labels, kept, strict=True):
        valid = label != losses.IGNORE
        own = image.gather(0, torch.where(valid, label, 0)[None])[0]
        ordered = own[valid].sort().values
        least = ordered[min(min_kept, len(ordered) - 1)].item() if len(ordered) else 0.0
        keep[valid & (own < max(least, threshold))] = 1.0
    return kept


def weighing(options: LossOptions) -> Weighing:
    classifier = CLASSIFIERS["linear"](12, CLASSES, 0.0, options)
    return classifier.weighing


# ---- one cross entropy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", [7 * 61 * 5, 1 << 30])  # elements: five rows, or all together
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, kind: str, align_corners: bool, band: int) -> None:
    """Equal to the plain formulation in double precision, to 1e-6; the dice equals that without options."""
    monkeypatch.setattr(f"{full_resolution_terms.__module__}.BAND_ELEMENTS", band)
    monkeypatch.setattr(f"{full_resolution_terms.__module__}.BAND_ROWS", band)
    options = OPTIONS[kind]
    seeded = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(3, CLASSES, 16, 16, generator=seeded)).requires_grad_()
    labels = torch.randint(0, CLASSES, (3, 53, 61), generator=seeded)
    labels[torch.rand(labels.shape, generator=seeded) < 0.3] = losses.IGNORE
    labels[1, 5:] = losses.IGNORE  # fewer pixels than are to be kept
    labels[2] = losses.IGNORE  # none
    terms = full_resolution_terms([Branch(logits, align_corners, True, weighing(options))], labels)[0]
    double = logits.detach().double().requires_grad_()
    expected = plain_pixels(upsampled(double, labels, align_corners), labels, options).sum(dim=(1, 2))
    assert relative(terms.cross_entropy, expected) < 1e-6
    assert terms.cross_entropy[2] == 0
    share = torch.tensor([1.0, 2.0, 3.0])
    (gradient,) = torch.autograd.grad((terms.cross_entropy * share).sum(), logits, retain_graph=True)
    (reference,) = torch.autograd.grad((expected * share).sum(), double)
    assert relative(gradient, reference) < 1e-6
    bare = full_resolution_terms([Branch(logits, align_corners, True)], labels)[0]
    assert torch.equal(terms.dice, bare.dice)
    assert torch.equal(*(torch.autograd.grad(each.dice.sum(), logits)[0] for each in (terms, bare)))


def test_options_that_change_nothing_give_the_same_bits() -> None:
    logits, labels = batch()
    logits = logits[:, :CLASSES]
    bare = full_resolution_terms([Branch(logits, True, True)], labels)[0]
    ones = full_resolution_terms([Branch(logits, True, True, Weighing(torch.ones(CLASSES), 0.0, 1.0, 0))], labels)[0]
    for name, value in bare._asdict().items():
        assert torch.equal(getattr(ones, name), value), name
    assert torch.equal(*(torch.autograd.grad(each.cross_entropy.sum(), logits)[0] for each in (bare, ones)))


@pytest.mark.parametrize("min_kept", [0, 1, 500, 4095, 4096, 100_000])
@pytest.mark.parametrize("threshold", [0.001, 0.3, 0.9999])
def test_hard_examples_are_mmsegmentations(min_kept: int, threshold: float) -> None:
    """The same pixels, whether there are as many as are to be kept or not; all 4,096 are valid in the last image."""
    seeded = torch.Generator().manual_seed(2)
    logits = (2 * torch.randn(4, CLASSES, 64, 64, generator=seeded)).requires_grad_()
    _, labels = batch()
    labels[2, 3:] = losses.IGNORE
    labels[3] = labels[3].clamp(max=CLASSES - 1)
    kept = plain_kept(logits.double(), labels, threshold, min_kept)
    terms = full_resolution_terms(
        [Branch(logits, True, weighing=Weighing(threshold=threshold, min_kept=min_kept))], labels
    )[0]
    # Logits as large as the labels: a pixel counts where its own logits have a gradient.
    (gradient,) = torch.autograd.grad(terms.cross_entropy.sum(), logits)
    assert torch.equal((gradient != 0).any(dim=1), kept > 0)
    if threshold < 0.9 and min_kept >= 4096:
        # Of fewer pixels than are to be kept the most probable one alone is left out: mmsegmentation's oddity.
        assert kept[3].sum() == 4096 - 1
    if min_kept == 500 and threshold == 0.001:
        assert kept[3].sum() == 500


# ---- the classifiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIONS)
def test_linear(kind: str) -> None:
    """The mean over all pixels, independent of their weights, as mmsegmentation's CrossEntropyLoss."""
    options = OPTIONS[kind]
    classifier = build("linear", options)
    feature, labels = batch()
    found = classifier.training_step(feature, labels).losses["main_ce"]
    expected = plain_pixels(upsampled(classifier(feature), labels, False), labels, options).mean()
    assert relative(found, expected) < 1e-6
    gradient, reference = (torch.autograd.grad(each, classifier.conv_seg.weight)[0] for each in (found, expected))
    assert relative(gradient, reference) < 2e-6  # the product of feature and gradient rounds, too


@pytest.mark.parametrize("kind", OPTIONS)
def test_ssa(kind: str) -> None:
    """Main as in `linear`; coarse and teacher as nn.CrossEntropyLoss, without mining; the other terms unchanged."""
    options = OPTIONS[kind]
    feature, labels = batch()
    classifier = build("ssa", options)
    found = classifier.training_step(feature, labels).losses
    student = classifier.adapt(feature)
    teacher = teacher_logits(classifier, feature, labels)
    criterion = torch.nn.CrossEntropyLoss(
        class_weights(options), ignore_index=losses.IGNORE, label_smoothing=options.label_smoothing
    )
    expected = {
        "main_ce": plain_pixels(upsampled(student.logits, labels, True), labels, options).mean(),
        "coarse_ce": criterion(upsampled(student.coarse, labels, True), labels),
        "teacher_ce": criterion(upsampled(teacher, labels, True), labels),
    }
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-6, name
        gradient, reference = (torch.autograd.grad(v, feature, retain_graph=True)[0] for v in (found[name], value))
        assert relative(gradient, reference) < 3e-6, name
    bare = build("ssa", None).training_step(feature, labels).losses
    assert all(torch.equal(found[name], value) for name, value in bare.items() if name not in expected)
    mined = options.ohem_threshold is not None and options.class_weights is None
    assert torch.equal(found["coarse_ce"], bare["coarse_ce"]) == mined


def teacher_logits(classifier: Any, feature: Tensor, labels: Tensor) -> Tensor:
    return distillation.teach(
        classifier.teacher,
        classifier.semantic_prototypes,
        classifier.spatial_prototypes,
        feature,
        classifier.adapt(feature),
        labels,
        classifier.group,
    ).logits


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_a_step_cut_into_micro_batches_is_the_same(name: str) -> None:
    """Eight images together or in two halves: losses and gradients to rounding, hard examples among them."""
    classifier = build(name, OPTIONS["all"], group=2)
    feature, labels = batch(images=8)
    pairs = None
    if classifier.needs_totals:
        pairs = torch.stack([classifier.step_totals(half) for half in labels.chunk(2)]).mean()
    halves = [
        classifier.training_step(each, label, pairs).losses
        for each, label in zip(feature.chunk(2), labels.chunk(2), strict=True)
    ]
    whole = classifier.training_step(feature, labels).losses
    for term, value in whole.items():
        assert relative((halves[0][term] + halves[1][term]) / 2, value) < 1e-6, term
    cut = sum(sum(half.values()) for half in halves) / 2
    gradients = [torch.autograd.grad(total, feature)[0] for total in (cut, sum(whole.values()))]
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_nothing_reads_a_value(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a GPU, by tensors without values; see the test of the same kind in test_losses.py."""
    monkeypatch.setattr(f"{full_resolution_terms.__module__}._can_look", lambda tensor: False)
    classifier = build(name, OPTIONS["all"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = classifier.training_step(torch.randn(2, 12, 8, 8), torch.randint(0, CLASSES, (2, 32, 32)))
        assert step.losses["main_ce"].shape == ()


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("ssa", None, "eager"),
        pytest.param("ssa", None, "aot_eager", marks=pytest.mark.slow),
        pytest.param("linear", "all", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_losses_compile_without_graph_break(name: str, kind: str | None, backend: str) -> None:
    """One graph: PyTorch's tracing alone tells. What compiles its gradient takes twice as long."""
    classifier = build(name, OPTIONS[kind] if kind else None)
    feature, labels = batch(images=2, size=32, small=8)

    def step(feature: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return classifier.training_step(feature, labels).losses

    eager = step(feature, labels)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)(feature, labels)
    assert set(compiled) == set(eager)
    for term, value in eager.items():
        assert torch.allclose(compiled[term], value, rtol=1e-5), term
    found, expected = (torch.autograd.grad(sum(each.values()), feature)[0] for each in (compiled, eager))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_ignored_pixels_alone(name: str) -> None:
    classifier = build(name, OPTIONS["all"])
    feature, labels = batch(images=1)
    labels[:] = losses.IGNORE
    found = classifier.training_step(feature, labels).losses
    sum(found.values()).backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert found["main_ce"] == 0


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ssa", "linear"])
def test_options_are_no_part_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    model = build_model("seaformer_t", CLASSES, name, loss=OPTIONS["all"])
    plain = build_model("seaformer_t", CLASSES, name)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert plain.classifier.weighing == Weighing(None, 0.0, None, 100_000)
    save_model(tmp_path / "m.safetensors", model, {})
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert loaded.classifier.weighing.classes is None
    assert model.classifier.weighing.classes is not None
    assert model.double().classifier.weighing.classes.dtype == torch.float64  # follows the model, as a buffer does


@pytest.mark.parametrize("weights", [(1.0,) * 6, (0.0,) * 7, (1.0,) * 6 + (-1.0,), (1.0,) * 6 + (float("nan"),)])
def test_weights_that_make_no_sense(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"class_weights (has . numbers, expected 7, finite, 0 or more|are all 0)"):
        build_model("cgrseg_t", CLASSES, "linear", loss=LossOptions(class_weights=weights))


def recipe_network(*arguments: str) -> Any:
    recipe = load_recipe("demo", ["model.name=seaformer_t", *arguments])
    return build_network(recipe, ("sky", "road", "Car"))


def test_recipe_keys_become_options() -> None:
    """By class name, in the order of the data's classes."""
    assert recipe_network().classifier.loss == LossOptions()
    arguments = ["loss.class_weights.Car=2", "loss.class_weights.sky=0.5", "loss.label_smoothing=0.1"]
    found = recipe_network(*arguments, "loss.ohem.threshold=0.6", "loss.ohem.min_kept=9").classifier
    assert found.loss == LossOptions({}, (0.5, 1.0, 2.0), 0.1, 0.6, 9)
    assert found.class_weights.tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(("name", "fix"), [("car", "did you mean Car?"), ("umbrella", "correct the name")])
def test_a_weight_for_a_class_that_is_not_there(name: str, fix: str) -> None:
    with pytest.raises(CommandError) as error:
        recipe_network(f"loss.class_weights.{name}=2")
    lines = str(error.value).split("\n")
    assert lines[:2] == [f"loss.class_weights.{name}: no such class", "expected names of sky, road, Car"]
    assert lines[2].startswith(fix)
