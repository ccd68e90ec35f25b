"""Conventions of outlines: the pixels of each, relatives of the usual layout, and what is refused.

One drawing is written in every convention; its truth is painted here, as Pillow fills polygons.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ssaseg.datasets import DataError
from ssaseg.datasets.conventions import recognise
from ssaseg.datasets.conventions.base import Options, Source, Tree
from ssaseg.datasets.conventions.cvat import _elements
from ssaseg.datasets.conventions.hints import advise, beside_masks, describe_json

HEIGHT, WIDTH = 30, 40
ROAD = [[5, 29], [15, 10], [25, 10], [36, 29]]
CAR = [[14, 18], [24, 18], [25, 26], [13, 26]]  # on the road, and smaller
NAMES = ["background", "road", "car"]


def truth(*outlines: tuple[list[list[int]], int], rest: int = 0) -> np.ndarray:
    canvas = Image.new("L", (WIDTH, HEIGHT), rest)
    for points, value in outlines:
        ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=value, outline=value)
    return np.array(canvas)


SCENE = truth((ROAD, 1), (CAR, 2))
EMPTY = np.zeros((HEIGHT, WIDTH), np.uint8)


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def image(file: Path, turned: bool = False) -> Path:
    """An image of WIDTH × HEIGHT. turned: as it is shown; stored on its side, with an EXIF orientation."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, **({"exif": exif} if turned else {}))
    return file


def source(root: Path, kind: str, **options: Any) -> Source:
    found = recognise(Tree(root))
    assert found is not None
    assert found[0].kind == kind
    return found[0].open_source(Tree(root), Options(**options))


def labels(found: Source) -> dict[tuple[str, str], np.ndarray]:
    read, items = pickle.loads(pickle.dumps((found.read, found.items)))  # as worker processes get them
    return {(item.split, item.name): read(item) for item in items}


def require(found: Source, expected: dict[tuple[str, str], np.ndarray]) -> None:
    read = labels(found)
    assert read.keys() == expected.keys()
    for key, label in read.items():
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, expected[key], err_msg=str(key))


def refused(root: Path, kind: str, *parts: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        labels(source(root, kind, **options))
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) <= 3


# ---- YOLO --------------------------------------------------------------------------------------------------------
def shares(number: int, points: list[list[int]]) -> str:
    return f"{number} " + " ".join(
        f"{value / side:.6f}" for x, y in points for value, side in ((x, WIDTH), (y, HEIGHT))
    )


OUTLINES = f"{shares(1, CAR)}\n{shares(0, ROAD)}\n"  # the smaller comes first, and lies on top


def yolo(root: Path, yaml: str, *folders: str, text: str = OUTLINES) -> Path:
    """Images a, with outlines, and b, with an empty text file, in each folder."""
    for folder in folders:
        for name, content in (("a", text), ("b", "")):
            file = image(root / folder / f"{name}.jpg")
            beside = f"/{folder}/".replace("/images/", "/labels/")
            write(root / beside.strip("/") / f"{file.stem}.txt", content)
    write(root / "data.yaml", yaml)
    return root


TWO = {("train", "a"): SCENE, ("train", "b"): EMPTY, ("val", "a"): SCENE, ("val", "b"): EMPTY}
PLAIN, BESIDE = ("images/train", "images/val"), ("train/images", "valid/images")
YOLO_LAYOUTS = {
    "plain": ("path: .\ntrain: images/train\nval: images/val\nnames: [road, car]", *PLAIN),
    "mapping": ("train: images/train\nval: images/val\nnames: {0: road, 1: car}", *PLAIN),
    "roboflow": ("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['road', 'car']", *BESIDE),
    "windows": ("path: C:\\data\\x\ntrain: images\\train\nval: images\\val\nnames: [road, car]", *PLAIN),
    "elsewhere": ("path: /home/u/x\ntrain: images/train\nval:\n  - images/val\nnames: [road, car]", *PLAIN),
    "absolute": ("train: /content/x/train/images\nval: /content/x/valid/images\nnames: [road, car]", *BESIDE),
    "test for val": ("train: images/train\nval: null\ntest: images/test\nnames: [road, car]", PLAIN[0], "images/test"),
    "no folders": ("nc: 2\nnames: [road, car]", *PLAIN),
}


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path: Path, layout: str) -> None:
    found = source(yolo(tmp_path, *YOLO_LAYOUTS[layout]), "yolo")
    assert found.classes == NAMES
    require(found, TWO)


def test_yolo_without_splits_or_text_file(tmp_path: Path) -> None:
    yolo(tmp_path, "train: images\nnames: [road, car]", "images")
    image(tmp_path / "images/more/c.png")
    found = source(tmp_path, "yolo")
    require(found, {("all", "a"): SCENE, ("all", "b"): EMPTY, ("all", "more/c"): EMPTY})
    assert any("without a text file" in note and "1" in note for note in found.notes)


def test_yolo_list_of_images_and_names_file(tmp_path: Path) -> None:
    yolo(tmp_path, "train: train.txt\nval: val.txt\nnames: [road, car]", "images")
    write(tmp_path / "train.txt", "./images/a.jpg\n")
    write(tmp_path / "val.txt", "D:\\x\\images\\b.jpg\n")
    require(source(tmp_path, "yolo"), {("train", "a"): SCENE, ("val", "b"): EMPTY})
    (tmp_path / "data.yaml").unlink()
    write(tmp_path / "classes.txt", "road\ncar\n")
    require(source(tmp_path, "yolo"), {("all", "a"): SCENE, ("all", "b"): EMPTY})


def test_yolo_background_option_and_class(tmp_path: Path) -> None:
    yolo(tmp_path, "train: images\nnames: [road, car]", "images")
    assert source(tmp_path, "yolo", background="rest").classes == ["rest", "road", "car"]
    found = source(tmp_path, "yolo", background="car")
    assert found.classes == ["road", "car"]
    np.testing.assert_array_equal(found.read(found.items[0]), truth((ROAD, 0), (CAR, 1), rest=1))


def test_yolo_slightly_outside_is_moved_to_the_edge(tmp_path: Path) -> None:
    text = "0 -0.01 -0.02 1.03 0 1.0 1.04 0 1"
    yolo(tmp_path, "train: images\nnames: [road, car]", "images", text=text)
    assert (source(tmp_path, "yolo").read(source(tmp_path, "yolo").items[0]) == 1).all()


@pytest.mark.parametrize(
    ("yaml", "text", "parts"),
    [
        ("names: [road, car]", "0 0.5 0.5 0.2 0.2\n", ["boxes", "labels/a.txt"]),
        ("names: [road, car]", OUTLINES + "0 0.5 0.5 0.2 0.2\n", ["a.txt: line 3", "five numbers: a box"]),
        ("names: [road, car]", "0 5 9 12 9 12 20\n", ["line 1", "divide pixels by the size"]),
        ("names: [road, car]", "2 0 0 1 0 1 1\n", ["class 2", "0..1"]),
        ("names: [road, car]", "0 0 0 1 0 1 1 0\n", ["8 numbers"]),
        ("names: [road, car]", OUTLINES + "0 a b\n", ["line 3", "expected numbers"]),
        ("names: {0: road, 2: car}", OUTLINES, ["data.yaml", "without gaps"]),
        ("names: [car, car]", OUTLINES, ["twice"]),
        ("kpt_shape: [17, 3]\nnames: [road, car]", OUTLINES, ["key points"]),
    ],
)
def test_yolo_refused(tmp_path: Path, yaml: str, text: str, parts: list[str]) -> None:
    refused(yolo(tmp_path, f"train: images\n{yaml}", "images", text=text), "yolo", *parts)


def test_yolo_two_splits_never_get_one_folder_by_chance(tmp_path: Path) -> None:
    yolo(tmp_path, "train: /a/one/images\nval: /a/two/images\nnames: [road, car]", "images")
    refused(tmp_path, "yolo", "both fit images")


def test_yolo_aliases_are_not_expanded(tmp_path: Path) -> None:
    yolo(tmp_path, "a: &a [x, x]\ntrain: images\nnames: *a", "images")
    assert recognise(Tree(tmp_path)) is None


# ---- labelme -----------------------------------------------------------------------------------------------------
def png64(bits: np.ndarray, mode: str = "L", compressed: bool = False) -> str:
    file = io.BytesIO()
    picture = Image.fromarray(bits.astype(np.uint8) * (255 if mode != "P" else 1))
    if mode == "P":  # as Supervisely's SDK writes them: index 0 is transparent
        picture.putpalette([0, 0, 0, 255, 255, 255])
        picture.save(file, "PNG", transparency=0)
    else:
        picture.convert(mode).save(file, "PNG")
    data = zlib.compress(file.getvalue()) if compressed else file.getvalue()
    return base64.b64encode(data).decode()


def shape(label: str, points: Any, kind: str | None = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def labelme(file: Path, name: str, *shapes: dict[str, Any], **more: Any) -> Path:
    content = {"version": "5.4.1", "shapes": list(shapes), "imagePath": name, "imageData": None}
    return write(file, content | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more)


def test_labelme_shapes_and_order(tmp_path: Path) -> None:
    """A later shape lies on an earlier one, also where it is larger; the order of classes is that of labels.txt."""
    write(tmp_path / "labels.txt", "__ignore__\n_background_\nroad\ncar\n")
    image(tmp_path / "a.jpg")
    labelme(tmp_path / "a.json", "a.jpg", shape("road", ROAD, None), shape("car", CAR))
    image(tmp_path / "b.jpg")
    hidden = [
        shape("car", CAR),
        shape("road", ROAD),
        shape("__ignore__", CAR),
        shape("_background_", [[0, 0], [9, 29]], "rectangle"),
    ]
    labelme(tmp_path / "b.json", "b.jpg", *hidden)
    found = source(tmp_path, "labelme")
    assert found.classes == NAMES
    expected = truth((ROAD, 1), (CAR, 255))
    expected[:, :10] = 0
    require(found, {("all", "a"): SCENE, ("all", "b"): expected})


def test_labelme_kinds_of_shapes(tmp_path: Path) -> None:
    bits = np.zeros((4, 5), bool)
    bits[1:3, 1:4] = True
    drawn: dict[str, tuple[dict[str, Any], Callable[[ImageDraw.ImageDraw], None]]] = {
        "circle": (shape("x", [[20, 15], [20, 21]], "circle"), lambda d: d.ellipse((14, 9, 26, 21), fill=1, outline=1)),
        "point": (shape("x", [[20, 15]], "point"), lambda d: d.ellipse((15, 10, 25, 20), fill=1, outline=1)),
        "line": (shape("x", [[5, 5], [30, 20]], "line"), lambda d: d.line([(5, 5), (30, 20)], fill=1, width=10)),
        "linestrip": (
            shape("x", [[5, 5], [30, 5], [30, 25]], "linestrip"),
            lambda d: d.line([(5, 5), (30, 5), (30, 25)], fill=1, width=10),
        ),
        "rectangle": (shape("x", [[30, 20], [5, 5.5]], "rectangle"), lambda d: d.rectangle((5, 5.5, 30, 20), fill=1)),
        "mask": (
            shape("x", [[3.0, 2.0], [7.0, 5.0]], "mask", mask=png64(bits)),
            lambda d: d.rectangle((4, 3, 6, 4), fill=1),
        ),
    }
    for name, (each, _) in drawn.items():
        image(tmp_path / f"{name}.png")
        labelme(tmp_path / f"{name}.json", f"{name}.png", each)
    expected = {}
    for name, (_, draw) in drawn.items():
        canvas = Image.new("L", (WIDTH, HEIGHT), 0)
        draw(ImageDraw.Draw(canvas))
        expected["all", name] = np.array(canvas)
        assert expected["all", name].any()
    require(source(tmp_path, "labelme"), expected)


def test_labelme_splits_paths_and_names(tmp_path: Path) -> None:
    """JSON files apart from the images, with backslashes and `..`; names as they are, in alphabetical order."""
    for split in ("train", "val"):
        image(tmp_path / "images" / split / "a.jpg")
        shapes = shape("car-1", CAR), shape("road", ROAD)
        labelme(tmp_path / "json" / split / "a.json", f"..\\..\\images\\{split}\\a.jpg", *shapes)
    image(tmp_path / "images/train/unlabelled.jpg")
    found = source(tmp_path, "labelme")
    assert found.classes == ["background", "car-1", "road"]
    label = truth((CAR, 1), (ROAD, 2))
    require(found, {("train", "a"): label, ("val", "a"): label})
    assert any("without a JSON file" in note and "unlabelled" in note for note in found.notes)


@pytest.mark.parametrize(
    ("shapes", "more", "parts"),
    [
        ([shape("car", CAR)], {"imageWidth": 41}, ["a.jpg", "40x30", "expected 41x30"]),
        ([shape("car", CAR)], {"imageWidth": 30, "imageHeight": 40}, ["EXIF"]),
        ([shape("car", CAR)], {"imagePath": "b.jpg", "imageData": "AAAA"}, ["only inside the file"]),
        ([shape("car", CAR, "spline")], {}, ["spline", "shape 0"]),
        ([shape("car", CAR[:2])], {}, ["2 points"]),
        ([shape("car", [[0, 0], [1, 1], [0, 1e30]])], {}, ["1e+30"]),
        ([shape("car", [[0, 0], [1, 1], [0, float("nan")]])], {}, ["nan"]),
        ([shape("car", [[0, 0], [4, 4]], "mask", mask=png64(np.ones((4, 4))))], {}, ["4x4", "5x5"]),
        ([shape("car", [[0, 0], [4, 4]], "mask", mask="AAAA")], {}, ["not a PNG"]),
        ([shape("car", [[0, 0], [4, 4]], "mask", mask=png64(np.ones((900, 900))))], {}, ["bitmap"]),
        ([shape("", CAR)], {}, ["label is ''"]),
        ([{"label": "car"}], {}, ["an outline None"]),
    ],
)
def test_labelme_refused(tmp_path: Path, shapes: list[Any], more: dict[str, Any], parts: list[str]) -> None:
    image(tmp_path / "a.jpg")
    name = "b.json" if "imagePath" in more else "a.json"
    labelme(tmp_path / name, "a.jpg", *shapes, **more)
    refused(tmp_path, "labelme", *parts)


def test_labelme_class_that_labels_txt_does_not_have(tmp_path: Path) -> None:
    write(tmp_path / "labels.txt", "road\n")
    image(tmp_path / "a.jpg")
    labelme(tmp_path / "a.json", "a.jpg", shape("car", CAR))
    refused(tmp_path, "labelme", "'car'", "labels.txt")


def test_outlines_follow_the_image_as_it_is_shown(tmp_path: Path) -> None:
    """labelme shows an image with its EXIF orientation, as `read_image` does."""
    image(tmp_path / "a.jpg", turned=True)
    labelme(tmp_path / "a.json", "a.jpg", shape("road", ROAD), shape("car", CAR))
    require(source(tmp_path, "labelme"), {("all", "a"): truth((ROAD, 2), (CAR, 1))})


# ---- Supervisely -------------------------------------------------------------------------------------------------
BOMB = base64.b64encode(zlib.compress(bytes(2**24))).decode()  # 16 KiB that become 16 MiB


def figure(title: str, kind: str, exterior: Any = None, interior: Any = (), **more: Any) -> dict[str, Any]:
    points = {} if exterior is None else {"points": {"exterior": exterior, "interior": interior}}
    return {"classTitle": title, "geometryType": kind, **points, **more}


def supervisely(root: Path, dataset: str, name: str, *objects: dict[str, Any], suffix: str = ".jpg.json") -> None:
    image(root / dataset / "img" / f"{name}.jpg")
    content = {"size": {"height": HEIGHT, "width": WIDTH}, "objects": list(objects)}
    write(root / dataset / "ann" / f"{name}{suffix}", content)
    classes = [
        {"title": "road", "shape": "any", "color": "#804080"},
        {"title": "car", "shape": "any", "color": "#00008E"},
    ]
    write(root / "meta.json", {"classes": classes, "tags": []})


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGBA"])
def test_supervisely_bitmap_and_hole(tmp_path: Path, mode: str) -> None:
    car = truth((CAR, 1))[18:27, 13:26]
    picture = car * np.ones((1, 1), np.uint8)
    bitmap = {"data": png64(picture, mode if mode != "RGBA" else "L", True), "origin": [13, 18]}
    if mode == "RGBA":
        rgba = io.BytesIO()
        Image.fromarray(np.dstack([np.full((*car.shape, 3), 255, np.uint8), car * 255])).save(rgba, "PNG")
        bitmap["data"] = base64.b64encode(zlib.compress(rgba.getvalue())).decode()
    supervisely(tmp_path, "ds", "a", figure("road", "polygon", ROAD), figure("car", "bitmap", bitmap=bitmap))
    supervisely(tmp_path, "ds", "b", figure("road", "polygon", ROAD, [CAR]), suffix=".json")
    supervisely(tmp_path, "ds", "c", figure("car", "rectangle", [[9, 9], [3, 4]]))
    found = source(tmp_path, "supervisely")
    assert found.classes == NAMES
    assert found.palette == [(0, 0, 0), (128, 64, 128), (0, 0, 142)]
    rectangle = EMPTY.copy()
    rectangle[4:10, 3:10] = 2
    require(found, {("all", "a"): SCENE, ("all", "b"): truth((ROAD, 1), (CAR, 0)), ("all", "c"): rectangle})


def test_supervisely_datasets_are_splits_only_by_their_names(tmp_path: Path) -> None:
    for name in ("train", "val"):
        supervisely(tmp_path / "splits", name, "a", figure("road", "polygon", ROAD), figure("car", "polygon", CAR))
    require(source(tmp_path / "splits", "supervisely"), {("train", "a"): SCENE, ("val", "a"): SCENE})
    for name in ("one", "two"):
        supervisely(tmp_path / "all", name, "a", figure("road", "polygon", ROAD), figure("car", "polygon", CAR))
    found = source(tmp_path / "all", "supervisely")
    assert [(item.split, item.name) for item in found.items] == [("all", "one/img/a"), ("all", "two/img/a")]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        (figure("tree", "polygon", ROAD), ["'tree'", "meta.json"]),
        (figure("road", "line", ROAD), ["'line'"]),
        (figure("road", "bitmap", bitmap={"data": base64.b64encode(b"x").decode(), "origin": [0, 0]}), ["not a PNG"]),
        (figure("road", "bitmap", bitmap={"data": png64(np.ones((31, 8)), "P", True), "origin": [0, 0]}), ["8x31"]),
        (figure("road", "bitmap", bitmap={"data": BOMB, "origin": [0, 0]}), ["not a PNG"]),
        (figure("road", "bitmap"), ["outline"]),
    ],
)  # fmt: skip
def test_supervisely_refused(tmp_path: Path, entry: dict[str, Any], parts: list[str]) -> None:
    supervisely(tmp_path, "ds", "a", entry)
    refused(tmp_path, "supervisely", "object 0", *parts)


# ---- VIA ---------------------------------------------------------------------------------------------------------
def region(shape: str, attributes: Any = None, **numbers: Any) -> dict[str, Any]:
    return {"shape_attributes": {"name": shape, **numbers}, "region_attributes": attributes or {}}


def xy(points: list[list[int]]) -> dict[str, list[int]]:
    return {"all_points_x": [x for x, _ in points], "all_points_y": [y for _, y in points]}


def via(file: Path, *regions: dict[str, Any], form: str = "list", folder: Path | None = None) -> None:
    entry: dict[str, Any] = {"filename": "a.jpg", "size": 1000, "file_attributes": {}}
    entry["regions"] = dict(enumerate(regions)) if form == "dict" else list(regions)
    image((folder or file.parent) / "a.jpg")
    content = {"a.jpg1000": entry}
    write(
        file,
        {"_via_settings": {}, "_via_img_metadata": content, "_via_attributes": {}} if form == "project" else content,
    )


@pytest.mark.parametrize("form", ["list", "dict", "project"])
@pytest.mark.parametrize("value", ["text", "checkbox"])
def test_via_forms(tmp_path: Path, form: str, value: str) -> None:
    def kind(name: str) -> Any:
        return {"class": {name: True, "other": False} if value == "checkbox" else name, "remark": ""}

    regions = region("polygon", kind("road"), **xy(ROAD)), region("polyline", kind("car"), **xy(CAR))
    for split in ("train", "val"):
        via(tmp_path / split / "via_region_data.json", *regions, form=form)
    found = source(tmp_path, "via")
    assert found.classes == ["background", "car", "road"]
    label = truth((ROAD, 2), (CAR, 1))
    require(found, {("train", "a"): label, ("val", "a"): label})


def test_via_shapes_without_attribute(tmp_path: Path) -> None:
    regions = [region("rect", x=2, y=3, width=5, height=6), region("circle", cx=20, cy=15, r=5)]
    via(tmp_path / "via.json", *regions, region("ellipse", cx=33, cy=20, rx=6, ry=3, theta=np.pi / 2))
    found = source(tmp_path, "via")
    assert found.classes == ["background", "object"]
    (label,) = labels(found).values()
    assert label[3:10, 2:8].all()
    assert not label[2, :10].any()
    for (x, y), (rx, ry) in (((20, 15), (5, 5)), ((33, 20), (3, 6))):  # turned by a quarter
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        distance = ((columns - x) / rx) ** 2 + ((rows - y) / ry) ** 2
        near = (abs(columns - x) <= rx + 2) & (abs(rows - y) <= ry + 2)
        assert label[distance < 0.6].all()
        assert not label[near & (distance > 1.8)].any()


@pytest.mark.parametrize(
    ("regions", "parts"),
    [
        ([region("polygon", {"kind": "x", "size": "big"}, **xy(CAR))], ["2 attributes", "'kind'", "'size'"]),
        ([region("polygon", {"kind": "x"}, **xy(CAR)), region("polygon", **xy(ROAD))], ["1 of 2 regions", "'kind'"]),
        ([region("point", {"kind": "x"}, cx=1, cy=2)], ["'point'", "a.jpg: region 0"]),
        ([region("circle", {"kind": "x"}, cx=1, cy=2, r="big")], ["circle"]),
        ([region("polygon", {"kind": "x"}, all_points_x=[1, 2, 3], all_points_y=[1, 2])], ["an outline None"]),
    ],
)
def test_via_refused(tmp_path: Path, regions: list[dict[str, Any]], parts: list[str]) -> None:
    via(tmp_path / "via.json", *regions)
    refused(tmp_path, "via", *parts)


def test_via_table_chooses_among_attributes(tmp_path: Path) -> None:
    table = write(tmp_path / "names.txt", "road\ncar\n")
    drawn = (("road", ROAD), ("car", CAR))
    regions = [region("polygon", {"kind": kind, "size": "big"}, **xy(points)) for kind, points in drawn]
    via(tmp_path / "data/via.json", *regions)
    found = source(tmp_path / "data", "via", table=table)
    assert found.classes == NAMES
    require(found, {("all", "a"): SCENE})
    via(tmp_path / "data/via.json", region("polygon", {"kind": "road"}, **xy(ROAD)))
    assert source(tmp_path / "data", "via", table=table).classes == NAMES  # the table's, with those without a region
    table = write(tmp_path / "names.txt", "car\nsky\n")
    refused(tmp_path / "data", "via", "kind", "road", "names.txt", table=table)
    via(tmp_path / "data/via.json", region("polygon", **xy(ROAD)))
    refused(tmp_path / "data", "via", "no attribute", "names.txt", table=table)


# ---- CVAT --------------------------------------------------------------------------------------------------------
HEAD = (
    "<?xml version='1.0'?><annotations><version>1.1</version><meta><job><labels>"
    "<label><name>road</name><color>#804080</color></label><label><name>car</name><color>#00008e</color></label>"
    "</labels></job></meta>"
)


def cvat(root: Path, *shapes: str, head: str = HEAD, subsets: tuple[str, ...] = ("",)) -> Path:
    text = head
    for subset in subsets:
        image(root / "images" / subset / "a.jpg")
        inside = f'subset="{subset}" ' if subset else ""
        text += f'<image id="0" name="a.jpg" {inside}width="{WIDTH}" height="{HEIGHT}">{"".join(shapes)}</image>'
    return write(root / "annotations.xml", f"{text}</annotations>")


def run_text(bits: np.ndarray) -> str:
    """Run lengths of a mask whose first pixel is outside."""
    return ", ".join(str(len(list(run))) for _, run in groupby(bits.ravel().tolist()))


def test_cvat_order_mask_and_box(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (5, 7)).astype(np.uint8)
    bits[0, 0] = 0
    mask = f'<mask label="car" z_order="1" left="3" top="2" width="7" height="5" rle="{run_text(bits)}"></mask>'
    box = '<box label="road" z_order="0" xtl="0" ytl="0" xbr="20" ybr="20"></box>'
    line = '<polyline label="road" points="0,0;5,5"></polyline>'
    cvat(tmp_path, mask, box, line, subsets=("Train", "Validation"))
    found = source(tmp_path, "cvat")
    assert found.classes == NAMES
    assert found.palette == [(0, 0, 0), (128, 64, 128), (0, 0, 142)]
    expected = EMPTY.copy()
    expected[:20, :20] = 1  # the box lies below the mask, although it comes later
    expected[2:7, 3:10][bits == 1] = 2
    require(found, {("train", "a"): expected, ("val", "a"): expected})
    assert any("2 polyline" in note for note in found.notes)


def test_cvat_polygon_is_within_a_pixel_of_its_edge(tmp_path: Path) -> None:
    cvat(tmp_path, *(f'<polygon label="{name}" points="{";".join(f"{x}.00,{y}.00" for x, y in points)}"></polygon>'
                     for name, points in (("road", ROAD), ("car", CAR))))  # fmt: skip
    (label,) = labels(source(tmp_path, "cvat")).values()
    inner = np.array(Image.fromarray((SCENE == 2).astype(np.uint8)))
    assert (label[20:25, 15:24] == 2).all()
    assert abs(int((label == 2).sum()) - int(inner.sum())) < 40
    assert abs(int((label == 1).sum()) - int((SCENE == 1).sum())) < 60


@pytest.mark.parametrize(
    ("shapes", "head", "parts"),
    [
        (['<mask label="car" left="0" top="0" width="3" height="3" rle="1, 2"/>'], HEAD, ["3 pixels", "expected 9"]),
        (['<mask label="car" left="39" top="0" width="3" height="3" rle="9"/>'], HEAD, ["inside 40x30"]),
        (['<polygon label="car" points="1,2;3"/>'], HEAD, ["polygon of 3 numbers"]),
        (['<box label="car" xtl="a"/>'], HEAD, ["xtl='a'"]),
        (['<mask label="car" left="nan" top="0" width="3" height="3" rle="9"/>'], HEAD, ["left='nan'"]),
        ([], HEAD.replace("<annotations>", "<!DOCTYPE x [<!ENTITY a 'b'>]><annotations>"), ["DOCTYPE"]),
        (["<polygon"], HEAD, ["not whole XML"]),
        (['<track id="0"/>'], HEAD, ["video"]),
    ],
)
def test_cvat_refused(tmp_path: Path, shapes: list[str], head: str, parts: list[str]) -> None:
    cvat(tmp_path, *shapes, head=head)
    refused(tmp_path, "cvat", "annotations.xml", *parts)


# ---- COCO panoptic -----------------------------------------------------------------------------------------------
def test_cvat_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    one = f'<image name="a.jpg" width="40" height="30"><polygon label="road" points="{"1,2;" * 100}3,4"/></image>\n'
    file = write(tmp_path / "annotations.xml", f"{HEAD}{one * 2000}</annotations>")
    tracemalloc.start()
    count = sum(element.tag == "image" for element in _elements(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < file.stat().st_size / 4


def test_cvat_entities_are_found_between_two_blocks(tmp_path: Path) -> None:
    before = "<!--" + "x" * (2**14 - 12) + "-->"  # blocks of 16 KiB are read
    file = write(tmp_path / "annotations.xml", f"{before}<!DOCTYPE a><annotations></annotations>")
    assert file.read_bytes()[2**14 - 5 : 2**14 + 4] == b"<!DOCTYPE"
    with pytest.raises(DataError, match="DOCTYPE"):
        list(_elements(file))


def test_panoptic_category_that_cannot_be_one(tmp_path: Path) -> None:
    for category in (-1, 10**12):
        panoptic(tmp_path, [{"id": 5, "category_id": category}], np.full((HEIGHT, WIDTH), 5))
        refused(tmp_path, "coco_panoptic", "category_id")


def panoptic(root: Path, segments: list[dict[str, int]], ids: np.ndarray, split: str = "train") -> Path:
    image(root / f"{split}2017" / "a.png")  # as its segments: in another folder
    folder = root / "annotations" / f"panoptic_{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.dstack([ids & 255, ids >> 8 & 255, ids >> 16]).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 90, "name": "road"}, {"id": 7, "name": "car"}],
    }
    return write(folder.with_suffix(".json"), content)


SEGMENTS = [{"id": 70000, "category_id": 90, "iscrowd": 1}, {"id": 256, "category_id": 7, "iscrowd": 0}]


def test_panoptic_ids_crowds_and_unlabelled(tmp_path: Path) -> None:
    ids = np.array([0, 70000, 256])[SCENE]
    for split in ("train", "val"):
        panoptic(tmp_path, SEGMENTS, ids, split)
    found = source(tmp_path, "coco_panoptic")
    assert found.classes == ["car", "road"]
    expected = np.array([255, 1, 0], np.uint8)[SCENE]
    require(found, {("train", "a"): expected, ("val", "a"): expected})
    other = source(tmp_path, "coco_panoptic", background="void")
    assert other.classes == ["void", "car", "road"]
    np.testing.assert_array_equal(other.read(other.items[0]), np.array([0, 2, 1], np.uint8)[SCENE])


@pytest.mark.parametrize(
    ("segments", "parts"),
    [
        (SEGMENTS[:1], ["segment id 256", f"in {(SCENE == 2).sum()} pixels"]),
        ([{"id": 256, "category_id": 8}], ["segments_info", "category_id"]),
        ([{"id": 0, "category_id": 7}], ["1 to 16777215"]),
    ],
)
def test_panoptic_refused(tmp_path: Path, segments: list[dict[str, int]], parts: list[str]) -> None:
    panoptic(tmp_path, segments, np.array([0, 70000, 256])[SCENE])
    refused(tmp_path, "coco_panoptic", "a.png", *parts)


# ---- KITTI -------------------------------------------------------------------------------------------------------
def test_kitti_reads_ids_of_cityscapes_and_no_other_folder(tmp_path: Path) -> None:
    image(tmp_path / "training/image_2/000000_10.png")
    ids = np.full((HEIGHT, WIDTH), 7, np.uint8)
    ids[0], ids[1], ids[2] = 0, 33, 26
    for folder, content in (("semantic", ids), ("semantic_rgb", np.dstack([ids] * 3)), ("instance", ids * 3)):
        (tmp_path / "training" / folder).mkdir()
        Image.fromarray(content).save(tmp_path / "training" / folder / "000000_10.png")
    image(tmp_path / "testing/image_2/000000_10.png")
    found = source(tmp_path, "kitti")
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[0], expected[1], expected[2] = 255, 18, 13
    require(found, {("all", "000000_10"): expected})
    assert found.classes[0] == "road"
    assert len(found.classes) == 19


# ---- hints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"shapes": [], "imagePath": "a.jpg"}, "prepare labelme"),
        ({"images": [], "annotations": [{"segments_info": []}], "categories": []}, "prepare coco_panoptic"),
        ({"images": [], "annotations": [{"segmentation": []}], "categories": []}, "coco_json"),
        ({"images": [], "annotations": [{"bbox": []}], "categories": []}, "boxes"),
        ({"a": {"regions": [{"shape_attributes": {}}]}}, "prepare via"),
        ({"objects": [{"geometryType": "polygon"}]}, "prepare supervisely"),
        ({"imgHeight": 1, "imgWidth": 1, "objects": [{"polygon": []}]}, "labelIds"),
        ([{"annotations": [{"result": []}]}], "Label Studio"),
        ({"objects": []}, "objects"),
        ({"learning_rate": 1}, None),
        ("[" * 100_000, None),
        ("no JSON", None),
    ],
)
def test_hint_fits_the_keys(tmp_path: Path, content: Any, hint: str | None) -> None:
    found = describe_json(write(tmp_path / "x.json", content))
    assert hint is None if found is None else hint is not None and hint in found
    assert found is None or "\n" not in found


def test_advice_is_about_the_first_file_that_says_something(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.json", {"x": number})
    assert advise(Tree(tmp_path)) is None
    assert beside_masks(Tree(tmp_path)) is None
    labelme(tmp_path / "a.json", "a.jpg")
    assert "prepare labelme" in str(advise(Tree(tmp_path)))
    assert "labelme's shapes in JSON files, such as a.json" in str(beside_masks(Tree(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.json", '{"images": [', "a.json is not whole JSON"),
        ("a.json", "", "a.json is not whole JSON"),
        ("labels/a.txt", "\ufeff0 0.1 0.1 0.9 0.1 0.9 0.9\n", "ssaseg data prepare yolo --source "),
        ("labels/a.txt", "3\n", None),
        ("via.csv", "filename,region_shape_attributes\n", "export them again as JSON"),
        ("a.xml", "<annotation><object><bndbox></bndbox></object></annotation>", "boxes of PASCAL VOC"),
    ],
)
def test_advice_about_other_files(tmp_path: Path, name: str, content: str, advice: str | None) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    found = advise(Tree(tmp_path))
    assert found is None if advice is None else advice in str(found)


def test_hint_of_a_large_file_reads_its_ends(tmp_path: Path) -> None:
    middle = ", ".join(['{"segmentation": [[1, 2, 3, 4, 5, 6]]}'] * 40_000)
    file = write(tmp_path / "x.json", f'{{"images": [], "annotations": [{middle}], "categories": []}}')
    assert file.stat().st_size > 2**20
    assert "coco_json" in str(describe_json(file))
