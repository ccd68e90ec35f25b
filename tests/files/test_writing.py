"""Files in folders of other people: links, FIFOs, devices and locks end in an error, and nothing else is touched."""

import errno
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from ssaseg.files import writing
from ssaseg.files.reading import open_file, read_file
from ssaseg.files.text import KEPT, printable
from ssaseg.files.writing import FolderInUse, FolderLock, open_append, open_to_others, write_atomic

HOLD = """
import sys
import tracemalloc
from pathlib import Path
from ssaseg.files.writing import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_link_with_the_name_of_a_result_is_replaced_below_a_root(tmp_path: Path) -> None:
    victim, root = tmp_path / "victim", tmp_path / "out"
    victim.write_text("my key")
    root.mkdir()
    (root / "x.png").symlink_to(victim)
    write_atomic(root / "x.png", b"picture", root=root)
    assert victim.read_text() == "my key"
    assert not (root / "x.png").is_symlink()
    assert (root / "x.png").read_bytes() == b"picture"


def test_a_link_is_followed_that_the_user_has_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["index/x.png", "a/../../x.png", "index/b/x.png", ".."])
def test_nothing_is_written_out_of_a_root(tmp_path: Path, name: str) -> None:
    root, other = tmp_path / "out", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "index").symlink_to(other)
    with pytest.raises(OSError, match="leads out of"):
        write_atomic(root / name, b"1", root=root)
    assert [*other.iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_links_that_stay_inside_a_root_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / "real").mkdir(parents=True)
    (root / "index").symlink_to("real")
    (tmp_path / "name").symlink_to(root)  # the root itself is the user's
    write_atomic(tmp_path / "name/index/x", b"1", root=tmp_path / "name")
    assert (root / "real/x").read_bytes() == b"1"


def test_a_root_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone/x", b"1", root=tmp_path / "gone")
    assert [*tmp_path.iterdir()] == []


def test_temporary_files_are_not_opened_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "guessed")
    (tmp_path / "victim").write_text("my key")
    (tmp_path / ".guessed.partial").symlink_to("victim")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "x", b"1")
    assert (tmp_path / "victim").read_text() == "my key"


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("x" * 255), b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_a_lock_keeps_another_process_out_until_it_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(FolderInUse, match=f"process {holder.pid} on "):
        FolderLock(tmp_path)
    holder.stdin.close()
    assert holder.wait() == 0
    holder.stdout.close()
    lock = FolderLock(tmp_path)  # the file that was left is taken over
    lock.check()
    lock.release()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("change", ["deleted", "made anew", "moved"])
def test_a_folder_that_was_replaced_is_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    if change == "moved":
        folder.rename(tmp_path / "elsewhere")
    else:
        lock.path.unlink()
        folder.rmdir()
    if change == "made anew":
        folder.mkdir()
        FolderLock(folder).release(delete=False)
    with pytest.raises(OSError, match="deleted or replaced"):
        lock.check()
    lock.release()
    assert (folder / ".lock").exists() == (change == "made anew"), "another lock file was deleted"


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "fifo"])
def test_a_lock_file_that_is_something_else_is_refused(tmp_path: Path, kind: str) -> None:
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("my key")
    {
        "symlink": lambda at: at.symlink_to(victim),
        "dangling": lambda at: at.symlink_to(tmp_path / "new"),
        "hard link": lambda at: at.hardlink_to(victim),
        "fifo": os.mkfifo,
    }[kind](folder / ".lock")
    with pytest.raises(OSError, match=r"\.lock"):
        FolderLock(folder)
    assert victim.read_text() == "my key"
    assert not (tmp_path / "new").exists()


def test_a_lock_file_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "write", full)
    with pytest.raises(OSError, match=r"No space.*\.lock"):
        FolderLock(tmp_path)
    monkeypatch.undo()
    FolderLock(tmp_path).release()


def test_appending_follows_no_link_and_waits_for_no_fifo(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("my key")
    (tmp_path / "log").symlink_to("victim")
    os.mkfifo(tmp_path / "fifo")
    for name in ("log", "fifo"):
        with pytest.raises(OSError, match=name):
            open_append(tmp_path / name)
    assert (tmp_path / "victim").read_text() == "my key"
    for text in ("a", "ü"):
        with open_append(tmp_path / "new") as file:
            file.write(text)
    assert (tmp_path / "new").read_text(encoding="utf-8") == "aü"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, said in (("fifo", "a FIFO"), ("zero", "a device"), ("", "directory"), ("a\0b", "not a file name")):
        with pytest.raises(OSError, match=f"{said}") as caught:
            read_file(f"{tmp_path}/{name}")
        assert caught.value.filename == f"{tmp_path}/{name}"
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", limit=5) == b"12345"


def test_reading_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    tracemalloc.start()
    assert read_file(tmp_path / "file") == b"12345"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="larger than 1,024 MiB"):
        read_file(tmp_path / "sparse")
    with pytest.raises(OSError, match="larger than"):
        open_file(tmp_path / "sparse", limit=2**20)
    if Path("/proc/self/environ").exists():  # claims to be empty
        with pytest.raises(OSError, match="larger than"):
            read_file("/proc/self/environ", limit=1)


def test_what_could_change_a_terminal_is_shown_by_its_code() -> None:
    assert printable("\x1b]0;title\a\x9b\x7f") == r"\x1b]0;title\x07\x9b\x7f"
    assert printable("a\nb\tc\r") == r"a\x0ab\x09c\x0d"
    assert printable("a\nb\tc\r", KEPT) == "a\nb\tc\\x0d"
    assert printable("gpj.\u202efdp\u2028") == r"gpj.\u202efdp\u2028"
    assert printable(b"\xff.png".decode(errors="surrogateescape") + "\ud800") == r"\xff.png\ud800"
    assert printable("Straße – 道路 é ☃") == "Straße – 道路 é ☃"


@pytest.mark.parametrize(
    ("parent", "folder", "open_one"),
    [
        (0o755, 0o755, None),
        (0o777, 0o755, "parent"),
        (0o1777, 0o755, None),  # like /tmp: others cannot rename what is not theirs
        (0o755, 0o777, "folder"),
        (0o755, 0o1777, "folder"),  # others can add files
        (0o775, 0o775, None),  # a group works together
    ],
)
def test_folders_that_every_user_can_write_to(tmp_path: Path, parent: int, folder: int, open_one: str | None) -> None:
    places = {"parent": tmp_path / "parent", "folder": tmp_path / "parent" / "folder"}
    places["folder"].mkdir(parents=True)
    places["folder"].chmod(folder)
    places["parent"].chmod(parent)
    assert open_to_others(places["folder"]) == (places[open_one] if open_one else None)
