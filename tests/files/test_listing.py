"""Files as text: the same paths as pathlib and `os.path.realpath` give."""

import os
from pathlib import Path

import pytest

from ssaseg.files.listing import FileList, prefix_of, real_path, texts_of, walk_below


def test_a_list_of_files_is_a_list_of_paths() -> None:
    files = FileList(["a/b.png", "c.png", "d.png"])
    paths = [Path("a/b.png"), Path("c.png"), Path("d.png")]
    assert [files[0], files[-1]] == [paths[0], paths[-1]]
    assert [*files] == [*files[0:3]] == paths
    assert texts_of(files) == texts_of(paths) == files.texts
    assert paths[1] in files
    assert not FileList([])


@pytest.mark.parametrize("folder", [".", "a", "a/", "./a/b", "/", "/a"])
def test_prefixes_join_as_pathlib_does(folder: str) -> None:
    assert prefix_of(Path(folder)) + "c/d.png" == str(Path(folder) / "c/d.png")


def test_real_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "link").symlink_to("folder/file")
    (tmp_path / "self").symlink_to("self")
    monkeypatch.chdir(tmp_path)
    folders: dict[str, str] = {}
    for file in (
        "real/file",
        "folder/file",
        "link",
        "self",
        "missing",
        str(tmp_path / "folder/file"),
        "folder/../link",
    ):
        assert real_path(file, folders) == os.path.realpath(file), file


def test_order_and_kinds(tmp_path: Path) -> None:
    """Files of a folder before its subfolders; hidden ones are left out; a link to nothing is a file."""
    for name in ("b/2.png", "b/1.png", "a/c/3.png", "z.png", "a/.hidden", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "y").symlink_to("a")
    os.mkfifo(tmp_path / "b" / "pipe")
    expected = ["nothing", "z.png", "a/c/3.png", "b/1.png", "b/2.png", "b/pipe", "y/c/3.png"]
    assert list(walk_below(tmp_path)) == expected
