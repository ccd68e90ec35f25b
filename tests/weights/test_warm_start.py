"""Starting from a whole segmentation checkpoint: the classifier's rows follow the names of the classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from networks import tiny_networks
from torch import Tensor

from ssaseg.cli.engine.opening import open_file
from ssaseg.cli.weights.convert import run_convert
from ssaseg.cli.weights.pretrained import load_pretrained
from ssaseg.datasets.labels import label_space
from ssaseg.models import Segmenter, build_model, save_model
from ssaseg.models.checkpoint import read_header
from ssaseg.models.official import official_keys

ROAD = ("sky", "road", "car", "tree")


def network(classes: int, classifier: str = "ssa", seed: int = 1) -> Segmenter:
    torch.manual_seed(seed)
    return build_model("seaformer_t", classes, classifier)


def checkpoint(folder: Path, model: Segmenter, names: Sequence[str] | None, official: bool) -> Path:
    """A file of ours or of mmsegmentation's, with names or without."""
    if not official:
        path = folder / "ours.safetensors"
        save_model(path, model, {} if names is None else {"classes": list(names)})
        return path
    own = model.state_dict()
    state = {key: own[ours] for ours, key in official_keys(model).items()}
    meta = {} if names is None else {"CLASSES": tuple(names)}
    torch.save({"state_dict": state, "meta": meta}, folder / "official.pth")
    return folder / "official.pth"


def rows_of(model: Segmenter) -> dict[str, Tensor]:
    state = model.state_dict()
    return {key: state[key].clone() for key in model.class_rows()}


def assert_rows(model: Segmenter, source: Segmenter, before: dict[str, Tensor], rows: Sequence[int | None]) -> None:
    """Row k is the source's row rows[k], or as it was; everything that has no class rows is the source's."""
    assert len(before) == (3 if model.classifier_name == "ssa" else 2)
    state, of_classes = source.state_dict(), model.class_rows()
    for key, value in model.state_dict().items():
        if key not in of_classes:
            assert torch.equal(value, state[key]), key
            continue
        for k, row in enumerate(rows):
            assert torch.equal(value[k], before[key][k] if row is None else state[key][row]), (key, k)


CASES = {
    "same": (ROAD, [0, 1, 2, 3], "rows kept    all 4: the same classes in the same order"),
    "permuted": (("car", "tree", "sky", "road"), [2, 3, 0, 1], "rows kept    4: car, tree, sky, road"),
    "as many, others": (("sky", "pole", "car", "sign"), [0, None, 2, None], "rows new     2: pole, sign"),
    "fewer": (("tree", "sky"), [3, 0], "rows kept    2: tree, sky"),
    "more": (("a", *ROAD, "b"), [None, 0, 1, 2, 3, None], "rows new     2: a, b"),
    "case": (("Sky", " ROAD", "Car"), [0, 1, 2], "rows kept    3: Sky (sky),  ROAD (road), Car (car)"),
    "synonyms": (("car;auto", "sky,heaven"), [2, 0], "rows kept    2: car;auto (car), sky,heaven (sky)"),
}


@pytest.mark.parametrize(
    ("case", "classifier", "official"), [*((case, "linear", True) for case in CASES), ("more", "ssa", False)]
)
def test_rows_follow_names(tmp_path: Path, case: str, official: bool, classifier: str) -> None:
    names, rows, line = CASES[case]
    source, start = network(4, classifier), network(len(names), classifier, seed=2)
    before = rows_of(start)
    report = load_pretrained(start, checkpoint(tmp_path, source, ROAD, official), names)
    assert line in str(report).split("\n  ", 1)[1]
    assert report.complete
    assert not report.fresh
    assert_rows(start, source, before, rows)


@pytest.mark.parametrize(("classifier", "count"), [("ssa", 4), ("linear", 6)])
def test_no_name_in_common(tmp_path: Path, count: int, classifier: str) -> None:
    """As many classes, but others: until they were compared by name these rows were taken in silence."""
    source, start = network(4, classifier), network(count, classifier, seed=2)
    before = rows_of(start)
    report = load_pretrained(start, checkpoint(tmp_path, source, ROAD, False), [f"organ {k}" for k in range(count)])
    assert f"rows new     all {count}: the file has no class of these names (sky, road, car, tree)" in str(report)
    assert set(report.fresh) == set(before)
    assert_rows(start, source, before, [None] * count)


@pytest.mark.parametrize(("count", "official"), [(4, False), (3, True)])
def test_a_file_without_names(tmp_path: Path, count: int, official: bool) -> None:
    """As many rows are taken in their order, and said to be; of another number none can be told apart."""
    source, start = network(4), network(count, seed=2)
    before = rows_of(start)
    report = load_pretrained(start, checkpoint(tmp_path, source, None, official), ROAD[:count])
    told = "kept    all 4, in their order" if count == 4 else "new     all 3"
    assert f"rows {told}, because the file's classes have no names" in str(report)
    assert_rows(start, source, before, [0, 1, 2, 3] if count == 4 else [None] * 3)


def test_a_model_without_names(tmp_path: Path) -> None:
    source, start = network(4), network(4, seed=2)
    report = load_pretrained(start, checkpoint(tmp_path, source, ROAD, False))
    assert "rows kept    all 4, in their order, because the model's classes have no names" in str(report)
    assert_rows(start, source, rows_of(start), [0, 1, 2, 3])


def test_an_official_file_of_150_classes_is_ade20ks(tmp_path: Path) -> None:
    """Also for other data of 150 classes, where taking rows in their order would be wrong."""
    known = list(label_space("ade20k").classes)
    names = ["nothing", *known[:0:-1]]  # the last first; the first, wall, is not there
    source, start = network(150), network(150, seed=2)
    before = rows_of(start)
    report = load_pretrained(start, checkpoint(tmp_path, source, None, True), names)
    assert "rows kept    149: " in str(report)
    assert "rows new     1: nothing" in str(report)
    assert_rows(start, source, before, [None, *range(149, 0, -1)])


def test_a_plain_head_starts_an_ssa_one(tmp_path: Path) -> None:
    """What both have follows the names; the rest of the classifier starts fresh."""
    source, start = network(4, "linear"), network(2, "ssa", seed=2)
    table = start.classifier.spatial_prototypes.clone()
    report = load_pretrained(start, checkpoint(tmp_path, source, ROAD, False), ("tree", "sky"))
    assert "classifier.spatial_prototypes" in report.missing
    weight = start.classifier.conv_seg.weight
    assert torch.equal(weight, source.classifier.conv_seg.weight[[3, 0]])
    assert torch.equal(start.classifier.spatial_prototypes, table)


def test_half_precision_becomes_the_models(tmp_path: Path) -> None:
    source, start = network(4), network(2, seed=2)
    path = checkpoint(tmp_path, source.half(), ROAD, True)
    load_pretrained(start, path, ("tree", "sky"))
    weight = start.classifier.conv_seg.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.classifier.conv_seg.weight[[3, 0]].float())


# ---- classes that were never trained -----------------------------------------------------------------------------
@pytest.fixture
def tiny() -> Iterator[None]:
    with tiny_networks():
        yield


@pytest.mark.usefixtures("tiny")
def test_classes_that_were_never_trained_are_reported_until_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    path, other, small = (tmp_path / f"{name}.safetensors" for name in ("first", "other", "small"))
    save_model(path, build_model("seaformer_y", 2, "linear"), {"classes": ["sky", "road"]})
    open_file(path)
    assert "never trained" not in capsys.readouterr().err
    run_convert(path, other, classes="road,pole,car")
    assert read_header(other)[0]["untrained"] == ["pole", "car"]
    run_convert(other, small, deploy=True)
    for file in (other, small):
        open_file(file)
        said = f"warning: {file}: 2 of 3 classes have random weights, never trained: pole, car\n"
        assert said in capsys.readouterr().err
    run_convert(other, path, classes="sign,car,road")  # car moves with its random row
    assert read_header(path)[0]["untrained"] == ["sign", "car"]
    run_convert(path, other, classes="road,ROAD2")
    assert read_header(other)[0]["untrained"] == ["ROAD2"]


@pytest.mark.usefixtures("tiny")
def test_a_classifier_that_did_not_match_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("seaformer_y", 2, "linear")
    own = model.state_dict()
    state = {key: own[ours] for ours, key in official_keys(model).items()}
    kept = {key: value for key, value in state.items() if not key.endswith("conv_seg.bias")}
    for name, tensors in (("whole", state), ("partial", kept)):
        torch.save({"state_dict": tensors, "meta": {"CLASSES": ("sky", "road")}}, tmp_path / f"{name}.pth")
        destination = tmp_path / f"{name}.safetensors"
        run_convert(tmp_path / f"{name}.pth", destination, "seaformer_y", "linear", allow_partial=True)
    assert "untrained" not in read_header(tmp_path / "whole.safetensors")[0]
    assert read_header(tmp_path / "partial.safetensors")[0]["untrained"] == ["sky", "road"]
