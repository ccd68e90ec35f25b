"""`predict --where` and `--only`: which images get results, and which classes are in them."""

import json
from pathlib import Path

import numpy as np
import pytest
from calling import call
from PIL import Image
from predicting import CLASSES, PALETTE, files, labelled_images, picture, save_checkpoint, write

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.selection import DEEPEST, parse_choice, parse_condition, selection_of
from ssaseg.cli.scoring.inference import Prediction

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")
SHARES = {"car": 0.25, "person": 0.0, "traffic light": 0.05, "0": 0.7, "and": 0.0}


# ---- conditions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("car>0.01", True),
        ("car > 25%", False),
        ("car>=25%", True),
        ("car==.25 and person==0", True),
        ("person!=0 or 'traffic light'<=5e-2", True),
        ("not car>0.01", False),
        ("NOT (car>0.5 OR person>0)", True),
        ("car>0 or car>0 and person>0", True),  # `and` binds more
        ("(car>0 or car>0) and person>0", False),
        ("not person>0 and car>0.5", False),
        ("0.1<car<0.5", True),
        ("0.1<car<0.2", False),
        ("car>person", True),
        ('"0">0.5', True),  # a class whose name is a number
        ("'and'==0", True),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert parse_condition(text).holds(SHARES) is holds


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no condition"),
        ("car", "expected a comparison, such as >0.01, after 'car', got the end"),
        ("car=0.1", "not understood from '=0.1' on\nwrite == to compare"),
        ("car>", "expected a class or a number after '>', got the end"),
        (">0.1", "expected a class or a number at the start, got '>'"),
        ("car>5", "5: shares are from 0 to 1\nwrite 0.05 or 5%"),
        ("car>101%", "101%: shares are from 0 to 1"),
        ("0.1>0.2", "a comparison without a class"),
        ("traffic light>0", "after 'traffic', got 'light'; names with spaces: in quotes"),
        ("car>0 person>0", "expected `and` or `or` before 'person'"),
        ("car>0 && person>0", "expected `and` or `or` before '&&'"),
        ("(car>0", "expected ) after '0', got the end"),
        ("car>0)", "expected `and` or `or` before ')'"),
        ("car>0 and", "expected a class or a number after 'and', got the end"),
        ("'car>0", 'not understood from "\'car>0" on\nclose the quotes'),
        ("__import__('os').system('x')>0", "expected a comparison, such as >0.01, after '__import__', got '('"),
        ("car=\x1b[31m", "--where car=\\x1b[31m: not understood"),
        ("(" * 10**5, f"more than {DEEPEST} brackets"),
        ("not " * 10**5, f"more than {DEEPEST} brackets"),
    ],
)
def test_conditions_that_are_wrong(text: str, error: str) -> None:
    with pytest.raises(CommandError) as caught:
        selection_of(parse_choice(text, None), ["car", "person"])
    assert error in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("where", "only", "error"),
    [
        ("cat>0", None, "--where: the network has no class 'cat'\ndid you mean 'car'? classes: car, Person, car (2)"),
        ("person>0", None, "did you mean 'Person'?"),
        (None, "car,zebra", "--only: the network has no class 'zebra'\nclasses: "),
        (None, "", "--only '': no class"),
        (None, " , ", "--only ' , ': no class"),
    ],
)
def test_names_that_are_wrong(where: str | None, only: str | None, error: str) -> None:
    with pytest.raises(CommandError) as caught:
        selection_of(parse_choice(where, only), ["car", "Person", "car (2)"])
    assert error in str(caught.value)


def test_names_that_several_classes_have() -> None:
    classes = ["car", "tree, small", "car"]
    labels = np.array([[0, 0, 1, 2]], np.uint8)
    assert selection_of(parse_choice('"car (0)"==0.5 and "car (2)"==0.25', None), classes).holds(labels)
    for only, kept in (("car", [0, 0, 255, 2]), ('car (2),"tree, small"', [255, 255, 1, 2])):
        selection = selection_of(parse_choice(None, only), classes)
        drawn = selection.drawn(Prediction(labels, labels, None))
        assert drawn.labels.tolist() == [kept]
        assert drawn.coarse is not None
        assert drawn.coarse.tolist() == [kept]


# ---- the command -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: None) -> Path:
    """A folder with a checkpoint, images `in`, and their results without options in `all`."""
    place = tmp_path_factory.mktemp("selection")
    save_checkpoint(place / "tiny.safetensors", "linear", network="seaformer_y")
    for seed in range(5):
        write(place / f"in/{seed}.png", picture(40, 56, seed))
    call("predict", place / "tiny.safetensors", place / "in", "--out", place / "all", "--save", "index,shares,rle")
    return place


def index(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def shares_of(place: Path) -> dict[str, float]:
    """The share of one class in each image: a class that some images have more of than others."""
    rows = json.loads((place / "all/shares.json").read_text())
    return {row["image"]: row["shares"]["car"] for row in rows}


def test_only_images_for_which_the_condition_holds(place: Path, tmp_path: Path) -> None:
    shares = shares_of(place)
    limit = float(np.median(list(shares.values())))
    chosen = sorted(name for name, share in shares.items() if share > limit)
    assert 0 < len(chosen) < 5
    condition = f"car > {limit + 1e-6}"
    words = ("predict", place / "tiny.safetensors", place / "in", "--out", tmp_path, "--save", "index,shares,overlay")
    ended = call(*words, "--where", condition)
    assert ended.exit_code == 0
    left = 5 - len(chosen)
    assert "labelled 5 of 5 images in" in ended.stdout
    assert f"; --where left out {left}\n" in ended.stdout
    assert files(tmp_path) == sorted(
        [f"index/{name}" for name in chosen] + [f"overlay/{Path(name).stem}.jpg" for name in chosen] + ["shares.json"]
    )
    assert labelled_images(tmp_path / "shares.json") == set(chosen)
    np.testing.assert_array_equal(index(tmp_path / "index" / chosen[0]), index(place / "all/index" / chosen[0]))

    again = call(*words, "--where", condition, "--skip-existing")
    assert "labelled 0 of 5 images in" in again.stdout
    assert f"; {len(chosen)} were there already; --where left out {left} ({left} of them earlier)\n" in again.stdout

    # Another condition looks at the images again that had no result; a changed image is looked at again too.
    Image.fromarray(picture(40, 56, 77)).save(place / "in/9.png")
    other = call(*words, "--where", "car>=0", "--skip-existing")
    (place / "in/9.png").unlink()
    assert f"labelled {left + 1} of 6 images in" in other.stdout
    assert "; --where left out 0\n" in other.stdout


def test_an_image_that_changes_is_looked_at_again(place: Path, tmp_path: Path) -> None:
    image = write(tmp_path / "in/a.png", picture(40, 56, 0))
    words = ("predict", place / "tiny.safetensors", tmp_path / "in", "--out", tmp_path / "out", "--where", "car<0")
    call(*words)
    assert "labelled 0 of 1" in call(*words, "--skip-existing").stdout
    write(image, picture(41, 56, 1))
    assert "labelled 1 of 1" in call(*words, "--skip-existing").stdout
    assert files(tmp_path / "out") == []


def test_only_some_classes_in_results(place: Path, tmp_path: Path) -> None:
    save = "index,color,overlay,rle,shares,confidence"
    words = ("predict", place / "tiny.safetensors", place / "in", "--out", tmp_path, "--save", save, "--no-legend")
    ended = call(*words, "--only", "car, sky")
    assert ended.exit_code == 0, ended.output
    found = set()
    for seed in range(5):
        before, after = index(place / f"all/index/{seed}.png"), index(tmp_path / f"index/{seed}.png")
        kept = np.isin(before, [CLASSES.index("car"), CLASSES.index("sky")])
        np.testing.assert_array_equal(after, np.where(kept, before, 255))
        colours = np.array(Image.open(tmp_path / f"color/{seed}.png"))
        table = np.array([*PALETTE, *[[0, 0, 0]] * (256 - len(PALETTE))], np.uint8)
        np.testing.assert_array_equal(colours, table[after])
        overlay, image = np.array(Image.open(tmp_path / f"overlay/{seed}.jpg")), picture(40, 56, seed)[..., ::-1]
        error = np.abs(overlay.astype(int) - image)[~kept]
        assert error.size == 0 or np.median(error) <= 6, "no colour but for JPEG"
        found.update(np.unique(after).tolist())
    assert 255 in found
    rows = json.loads((tmp_path / "rle.json").read_text())
    whole = json.loads((place / "all/rle.json").read_text())
    assert rows == [row for row in whole if row["category"] in ("car", "sky")]
    assert (tmp_path / "shares.json").read_text() == (place / "all/shares.json").read_text()
    # The same classes in another order are the same results; others are not.
    assert "labelled 0 of 5" in call(*words, "--skip-existing", "--only", "sky,car").stdout
    assert "labelled 5 of 5" in call(*words, "--skip-existing", "--only", "sky").stdout


def test_images_without_the_class_have_no_old_objects(place: Path, tmp_path: Path) -> None:
    """An image whose classes are all left out has no entry in rle.json, loses its earlier ones, and is done."""
    labels = index(place / "all/index/0.png")
    absent = next((name for k, name in enumerate(CLASSES) if not (labels == k).any()), None)
    assert absent is not None
    words = ("predict", place / "tiny.safetensors", place / "in/0.png", "--out", tmp_path, "--save", "rle")
    call(*words)
    assert labelled_images(tmp_path / "rle.json") == {"0.png"}
    call(*words, "--only", absent)
    assert json.loads((tmp_path / "rle.json").read_text()) == []
    assert "labelled 0 of 1" in call(*words, "--only", absent, "--skip-existing").stdout
    assert "labelled 1 of 1" in call(*words, "--skip-existing").stdout


def test_a_wrong_condition_is_an_error_before_any_work(place: Path, tmp_path: Path) -> None:
    for options, error in (
        (("--where", "car>"), "expected a class or a number"),
        (("--where", "cra>0"), "did you mean 'car'?"),
        (("--only", "Car"), "did you mean 'car'?"),
    ):
        ended = call("predict", place / "tiny.safetensors", place / "in", "--out", tmp_path / "out", *options)
        assert ended.exit_code == 2
        assert error in ended.output
    assert not (tmp_path / "out").exists()
