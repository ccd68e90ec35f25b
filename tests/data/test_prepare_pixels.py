"""Masks as tools write them: colours with a table, black and white, several for one image. From `init`'s message by its
command to the ids that training reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from calling import call
from owndata import command_for, photo, prepared, read_all, save, truth
from PIL import Image

from ssaseg.datasets import DataError
from ssaseg.datasets.classnames import guess_labels, read_class_names
from ssaseg.datasets.conventions import recognise
from ssaseg.datasets.conventions.base import Item, Options, Source, Tree
from ssaseg.datasets.conventions.layer_classes import choose_classes
from ssaseg.datasets.conventions.layer_files import find_layers
from ssaseg.datasets.conventions.layers import LAYERS as LAYERS_KIND
from ssaseg.datasets.conventions.tables import find_tables, read_table
from ssaseg.datasets.prepare import plan_source

NAMES = ["background", "road", "tree, tall", "car"]
COLOURS = np.array([[0, 0, 0], [128, 64, 128], [107, 142, 35], [0, 0, 142]], np.uint8)
TRUTHS = {f"{number:03}": truth(4, number) for number in range(5)}
LABELMAP = "# label:color_rgb:parts:actions\n" + "".join(
    f"{name}:{','.join(map(str, colour))}::\n" for name, colour in zip(NAMES, COLOURS.tolist(), strict=True)
)
MAPILLARY = {
    "labels": [
        {"color": colour, "readable": name, "name": f"a--{number}", "evaluate": True}
        for number, (name, colour) in enumerate(zip(NAMES, COLOURS.tolist(), strict=True))
    ]
}
LINES = list(zip(NAMES, COLOURS.tolist(), strict=True))
TABLES = {
    "labelmap.txt": LABELMAP,
    "label_colors.txt": "".join(f"{r} {g} {b}\t\t{name}\n" for name, (r, g, b) in LINES),
    "label_colours.txt": "".join(f"{name}\t{r}\t{g}\t{b}\n" for name, (r, g, b) in LINES),
    "class_dict.csv": "name,r,g,b\n" + "".join(f'"{name}",{r},{g},{b}\n' for name, (r, g, b) in LINES),
    "classes.csv": "b,g,r,class\n" + "".join(f'{b},{g},{r},"{name}"\n' for name, (r, g, b) in LINES),
    "colors.csv": "id;name;color\n"
    + "".join(f"{i};{n};#{r:02X}{g:02x}{b:02x}\n" for i, (n, (r, g, b)) in enumerate(LINES)),
    "config_v1.2.json": json.dumps({"folders": {}, **MAPILLARY}),
    "dataset_meta.json": json.dumps(
        {"label_map": dict(enumerate(NAMES)), "segmentation_colors": COLOURS.tolist(), "background_label": "0"}
    ),
    "data.yaml": yaml.safe_dump({"names": dict(enumerate(NAMES)), "palette": COLOURS.tolist()}),
    "meta/palette.json": json.dumps(dict(LINES)),
}


def rgb(ids: np.ndarray) -> np.ndarray:
    return COLOURS[ids]


def lay_out(root: Path, mask: Callable[[Path, np.ndarray, int], None], suffix: str = ".png") -> None:
    for number, (name, ids) in enumerate(TRUTHS.items()):
        photo(root / f"JPEGImages/{name}.jpg")
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask(root / f"SegmentationClass/{name}{suffix}", ids, number)


def assert_same(labels: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert labels.keys() == expected.keys()
    for name, ids in expected.items():
        np.testing.assert_array_equal(labels[name], ids, err_msg=name)


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(TABLES[name])
    (tmp_path / "names.txt").write_text("road\ntree\n")
    (table,) = find_tables(Tree(tmp_path))
    assert table.file == tmp_path / name
    assert table.classes == NAMES
    assert table.palette == list(map(tuple, COLOURS.tolist()))
    assert table.ids == {colour: number for number, colour in enumerate(table.palette)}
    (tmp_path / "names.txt").unlink()
    names = read_class_names(tmp_path)[0]
    assert (names is None) == (
        name in ("colors.csv", "meta/palette.json")
    )  # of masks of ids, fewer files are looked at
    if names:
        assert list(names.names.values()) == NAMES
        assert list(names.colours.values()) == table.palette


def test_what_is_not_evaluated_is_ignored_in_masks_of_colours_and_of_ids(tmp_path: Path) -> None:
    labels = [*MAPILLARY["labels"], {"name": "void", "color": [9, 9, 9], "evaluate": False}]
    (tmp_path / "config.json").write_text(json.dumps({"labels": labels}))
    assert read_table(tmp_path / "config.json").ids[9, 9, 9] == 255
    names = read_class_names(tmp_path)[0]
    assert names is not None
    assert names.ignored == {4}
    found = guess_labels([0, 1, 2, 3, 4], names, None)
    assert found.classes == NAMES
    assert found.raw_to_train == {0: 0, 1: 1, 2: 2, 3: 3, 4: 255}


def test_rules_of_tables(tmp_path: Path) -> None:
    """Several colours of one class, one colour of several classes, pixels to ignore, numbers before names."""
    (tmp_path / "a.txt").write_text("0 sky 0 0 0\n1 road 9 9 9\n2 car 7 7 7\n")
    assert read_table(tmp_path / "a.txt").classes == ["sky", "road", "car"]
    (tmp_path / "b.txt").write_text("sky: 0, 0, 0\nroad: 9, 9, 9\nsky: 8, 8, 8\nlane: 9, 9, 9\n__ignore__: 1, 1, 1\n")
    table = read_table(tmp_path / "b.txt")
    assert table.classes == ["sky", "road"]
    assert table.ids == {(0, 0, 0): 0, (9, 9, 9): 1, (8, 8, 8): 0, (1, 1, 1): 255}
    assert len(table.notes) == 3
    labels = [{"name": "void", "color": [0, 0, 0], "evaluate": False}, *MAPILLARY["labels"][1:]]
    (tmp_path / "c.json").write_text(json.dumps({"labels": labels}))
    assert read_table(tmp_path / "c.json").ids[0, 0, 0] == 255
    assert read_table(tmp_path / "c.json").classes == NAMES[1:]
    for text in (
        "road\ntree\n",
        "road,1,2\ntree,3,4\n",
        "road,300,0,0\ntree,0,0,0\n",
        "name,r,g,b\nroad,1\ntree\n",
        "\0\0",
        "[1, 2]",
        "",
    ):
        (tmp_path / "d.txt").write_text(text)
        with pytest.raises(DataError, match=r"d\.txt"):
            read_table(tmp_path / "d.txt")


def test_colour_masks_with_alpha_and_a_table_below(tmp_path: Path) -> None:
    source = tmp_path / "my data"
    lay_out(source, lambda file, ids, number: save(file, rgb(ids), "RGBA" if number % 2 else "RGB"))
    (source / "meta").mkdir()
    (source / "meta/palette.json").write_text(TABLES["meta/palette.json"])
    (source / "config.json").write_text(json.dumps({"mean": [1, 2, 3], "std": [4, 5, 6]}))  # no table of these masks
    data, labels, said = prepared(source, tmp_path)
    assert list(data.classes) == NAMES
    assert np.array_equal(data.palette, COLOURS)
    assert_same(labels, TRUTHS)
    assert "palette.json" in said


def test_cvat_export_with_its_lists_and_objects(tmp_path: Path) -> None:
    source = tmp_path / "cvat"
    lay_out(source, lambda file, ids, _: save(file, rgb(ids)))
    for name, ids in TRUTHS.items():
        save(source / f"SegmentationObject/{name}.png", rgb((ids > 0).astype(np.uint8)))
    lists = source / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("000\n001\n003\n")
    (lists / "val.txt").write_text("002\n004\n")
    (source / "labelmap.txt").write_text(LABELMAP + "bus:0,60,100::\n")
    data, labels, _ = prepared(source, tmp_path)
    assert list(data.classes) == [*NAMES, "bus"]
    assert_same(labels, TRUTHS)
    assert sorted(file.name for file in (tmp_path / "out/masks/val").iterdir()) == ["002.png", "004.png"]
    first = source / "JPEGImages/000.jpg"
    assert (tmp_path / "out/images/train/000.jpg").samefile(first)
    with Image.open(tmp_path / "out/masks/train/000.png") as mask:
        assert mask.mode == "L"


def test_palettes_that_number_the_colours_in_another_order(tmp_path: Path) -> None:
    """The indices are no classes, and differ from file to file: only the colours are right."""

    def mask(file: Path, ids: np.ndarray, number: int) -> None:
        order = np.roll(np.arange(4), number)
        image = Image.fromarray(np.argsort(order).astype(np.uint8)[ids])
        image.putpalette(COLOURS[order].tobytes())
        image.save(file)

    lay_out(tmp_path / "data", mask)
    (tmp_path / "data/labelmap.txt").write_text(LABELMAP)
    _, labels, _ = prepared(tmp_path / "data", tmp_path)
    assert_same(labels, TRUTHS)


def test_palettes_in_the_order_of_the_table_are_read_directly(tmp_path: Path) -> None:
    def mask(file: Path, ids: np.ndarray, number: int) -> None:
        image = Image.fromarray(ids)
        image.putpalette(COLOURS.tobytes())
        image.save(file)

    lay_out(tmp_path / "data", mask)
    (tmp_path / "data/labelmap.txt").write_text(LABELMAP)
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml").exit_code == 0


def test_a_colour_that_is_not_in_the_table(tmp_path: Path) -> None:
    source = tmp_path / "data"
    lay_out(source, lambda file, ids, _: save(file, rgb(ids)))
    void = rgb(TRUTHS["003"])
    void[0, :7] = (224, 224, 192)
    save(source / "SegmentationClass/003.png", void)
    (source / "labelmap.txt").write_text(LABELMAP)
    words = command_for(source, tmp_path)
    words[words.index("--root") + 1] = str(tmp_path / "out")
    result = call(*words, "--workers", "0")
    assert result.exit_code == 2
    assert "003.png: colour #e0e0c0 (224, 224, 192) in 7 pixels" in result.stderr
    assert "labelmap.txt" in result.stderr
    other = tmp_path / "with-void.txt"
    other.write_text(LABELMAP + "__ignore__:224,224,192::\n")
    data, labels, _ = prepared(source, tmp_path, "--table", str(other))
    assert list(data.classes) == NAMES
    assert (labels["003"][0, :7] == 255).all()
    assert_same({**labels, "003": labels["003"][1:]}, {**TRUTHS, "003": TRUTHS["003"][1:]})


def test_a_table_without_the_commonest_colour_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, lambda file, ids, _: save(file, rgb(ids)))
    (tmp_path / "labels.csv").write_text("name,r,g,b\nroad,128,64,128\ntree,107,142,35\ncar,0,0,142\n")
    result = call("data", "init", tmp_path, "--out", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert "a table of 3 classes: labels.csv; not in it: #000000 " in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name,r,g,b\nstra\xdfe,128,64,128\nb,0,0,0\n".encode("latin-1"), "not UTF-8 text"),
        (
            b"name,r,g,b\n" + b"".join(b"c%d,%d,7,7\n" % (at, at % 256) for at in range(256)) + b"x,8,8,8\n",
            "255 classes",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    lay_out(tmp_path, lambda file, ids, _: save(file, rgb(ids)))
    (tmp_path / "class_dict.csv").write_bytes(content)
    result = call("data", "init", tmp_path, "--out", tmp_path / "a.yaml")
    assert "not this one: " in result.stderr
    assert reason in result.stderr


def test_colours_without_a_table_give_one_to_fill_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "data"
    lay_out(source, lambda file, ids, _: save(file, rgb(ids)))
    result = call("data", "init", source, "--out", "a.yaml")
    share = sum(float((ids == 0).mean()) for ids in TRUTHS.values()) / len(TRUTHS)
    assert result.exit_code == 2
    assert f"#000000 {share:.1%}" in result.stderr
    assert "--table classes.csv`" in result.stderr
    assert result.stdout.splitlines()[1] == "name,r,g,b"
    (tmp_path / "classes.csv").write_text(result.stdout.replace("class_0", "nothing"))
    data, labels, _ = prepared(source, tmp_path)
    assert list(data.classes) == ["nothing", "class_1", "class_2", "class_3"]
    np.testing.assert_array_equal(np.array(data.palette)[labels["001"]], rgb(TRUTHS["001"]))
    again = call("data", "prepare", "colours", "--source", source, "--root", "other")
    assert again.exit_code == 2
    assert again.stdout == result.stdout
    assert not (tmp_path / "other").exists()


# ---- black and white ---------------------------------------------------------------------------------------------

SHAPES = {name: (ids > 1).astype(np.uint8) for name, ids in TRUTHS.items()}
WHITE = {name: ids * np.uint8(255) for name, ids in SHAPES.items()}


def alpha_only(file: Path, white: np.ndarray, _: int) -> None:
    save(file, np.dstack([np.zeros((*white.shape, 3), np.uint8), white]))


def soft_png(file: Path, white: np.ndarray, _: int) -> None:
    blurred = white.copy()
    blurred[:, :-1] = np.where(white[:, :-1] < white[:, 1:], 100, blurred[:, :-1])
    noise = np.random.default_rng(1).integers(0, 4, white.shape)
    save(file, np.where(blurred == 255, 255 - noise, np.where(blurred == 0, noise, blurred)).astype(np.uint8))


def mixed(file: Path, white: np.ndarray, number: int) -> None:
    save(file, white, "1" if number % 2 else "L")


def ones_and_whites(file: Path, white: np.ndarray, number: int) -> None:
    save(file, white if number % 2 else white // 255)


def sixteen(file: Path, white: np.ndarray, _: int) -> None:
    save(file, white.astype(np.uint16) * 257)


def palettes(file: Path, white: np.ndarray, number: int) -> None:
    """In every other file 0 is white."""
    first = number % 2
    image = Image.fromarray(1 - white // 255 if first else white // 255)
    image.putpalette([255 * (index == (0 if first else 1)) for index in range(2) for _ in range(3)])
    image.save(file)


BINARY = {
    "palettes in two orders": (palettes, ".png"),
    "WebP": (lambda file, white, _: save(file, white, "RGB", quality=90), ".webp"),
    "three equal channels": (lambda file, white, _: save(file, white, "RGB"), ".png"),
    "JPEG": (lambda file, white, _: save(file, white, quality=95), ".jpg"),
    "JPEG in three channels": (lambda file, white, _: save(file, white, "RGB", quality=95), ".jpeg"),
    "soft edges": (soft_png, ".png"),
    "1 bit and 8 bits": (mixed, ".png"),
    "1 and 255": (ones_and_whites, ".png"),
    "16 bits": (sixteen, ".png"),
    "alpha": (alpha_only, ".png"),
    "grey with alpha": (lambda file, white, _: save(file, white, "LA"), ".png"),
    "some in colour mode": (lambda file, white, number: save(file, white, "RGB" if number == 3 else "L"), ".png"),
}


def lay_out_white(root: Path, write: Callable[[Path, np.ndarray, int], None], suffix: str) -> None:
    for number, (name, white) in enumerate(WHITE.items()):
        photo(root / f"images/{name}.png")
        (root / "gt").mkdir(exist_ok=True)
        write(root / f"gt/{name}{suffix}", white, number)


@pytest.mark.parametrize("kind", BINARY)
def test_black_and_white(tmp_path: Path, kind: str) -> None:
    lay_out_white(tmp_path, *BINARY[kind])
    tree = Tree(tmp_path)
    found = recognise(tree)
    assert found is not None
    assert found[0].kind == "binary"
    source = found[0].open_source(tree, Options())
    assert source.classes == ["background", "object"]
    assert_same({item.name: source.read(item) for item in source.items}, SHAPES)


@pytest.mark.parametrize("kind", ["three equal channels", "JPEG", "palettes in two orders"])
def test_black_and_white_from_the_message_to_training(tmp_path: Path, kind: str) -> None:
    lay_out_white(tmp_path / "data", *BINARY[kind])
    data, labels, _ = prepared(tmp_path / "data", tmp_path, "--background", "land")
    assert list(data.classes) == ["land", "object"]
    assert_same(labels, SHAPES)


@pytest.mark.parametrize("kind", ["1 bit and 8 bits", "1 and 255"])
def test_two_ways_to_store_white_are_read_alike(tmp_path: Path, kind: str) -> None:
    lay_out_white(tmp_path / "data", *BINARY[kind])
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml").exit_code == 0
    assert_same(read_all(tmp_path / "a.yaml")[1], SHAPES)


@pytest.mark.parametrize("names", ["", "name,r,g,b\nland,0,0,0\nroad,255,255,255\n"])
def test_8_bit_masks_of_0_and_255_are_read_directly(tmp_path: Path, names: str) -> None:
    lay_out_white(tmp_path / "data", lambda file, white, _: save(file, white), ".png")
    if names:
        (tmp_path / "data/class_dict.csv").write_text(names)
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml").exit_code == 0
    data, labels = read_all(tmp_path / "a.yaml")
    assert list(data.classes) == (["land", "road"] if names else ["class_0", "class_255"])
    assert_same(labels, SHAPES)


def test_255_is_not_ignored_where_it_is_the_object(tmp_path: Path) -> None:
    """A few pixels of other ids, which are no soft edges."""

    def mask(file: Path, white: np.ndarray, _: int) -> None:
        white = white.copy()
        white[0, 0] = 1
        save(file, white)

    lay_out_white(tmp_path / "data", mask, ".png")
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml")
    assert "more than any id but 0: read as a class" in result.stdout
    assert list(read_all(tmp_path / "a.yaml")[0].classes) == ["class_0", "class_1", "class_255"]


def test_what_is_not_black_and_white(tmp_path: Path) -> None:
    """Ids 0, 1 and 255 in one file: 255 is "ignored", and no command is proposed."""
    for name, ids in SHAPES.items():
        ids = ids.copy()
        ids[0] = 255
        photo(tmp_path / f"data/images/{name}.png")
        save(tmp_path / f"data/masks/{name}.png", ids)
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml").exit_code == 0
    result = call("data", "prepare", "binary", "--source", tmp_path / "data", "--root", tmp_path / "out")
    assert result.exit_code == 2
    assert "not black and white" in result.stderr
    assert not (tmp_path / "out").exists()


def test_names_of_black_and_white(tmp_path: Path) -> None:
    for name, white in WHITE.items():
        photo(tmp_path / f"data/images/{name}.png")
        save(tmp_path / f"data/masks/{name}.png", white, "RGB")
    (tmp_path / "data/class_dict.csv").write_text("name,r,g,b\nland,0,0,0\nroad,255,255,255\n")
    data, labels, _ = prepared(tmp_path / "data", tmp_path)
    assert list(data.classes) == ["land", "road"]
    assert_same(labels, SHAPES)


def test_class_ids_in_equal_channels(tmp_path: Path) -> None:
    lay_out(tmp_path / "data", lambda file, ids, number: save(file, ids + 3, "LA" if number % 2 else "RGB"))
    data, labels, _ = prepared(tmp_path / "data", tmp_path)
    assert list(data.classes) == ["class_3", "class_4", "class_5", "class_6"]
    assert_same(labels, TRUTHS)


# ---- several masks for one image ---------------------------------------------------------------------------------


def by_number(root: Path, name: str, ids: np.ndarray) -> None:
    """As datumaro exports Open Images: a counter, then the class. Road in two pieces."""
    road = ids == 1
    top = road.copy()
    top[road.nonzero()[0].mean().astype(int) :] = False
    parts = [(1, top), (1, road & ~top), *((value, ids == value) for value in (2, 3))]
    for number, (value, shown) in enumerate(part for part in parts if part[1].any()):
        save(root / f"masks/{name}_m{number}_{value:08}.png", shown.astype(np.uint8) * 255)


def by_word(root: Path, name: str, ids: np.ndarray) -> None:
    for value, word in enumerate(("bus", "car", "red_tree"), 1):
        save(root / f"masks/{name}_mask_{word}.png", (ids == value).astype(np.uint8) * 255, "RGB")


def by_folder(root: Path, name: str, ids: np.ndarray) -> None:
    for value, word in enumerate(("bus", "car", "red tree"), 1):
        save(root / f"masks/{word}/{name}.png", (ids == value).astype(np.uint8) * 255, "1")


def by_folder_in_jpeg(root: Path, name: str, ids: np.ndarray) -> None:
    for value, word in enumerate(("bus", "car", "red tree"), 1):
        save(root / f"masks/{word}/{name}.jpg", (ids == value).astype(np.uint8) * 255, quality=95)


def by_sibling(root: Path, name: str, ids: np.ndarray) -> None:
    for value, word in enumerate(("bus", "car", "red tree"), 1):
        save(root / f"{word}/{name}.png", (ids == value).astype(np.uint8))


LAYERS = {
    "number": (by_number, ["background", "class_1", "class_2", "class_3"]),
    "word": (by_word, ["background", "bus", "car", "red_tree"]),
    "folder": (by_folder, ["background", "bus", "car", "red tree"]),
    "folder, JPEG": (by_folder_in_jpeg, ["background", "bus", "car", "red tree"]),
    "sibling folders": (by_sibling, ["background", "bus", "car", "red tree"]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_mask_a_class(tmp_path: Path, kind: str) -> None:
    write, classes = LAYERS[kind]
    for name, ids in TRUTHS.items():
        photo(tmp_path / f"data/images/{name}.jpg")
        write(tmp_path / "data", name, ids)
    data, labels, _ = prepared(tmp_path / "data", tmp_path)
    assert list(data.classes) == classes
    assert_same(labels, TRUTHS)


# Files and the class of each mask; None: one mask an image; "": refused.
NAMED = {
    "a.jpg a_car.png a_road.png b.jpg b_car.png b_road.png": {"a_car": "car", "b_road": "road"},
    "a.jpg a_car_1.png a_car_2.png b.jpg b_car_1.png": {"a_car_1": "car", "a_car_2": "car", "b_car_1": "car"},
    "images/a.jpg images/b.jpg masks/a/car.png masks/a/road.png masks/b/car.png": {"car": "car", "road": "road"},
    "images/a.jpg images/b.jpg masks/a/1f.png masks/a/2f.png masks/b/3e.png": {"1f": "object", "3e": "object"},
    "images/a.jpg images/b.jpg masks/a_0.png masks/a_1.png masks/b_0.png": {"a_0": "object", "a_1": "object"},
    "images/a.jpg images/b.jpg masks/a_0.png masks/a_1.png masks/b_1.png": {"a_0": "class_0", "b_1": "class_1"},
    "images/a.jpg images/b.jpg masks/a_class1.png masks/a_class_2.png masks/b_class_1.png": "",
    "images/a.jpg masks/a_class_1.png masks/a_class_2.png": {"a_class_1": "class_1", "a_class_2": "class_2"},
    "img/train/a.jpg img/val/b.jpg gt/train/car/a.png gt/train/bus/a.png gt/val/car/b.png": {"b": "car"},
    "train_img/a.jpg val_img/b.jpg train_mask/a_car.png train_mask/a_bg.png val_mask/b_car.png": {"a_bg": "bg"},
    "images/a.jpg images/b.jpg masks/a_1.png masks/a_2.png masks/b_1.png masks/b_2.png": "",
    "a.jpg a_1stHO.png a_2ndHO.png b.jpg b_1stHO.png b_2ndHO.png": None,
    "images/a.jpg images/a_1.jpg masks/a.png masks/a_1.png": None,
    "images/a.jpg images/b.jpg masks/a.png masks/a_edge.png masks/b.png masks/b_edge.png": None,
    "images/a.jpg masks/a.png car/a.png road/a.png": None,
    "1._Original_Images/a._Training_Set/a.jpg 2._All_Segmentation_Groundtruths/a._Training_Set/1._Car/a_MA.tif "
    "2._All_Segmentation_Groundtruths/a._Training_Set/2._Bus/a_HE.tif": {"a_MA": "1._Car", "a_HE": "2._Bus"},
    "images_png/a.jpg mask_png/car/a.png mask_png/bus/a.png masks_vis/bus/a.png images_png/b.jpg mask_png/bus/b.png": {
        "b": "bus"
    },
    "images_1/0.jpg images_2/0.jpg masks_1/0.png masks_2/0.png": None,
    "images_1/0.jpg images_2/0.jpg masks_1/0_x.png masks_2/0_x.png": None,
    "train_01/img/0.jpg train_02/img/0.jpg train_01/gt/0_x.png train_02/gt/0_x.png": None,
    "s1/image/0.jpg s2/image/0.jpg s1/mask/0_car.png s1/mask/0_bus.png s2/mask/0_car.png": {"0_bus": "bus"},
    "images/a.jpg SegmentationClass/a.png SegmentationObject/a.png": None,
}


@pytest.mark.parametrize("files", NAMED)
def test_names_of_several_masks(tmp_path: Path, files: str) -> None:
    expected = NAMED[files]
    for file in files.split():
        save(tmp_path / file, np.full((4, 5), 99 if "jpg" in file else 255, np.uint8))
    tree = Tree(tmp_path)
    found = find_layers(tree)
    if expected is None:
        assert found is None
    elif expected == "":
        assert found is not None
        with pytest.raises(DataError, match="several masks"):
            choose_classes(tmp_path, found, Options())
    else:
        source = LAYERS_KIND.open_source(tree, Options())
        assert len({item.name for item in source.items}) == files.count("jpg")
        got = {file.stem: source.classes[train_id] for item in source.items for file, train_id in item.label}
        assert {stem: got[stem] for stem in expected} == expected


def test_one_mask_an_object_in_a_folder_of_each_image(tmp_path: Path) -> None:
    """As in Data Science Bowl 2018. The smaller of two that overlap is painted last, but both are one class."""
    for number, (name, ids) in enumerate(TRUTHS.items()):
        photo(tmp_path / f"data/stage1_train/{name}/images/{name}.png")
        for value in range(1, 4):
            save(
                tmp_path / f"data/stage1_train/{name}/masks/{number}f{value}a9.png",
                (ids == value).astype(np.uint8) * 255,
            )
    data, labels, _ = prepared(tmp_path / "data", tmp_path)
    assert list(data.classes) == ["background", "object"]
    assert_same(labels, {name: (ids > 0).astype(np.uint8) for name, ids in TRUTHS.items()})


def test_masks_whose_class_nobody_can_know_are_refused(tmp_path: Path) -> None:
    for name, ids in TRUTHS.items():
        photo(tmp_path / f"data/images/{name}.jpg")
        for value in range(1, 4):
            save(tmp_path / f"data/masks/{name}_{value}.png", (ids == value).astype(np.uint8) * 255)
    result = call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml")
    assert result.exit_code == 2
    assert "each image has several masks, up to 3, such as masks/000_1.png, masks/000_2.png" in result.stderr
    (tmp_path / "names.txt").write_text("road\ntree\ncar\n")
    words = ["data", "prepare", "layers", "--source", tmp_path / "data", "--table", tmp_path / "names.txt"]
    assert call(*words, "--root", tmp_path / "out", "--workers", "0").exit_code == 0
    assert (tmp_path / "out/class_dict.csv").read_text().splitlines()[2] == '"road",128,0,0'
    for name, ids in TRUTHS.items():
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / f"out/masks/{name}.png")), ids)


def test_masks_beside_pictures_of_them_are_not_layers(tmp_path: Path) -> None:
    for name, ids in SHAPES.items():
        photo(tmp_path / f"data/images/{name}.jpg")
        save(tmp_path / f"data/masks/{name}_mask.png", ids)
        save(tmp_path / f"data/masks/{name}_mask_vis.png", ids * 255)
    assert call("data", "init", tmp_path / "data", "--out", tmp_path / "a.yaml").exit_code == 0


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_second_run_goes_on_and_a_changed_source_is_refused(tmp_path: Path) -> None:
    source, out = tmp_path / "data", tmp_path / "out"
    lay_out(source, lambda file, ids, _: save(file, rgb(ids)))
    (source / "labelmap.txt").write_text(LABELMAP)
    words = ["data", "prepare", "colours", "--source", source, "--root", out, "--workers", "0"]
    assert call(*words).exit_code == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (out / "masks/002.png").unlink()
    again = call(*words)
    assert "1 masks made" in again.stdout
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert "all masks already existed" in call(*words).stdout
    (source / "labelmap.txt").write_text(LABELMAP + "bus:0,60,100::\n")
    refused = call(*words)
    assert refused.exit_code == 2
    assert "class_dict.csv: already exists, with other classes" in refused.stderr
    (source / "labelmap.txt").write_text(LABELMAP)
    (source / "JPEGImages/004.jpg").unlink()
    refused = call(*words)
    assert refused.exit_code == 2
    assert "not made from this source" in refused.stderr


def test_folders_that_are_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "da ta"
    lay_out(source, lambda file, ids, _: save(file, rgb(ids)))
    (source / "labelmap.txt").write_text(LABELMAP)
    words = ["data", "prepare", "colours", "--source", source]
    inside = call(*words, "--root", source / "new")
    assert inside.exit_code == 2
    assert "among the data" in inside.stderr
    assert "expected a new folder to write to: --root 'da ta-prepared'" in call(*words).stderr
    monkeypatch.chdir(source)
    assert command_for(source, tmp_path)[-1] == f"{source}-prepared"
    assert "neither a data set nor a kind" in call("data", "prepare", "colour", "--source", source).stderr
    assert not (source / "new").exists()


def test_two_images_of_one_name(tmp_path: Path) -> None:
    """In different splits they are kept apart; in one they are refused, both by name."""
    for split in ("train", "val"):
        photo(tmp_path / f"data/images/{split}/a.png")
        save(tmp_path / f"data/masks/{split}/a.png", WHITE["000"], "RGB")
    words = ["data", "prepare", "binary", "--source", tmp_path / "data", "--root", tmp_path / "out", "--workers", "0"]
    assert call(*words).exit_code == 0
    assert len(list((tmp_path / "out/masks").rglob("a.png"))) == 2
    photo(tmp_path / "data/images/train/a.jpg")
    refused = call(*words)
    assert refused.exit_code == 2
    assert "a.jpg" in refused.stderr
    assert "a.png" in refused.stderr


def test_names_of_a_source_are_checked(tmp_path: Path) -> None:
    def source(*names: str, classes: tuple[str, ...] = ("a", "b")) -> Source:
        items = [Item("all", name, tmp_path / f"{number}.jpg", None) for number, name in enumerate(names)]
        return Source(items, list(classes), lambda item: np.zeros((2, 2), np.uint8))

    with pytest.raises(DataError, match=r"0\.jpg and .*1\.jpg: two images of the same name"):
        plan_source(source("x/a", "x/a"), tmp_path / "out")
    for name in ("../a", "/a", "a\\b"):
        with pytest.raises(DataError, match="path"):
            plan_source(source(name), tmp_path / "out")
    for classes in (("a", "a"), ("", "b"), ("a\nb", "c"), tuple(map(str, range(256)))):
        with pytest.raises(DataError, match="expected"):
            plan_source(source("a", classes=classes), tmp_path / "out")
    odd = ('"quoted", name', "#hash", " _ ", "ß日本")
    plan = plan_source(source("a", classes=odd), tmp_path / "out")
    (tmp_path / "class_dict.csv").write_bytes(plan.texts[tmp_path / "out/class_dict.csv"])
    names, _ = read_class_names(tmp_path)
    assert names is not None
    assert list(names.names.values()) == [name.strip() for name in odd]


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    for name, white in WHITE.items():
        photo(tmp_path / f"data/images/{name}.png")
        save(tmp_path / f"data/masks/{name}.png", white[: 20 if name == "002" else None], "RGB")
    words = ["data", "prepare", "binary", "--source", tmp_path / "data", "--root", tmp_path / "out", "--workers", "0"]
    refused = call(*words)
    assert refused.exit_code == 2
    assert "002.png: mask of 32x20 pixels" in refused.stderr
    assert len(list((tmp_path / "out/masks").iterdir())) == 4


def test_help_names_every_kind() -> None:
    from ssaseg.datasets.conventions import CONVENTIONS

    shown = " ".join(call("data", "prepare", "--help").stdout.split())
    for convention in CONVENTIONS:
        assert f"{convention.kind} {convention.what}" in shown


@pytest.mark.parametrize("kind", ["coco_panoptic", "supervisely", "labelme", "via", "cvat", "kitti", "yolo"])
@pytest.mark.parametrize("table", [False, True])
def test_a_kind_that_the_folder_has_not_is_refused(tmp_path: Path, kind: str, table: bool) -> None:
    source = tmp_path / "data"
    source.mkdir()
    save(source / "a.png", rgb(TRUTHS["001"]))
    (tmp_path / "names.txt").write_text("a\nb\n")
    more = ("--table", tmp_path / "names.txt") if table else ()
    result = call("data", "prepare", kind, "--source", source, "--root", tmp_path / "out", *more)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("searching ")
    assert 2 <= len(result.stderr.splitlines()[1:]) <= 3
    assert not (tmp_path / "out").exists()


def test_kitti_is_recognised_where_no_names_say_what_its_ids_mean(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / f"training/image_2/{number}.png", rgb(TRUTHS["001"]))
        save(tmp_path / f"training/semantic/{number}.png", TRUTHS["001"] + 7)
    result = call("data", "init", tmp_path, "--out", tmp_path / "a.yaml")
    assert "ssaseg data prepare kitti --source " in result.stderr
    (tmp_path / "classes.txt").write_text("".join(f"name_{number}\n" for number in range(11)))
    assert call("data", "init", tmp_path, "--out", tmp_path / "a.yaml").exit_code == 0
