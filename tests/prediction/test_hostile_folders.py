"""Images and folders from outside: devices, circles, links, patterns, names and images that do not fit into memory."""

import contextlib
import os
import signal
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from click.testing import CliRunner
from predicting import files, picture, save_checkpoint, write

from ssaseg.cli.errors import CommandError
from ssaseg.cli.main import cli
from ssaseg.cli.prediction import labelling, predict
from ssaseg.cli.prediction.predict import run_predict
from ssaseg.cli.prediction.skipping import MOST_REASONS, Skip, Skips, skip_reason
from ssaseg.cli.prediction.sources import LeftOut, find_sources
from ssaseg.cli.results import objects
from ssaseg.datasets import DataError
from ssaseg.files.listing import MOST_WAYS, walk

pytestmark = pytest.mark.usefixtures("one_thread")
Told = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def label(checkpoint: Path, given: Path, out: Path, *save: str) -> int:
    return run_predict(checkpoint, [str(given)], out, save or ("index",), False, "cpu")


def skipped(told: Told) -> list[tuple[str, str]]:
    """For each file that was skipped, its name and the reason."""
    lines = [line.split(": ", 2)[1:] for line in told.readouterr().err.splitlines() if line.startswith("skipped")]
    return [(Path(file).name, reason) for files, reason in lines for file in files.split(", ")]


# ---- what is not an image ----------------------------------------------------------------------------------------
def test_devices_and_pipes_are_skipped(checkpoint: Path, tmp_path: Path, capsys: Told) -> None:
    folder = tmp_path / "in"
    write(folder / "z.png")
    os.mkfifo(folder / "a.png")
    (folder / "b.png").symlink_to("/dev/zero")
    (folder / "c.png").symlink_to("itself.png")
    (folder / "itself.png").symlink_to("itself.png")
    with socket.socket(socket.AF_UNIX) as listening:
        before = os.getcwd()
        os.chdir(folder)  # the name of a socket may not be long
        listening.bind("s.png")
        os.chdir(before)
        for given in (folder, folder / "*.png", folder / "**/*.png"):
            assert label(checkpoint, given, tmp_path / "out") == 1
            found = skipped(capsys)
            assert [name for name, _ in found] == ["a.png", "b.png", "c.png", "itself.png", "s.png"]
            parts = ("a FIFO", "a device", "symbolic", "symbolic", "regular file")
            for (_, reason), part in zip(found, parts, strict=True):
                assert part in reason
            assert files(tmp_path / "out") == ["index/z.png"]
        assert label(checkpoint, folder / "a.png", tmp_path / "out") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_command_that_hangs(checkpoint: Path, tmp_path: Path, number: int) -> None:
    for name in "abc":
        write(tmp_path / f"in/{name}.png")
    reading, writing = os.pipe()

    def hang(*_: Any) -> None:
        os.write(writing, b"!")
        time.sleep(600)

    child = os.fork()
    if child == 0:
        labelling.read_bands = hang  # type: ignore[attr-defined]
        try:
            label(checkpoint, tmp_path / "in", tmp_path / "out")
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"!"
    time.sleep(0.2)
    os.kill(child, number)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # the first signal waits for the image
    os.kill(child, number)
    for _ in range(100):
        time.sleep(0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    else:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number


# ---- circles and depth -------------------------------------------------------------------------------------------
def test_a_walk_ends(tmp_path: Path) -> None:
    folders = [tmp_path / f"in/{index}" for index in range(12)]
    for folder in folders:
        write(folder / "x.png")
    for folder in folders[:3]:
        for index in range(3):
            (folder / f"to{index}").symlink_to(folders[index])
    assert len(list(walk(tmp_path / "in"))) == 12 + 2 * 3 + 2 * 3  # by one link, by two
    found = find_sources([str(tmp_path / "in/**/*.png")], tmp_path / "out")
    assert [source.path for source in found] == sorted(walk(tmp_path / "in"))
    for folder in folders:  # a billion ways, none of them a circle
        for index in range(3, 12):
            (folder / f"to{index}").symlink_to(folders[index])
    with pytest.raises(OSError, match=f"in more than {MOST_WAYS} ways"):
        list(walk(tmp_path / "in"))


def test_a_deep_folder_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 1100
    monkeypatch.chdir(tmp_path)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        write(Path("x.png"))
        assert [len(path.relative_to(tmp_path).parts) for path in walk(tmp_path)] == [depth + 1]
    finally:  # pytest cannot delete it
        os.unlink("x.png")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")


# ---- patterns ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["in/*/../../0.png", "*/../0.png", "in/a*/../../0.png", "in/**/../../0.png"])
def test_a_pattern_does_not_lead_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    (tmp_path / "work/in/a").mkdir(parents=True)
    victim = write(tmp_path / "0.png")
    write(tmp_path / "work/0.png")
    monkeypatch.chdir(tmp_path / "work")
    before = victim.read_bytes()
    for given in (pattern, os.path.join(os.getcwd(), pattern)):
        if pattern == "*/../0.png":
            assert run_predict(checkpoint, [given], Path("o"), ("index",), False, "cpu") == 0
            assert files(Path("o")) == ["index/0.png"]
        else:
            with pytest.raises(CommandError, match=r"before (its|the) first wildcard|'\.\.' after '\*\*'"):
                run_predict(checkpoint, [given], Path("o"), ("index",), False, "cpu")
    assert victim.read_bytes() == before


def test_patterns_above_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.png", "b/1.png", "b/c/d/2.png", "b/.hidden/3.png"):
        write(tmp_path / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def relative(*given: str) -> list[str]:
        return [source.relative for source in find_sources(given, tmp_path / "out")]

    assert relative("../*/1.png") == ["a/1.png", "b/1.png"]
    assert relative(f"{tmp_path}/b/**/*.png") == ["1.png", "c/d/2.png"]
    assert relative("../b/**") == ["1.png", "c/d/2.png"]
    assert relative("../**/d/*.png") == ["b/c/d/2.png"]
    assert relative("../*/**/2.png") == ["b/c/d/2.png"]
    assert relative("../b/*/../1.png") == ["1.png"]
    assert relative("../[ab]/../b/1.png", "../b/1.png") == ["b/1.png"]


# ---- links below OUT ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["elsewhere", "out/color", "nowhere"])
def test_a_folder_of_results_must_not_be_a_link(checkpoint: Path, tmp_path: Path, place: str) -> None:
    write(tmp_path / "in/0.png")
    for folder in ("elsewhere", "out/color"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out/index").symlink_to(tmp_path / place)
    with pytest.raises(CommandError, match="out/index: a link, but results are written to folders in --out"):
        label(checkpoint, tmp_path / "in", tmp_path / "out", "index", "color")
    assert files(tmp_path / "out") == files(tmp_path / "elsewhere") == []


def test_links_below_a_folder_of_results(checkpoint: Path, tmp_path: Path, capsys: Told) -> None:
    victim = tmp_path / "victim"
    victim.write_text("my key")
    for name in ("0.png", "deep/1.png", "deep/er/2.png"):
        write(tmp_path / "in" / name)
    out = tmp_path / "out"
    links = {
        **{"index/0.png": victim, "index/.0.png.partial": victim, ".writable": tmp_path / "new", "rle.json": victim},
        **{".predict.jsonl": victim, ".rle.json.partial": victim, "index/deep": tmp_path / "elsewhere"},
    }
    (tmp_path / "elsewhere").mkdir()
    for link, aim in links.items():
        (out / link).parent.mkdir(parents=True, exist_ok=True)
        (out / link).symlink_to(aim)
    with pytest.raises(CommandError, match="not a list"):
        label(checkpoint, tmp_path / "in", out, "rle")
    assert label(checkpoint, tmp_path / "in", out) == 1
    found = skipped(capsys)
    assert [name for name, _ in found] == ["1.png", "2.png"]
    assert all("leads out of" in reason for _, reason in found)
    assert victim.read_text() == "my key"
    assert not (tmp_path / "new").exists()
    assert files(tmp_path / "elsewhere") == []
    assert not (out / "index/0.png").is_symlink()
    for lock in (".predict.lock", ".predict.jsonl"):
        (out / lock).unlink(missing_ok=True)
    (out / ".predict.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        label(checkpoint, tmp_path / "in", out)
    assert victim.read_text() == "my key"


# ---- one image that cannot be labelled or written ----------------------------------------------------------------
def test_names_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: Told) -> None:
    longest = "b" + "m" * 245
    for name in ("a", "c", longest, "d", "x" * 251, "z"):
        write(tmp_path / "in/0.png").rename(tmp_path / f"in/{name}.png")
    (tmp_path / "out/index/c.png").mkdir(parents=True)
    (tmp_path / "out/index/d.png").mkdir()
    write(tmp_path / "in/a.png.jpg")
    (tmp_path / "in/deep").mkdir()
    write(tmp_path / "in/deep/1.png")
    (tmp_path / "out/index/deep").write_text("a file")
    assert label(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    assert [name for name, _ in skipped(capsys)] == ["c.png", "d.png", "1.png"]
    done = {path.name for path in (tmp_path / "out/index").iterdir() if path.is_file()}
    assert done == {"a.png", f"{longest}.png", f"{'x' * 251}.png", "z.png", "a.png.png", "deep"}


def test_a_name_too_long_for_its_result(checkpoint: Path, tmp_path: Path, capsys: Told) -> None:
    for suffix in ("png", "jpg"):
        write(tmp_path / f"in/0.{suffix}").rename(tmp_path / f"in/{'x' * 251}.{suffix}")
    write(tmp_path / "in/z.png")
    given = (checkpoint, [str(tmp_path / "in")], tmp_path / "out", ("index",), False, "cpu")
    assert run_predict(*given, keep_suffix=True) == 1
    assert [reason[:18] for _, reason in skipped(capsys)] == ["File name too long"] * 2
    assert files(tmp_path / "out") == ["index/z.png.png"]


def one_colour(path: Path, width: int, height: int) -> Path:
    """A small PNG file of many black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(bytes(1 + width // 8) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_max_pixels(checkpoint: Path, tmp_path: Path) -> None:
    for name in "az":
        write(tmp_path / f"in/{name}.png")
    one_colour(tmp_path / "in/m.png", 12_000, 12_000)
    one_colour(tmp_path / "in/n.png", 640, 640)
    words = ["predict", str(checkpoint), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more, done in ([], "anz"), (["--max-pixels", "9000"], "az"):
        ended = CliRunner().invoke(cli, [*words, *more])
        assert ended.exit_code == 1
        assert "in/m.png" in ended.stderr
        assert ": an image of 12000×12000 pixels" in ended.stderr
        assert "expected at most" in ended.stderr
        assert f"labelled {len(done)} of 4 images" in ended.stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 348 bytes. "
                      "Error code 12"), "not enough memory for this image (348 bytes more)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), "(20.00 GiB more)"),
        (RuntimeError("could not create a primitive"), "not enough memory for this image"),
        (MemoryError(), "not enough memory for this image"),
        (cv2.error("OpenCV(4) resize.cpp: error\nmore"), "error: OpenCV(4) resize.cpp: error"),
        (struct.error("unpack requires 4 bytes"), "error: unpack requires 4 bytes"),
        (ZeroDivisionError(), "ZeroDivisionError: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["read", "predict", "write"])
def test_the_others_are_labelled(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told, error: Exception, said: str,
    place: str,
) -> None:  # fmt: skip
    for name in "amz":
        write(tmp_path / f"in/{name}.png", picture(*((48, 48) if name == "m" else (40, 56))))

    def fails(real: Callable[..., Any], is_it: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*given: Any) -> Any:
            if is_it(*given):
                raise error
            return real(*given)

        return wrapped

    if place == "read":
        monkeypatch.setattr(labelling, "read_bands", fails(labelling.read_bands, lambda path, *_: path.name == "m.png"))
    elif place == "predict":
        real: Any = predict.Inference.predict_batch
        monkeypatch.setattr(predict.Inference, "predict_batch", fails(real, lambda *given: given[2] == [(48, 48)]))
    else:
        kind = labelling.KINDS["index"]
        encode: Any = fails(kind.encode, lambda image, *_: image.shape[0] == 48)
        monkeypatch.setattr(labelling, "KINDS", {**labelling.KINDS, "index": kind._replace(encode=encode)})
    assert label(checkpoint, tmp_path / "in", tmp_path / "out") == 1
    ((name, told),) = skipped(capsys)
    assert name == "m.png"
    assert said.removeprefix("error: ") in told
    assert files(tmp_path / "out") == ["index/a.png", "index/z.png"]


def test_errors_that_would_meet_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("a.png")
    for error in (OSError(24, "Too many open files", "a.png"), FloatingPointError("nan")):
        with pytest.raises(type(error)):
            skip_reason(error, path)
    for number in (28, 5, 30):
        with pytest.raises(OSError, match="x"):
            skip_reason(OSError(number, "x", "out/a.png"), path, writing=True)
    with pytest.raises(CommandError, match="--resume"):
        skip_reason(RuntimeError("CUDA error: an illegal memory access"), path)
    monkeypatch.setenv("SSASEG_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        skip_reason(ZeroDivisionError(), path)


def test_one_line_for_one_reason(capsys: Told) -> None:
    with contextlib.suppress(ZeroDivisionError), Skips() as skips:
        for index in range(17):
            skips.add(
                skip_reason(
                    DataError(f"in/{index}.jpg: its end is missing after {index} bytes"), Path(f"in/{index}.jpg")
                )
            )
        skips.add(skip_reason(OSError(40, "Too many links", "in/x.png"), Path("in/x.png")))
        assert capsys.readouterr().err == ""
        raise ZeroDivisionError
    assert capsys.readouterr().err.splitlines() == [
        "skipped 17 images: in/0.jpg, in/1.jpg, in/2.jpg, …: its end is missing after 0 bytes",
        "skipped: in/x.png: Too many links",
    ]
    for index in range(2 * MOST_REASONS):
        skips.add(Skip("a.png", "reason " + "x" * index))
    skips.report()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MOST_REASONS + 1
    assert "other reasons" in lines[-1]


def test_files_that_are_left_out_are_named(tmp_path: Path, capsys: Told) -> None:
    for name in ("1.jpg", "2.heic", "sub/3.HEIC", "4.txt", "5.mov", "out/index/6.txt"):
        write(tmp_path / "1.jpg") if name == "1.jpg" else put_text(tmp_path / name)
    others = LeftOut()
    (source,) = find_sources([str(tmp_path)], tmp_path / "out", others)
    assert str(others).startswith("4 files of other types are left out: 2 .heic, 1 .txt, 1 .mov (")
    assert str(others).endswith(", …)")
    assert str(others).count(str(tmp_path)) == 3
    source.path.unlink()
    with pytest.raises(CommandError, match=r"no image found; 4 files of other types .*2\.heic, "):
        find_sources([str(tmp_path)], tmp_path / "out")


def put_text(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image")


@pytest.mark.parametrize("given", ["gone.jpg", "gone/*.png", "empty"])
def test_a_missing_input_is_reported_before_the_network_is_read(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    ended = CliRunner().invoke(cli, ["predict", __file__, str(tmp_path / given), "--out", str(tmp_path / "out")])
    assert ended.exit_code == 2
    assert "no image found" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_names_with_control_characters(checkpoint: Path, tmp_path: Path, capsys: Told) -> None:
    folder = tmp_path / "in"
    for name in ("a\x1b[2Jb.png", "line\nfeed.png", "\u202egnp.png"):
        (write(folder / "0.png")).rename(folder / name)
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    os.mkfifo(os.fsencode(folder) + b"/pipe\n\xff.png")
    write(folder / "z.png")
    assert label(checkpoint, folder, tmp_path / "out\x1b[0m") == 1
    told = capsys.readouterr()
    lines = sorted(line for line in told.err.splitlines() if line.startswith("skipped"))
    assert len(lines) == len(told.err.splitlines()) == 2
    assert not set("\x1b\u202e\udcff") & set(told.err + told.out)
    assert lines[0].startswith("skipped 3 images: ")
    assert r"in/line\x0afeed.png" in lines[0]
    assert ": damaged image" in lines[0]
    assert r"in/pipe\x0a\xff.png: not a regular file, but a FIFO" in lines[1]
    for given in (f"{folder}/no\x1b*.png", f"{folder}/no\x1b.png"):
        with pytest.raises(CommandError) as caught:
            find_sources([given], tmp_path / "out")
        assert "\x1b" not in str(caught.value)


def test_an_empty_input_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match="INPUT is empty"):
        find_sources([""], tmp_path / "out")
    assert len(find_sources(["."], tmp_path / "out")) == 1


def test_a_line_without_end_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LONGEST_LINE", 2**10)
    with (tmp_path / "sparse").open("w+b") as file:
        file.write(b"x" * (2**10 - 1) + b"\n")
        file.truncate(2**42)
        file.seek(0)
        assert [len(line) for line in objects.read_lines(file)] == [2**10, 2**10]
