"""Networks with auxiliary heads and a first stage, and classifiers with state of their own: the contract's corners."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bank
import pytest
import torch
from networks import BUILT, TINY, tiny_networks
from torch import Tensor, nn

from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.models import CheckpointError, LossOptions, build_model, facts, load_model, save_model
from ssaseg.models.build import CLASSIFIERS, FAMILIES, build_outline
from ssaseg.models.checkpoint import save_deploy
from ssaseg.models.classifiers.base import Alone, Classifier
from ssaseg.models.classifiers.linear import LinearClassifier
from ssaseg.models.decoder import AuxiliaryHead, Decoder
from ssaseg.models.deploy import fold
from ssaseg.models.networks.family import Family, Layout, Parts
from ssaseg.models.official import official_entries, official_keys
from ssaseg.models.rows import Row

CLASSES = 3


class TwoMaps(nn.Module):
    """A backbone with a map at 1/4 and one at 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 4, stride=4)
        self.coarse = nn.Sequential(nn.Conv2d(6, 8, 2, stride=2), nn.BatchNorm2d(8))

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images).relu()
        return [fine, self.coarse(fine).relu()]


class OneMap(Decoder):
    """A 1×1 convolution on one of the maps."""

    def __init__(self, index: int, inputs: int, channels: int) -> None:
        super().__init__()
        self.index, self.channels, self.stride = index, channels, 4 * (index + 1)
        self.squeeze = nn.Conv2d(inputs, channels, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.squeeze(maps[self.index]).relu()


class Cascade(OneMap):
    """Its feature is weighed by what a first stage predicts."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(0, 6, 8)
        self.first = LinearClassifier(8, num_classes, 0.0)

    def forward(self, maps: list[Tensor]) -> Tensor:
        feature = super().forward(maps)
        return self.refine(feature, self.first(feature))

    def training_step(self, maps: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        feature = super().forward(maps)
        step = self.first.training_step(feature, labels)
        return self.refine(feature, step.logits), {"first_ce": step.losses["main_ce"]}

    def refine(self, feature: Tensor, logits: Tensor) -> Tensor:
        return feature * (1 + logits.softmax(dim=1).amax(dim=1, keepdim=True))


def build_fake(name: str, num_classes: int, drop_path: float | None) -> Parts:
    decoder = Cascade(num_classes) if name == "fake_cascade" else OneMap(0, 6, 8)
    head = AuxiliaryHead(OneMap(1, 8, 5), LinearClassifier(5, num_classes))
    return Parts(TwoMaps(), decoder, {"auxiliary": head} if name == "fake_auxiliary" else {})


def fake(name: str, losses: dict[str, str]) -> Family:
    stage = "decode_head.1" if name == "fake_cascade" else "decode_head"
    heads = {"classifier": stage, "decoder.first": "decode_head.0", "auxiliary.auxiliary.classifier": "auxiliary_head"}
    rows = [
        Row("backbone", "backbone"),
        Row("decoder.squeeze", f"{stage}.convs.0.conv"),
        Row("auxiliary.auxiliary.decoder.squeeze", "auxiliary_head.convs.0.conv"),
    ]
    return Family({name: None}, build_fake, rows, "backbone.fine.", heads=heads, losses=losses)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSIFIERS, "bank", bank.BankClassifier)
    for name, losses in (
        ("fake_auxiliary", {"auxiliary_ce": "cross entropy of the auxiliary head"}),
        ("fake_cascade", {"first_ce": "cross entropy of the first stage"}),
        ("fake_plain", {}),
    ):
        monkeypatch.setitem(FAMILIES, name, fake(name, losses))  # type: ignore[index]


def batch() -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 64, 64, generator=seeded), torch.randint(0, CLASSES, (2, 64, 64), generator=seeded)


@pytest.mark.parametrize("classifier", ["linear", "ssa"])
@pytest.mark.parametrize(("name", "loss"), [("fake_auxiliary", "auxiliary_ce"), ("fake_cascade", "first_ce")])
def test_further_losses_train_with_their_weights(name: str, loss: str, classifier: str) -> None:
    model = build_model(name, CLASSES, classifier, dropout=0.0)
    found = model(*batch())
    assert set(found) == set(facts(name, classifier).losses)
    assert facts(name, classifier).losses[loss].weight == 0.4
    sum(found.values()).backward()
    untouched = {key for key, value in model.named_parameters() if value.grad is None}
    assert all(key.startswith("backbone.coarse") for key in untouched)
    assert bool(untouched) == (name == "fake_cascade"), "only the auxiliary head reads the coarse map"
    weights = {}
    for weight in (0.4, 0.8, 0.0):
        torch.manual_seed(0)
        again = build_model(name, CLASSES, classifier, dropout=0.0, loss=LossOptions(weights={loss: weight}))
        weights[weight] = again(*batch())
    assert weights[0.8][loss].item() == pytest.approx(2 * weights[0.4][loss].item())
    assert loss not in weights[0.0]
    with pytest.raises(ValueError, match=r"no loss 'other_ce'\nknown: .*_ce"):
        build_model(name, CLASSES, classifier, loss=LossOptions(weights={"other_ce": 1.0}))


@pytest.mark.parametrize(("name", "loss"), [("fake_auxiliary", "auxiliary_ce"), ("fake_cascade", "first_ce")])
def test_class_weights_and_smoothing_apply_to_further_losses_too(name: str, loss: str) -> None:
    found = []
    for options in (None, LossOptions(class_weights=(0.0, 2.0, 5.0)), LossOptions(label_smoothing=0.5)):
        torch.manual_seed(0)
        model = build_model(name, CLASSES, "linear", dropout=0.0, loss=options)
        for key in model.class_rows():  # fresh logits are all alike, and smoothing changes nothing
            nn.init.normal_(model.get_parameter(key))
        found.append(model(*batch())[loss].item())
    assert len({round(value, 4) for value in found}) == 3


def test_every_network_says_its_losses() -> None:
    with tiny_networks():  # of each family one
        for name in (*TINY, *BUILT, "fake_plain"):
            for classifier in ("linear", "ssa"):
                found = build_model(name, CLASSES, classifier)(*batch())
                assert list(found) == list(facts(name, classifier).losses), name


def test_strides() -> None:
    assert build_model("fake_plain", CLASSES).stride == 4
    assert build_model("fake_plain", CLASSES).eval()(batch()[0]).shape == (2, CLASSES, 16, 16)
    found = {
        name: build_model(name, CLASSES).stride for name in ("seaformer_t", "fcn_r50", "segformer_b0", "ocrnet_hr18")
    }
    assert found == {"seaformer_t": 8, "fcn_r50": 8, "segformer_b0": 4, "ocrnet_hr18": 4}


def test_all_rows_of_classes_are_known() -> None:
    for name in ("fake_auxiliary", "fake_cascade", "fake_plain"):
        for classifier in CLASSIFIERS:
            few, many = (build_outline(name, classes, classifier) for classes in (3, 4))
            states = few.state_dict(), many.state_dict()
            changed = {key for key in states[0] if states[0][key].shape != states[1][key].shape}
            assert changed == set(few.class_rows())


def test_official_names_of_stages_and_heads() -> None:
    names = official_keys(build_model("fake_cascade", CLASSES, "ssa"))
    assert names["decoder.first.conv_seg.weight"] == "decode_head.0.conv_seg.weight"
    assert names["classifier.spatial_prototypes"] == "decode_head.1.center_pos.weight"
    names = official_keys(build_model("fake_auxiliary", CLASSES, "linear"))
    assert names["auxiliary.auxiliary.classifier.conv_seg.bias"] == "auxiliary_head.conv_seg.bias"
    assert names["auxiliary.auxiliary.decoder.squeeze.weight"] == "auxiliary_head.convs.0.conv.weight"


@pytest.mark.parametrize("name", ["fake_auxiliary", "fake_cascade", "fake_plain"])
@pytest.mark.parametrize("classifier", ["linear", "ssa", "bank"])
def test_deploy_form_has_nothing_of_training_alone_and_loads(name: str, classifier: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(name, CLASSES, classifier)
    model(*batch())
    model.eval()
    save_model(tmp_path / "whole.safetensors", model, {})
    save_deploy(tmp_path / "small.safetensors", model, {"classes": ["a", "b", "c"]})
    whole, _ = load_model(tmp_path / "whole.safetensors")
    small, _ = load_model(tmp_path / "small.safetensors")
    assert whole.state_dict().keys() == model.state_dict().keys()
    dropped = whole.state_dict().keys() - small.state_dict().keys()
    expected = {
        "linear": set(),
        "ssa": {"classifier.teacher"},
        "bank": {f"classifier.{part}" for part in ("bank", "pointer", "spare")},
    }[classifier] | ({"auxiliary"} if name == "fake_auxiliary" else set())
    assert {next(part for part in expected if key.startswith(part)) for key in dropped} == expected
    images = batch()[0]
    torch.testing.assert_close(small(images), model(images), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(fold(model)(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_deploy_form_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """The test above can fail: without the header's `deploy`, missing tensors are an error."""
    save_model(tmp_path / "odd.safetensors", fold(build_model("fake_plain", CLASSES, "bank")), {})
    with pytest.raises(CheckpointError, match="3 keys missing"):
        load_model(tmp_path / "odd.safetensors")


def test_an_imagenet_file_may_have_names_and_layouts_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Family.layouts`: here its convolutions are called otherwise, one is a matrix, and a norm has no name."""
    rows = (
        Row("backbone.fine", "backbone.patch.proj", lambda *v: tuple(v), lambda *v: tuple(v)),
        Row(
            "backbone.coarse.0.weight",
            "backbone.merge.matrix",
            lambda matrix: (matrix.view(8, 6, 2, 2),),
            lambda weight: (weight.reshape(8, 24),),
        ),
        Row("backbone.coarse.0.bias", "backbone.merge.bias"),
    )
    family = replace(fake("fake_plain", {}), layouts=[Layout("other", re.compile("backbone.merge.matrix"), rows)])
    monkeypatch.setitem(FAMILIES, "fake_plain", family)  # type: ignore[index]
    torch.manual_seed(1)
    source, start = (build_model("fake_plain", CLASSES) for _ in range(2))
    state: dict[str, Tensor] = {}
    for entry in official_entries(source, backbone=True, layout="other"):
        state |= entry.give(source.state_dict())
    torch.save({key.removeprefix("backbone."): value for key, value in state.items()}, tmp_path / "imagenet.pth")
    assert "merge.matrix" in torch.load(tmp_path / "imagenet.pth", weights_only=True)
    found = load_pretrained(start, tmp_path / "imagenet.pth")
    assert found.complete
    norm = [f"backbone.coarse.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert found.fresh == norm
    for key, value in source.backbone.state_dict().items():
        if f"backbone.{key}" not in (*norm, "backbone.coarse.1.num_batches_tracked"):
            assert torch.equal(value, start.backbone.state_dict()[key]), key


def test_options_are_handed_to_the_classifier() -> None:
    model = build_model("fake_plain", CLASSES, "bank", options={"slots": 7})
    assert model.classifier.bank.shape == (CLASSES, 7, 8)
    with pytest.raises(ValueError, match="classifier bank has no option 'slot'\nknown: slots, momentum, pull"):
        build_model("fake_plain", CLASSES, "bank", options={"slot": 7})
    with pytest.raises(ValueError, match="known: none"):
        build_model("fake_plain", CLASSES, "linear", options={"slots": 7})


def test_only_what_a_classifier_uses_is_built() -> None:
    assert list(Classifier(8, CLASSES).state_dict()) == []


def test_memories_go_to_update_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("fake_plain", CLASSES, "bank")
    seen: list[Any] = []
    monkeypatch.setattr(model.classifier, "update", lambda memories, peers, held: seen.append(len(memories)))
    for _ in range(2):
        model(*batch())
    for _ in range(2):
        model.update(Alone(), torch.zeros(()))
    assert seen == [2, 0]
