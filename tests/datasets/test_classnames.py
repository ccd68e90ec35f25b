"""What ids mean, by a file of class names or by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssaseg.datasets import DataError
from ssaseg.datasets.classnames import Names, guess_labels, read_class_names


@pytest.mark.parametrize(
    ("ids", "classes", "reduce", "mapped"),
    [
        ([0, 1, 2], 3, False, None),
        ([0, 1, 2, 255], 3, False, None),
        ([1, 2, 3], 3, True, None),
        ([1, 2, 3, 255], 3, True, None),
        ([0, 7, 8, 255], 3, False, {0: 0, 7: 1, 8: 2}),
        ([2, 3], 2, False, {2: 0, 3: 1}),
        ([0, 255], 2, False, {0: 0, 255: 1}),
    ],
)
def test_ids_are_given_a_meaning(ids: list[int], classes: int, reduce: bool, mapped: dict[int, int] | None) -> None:
    labels = guess_labels(ids, None, None)
    assert (len(labels.classes), labels.reduce_zero_label, labels.raw_to_train) == (classes, reduce, mapped)
    assert labels.notes


@pytest.mark.parametrize(("ids", "part"), [([0], "one class"), ([4, 255], "one class"), (list(range(256)), "grey")])
def test_ids_that_cannot_be_classes(ids: list[int], part: str) -> None:
    with pytest.raises(DataError, match=part):
        guess_labels(ids, None, None)


@pytest.mark.parametrize(
    ("name", "text", "names", "colours"),
    [
        ("classes.txt", "cat\ndog tired\n", {0: "cat", 1: "dog tired"}, {}),
        ("labels.txt", "# ids\n3: cat\n7: dog\n", {3: "cat", 7: "dog"}, {}),
        ("labelmap.txt", "# label:color_rgb:parts:actions\ncat:9,8,7::\ndog:0,0,255::\n", None, {0: (9, 8, 7)}),
        ("class_dict.csv", "name,r,g,b\ncat,9,8,7\ndog,0,0,255\n", None, {0: (9, 8, 7)}),
        ("class_dict.csv", "Name,R,G,B\ncat,9,8,7\ndog,0,0,255\n", None, {0: (9, 8, 7)}),
        ("class_dict.csv", "ID; Red; Green; Blue; Class\n4;9;8;7;cat\n", {4: "cat"}, {4: (9, 8, 7)}),
        ("class_dict.csv", 'name;r;g;b\n"cat;big";9;8;7\n', {0: "cat;big"}, {0: (9, 8, 7)}),
        ("classes.txt", "Name\ncat\ndog 2\n", {0: "cat", 1: "dog 2"}, {}),
        ("classes.txt", "id name\n3 big cat\n7 dog\n", {3: "big cat", 7: "dog"}, {}),
        ("classes.txt", "id,name\n3,cat\n7,dog\n", {3: "cat", 7: "dog"}, {}),
        ("classes.txt", "0,cat\n2,dog\n", {0: "cat", 2: "dog"}, {}),
        ("classes.txt", "cat 0\ndog 2\n", {0: "cat", 2: "dog"}, {}),
        ("classes.txt", "zone 1\nzone 2\n", {0: "zone 1", 1: "zone 2"}, {}),
        ("labels.txt", "__ignore__\n_background_\ncat\n", {0: "_background_", 1: "cat"}, {}),
        ("labels.txt", "-1 __ignore__\n0 cat\n1 dog\n255 void\n", None, {}),
    ],
)
def test_class_names_are_read(
    tmp_path: Path, name: str, text: str, names: dict[int, str] | None, colours: dict[int, tuple[int, int, int]]
) -> None:
    (tmp_path / name).write_text(text)
    read, _ = read_class_names(tmp_path)
    assert read is not None
    assert read.names == (names or {0: "cat", 1: "dog"})
    assert read.colours == (colours if names or not colours else {0: (9, 8, 7), 1: (0, 0, 255)})


def test_class_names_decide_what_0_means() -> None:
    two = Names(Path("classes.txt"), {0: "cat", 1: "dog"}, {}, False)
    assert guess_labels([0, 1, 255], two, None).classes == ["cat", "dog"]
    white = guess_labels([0, 255], two, None)
    assert (white.classes, white.raw_to_train) == (["cat", "dog"], {0: 0, 255: 1}), "255 is the second class"
    reduced = guess_labels([0, 1, 2], two, None)
    assert (reduced.classes, reduced.reduce_zero_label) == (["cat", "dog"], True)
    assert any("0 is read as 'ignored'" in note for note in reduced.notes)
    unfit = guess_labels([0, 1, 5], two, None)
    assert unfit.classes == ["class_0", "class_1", "class_5"]
    assert any("classes.txt is not used: it has 2 names" in note for note in unfit.notes)
    numbered = guess_labels([0, 7], Names(Path("labels.txt"), {0: "cat", 7: "dog", 9: "cow"}, {}, True), None)
    assert (numbered.classes, numbered.raw_to_train) == (["cat", "dog", "cow"], {0: 0, 7: 1, 9: 2})


def test_names_that_do_not_fit_the_ids_are_told() -> None:
    four = Names(Path("labels.txt"), dict(enumerate(["_background_", "cat", "dog", "cow"])), {}, False)
    labels = guess_labels([0, 1, 2], four, None)
    assert (labels.classes, labels.raw_to_train) == (["_background_", "cat", "dog", "cow"], None)
    assert "4 names, but ids only go up to 2: the last names have no pixel" in labels.notes
    assert any("no mask holds 0, the id of _background_" in note for note in guess_labels([1, 2], four, None).notes)
    # With the background named, 0 cannot be 'ignored' beside it.
    assert any("labels.txt is not used" in note for note in guess_labels([0, 1, 4], four, None).notes)
    one = guess_labels([0, 1], Names(Path("labels.txt"), {0: "cat"}, {}, False), None)
    assert one.classes == ["class_0", "class_1"]
    assert any("it has 1 names, and the ids are 0, 1" in note for note in one.notes)
    numbered = Names(Path("labels.txt"), {0: "cat", 1: "dog", 9: "cow"}, {}, True)
    assert "1 of 3 names have no pixel: cow" in guess_labels([0, 1], numbered, None).notes


def test_a_numbered_id_that_is_to_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("0 __ignore__\n1 cat\n2 dog\n")
    names, notes = read_class_names(tmp_path)
    assert "__ignore__ in labels.txt is not a class" in notes[0]
    labels = guess_labels([0, 1, 2], names, None)
    assert (labels.classes, labels.raw_to_train) == (["cat", "dog"], {0: 255, 1: 0, 2: 1})


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_file_of_names_that_is_no_text_is_told(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "classes.txt").write_bytes("Stra\xdfe\nHaus\n".encode(encoding))
    names, notes = read_class_names(tmp_path)
    assert names is None
    assert notes == ["classes.txt is not used: not UTF-8 text; save it as UTF-8"]


def test_a_file_of_names_from_windows_is_read(tmp_path: Path) -> None:
    """UTF-16 with its mark, as PowerShell writes it."""
    (tmp_path / "classes.txt").write_bytes("Stra\xdfe\r\nHaus\r\n".encode("utf-16"))
    names, notes = read_class_names(tmp_path)
    assert names is not None
    assert (names.names, notes) == ({0: "Straße", 1: "Haus"}, [])


def test_colours_go_with_their_names() -> None:
    two = Names(Path("labels.txt"), {0: "cat", 1: "dog"}, {0: (9, 8, 7), 1: (6, 5, 4)}, False)
    for ids in ([0, 1], [0, 1, 2]):  # as they are; and with 0 ignored
        assert guess_labels(ids, two, None).palette == [(9, 8, 7), (6, 5, 4)]
    background = two._replace(names={0: "background", 1: "cat"})
    assert guess_labels([1, 2], background, None).palette is None, "neither names nor colours fit"


@pytest.mark.parametrize(
    ("name", "text", "names", "colours"),
    [
        ("_classes.csv", "Pixel Value, Class\n0, cat\n1, dog", {0: "cat", 1: "dog"}, {}),
        ("label_colors.txt", "9 8 7 cat\n0 0 255 big dog\n", {0: "cat", 1: "big dog"}, {0: (9, 8, 7), 1: (0, 0, 255)}),
        ("label_colors.txt", "cat\t9 8 7\ndog\t0 0 255\n", {0: "cat", 1: "dog"}, {0: (9, 8, 7), 1: (0, 0, 255)}),
        ("data.yaml", "nc: 2\ntrain: ../x\nnames: [cat, dog]\n", {0: "cat", 1: "dog"}, {}),
        ("data.yaml", "names:\n  3: cat\n  7: dog\n", {3: "cat", 7: "dog"}, {}),
        ("meta.json", '{"classes": [{"title": "cat", "color": "#090807", "id": 44}]}', {0: "cat"}, {0: (9, 8, 7)}),
        (
            "dataset_meta.json",
            '{"label_map": {"0": "cat", "4": "dog"}, "segmentation_colors": [[9, 8, 7], [1, 1, 1]]}',
            {0: "cat", 4: "dog"},
            {0: (9, 8, 7), 4: (1, 1, 1)},
        ),
        ("labels.json", '{"cat": 1, "dog": 2}', {1: "cat", 2: "dog"}, {}),
        ("labels.json", '["cat", "dog"]', {0: "cat", 1: "dog"}, {}),
        ("config.json", '{"hidden": 3, "id2label": {"0": "cat"}, "label2id": {"cat": 0}}', {0: "cat"}, {}),
        ("config_v1.json", '{"labels": [{"name": "a--cat", "readable": "Cat", "color": [9, 8, 7]}]}', {0: "Cat"}, None),
        (
            "dataset_info.json",
            '{"features": {"label": {"names": ["cat", "dog"]}}, "splits": {"train": {"num": 3}}}',
            {0: "cat", 1: "dog"},
            {},
        ),
    ],
)
def test_names_of_other_tools(
    tmp_path: Path, name: str, text: str, names: dict[int, str], colours: dict[int, tuple[int, int, int]] | None
) -> None:
    (tmp_path / name).write_text(text)
    read, notes = read_class_names(tmp_path)
    assert read is not None
    assert (read.names, notes) == (names, [])
    assert colours is None or read.colours == colours


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"layers": 3, "heads": 4, "splits": {"train": 3, "val": 4}}'),
        ("labels.txt", "labels/0.png\nlabels/1.png\n"),
        ("data.yaml", "train: a\nval: b\n"),
    ],
)
def test_what_holds_no_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("name", "text"), [("data.yaml", "a: &x [1]\nb: *x\n"), ("labels.json", "{"), ("labels.txt", "a\n" * 300)]
)
def test_what_cannot_be_read_as_names_is_noted(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    names, notes = read_class_names(tmp_path)
    assert names is None
    assert notes[0].startswith(f"{name} is not used: ")


def test_names_beside_the_masks(tmp_path: Path) -> None:
    """The file nearest to the root is used, and another one with other names is noted."""
    for folder, text in (("train/masks", "cat\ndog\n"), ("val", "cat\ncow\n")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "classes.txt").write_text(text)
    names, notes = read_class_names(tmp_path, ["train/masks"])
    assert (names and list(names.names.values()), notes) == (["cat", "dog"], [])
    names, notes = read_class_names(tmp_path, ["train/masks", "val/masks"])
    assert names is not None
    assert list(names.names.values()) == ["cat", "cow"]
    assert notes == ["train/masks/classes.txt has other class names than val/classes.txt and is not used"]
    assert read_class_names(tmp_path) == (None, [])


@pytest.mark.parametrize("ids", [[0, 127, 255], [0, 128, 255], [0, 85, 170, 255], [0, 51, 102, 153, 204, 255]])
def test_ids_spread_over_all_levels_have_255_as_a_class(ids: list[int]) -> None:
    """As in REFUGE's masks: 255 is a class like the others."""
    labels = guess_labels(ids, None, None)
    assert labels.raw_ids == ids
    assert labels.raw_to_train == {raw: train_id for train_id, raw in enumerate(ids)}
    assert any("255 is read as a class" in note for note in labels.notes)
    names = Names(Path("labels.txt"), {number: f"name_{number}" for number in range(len(ids))}, {}, False)
    named = guess_labels(ids, names, None)
    assert (named.raw_ids, named.classes) == (ids, list(names.names.values()))


@pytest.mark.parametrize("ids", [[0, 1, 255], [0, 1, 2, 255], [0, 100, 255], [0, 127, 128, 255], [*range(100), 255]])
def test_other_ids_have_255_as_ignored(ids: list[int]) -> None:
    assert 255 not in guess_labels(ids, None, None).raw_ids
