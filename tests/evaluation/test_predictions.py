"""`ssaseg eval --predictions` against figures of other tools, and files that cannot be scored."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calling import call
from labelled import write_data, write_labels
from PIL import Image
from places import FIXTURES

from ssaseg.cli.evaluation.predictions import Reading, count_predicted, find_predictions
from ssaseg.cli.evaluation.protocols import Scored, protocol_scores
from ssaseg.datasets.pairs import PairDataset
from ssaseg.files.reading import read_file

STORED = np.load(FIXTURES / "prediction_figures.npz")
NAMES = ["sky", "road", "car"]


def unpack(folder: Path, kind: str) -> Path:
    """The stored PNGs as masks, images and predictions."""
    for index in range(3):
        for name, key in (("masks", "label"), ("labels", "pred")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{index}.png").write_bytes(STORED[f"{kind}_{key}{index}"].tobytes())
        with Image.open(folder / "masks" / f"{index}.png") as mask:
            (folder / "images").mkdir(exist_ok=True)
            Image.new("RGB", mask.size).save(folder / "images" / f"{index}.png")
    return folder


def scores(folder: Path, classes: list[str], reading: Reading, **keys: Any) -> tuple[Scored, dict[str, dict[str, Any]]]:
    dataset = PairDataset(folder / "images", folder / "masks", classes, **keys)
    scored = count_predicted(find_predictions(folder / "labels", dataset, len(dataset)), dataset, reading)
    return scored, {each["name"]: each for each in protocol_scores(scored)}


def test_figures_of_mmsegmentation_and_torchmetrics(tmp_path: Path) -> None:
    classes = [f"class{k}" for k in range(7)]
    folder = unpack(tmp_path, "mmseg")
    scored, found = scores(folder, classes, Reading(mask_ids=True), reduce_zero_label=True)
    for name, key in (("mmsegmentation", "mmseg"), ("mmsegmentation nan_to_num=0", "mmseg_zero")):
        for mean in ("mIoU", "mAcc", "aAcc"):  # float32 there
            assert found[name][mean] == pytest.approx(float(STORED[f"{key}_{mean}"]), abs=1e-5), (name, mean)
    assert found["torchmetrics JaccardIndex"]["mIoU"] == pytest.approx(100 * STORED["torchmetrics_jaccard"], abs=1e-4)
    assert [found[name]["counted"] for name in ("ssaseg", "labelled classes")] == [6, 5]
    assert scored.matrix[:, -1].sum() == 0
    for file in [*folder.glob("masks/*.png"), *folder.glob("labels/*.png"), *folder.glob("images/*.png")]:
        with Image.open(file) as picture:  # their MeanIoU knows no ignored pixels
            picture.crop((0, 0, picture.width, 10)).save(file)
    _, found = scores(folder, classes, Reading(mask_ids=True), reduce_zero_label=True)
    assert found["torchmetrics MeanIoU"]["mIoU"] == pytest.approx(100 * STORED["torchmetrics_miou"], abs=1e-4)


def test_figures_of_cityscapes_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = STORED["city_ids"].tolist()
    table = {raw: ids.index(raw) if raw in ids else 255 for raw in range(34)}
    folder = unpack(tmp_path, "city")
    reading = Reading(mask_ids=True, allow_void=True)
    scored, found = scores(folder, [str(raw) for raw in ids], reading, raw_to_train=table)
    assert found["Cityscapes"]["mIoU"] == pytest.approx(100 * STORED["city_mean"], abs=1e-9)
    np.testing.assert_allclose(scored.iou, 100 * STORED["city_iou"], atol=1e-9)
    assert scored.matrix[:, -1].sum() > 0
    assert "are predicted as no class; they count as wrong" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--allow-void counts them as wrong"):
        scores(folder, [str(raw) for raw in ids], Reading(mask_ids=True), raw_to_train=table)


# ---- the command -------------------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The recipe; right predictions but for one pixel are in `labels`."""
    rng = np.random.default_rng(0)
    maps = {name: rng.integers(0, 3, (12, 16)).astype(np.uint8) for name in ("a/1", "a/2", "b/3")}
    recipe = write_data(tmp_path / "data", maps, NAMES, palette=[[9, 9, 200], [200, 9, 9], [9, 200, 9]])
    wrong = maps["a/1"].copy()
    wrong[0, 0] = (wrong[0, 0] + 1) % 3
    write_labels(tmp_path / "labels", maps | {"a/1": wrong})
    return recipe


def score(data: Path, *options: str, folder: str = "labels") -> Any:
    return call("eval", "--predictions", data.parents[1] / folder, "--data", data, *options)


def test_a_folder_in_numbers(data: Path, tmp_path: Path) -> None:
    result = score(data, "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["protocols"][0]["aAcc"] == pytest.approx(100 * (1 - 1 / 576))
    assert (report["images"], [row["name"] for row in report["classes"]]) == (3, NAMES)
    sums = {
        f"{n}.png": hashlib.sha256(read_file(tmp_path / f"labels/{n}.png")).hexdigest() for n in ("a/1", "a/2", "b/3")
    }
    assert {each["name"]: each["sha256"] for each in report["files"]} == sums
    lines = "".join(f"{value}  {name}\n" for name, value in sums.items())
    assert report["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    for text in ("labels of files", "Cityscapes", "torchmetrics MeanIoU", report["sha256"], "95 % interval"):
        assert text in result.stdout
    assert json.loads(score(data, "--limit", "2", "--json", "-").stdout)["images"] == 2


def test_flat_folders_suffixes_and_files_of_others(data: Path, tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/3"):
        (tmp_path / "flat/index").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"flat/index/{name[2:]}_pred.png").write_bytes((tmp_path / f"labels/{name}.png").read_bytes())
    (tmp_path / "flat/index/\x1b[31m<b>_pred.png").write_bytes(b"not read")
    assert "found 1_pred.png: give --suffix" in score(data, folder="flat").stderr
    result = score(data, "--suffix", "_pred.png", folder="flat")
    assert result.exit_code == 0, result.stderr
    assert r"1 files belong to no image of this split, not scored: \x1b[31m<b>_pred.png" in result.stderr
    assert "\x1b" not in result.output


def spoil(kind: str, folder: Path) -> None:
    """Makes label file a/2.png unusable."""
    file = folder / "a/2.png"
    with Image.open(file) as picture:
        ids = np.array(picture)
    if kind == "size":
        Image.fromarray(ids[:, :-1]).save(file)
    elif kind == "turned":
        Image.fromarray(ids.T.copy()).save(file)
    elif kind == "missing":
        file.unlink()
    elif kind == "colours":
        Image.fromarray(np.stack([ids * 9, ids, ids], axis=2)).save(file)
    elif kind == "16 bit":
        Image.fromarray(ids.astype(np.uint16) + 300).save(file)
    elif kind == "damaged":
        file.write_bytes(file.read_bytes()[:60])
    elif kind in ("id", "void", "from one"):
        ids = ids + 1 if kind == "from one" else ids
        ids[0, 1] = {"id": 7, "void": 255, "from one": 3}[kind]
        Image.fromarray(ids.astype(np.uint8)).save(file)
    else:
        names = {"names": ["sky", "<b>\x1b[1m", "car"], "fewer": ["sky", "road"], "no names": [1]}[kind]
        (folder / "classes.json").write_text(json.dumps({"classes": names}))


@pytest.mark.parametrize(
    ("kind", "message", "fix"),
    [
        ("size", "a prediction of 15x12 pixels", "resize the logits"),
        ("turned", "a prediction of 12x16 pixels", "width and height are swapped"),
        ("missing", "1 of 3 images have no prediction: a/2", "expected a/2.png"),
        ("colours", "a mask of 3 channels", "replace each colour by its class id"),
        ("16 bit", "values 300..302 in a mask", "store ids in 8 bits"),
        ("damaged", "a/2.png", ""),
        ("id", "id 7 in 1 labelled pixels", "--mask-ids"),
        ("from one", "id 3 in ", "numbered from 1? Subtract 1"),
        ("void", "id 255 in 1 labelled pixels", "--allow-void counts them as wrong"),
        ("names", r"class 1 is '<b>\x1b[1m'; in the data 'road'", "give --data a recipe"),
        ("fewer", "2 classes; the data have 3", "give --data a recipe"),
        ("no names", "holds no class names", "correct or remove it"),
    ],
)
def test_files_that_cannot_be_scored(data: Path, tmp_path: Path, kind: str, message: str, fix: str) -> None:
    spoil(kind, tmp_path / "labels")
    result = score(data)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\\\\x", "\\x")
    assert fix in result.stderr
    assert "\x1b" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_a_palette_in_another_order(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels/b/3.png"
    with Image.open(file) as picture:
        ids = picture.convert("P")
    ids.putpalette([9, 9, 200, 9, 200, 9, 200, 9, 9])
    ids.save(file)
    result = score(data)
    assert result.exit_code == 2
    assert "id 1 (road) has the colour of car" in result.stderr
    assert "write class numbers as indices" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Missing argument 'FILE...'. Or give --predictions DIR"),
        (("--predictions", "{labels}"), "give --data RECIPE"),
        (("--predictions", "{labels}", "{file}"), "give either FILEs or --predictions"),
        (("--predictions", "{labels}", "--data", "{data}", "--flip"), "--flip: not with --predictions"),
        (("{file}", "--allow-void"), "--allow-void: only with --predictions"),
        (("--predictions", "{data}"), "is a file"),
    ],
)
def test_options_that_do_not_fit(data: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    file = tmp_path / "net.safetensors"
    file.touch()
    result = call("eval", *(word.format(labels=tmp_path / "labels", data=data, file=file) for word in words))
    assert result.exit_code == 2
    assert message in result.stderr
