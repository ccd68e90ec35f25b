"""Lists of pairs: one image and its mask a line, in the forms that other programs write."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from ssaseg.datasets import DataError
from ssaseg.datasets.pairlist import choose_splits, read_pairs, split_of_path

FILES = "a/0.jpg a/1.jpg b/0.png b/1.png"
BOTH = [("a/0", "b/0.png"), ("a/1", "b/1.png")]


def put(root: Path, files: str, text: str) -> Path:
    """Empty files, in whose names ? stands for a space, and a list."""
    for name in files.replace(" ", "\n").replace("?", " ").split("\n"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "list.txt").write_text(text, encoding="utf-8")
    return root / "list.txt"


@pytest.mark.parametrize(
    "text",
    [
        "a/0.jpg\tb/0.png\na/1.jpg\tb/1.png\n",
        "a/1.jpg b/1.png\na/0.jpg   b/0.png",  # no line feed at the end
        "a/0.jpg,b/0.png\r\na/1.jpg;b/1.png\r\n\r\n",
        "# image mask\n./a/0.jpg b\\0.png\n\na\\1.jpg .\\b\\1.png\n",
        "\ufeffimage,mask\na/0.jpg,b/0.png\na/1.jpg,b/1.png\n",
        ',img_path,label_path\n0,"a/0.jpg",b/0.png\n1,a/1.jpg,b/1.png\n',
        "filename;annotation\na/0.jpg;b/0.png\na/1.jpg;b/1.png\n",
        "mask\timage\nb/0.png\ta/0.jpg\nb/1.png\ta/1.jpg\n",
        "/SegNet/CamVid/a/0.jpg /SegNet/CamVid/b/0.png\n/SegNet/CamVid/a/1.jpg /SegNet/CamVid/b/1.png\n",
        "../../data/a/0.jpg ../../data/b/0.png\n../../data/a/1.jpg ../../data/b/1.png\n",
        "C:\\data\\a\\0.jpg C:\\data\\b\\0.png\nC:\\data\\a\\1.jpg C:\\data\\b\\1.png\n",
        "a/0.jpg b/0.png 512 512\na/1.jpg b/1.png 512 512\n",
    ],
)
def test_forms_of_lists(tmp_path: Path, text: str) -> None:
    pairs, _ = read_pairs(put(tmp_path, FILES, text), tmp_path)
    masks = [mask.relative_to(tmp_path).as_posix() for mask in pairs.masks]
    assert list(zip(pairs.names, masks, strict=True)) == BOTH
    assert pairs.images == [tmp_path / "a/0.jpg", tmp_path / "a/1.jpg"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    moved = read_pairs(put(tmp_path, FILES, "/S/C/a/0.jpg /S/C/b/0.png\n"), tmp_path)[1]
    assert moved == ["list.txt: paths are read without S/C/ before them"]
    assert "not used (1 lines)" in read_pairs(put(tmp_path, FILES, "a/0.jpg b/0.png 3\n"), tmp_path)[1][0]


def test_a_list_with_the_masks_first_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"JPEG(.|\n)*if the mask comes first, exchange the two"):
        read_pairs(put(tmp_path, FILES, "b/0.png a/0.jpg\nb/1.png a/1.jpg\n"), tmp_path)


def test_paths_below_the_folder_of_the_list(tmp_path: Path) -> None:
    file = put(tmp_path / "sub", FILES, "a/0.jpg b/0.png\n")
    assert read_pairs(file, tmp_path)[0].names == ["sub/a/0"]


def test_a_column_of_splits(tmp_path: Path) -> None:
    """As DeepGlobe's metadata.csv."""
    text = "image_id,split,sat_image_path,mask_path\n0,train,a/0.jpg,b/0.png\n1,valid,a/1.jpg,b/1.png\n2,test,x.jpg,\n"
    file = put(tmp_path, FILES, text)
    assert read_pairs(file, tmp_path, "train")[0].names == ["a/0"]
    assert read_pairs(file, tmp_path, "val")[0].names == ["a/1"]


def test_names_with_spaces_commas_and_other_compositions(tmp_path: Path) -> None:
    files = "x?y/0?a.jpg x?y/0?b.png a,b.jpg a,b.png e\u0301.jpg \u00e9.png ?c?.jpg ?c?.png"
    text = "x y/0 a.jpg x y/0 b.png\na,b.jpg a,b.png\n\u00e9.jpg\te\u0301.png\n c .jpg\t c .png\n"
    pairs, _ = read_pairs(put(tmp_path, files, text), tmp_path)
    assert pairs.names == [" c ", "a,b", "e\u0301", "x y/0 a"]
    assert [mask.name for mask in pairs.masks] == [" c .png", "a,b.png", "\u00e9.png", "0 b.png"]


def test_names_are_unique(tmp_path: Path) -> None:
    pairs, _ = read_pairs(put(tmp_path, "a/0.jpg a/0.png m.png", "a/0.jpg m.png\na/0.png m.png\n"), tmp_path)
    assert pairs.names == ["a/0.jpg", "a/0.png"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a/0.jpg b/0.png\na/1.jpg\n", "line 2: 'a/1.jpg': one path, where an image and a mask are expected"),
        ("a/0.jpg b/0.png\na/1.jpg b/9.png\n", "line 2: 'a/1.jpg b/9.png': no such file: 'b/9.png'"),
        ("a/0.jpg b/0.png\na/0.jpg b/1.png\n", "line 2: 'a/0.jpg b/1.png': this image is in line 1 too"),
        ("a/0.jpg a/0.jpg\n", "these files do not exist"),
        ("/S/a/0.jpg /S/b/0.png\n/T/a/1.jpg /T/b/1.png\n", "line 2: .*no such files: '/T/a/1.jpg', '/T/b/1.png'"),
        ("a/0.jpg b/0.png\nx/../a/1.jpg b/1.png\n", "line 2: .*no such file"),
        ("image,mask\na/0.jpg,\n", "line 2: 'a/0.jpg,': one path"),
        ("\n \n", "no line in this file"),
        ("# nothing\n", "only comments"),
        ("a/0.jpg\0 b/0.png\n", "these files do not exist"),
        (f"{' ' * 20_000}a/0.jpg b/0.png\n", "one path"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(DataError, match=part) as error:
        read_pairs(put(tmp_path, FILES, text), tmp_path)
    lines = str(error.value).splitlines()
    assert 2 <= len(lines) <= 3
    assert "expected" in lines[1]


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "gone.txt", tmp_path)
    file = put(tmp_path, FILES, "")
    file.write_bytes("a/0.jpg b/ü.png".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_pairs(file, tmp_path)


def test_lines_without_files_may_be_left_out(tmp_path: Path) -> None:
    incomplete: list[DataError] = []
    pairs, _ = read_pairs(
        put(tmp_path, FILES, "a/0.jpg b/0.png\na/7.jpg b/7.png\na/8.jpg\n"), tmp_path, None, incomplete
    )
    assert pairs.names == ["a/0"]
    assert "line 2: 'a/7.jpg b/7.png': no such files: 'a/7.jpg', 'b/7.png' (and 1 more of 3 lines)" in str(
        incomplete[0]
    )


def test_a_link_does_not_lead_a_list_out_of_its_names(tmp_path: Path) -> None:
    """A path never has `..` in it, and a file in place of a folder is no error."""
    for text in ("../list.txt a/0.jpg\n", "a/0.jpg/x b/0.png\n"):
        with pytest.raises(DataError, match="these files do not exist"):
            read_pairs(put(tmp_path / "root", FILES, text), tmp_path / "root" / "a")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train2017/img", "train"),
        ("a/instances_val2017.json", "val"),
        ("eval/a.json", "val"),
        ("trn/tst", "test"),
        ("train/validation", "val"),
        ("train_val", "train"),
        ("constrain/evaluated", None),
    ],
)
def test_words_of_splits(path: str, split: str | None) -> None:
    assert split_of_path(PurePosixPath(path)) == split


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"train", "val", "test"}, {"train": "train", "val": "val"}),
        ({"train", "test", None}, {"train": "train", "val": "test"}),
        ({"train", None}, None),
        ({"val", "test"}, None),
    ],
)
def test_choice_of_splits(found: set[str | None], chosen: dict[str, str] | None) -> None:
    splits, notes = choose_splits(found) or (None, [])
    assert splits == chosen
    assert len(notes) == (chosen is not None and chosen["val"] == "test")
