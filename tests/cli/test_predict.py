"""Predicting files: every kind of result, names, damaged images, interruptions, and memory that stays flat."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from networks import tiny_networks
from PIL import Image
from predicting import CLASSES, PALETTE, files, labelled_images, picture, save_checkpoint, write
from pycocotools import mask as coco

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction import predict
from ssaseg.cli.prediction.predict import run_predict
from ssaseg.cli.prediction.sources import find_sources
from ssaseg.cli.results import objects
from ssaseg.cli.results.objects import write_objects
from ssaseg.cli.scoring.inference import predict_labels
from ssaseg.cli.scoring.lanes import in_order
from ssaseg.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("index", "color", "overlay", "probs", "rle", "coarse")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def test_every_kind_of_result(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", protocol={"scale": [96, 64], "multiple": 32})
    source = write(tmp_path / "in" / "deep" / "a.png", picture(45, 61))
    out = tmp_path / "out"
    assert run_predict(checkpoint, [str(tmp_path / "in")], out, KINDS, False, "cpu", exact=True) == 0
    assert files(out) == [
        *("coarse/deep/a.png", "color/deep/a.png", "index/deep/a.png", "overlay/deep/a.jpg", "probs/deep/a.npz"),
        "rle.json",
    ]
    model, metadata = load_model(checkpoint)
    image = cv2.imread(str(source))
    assert image is not None
    expected = predict_labels(
        model, image, metadata["protocol"], metadata["mean"], metadata["std"], torch.device("cpu"), probabilities=True
    )
    index = Image.open(out / "index/deep/a.png")
    assert index.mode == "P"
    np.testing.assert_array_equal(np.array(index), expected.labels)
    palette = np.array(index.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(palette[: len(PALETTE)], PALETTE)
    np.testing.assert_array_equal(np.array(Image.open(out / "coarse/deep/a.png")), expected.coarse)
    color = np.array(Image.open(out / "color/deep/a.png"))
    np.testing.assert_array_equal(color, np.array(PALETTE)[expected.labels])
    overlay = np.array(Image.open(out / "overlay/deep/a.jpg").convert("RGB")).astype(int)
    assert overlay.shape == (45, 61, 3)
    assert np.abs(overlay - (color.astype(int) + image[..., ::-1]) / 2).mean() < 6  # JPEG
    probabilities = np.load(out / "probs/deep/a.npz")["probabilities"]
    assert (probabilities.dtype, probabilities.shape) == (np.float16, (5, 45, 61))
    np.testing.assert_array_equal(probabilities, expected.probabilities)
    np.testing.assert_allclose(probabilities.astype(np.float32).sum(axis=0), 1, atol=2e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools with NumPy 2
def test_run_lengths_decode_to_the_labels(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.png"):
        write(tmp_path / "in" / name, picture(33, 47, seed=len(name)))
    assert run_predict(checkpoint, [str(tmp_path / "in")], tmp_path / "out", ("index", "rle"), False, "cpu") == 0
    entries = json.loads((tmp_path / "out/rle.json").read_text())
    assert list(dict.fromkeys(entry["image"] for entry in entries)) == ["b.png", "sub/a.png"]
    for name in ("b.png", "sub/a.png"):
        labels = np.array(Image.open(tmp_path / "out/index" / name))
        rebuilt = np.full(labels.shape, 255)
        for entry in (each for each in entries if each["image"] == name):
            inside = coco.decode(entry["segmentation"]) > 0
            assert (rebuilt[inside] == 255).all()
            rebuilt[inside] = entry["category_id"]
            assert entry["category"] == CLASSES[entry["category_id"]]
            assert entry["area"] == inside.sum()
        np.testing.assert_array_equal(rebuilt, labels)


def test_orientation_is_honoured(checkpoint: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(40, 56)).save(tmp_path / "in/turned.jpg", exif=exif)
    assert run_predict(checkpoint, [str(tmp_path / "in/turned.jpg")], tmp_path / "out", ("index",), False, "cpu") == 0
    assert Image.open(tmp_path / "out/index/turned.png").size == (40, 56)  # (width, height)


def test_names_do_not_depend_on_other_files(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/a.jpg", "c.PNG", "c.jpg.webp"):
        write(tmp_path / name)

    def named(keep_suffix: bool = False) -> dict[str, str]:
        found = find_sources([str(tmp_path)], tmp_path / "out", keep_suffix=keep_suffix)
        return {source.relative: source.name for source in found}

    assert named() == {"a.jpg": "a", "sub/a.jpg": "sub/a", "c.PNG": "c", "c.jpg.webp": "c.jpg"}
    write(tmp_path / "a.png")  # of two names that would be equal, neither becomes another one
    with pytest.raises(CommandError, match=r"a\.jpg and .*a\.png: .* the same name, a\n`predict --keep-suffix`"):
        named()
    assert named(keep_suffix=True) == {name: name for name in ("a.jpg", "a.png", "sub/a.jpg", "c.PNG", "c.jpg.webp")}


def test_two_folders_with_the_same_name_are_refused(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "two/a.jpg"):
        write(tmp_path / name)
    with pytest.raises(CommandError, match=r"one/a.jpg and .*two/a.jpg: their results .* same name, a\ngive"):
        find_sources([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out")
    twice = find_sources([str(tmp_path / "one"), str(tmp_path / "one/a.jpg")], tmp_path / "out")
    assert [source.name for source in twice] == ["a"]


def test_globs_folders_and_what_is_left_out(tmp_path: Path) -> None:
    for name in ("x/1.jpg", "x/y/2.JPG", "x/y/3.png", "x/notes.jpg.txt", "x/.hidden.jpg", "out/index/1.png"):
        write(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("no image")

    def relative(given: str) -> list[str]:
        return [source.relative for source in find_sources([str(tmp_path / given)], tmp_path / "out")]

    assert relative("x") == ["1.jpg", "y/2.JPG", "y/3.png"]
    assert relative("x/**/*") == ["1.jpg", "y/2.JPG", "y/3.png"]
    assert relative("x/*/*.png") == ["y/3.png"]
    assert relative(".") == ["x/1.jpg", "x/y/2.JPG", "x/y/3.png"]  # not the results of a run before
    for given in ("out", "out/index/1.png", "out/*/*.png"):
        with pytest.raises(CommandError, match=r"results in --out .* skipped"):
            relative(given)


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    for name in ("in/a.jpg", "in/sub/b.jpg", "far/c.jpg"):
        write(tmp_path / name)
    for link, folder in {"in/far": "far", "in/sub/up": "in", "in/out": ".", "far/back": "in"}.items():
        (tmp_path / link).symlink_to(tmp_path / folder)
    found = find_sources([str(tmp_path / "in")], tmp_path / "out")
    assert [source.relative for source in found] == ["a.jpg", "far/c.jpg", "sub/b.jpg"]


@pytest.mark.parametrize(
    ("given", "said"), [("empty", "images in this folder"), ("*.jpg", "this pattern"), ("gone.jpg", "of this name")]
)
def test_an_input_without_images_is_an_error(tmp_path: Path, given: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match=f"{said}.*types: jpg"):
        find_sources([str(tmp_path / given)], tmp_path / "out")


def test_damaged_images_are_named_and_the_rest_is_done(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write(tmp_path / "in/a.jpg").read_bytes()
    write(tmp_path / "in/e.png")
    (tmp_path / "in/b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/c.png").write_text("not a picture")
    write(tmp_path / "in/d.png", picture(31, 90))
    assert run_predict(checkpoint, [str(tmp_path / "in")], tmp_path / "out", ("index", "rle"), False, "cpu") == 1
    assert files(tmp_path / "out") == ["index/a.png", "index/e.png", "rle.json"]
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("skipped: ")]
    assert [Path(line.split()[1].rstrip(":")).name for line in lines] == ["b.jpg", "c.png", "d.png"]
    assert "too small: got 90x31 pixels as the network's input, expected 32x32 or more" in lines[2]
    assert "labelled 2 of 5 images" in told.out
    assert "3 skipped" in told.out


def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.png")
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CommandError, match="cannot be written here"):
            run_predict(checkpoint, [str(source)], out, ("index",), False, "cpu")


def test_coarse_needs_a_classifier_that_adapts(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "linear.safetensors", "linear")
    source = write(tmp_path / "a.png")
    with pytest.raises(CommandError, match="classifier linear does not adapt"):
        run_predict(checkpoint, [str(source)], tmp_path / "out", ("index", "coarse"), False, "cpu")
    assert run_predict(checkpoint, [str(source)], tmp_path / "out", ("index",), False, "cpu") == 0


def test_skip_existing_does_what_is_missing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, out, save = [str(tmp_path / "in")], tmp_path / "out", ("index", "rle")
    for name in "abc":
        write(tmp_path / f"in/{name}.png", picture(seed=ord(name)))
    assert run_predict(checkpoint, inputs, out, save, True, "cpu") == 0
    first = (out / "rle.json").read_text()
    (out / "index/b.png").unlink()
    before = (out / "index/a.png").stat().st_mtime_ns
    write(tmp_path / "in/d.png")
    capsys.readouterr()
    assert run_predict(checkpoint, inputs, out, save, True, "cpu") == 0
    assert "labelled 2 of 4 images" in capsys.readouterr().out
    assert (out / "index/a.png").stat().st_mtime_ns == before
    entries = json.loads((out / "rle.json").read_text())
    assert sorted({entry["image"] for entry in entries}) == ["a.png", "b.png", "c.png", "d.png"]
    keys = [(entry["image"], entry["category_id"]) for entry in entries]
    assert len(keys) == len(set(keys))
    assert sorted(map(str, json.loads(first))) == sorted(str(each) for each in entries if each["image"] != "d.png")
    assert run_predict(checkpoint, inputs, out, save, True, "cpu") == 0
    assert "labelled 0 of 4 images" in capsys.readouterr().out
    assert json.loads((out / "rle.json").read_text()) == entries
    (out / "rle.json").write_text('{"images": []}')
    with pytest.raises(CommandError, match="not a list that `ssaseg predict` wrote"):
        run_predict(checkpoint, inputs, out, save, True, "cpu")


def stop_at_the_fifth(monkeypatch: pytest.MonkeyPatch, *signals: int) -> None:
    """The process gets signals while it labels the fifth image."""
    real, calls = predict.Inference.predict_batch, []

    def infer(*given: Any) -> Any:
        calls.append(1)
        for number in signals if len(calls) == 5 else ():
            signal.raise_signal(number)
        return real(*given)

    monkeypatch.setattr(predict.Inference, "predict_batch", infer)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_finishes_what_it_has_begun(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    for index in range(8):
        write(tmp_path / f"in/{index}.png", picture(seed=index))
    stop_at_the_fifth(monkeypatch, number)
    out, inputs = tmp_path / "out", [str(tmp_path / "in")]
    assert run_predict(checkpoint, inputs, out, ("index", "rle"), False, "cpu") == code
    assert files(out) == [*(f"index/{index}.png" for index in range(5)), "rle.json"]
    assert labelled_images(out / "rle.json") == {f"{index}.png" for index in range(5)}
    told = capsys.readouterr()
    assert told.err == "stopped: 5 of 8 images are done; --resume labels the rest\n"
    assert told.out == ""
    monkeypatch.undo()
    assert run_predict(checkpoint, inputs, out, ("index", "rle"), True, "cpu") == 0
    assert len(labelled_images(out / "rle.json")) == 8
    whole = json.loads((out / "rle.json").read_text())
    stop_at_the_fifth(monkeypatch, number)
    assert run_predict(checkpoint, inputs, out, ("rle",), False, "cpu") == code
    kept = json.loads((out / "rle.json").read_text())
    assert sorted(map(str, kept)) == sorted(map(str, whole))  # also what this run did not get to


def test_a_second_ctrl_c_leaves_whole_files(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(8):
        write(tmp_path / f"in/{index}.png", picture(seed=index))
    stop_at_the_fifth(monkeypatch, signal.SIGINT, signal.SIGINT)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_predict(checkpoint, [str(tmp_path / "in")], out, ("index", "rle"), False, "cpu")
    written = set(files(out)) - {"rle.json"}
    assert written <= {f"index/{index}.png" for index in range(4)}  # those that were being written may be missing
    for name in written:
        Image.open(out / name).load()
    assert labelled_images(out / "rle.json") <= {f"{index}.png" for index in range(4)}
    monkeypatch.undo()
    assert run_predict(checkpoint, [str(tmp_path / "in")], out, ("index", "rle"), True, "cpu") == 0
    assert len({entry["image"] for entry in json.loads((out / "rle.json").read_text())}) == 8


def test_rle_keeps_what_a_run_did_not_do(checkpoint: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "out" / "rle.json"
    for name in "ab":
        write(tmp_path / f"in/{name}.png", picture(seed=ord(name)))
    assert run_predict(checkpoint, [str(tmp_path / "in")], out, ("rle",), False, "cpu") == 0
    before = json.loads(path.read_text())
    write(tmp_path / "in/a.png", picture(64, 64))
    (tmp_path / "in/b.png").write_text("damaged by now")
    write(tmp_path / "c.png")
    inputs = [str(tmp_path / "in"), str(tmp_path / "c.png")]
    assert run_predict(checkpoint, inputs, out, ("rle",), False, "cpu") == 1
    after = json.loads(path.read_text())
    assert {entry["image"] for entry in after} == {"a.png", "b.png", "c.png"}
    assert all(entry["segmentation"]["size"] == [64, 64] for entry in after if entry["image"] == "a.png")
    kept = [[entry for entry in entries if entry["image"] == "b.png"] for entries in (before, after)]
    assert kept[0] == kept[1] != []
    path.write_bytes(b"\xff")
    with pytest.raises(CommandError, match="not a list that `ssaseg predict` wrote"):
        run_predict(checkpoint, inputs, out, ("rle",), False, "cpu")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full here")
@pytest.mark.parametrize("length", [10, 100_000])  # noticed when the file is closed, or while it is written
def test_a_full_disk_leaves_the_old_rle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    path = tmp_path / "rle.json"
    path.write_text("[]\n")
    real = objects.make_temporary

    def full(folder: Path) -> tuple[Path, int]:
        temporary, descriptor = real(folder)
        os.close(descriptor)
        return temporary, os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(objects, "make_temporary", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_objects(path, [("a.png", [b"{" + b" " * length + b"}"])], lambda entry: True)
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["rle.json"]
    assert path.read_text() == "[]\n"


def test_a_full_disk_stops_the_run_and_leaves_no_half_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        write(tmp_path / f"in/{index}.png")
    real = os.replace

    def full(temporary: Path, path: Path) -> None:
        if Path(path).name == "1.png":
            raise OSError(28, "No space left on device", str(path))
        real(temporary, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run_predict(checkpoint, [str(tmp_path / "in")], tmp_path / "out", ("index",), False, "cpu")
    assert set(files(tmp_path / "out")) <= {"index/0.png", "index/2.png"}


@pytest.mark.parametrize("threads", [1, 3])
def test_in_order_works_ahead_but_not_far(threads: int) -> None:
    started: list[int] = []

    def square(item: int) -> int:
        started.append(item)
        time.sleep(0.002 * (item % 3))
        if item == 9:
            raise OSError("nine")
        return item * item

    results = in_order(square, range(100), threads)
    ahead = 0
    for item in range(7):
        assert next(results) == item * item
        ahead = max(ahead, len(started) - 1 - item)
        assert len(started) <= item + 1 + threads
        time.sleep(0.01)
        ahead = max(ahead, len(started) - 1 - item)
    assert ahead > 0
    with pytest.raises(OSError, match="nine"):
        list(results)
    assert len(started) <= 10 + threads


def test_one_thread_works_in_order_and_as_far_ahead_as_is_asked() -> None:
    started: list[int] = []
    results = in_order(started.append, range(100), 1, ahead=5)
    next(results)
    time.sleep(0.05)
    assert started == [*range(6)]
    results.close()
    assert len(started) <= 6


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 images: over the last half the resident set grows by less than 1 KiB an image."""
    count = 2000
    first = write(tmp_path / "in/0000.png", picture(32, 32))
    for index in range(1, count):
        os.link(first, tmp_path / f"in/{index:04}.png")
    process, resident = psutil.Process(), []
    real = predict.Inference.predict_batch

    def measured(*given: Any) -> Any:
        resident.append(process.memory_info().rss)
        return real(*given)

    monkeypatch.setattr(predict.Inference, "predict_batch", measured)
    with tiny_networks():
        checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", network="seaformer_x")
        assert run_predict(checkpoint, [str(tmp_path / "in")], tmp_path / "out", ("index", "rle"), False, "cpu") == 0
    assert len(files(tmp_path / "out/index")) == count
    slope = np.polyfit(np.arange(count // 2), resident[count // 2 :], 1)[0]
    assert slope < 1024, f"{slope:.0f} bytes an image"
