"""Rival classifiers: CAC, ProtoSeg, GMMSeg and DNC. Figures of the official code: see `golden/README.md`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import GOLDEN
from torch import Tensor
from torch.nn import functional as F

from ssaseg.cli.weights import archive
from ssaseg.models import CheckpointError, build_model, checkpoint, load_model, save_model
from ssaseg.models.classifiers import protoseg
from ssaseg.models.classifiers.base import Alone, Classifier, LossOptions
from ssaseg.models.classifiers.cac import CACClassifier
from ssaseg.models.classifiers.dnc import DNCClassifier
from ssaseg.models.classifiers.gmmseg import GMMSegClassifier
from ssaseg.models.classifiers.protoseg import ProtoSegClassifier
from ssaseg.models.classifiers.prototypes import PrototypeClassifier, evenly, sinkhorn, write_ring
from ssaseg.models.deploy import fold

pytestmark = pytest.mark.usefixtures("one_thread")
NOW = torch.zeros(())
Figures = dict[str, Tensor]


def figures(name: str) -> Figures:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


def norms(classifier: PrototypeClassifier, stored: Figures, names: str) -> None:
    """`names`: what a key is, with NORM and PART in it."""
    for norm in ("feat_norm", "mask_norm"):
        for part in ("weight", "bias"):
            key = names.replace("NORM", norm).replace("PART", part if "." in names else part[0])
            getattr(getattr(classifier, norm), part).data.copy_(stored[key])


def protoseg_of(stored: Figures, kind: Callable[..., Any] = ProtoSegClassifier, **options: Any) -> Any:
    classifier = kind(32, 7, dropout=0.0, prototypes=4, momentum=0.9, **options)
    norms(classifier, stored, "NORM_PART")
    classifier.prototypes.copy_(stored["proto0"])
    return classifier


def gmmseg_of(stored: Figures, **options: Any) -> GMMSegClassifier:
    given = {"components": 4, "width": 32, "memory": 50, "samples": 20, "interval": 1, "momentum": 0.9} | options
    classifier = GMMSegClassifier(32, 7, dropout=0.0, **given)
    norms(classifier, stored, "s0_NORM.PART")
    classifier.means.copy_(stored["s0_means"])
    classifier.stds.copy_(stored["s0_diagonal"])
    classifier.queue.copy_(stored["s0_queue"].transpose(1, 2).unflatten(0, (7, 4)))
    classifier.sum_up()
    classifier.pointer.copy_(stored["s0_queue_ptr"].view(7, 4))
    classifier.counter.copy_(stored["s0_iteration_counter"][0])
    return classifier


def stepped(classifier: Classifier, stored: Figures) -> tuple[Any, Tensor]:
    feature = stored["feature"].clone().requires_grad_()
    step = classifier.training_step(feature, stored["label"][:, 0])
    sum(step.losses.values()).backward()
    assert feature.grad is not None
    return step, feature.grad


def targets(classifier: PrototypeClassifier, stored: Figures) -> Tensor:
    """The number of each pixel's prototype, 255 where it is ignored."""
    scored = classifier.compare(stored["feature"], stored["label"][:, 0])
    number = scored.labels * classifier.count + scored.component
    return torch.where(scored.labels == 255, 255, number).flatten()


def official_noise(stored: Figures) -> Callable[[Tensor], Tensor]:
    """The official code draws for one class after the other, of seed 7."""
    labels = F.interpolate(stored["label"].float(), (12, 16), mode="nearest").flatten()

    def draw(like: Tensor) -> Tensor:
        torch.manual_seed(7)
        noise = torch.zeros_like(like).flatten(0, 1)
        for k in labels[labels != 255].unique():
            noise[labels == k] = -torch.empty(int((labels == k).sum()), 4).exponential_().log()
        return noise.view_as(like)

    return draw


def test_protoseg_has_the_official_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = figures("protoseg")
    classifier = protoseg_of(stored, projection=False)
    monkeypatch.setattr(protoseg, "gumbel_noise", official_noise(stored))
    torch.testing.assert_close(classifier(stored["feature"]), stored["logits_eval"], rtol=0, atol=5e-6)
    step, gradient = stepped(classifier, stored)
    torch.testing.assert_close(step.logits, stored["logits_train"], rtol=0, atol=5e-6)
    for ours, theirs, weight in (("main_ce", "ce", 1), ("contrast", "ppc", 0.01), ("distance", "ppd", 0.001)):
        torch.testing.assert_close(step.losses[ours] / weight, stored[f"loss_{theirs}"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, stored["grad_feature"], rtol=0, atol=1e-8)
    official = torch.where(stored["contrast_target"] < 0, 255, stored["contrast_target"])
    assert torch.equal(targets(classifier, stored), official.long())
    classifier.update([step.memory], Alone(), NOW)
    torch.testing.assert_close(classifier.prototypes, stored["proto1"], rtol=0, atol=1e-6)
    assert (classifier.prototypes - F.normalize(stored["proto0"], dim=-1)).abs().max() > 0.01, "they have moved"


def test_gmmseg_has_the_official_figures() -> None:
    stored = figures("gmmseg")
    classifier = gmmseg_of(stored)
    torch.testing.assert_close(classifier(stored["feature"]), stored["logits_eval"], rtol=0, atol=5e-5)
    step, gradient = stepped(classifier, stored)
    torch.testing.assert_close(step.logits, stored["logits_train"], rtol=0, atol=5e-5)
    torch.testing.assert_close(step.losses["main_ce"], stored["loss_ce"], rtol=1e-6, atol=0)
    torch.testing.assert_close(step.losses["contrast"] / 0.01, stored["loss_contrast_unweighted"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, stored["grad_feature"], rtol=0, atol=5e-8)
    assert torch.equal(targets(classifier, stored), stored["contrast_target"].long())
    classifier.update([step.memory], Alone(), NOW)
    for name, theirs in (("means", "s1_means"), ("stds", "s1_diagonal")):
        torch.testing.assert_close(getattr(classifier, name), stored[theirs], rtol=0, atol=1e-6)
    assert torch.equal(classifier.queue.flatten(0, 1).transpose(1, 2), stored["s1_queue"])
    assert torch.equal(classifier.pointer.flatten(), stored["s1_queue_ptr"])
    sums, squares = classifier.sums.clone(), classifier.squares.clone()
    classifier.sum_up()
    torch.testing.assert_close(sums, classifier.sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(squares, classifier.squares, rtol=0, atol=1e-12)


def test_gmmseg_fits_at_its_interval_only() -> None:
    stored = figures("gmmseg")
    classifier = gmmseg_of(stored, interval=3)
    changed = []
    for _ in range(5):
        before, rings = F.normalize(classifier.means, dim=-1), classifier.queue.clone()
        step, _ = stepped(classifier, stored)
        classifier.update([step.memory], Alone(), NOW)
        changed.append(not torch.equal(F.normalize(classifier.means, dim=-1), F.normalize(before, dim=-1)))
        assert not torch.equal(classifier.queue, rings)
    counter = int(stored["s0_iteration_counter"])
    assert changed == [(counter + step) % 3 == 0 for step in range(5)]


def test_component_255_is_trained_unless_the_official_collision_is_chosen() -> None:
    torch.manual_seed(0)
    labels = torch.full((1, 8, 8), 31)  # of 40 classes with 8 components: 31 · 8 + 7 = 255
    found = []
    for official in (False, True):
        torch.manual_seed(1)
        classifier = GMMSegClassifier(16, 40, 0.0, components=8, width=16, memory=30, official_255=official)
        scored = classifier.compare(torch.randn(1, 16, 8, 8), labels)
        assert (scored.component == 7).any()
        found.append(int(scored.counted))
        assert int(scored.counted) == 64 - official * int((scored.component == 7).sum())
    assert found[0] == 64 > found[1]


def test_dnc_reduces_to_protoseg_with_the_cross_entropy_alone() -> None:
    """Logits, loss and gradient; and the prototypes, if the memory holds exactly the pixels of the step."""
    stored = figures("protoseg")
    dnc = protoseg_of(stored, DNCClassifier, memory=400, samples=400)
    other = protoseg_of(
        stored,
        loss=LossOptions({"contrast": 0, "distance": 0}),
        projection=False,
        assignment="argmax",
    )
    torch.testing.assert_close(dnc(stored["feature"]), stored["logits_eval"], rtol=0, atol=5e-6)
    (step, gradient), (expected, expected_gradient) = stepped(dnc, stored), stepped(other, stored)
    torch.testing.assert_close(step.losses["main_ce"], stored["loss_ce"], rtol=1e-6, atol=0)
    assert list(step.losses) == list(expected.losses) == ["main_ce"]
    assert torch.equal(gradient, expected_gradient)
    before = F.normalize(dnc.prototypes, dim=-1)
    for classifier, each in ((dnc, step), (other, expected)):
        classifier.update([each.memory], Alone(), NOW)
    torch.testing.assert_close(dnc.prototypes, other.prototypes, rtol=0, atol=1e-6)
    assert (dnc.prototypes - before).abs().max() > 0.01


SMALL: dict[str, dict[str, Any]] = {
    "cac": {},
    "protoseg": {"prototypes": 3, "assignment": "argmax"},
    "gmmseg": {"components": 3, "width": 8, "memory": 30, "samples": 5, "interval": 1},
    "dnc": {"prototypes": 3, "memory": 30, "samples": 10},
}
KINDS: dict[str, type[Classifier]] = {
    "cac": CACClassifier,
    "protoseg": ProtoSegClassifier,
    "gmmseg": GMMSegClassifier,
    "dnc": DNCClassifier,
}


def small(name: str, group: int = 2, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    classifier = KINDS[name](16, 5, dropout=dropout, group=group, **SMALL[name])
    for module in classifier.modules():  # batch statistics would depend on the micro-batch
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    return classifier


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(0, 4, (4, 24, 32))  # class 4 is absent
    labels[:, :3] = 255
    return torch.randn(4, 16, 6, 8), labels


@pytest.mark.parametrize("name", SMALL)
def test_two_micro_batches_are_one_batch(name: str) -> None:
    """Losses, gradients, and the state after the update."""
    feature, labels = batch()
    states, gradients, losses = [], [], []
    for cuts in (1, 2):
        classifier, memories, total = small(name), [], 0.0
        for images, known in zip(feature.chunk(cuts), labels.chunk(cuts), strict=True):
            step = classifier.training_step(images, known)
            loss = sum(step.losses.values()) / cuts
            loss.backward()
            total += loss.item()
            memories.append(step.memory)
        if name != "cac":
            classifier.update(memories, Alone(), NOW)
        states.append(classifier.state_dict())
        gradients.append([each.grad for each in classifier.parameters() if each.grad is not None])
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_a_zero_pixel_gives_no_nan(name: str) -> None:
    classifier = small(name)
    feature, labels = batch()
    feature[:, :, 2] = 0
    feature.requires_grad_()
    step = classifier.training_step(feature, labels)
    sum(step.losses.values()).backward()
    assert step.logits.isfinite().all()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert all(each.grad.isfinite().all() for each in classifier.parameters() if each.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_all_labels_ignored_and_half_precision(name: str) -> None:
    classifier = small(name)
    feature, labels = batch()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    step = classifier.training_step(feature, torch.full_like(labels, 255))
    assert all(loss == 0 for loss in step.losses.values())
    if name != "cac":
        classifier.update([step.memory], Alone(), NOW)
        for key in ("prototypes", "means"):
            if key in before:
                now = F.normalize(classifier.state_dict()[key], dim=-1)
                torch.testing.assert_close(now, F.normalize(before[key], dim=-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = classifier.training_step(feature.bfloat16(), labels)
    sum(step.losses.values()).backward()
    assert step.logits.dtype == torch.float32
    assert all(loss.isfinite() for loss in step.losses.values())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "cac"])
def test_inference_writes_nothing_and_deploy_forms_have_no_memory(name: str) -> None:
    with torch.device("cpu"):
        model = build_model("seaformer_t", 5, name, options=SMALL[name]).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.drop_training_only()
    kept = dict(model.classifier.named_buffers())
    assert not {"queue", "pointer", "sums", "squares", "counter", "marks"} & kept.keys()
    with torch.no_grad():
        assert torch.equal(model(images), logits)


@pytest.mark.parametrize("name", SMALL)
def test_a_folded_network_gives_the_same(name: str) -> None:
    model = build_model("seaformer_t", 5, name, options=SMALL[name]).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), fold(model)(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [name for name in SMALL if name != "cac"])
def test_best_of_several_components_is_the_score(name: str) -> None:
    """Inference compares with one prototype per class after the other; training with all together."""
    classifier = small(name)
    feature, labels = batch()
    torch.testing.assert_close(classifier(feature), classifier.compare(feature, labels).logits, rtol=1e-5, atol=1e-5)


def test_sinkhorn_is_that_of_each_class_alone() -> None:
    torch.manual_seed(0)
    nearness, labels = torch.rand(60, 4) * 2 - 1, torch.randint(0, 3, (60,))
    labels[:7] = 255
    found = sinkhorn(nearness, labels, 5)
    assert (found[:7] == 0).all()
    for k in range(3):
        shares = (nearness[labels == k] / 0.05).exp().T
        shares /= shares.sum()
        for _ in range(3):
            shares /= shares.sum(dim=1, keepdim=True) * 4
            shares /= shares.sum(dim=0, keepdim=True) * shares.shape[1]
        torch.testing.assert_close(found[labels == k], (shares * shares.shape[1]).T, rtol=1e-4, atol=1e-6)


def test_evenly_chosen_pixels_are_those_of_linspace() -> None:
    torch.manual_seed(0)
    segments = torch.randint(0, 4, (200,))
    segments[segments == 2] = 5  # of none; segment 2 is empty, segment 4 too
    segments[::40] = 3
    chosen = evenly(segments, 5, 7)
    for segment in range(5):
        pixels = (segments == segment).nonzero().flatten()
        count = int(chosen.number[segment])
        assert count == min(len(pixels), 7)
        picked = pixels if len(pixels) <= 7 else pixels[torch.linspace(0, len(pixels) - 1, 7, dtype=torch.int64)]
        assert torch.equal(chosen.positions[segment, :count], picked)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_evenly_chosen_pixels(most: int) -> None:
    chosen = evenly(torch.zeros(10, dtype=torch.long), 1, most)
    assert torch.equal(chosen.positions[0], torch.linspace(0, 9, most, dtype=torch.int64))


def test_a_ring_is_written_across_its_end() -> None:
    ring, pointer = torch.zeros(2, 5, 1), torch.tensor([3, 0])
    values = torch.arange(1.0, 9.0).view(2, 4, 1)
    old, new = write_ring(ring, pointer, values, torch.tensor([4, 1]))
    assert ring.squeeze(2).tolist() == [[3, 4, 0, 1, 2], [5, 0, 0, 0, 0]]
    assert pointer.tolist() == [2, 1]
    assert (old == 0).all()
    assert new.squeeze(2).tolist() == [[1, 2, 3, 4], [5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("protoseg", {"prototypes": 500}, ["150 classes with 500 prototypes", "at most 65,535", "at most 436 per"]),
        ("gmmseg", {"components": 500, "memory": 20}, ["75,000 prototypes"]),
        ("gmmseg", {"memory": 10}, ["samples is 20, more than the memory of 10"]),
        ("dnc", {"memory": 10**9}, ["needs", "GB, and the machine has", "a smaller model.options.memory"]),
        ("gmmseg", {"memory": 10**9}, ["needs 192000.0 GB"]),
        ("gmmseg", {"prototypes": 3}, ["classifier gmmseg has no option 'prototypes'"]),
    ],
)
def test_settings_that_cannot_be(name: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\A.+\n?.*\Z") as caught:
        build_model("seaformer_t", 150, name, options=options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_bytes_of_a_memory_are_those_of_the_buffer() -> None:
    for name in ("gmmseg", "dnc"):
        classifier = small(name)
        queue = classifier.queue
        assert KINDS[name].bank_bytes(16, 5, **SMALL[name]) == queue.numel() * queue.element_size()
    assert GMMSegClassifier.bank_bytes(768, 150, components=8) == 9_830_400_000  # the official one of ADE20K: 9.8 GB
    assert archive.LARGEST > 2 * 9_830_400_000, "a training state has it, too"


def test_a_memory_that_was_not_loaded_says_what_the_gaussians_say() -> None:
    torch.manual_seed(0)
    classifier = GMMSegClassifier(16, 3, components=2, width=16, memory=4000)
    classifier.means.copy_(F.normalize(torch.randn(3, 2, 16), dim=-1))
    classifier.stds.uniform_(0.11, 0.2)
    classifier.restore_memory()
    means, stds = classifier.fit()
    assert (means * classifier.means).sum(dim=-1).min() > 0.99
    torch.testing.assert_close(stds, classifier.stds, rtol=0.2, atol=0)


def test_a_header_cannot_make_a_network_larger_than_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("seaformer_t", 2, "gmmseg", options={"components": 2, "width": 8, "memory": 20})
    save_model(tmp_path / "ours.safetensors", model, {})
    loaded, _ = load_model(tmp_path / "ours.safetensors")
    assert loaded.options == model.options
    assert not hasattr(loaded.classifier, "queue")
    model.options = {"components": 30_000, "width": 4096}
    save_model(tmp_path / "large.safetensors", model, {})

    def refused(*names: Any, **options: Any) -> Any:
        raise AssertionError("a network with memory was built")

    monkeypatch.setattr(checkpoint, "build_model", refused)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(tmp_path / "large.safetensors")
