"""`ssaseg video`: order, times, sound, damage, smoothing, and wrong input."""

import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from calling import call
from explaining import checkpoint
from networks import tiny_networks
from predicting import picture

from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.scoring.lanes import THREAD_NAME
from ssaseg.cli.scoring.timings import VIDEO_STAGES
from ssaseg.cli.video.smoothing import Flicker, Smoother
from ssaseg.cli.video.streams import Frame, Reader, Writer
from ssaseg.recipes import parse_protocol

av = pytest.importorskip("av", reason="needs PyAV: pip install 'ssaseg[video]'")
pytestmark = pytest.mark.usefixtures("one_thread")
H, W, FRAMES = 48, 64, 9


def moving(number: int) -> np.ndarray:
    """A frame: a picture that moves by two pixels."""
    return np.roll(np.tile(picture(H, W, seed=3), (1, 1, 1)), 2 * number, axis=1)


def write_video(path: Path, frames: int = FRAMES, sound: bool = False, codec: str = "mpeg4") -> Path:
    """Frames at uneven times, and a second of a tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        tone = container.add_stream("aac", rate=8000) if sound else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(moving(number), format="bgr24")
            frame.pts, frame.time_base = 4 * number + 3 * (number > 4), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for start in range(0, 4096 if tone else 0, 1024):
            wave = np.sin(np.arange(start, start + 1024) / 5).astype(np.float32)[None]
            piece = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = 8000, start, Fraction(1, 8000)
            container.mux(tone.encode(piece))
        if tone:
            container.mux(tone.encode())
    return path


def content(path: Path) -> tuple[list[np.ndarray], list[float], list[bytes]]:
    """Frames, their times [s], and the packets of the sound."""
    with av.open(str(path)) as container:
        frames, times, sound = [], [], []
        for packet in container.demux():
            if packet.stream.type == "audio":
                sound += [bytes(packet)] if packet.size else []
                continue
            for frame in packet.decode():
                grey = frame.format.name.startswith("gray")
                frames.append(frame.to_ndarray(format="gray" if grey else "bgr24"))
                times.append(float(frame.time))
        return frames, times, sound


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("video")
    write_video(folder / "in.mp4", sound=True)
    with tiny_networks():
        checkpoint(folder / "net.safetensors", "linear")
        yield folder


def run(place: Path, *words: str | Path, code: int = 0) -> str:
    words = ("--device", "cpu", "--backend", "torch", *words)
    result = call("video", place / "net.safetensors", *words)
    assert result.exit_code == code, result.output
    return result.output


def test_labels_are_those_of_each_frame_in_order(place: Path, tmp_path: Path) -> None:
    printed = run(place, place / "in.mp4", "--out", tmp_path / "out.mkv", "--save", "labels")
    frames, times, _ = content(tmp_path / "out.mkv")
    before, when, _ = content(place / "in.mp4")
    assert len(frames) == FRAMES
    # Matroska has no times before 0, where the sound begins: all times are later by as much.
    assert [each - times[0] for each in times] == pytest.approx([each - when[0] for each in when], abs=2e-3)
    opened = open_file(place / "net.safetensors")
    engine = make_engine(opened, torch.device("cpu"), backend="torch")
    inference = Inference(engine, parse_protocol({}, "p"), opened.metadata["mean"], opened.metadata["std"])
    for image, labels in zip(before, frames, strict=True):
        expected = inference.labels([torch.from_numpy(each) for each in inference.inputs(image, "x")], image.shape[:2])
        assert np.array_equal(labels, expected.numpy())
    assert f"{FRAMES} frames" in printed
    assert len(np.unique(np.stack(frames))) > 1


def test_sound_and_times_are_kept(place: Path, tmp_path: Path) -> None:
    run(place, place / "in.mp4", "--out", tmp_path / "out.mp4", "--side-by-side")
    frames, times, sound = content(tmp_path / "out.mp4")
    before, when, original = content(place / "in.mp4")
    assert sound == original
    assert len(sound) > 2
    assert times == pytest.approx(when, abs=1e-3)
    assert frames[0].shape == (H, 2 * W, 3)
    for now, image in zip(frames, before, strict=True):
        assert np.abs(now[:, :W].astype(int) - image).mean() < 6  # beside the overlay is the frame itself


def test_only_some_frames_are_labelled(place: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "out.mkv", "--save", "labels", "--every", "3", "--limit", "7")
    run(place, place / "in.mp4", *words)
    frames = content(tmp_path / "out.mkv")[0]
    assert len(frames) == 7
    for start in (0, 3):
        assert all(np.array_equal(frames[start], frames[start + more]) for more in (1, 2))
    assert not np.array_equal(frames[0], frames[3])


def test_what_is_whole_of_a_damaged_file_is_kept(place: Path, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "in.mkv", frames=40).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    result = call(
        "video", place / "net.safetensors", tmp_path / "cut.mkv", "--out", tmp_path / "out.mkv", "--backend", "torch"
    )
    kept = len(content(tmp_path / "out.mkv")[0])
    assert 5 < kept < 40
    assert f"{kept} frames" in result.output
    assert result.exit_code == 1
    assert f"cut.mkv: damaged (it ends after {kept / 25:.1f} of 1.6 s): {kept} frames" in result.output
    noisy = bytearray(whole)
    noisy[len(whole) // 2 : len(whole) // 2 + 400] = b"\xa5" * 400
    (tmp_path / "noisy.mkv").write_bytes(bytes(noisy))
    call("video", place / "net.safetensors", tmp_path / "noisy.mkv", "--out", tmp_path / "o.mkv", "--backend", "torch")
    assert len(content(tmp_path / "o.mkv")[0]) > 10


def test_an_mp4_file_that_is_cut_off_keeps_its_beginning(place: Path, tmp_path: Path) -> None:
    """Where the index is at the beginning; where it is at the end, nothing can be read."""
    data = write_video(tmp_path / "in.mp4", frames=40).read_bytes()
    begin = data.index(b"moov") - 4
    (tmp_path / "lost.mp4").write_bytes(data[:begin])
    assert "lacks the index at its end" in run(place, tmp_path / "lost.mp4", "--out", tmp_path / "x.mkv", code=2)
    with (
        av.open(str(tmp_path / "in.mp4")) as source,
        av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "first.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(data[: (data.index(b"mdat") + len(data)) // 2])
    printed = run(place, tmp_path / "cut.mp4", "--out", tmp_path / "out.mkv", "--save", "labels", code=1)
    kept = len(content(tmp_path / "out.mkv")[0])
    assert 5 < kept < 40
    assert f"{kept} frames could be decoded and are kept" in printed


def test_one_frame_of_odd_sides(place: Path, tmp_path: Path) -> None:
    """Colours are stored for two by two pixels: the last row and column are repeated. Labels keep their size."""
    with av.open(str(tmp_path / "in.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 33, 47, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(33, 47), format="bgr24")))
        container.mux(stream.encode())
    run(place, tmp_path / "in.mkv", "--out", tmp_path / "out.mp4")
    run(place, tmp_path / "in.mkv", "--out", tmp_path / "out.mkv", "--save", "labels")
    (colours,), (labels,) = (content(tmp_path / name)[0] for name in ("out.mp4", "out.mkv"))
    assert colours.shape == (34, 48, 3)
    assert np.abs(colours[32].astype(int) - colours[33]).mean() < 3
    assert labels.shape == (33, 47)


# ---- the threads -------------------------------------------------------------------------------------------------
def test_few_frames_are_in_work_at_a_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, ahead, written = write_video(tmp_path / "in.mp4", frames=60), [], 0
    readers: list[Reader] = []
    opened, added = Reader.__init__, Writer.add

    def open_reader(self: Reader, *given: Any) -> None:
        opened(self, *given)
        readers.append(self)

    def add(self: Writer, *given: Any) -> int:
        nonlocal written
        ahead.append(readers[0].frames - written)
        written += 1
        return added(self, *given)

    monkeypatch.setattr(Reader, "__init__", open_reader)
    monkeypatch.setattr(Writer, "add", add)
    monkeypatch.setattr("ssaseg.cli.video.run.count_lanes", lambda *_: 2)
    run(place, long, "--out", tmp_path / "out.mp4")
    assert written == 60
    assert 1 < max(ahead) <= 4 + 1 + 2 * 2 + 1 + 4, "decoded, in lanes, drawn and encoded, and one on the way to each"


@pytest.mark.parametrize("place_of_error", ["ssaseg.cli.video.run.overlay", "ssaseg.cli.video.streams.Writer.add"])
def test_an_error_of_any_thread_ends_the_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_of_error: str
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place_of_error, fail)
    assert "No space left on device" in run(place, place / "in.mp4", "--out", tmp_path / "out.mp4", code=2)
    assert list(tmp_path.iterdir()) == []
    left = [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
    for thread in left:
        thread.join(20)
    assert not [thread for thread in left if thread.is_alive()]


def test_timings_of_the_stages(place: Path, tmp_path: Path) -> None:
    printed = run(place, place / "in.mp4", "--out", tmp_path / "out.mp4", "--timings")
    rows = re.findall(r"^ *(\w+) {2,}.* ([\d.]+) +[\d.]+ *$", printed, re.MULTILINE)
    assert [name for name, _ in rows] == [*VIDEO_STAGES, "waiting"]
    assert all(float(spent) > 0 for name, spent in rows if name != "waiting")


def test_smoothing_is_the_exponential_average() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(3, 1, 4, 6, 8, generator=generator)
    smooth, image = Smoother(0.75), picture(48, 64)
    assert torch.equal(smooth(first, image), first)
    assert torch.allclose(smooth(second, image), 0.75 * first + 0.25 * second)
    assert torch.allclose(smooth(third, image), 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third)
    assert torch.equal(smooth(torch.zeros(1, 4, 3, 3), image), torch.zeros(1, 4, 3, 3))


def test_motion_moves_the_past_with_the_image() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    image = np.asarray(torch.nn.functional.avg_pool2d(torch.from_numpy(noise).float().permute(2, 0, 1), 5, 1, 2))
    image = np.ascontiguousarray(np.clip((image.transpose(1, 2, 0) - 100) * 4, 0, 255).astype(np.uint8))
    logits = torch.zeros(1, 2, 24, 32)
    logits[0, 1, 8:16, 8:16] = 4.0
    moved = np.roll(image, 8, axis=1)  # 8 of 128 pixels are 2 of 32 logits
    fixed, following = Smoother(0.9), Smoother(0.9, motion=True)
    for each in (fixed, following):
        each(logits, image)
    now = torch.zeros_like(logits)
    target = torch.roll(logits, 2, 3)
    left = [(each(now, moved) - 0.9 * target).abs().mean().item() for each in (fixed, following)]
    assert left[1] < 0.3 * left[0]


def test_flicker_counts_still_pixels_only() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    labels = np.zeros((8, 8), np.uint8)
    flicker = Flicker()
    flicker.add(image, labels)
    assert flicker.share is None
    other, brighter = labels.copy(), image.copy()
    other[:, :4] = 1
    brighter[:, :2] = 200  # with the blur, three columns change
    flicker.add(brighter, other)
    assert flicker.still == 8 * 5
    assert flicker.changed == 8 * 1
    flicker.add(brighter, other)
    assert flicker.share == 8 / (8 * 5 + 64)


def test_smoothing_changes_labels_and_is_reported(place: Path, tmp_path: Path) -> None:
    printed = run(place, place / "in.mp4", "--out", tmp_path / "a.mkv", "--save", "labels", "--smooth", "0.9")
    run(place, place / "in.mp4", "--out", tmp_path / "b.mkv", "--save", "labels")
    smooth, plain = (np.stack(content(tmp_path / name)[0]) for name in ("a.mkv", "b.mkv"))
    assert np.array_equal(smooth[0], plain[0])
    assert (smooth[1:] != smooth[:-1]).mean() < (plain[1:] != plain[:-1]).mean()
    assert "flicker" not in printed or "without --smooth" in printed


def broken(path: Path) -> None:
    with Writer(path, (H, W), Fraction(25), Fraction(1, 25), labels=False) as writer:
        writer.add(moving(0), 0)
        raise RuntimeError


def test_a_file_is_complete_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        broken(tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


def test_sides_of_odd_length(tmp_path: Path) -> None:
    with Writer(tmp_path / "x.mp4", (31, 45), Fraction(25), Fraction(1, 25), labels=False) as writer:
        writer.add(picture(31, 45), 0)
    assert content(tmp_path / "x.mp4")[0][0].shape == (32, 46, 3)


def test_turned_videos_are_read_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "in.mp4", frames=2)
    data = path.read_bytes()
    start = data.index(b"tkhd") + 4
    matrix = start + 40
    turned = b"".join(value.to_bytes(4, "big", signed=True) for value in (0, 65536, 0, -65536, 0, 0, 0, 0, 0x40000000))
    assert data[matrix : matrix + 4] == (65536).to_bytes(4, "big")
    (tmp_path / "turned.mp4").write_bytes(data[:matrix] + turned + data[matrix + 36 :])
    with Reader(str(tmp_path / "turned.mp4")) as reader, Reader(str(path)) as plain:
        one, other = (next(each for each in found if isinstance(each, Frame)).image for found in (reader, plain))
    assert np.array_equal(one, np.rot90(other, -1))  # to the right, as players show it


def bad_inputs(folder: Path) -> dict[str, Any]:
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    for kind in ("jpg", "png"):
        (folder / f"{kind}.mp4").write_bytes(cv2.imencode(f".{kind}", picture())[1].tobytes())
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile in.mp4\n")
    for name in ("frameless.mkv", "sound.mp4"):
        with av.open(str(folder / name), "w") as container:
            if name == "frameless.mkv":
                stream = container.add_stream("mpeg4", rate=25)
                stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
            tone = container.add_stream("aac", rate=8000)
            piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            piece.sample_rate = 8000
            container.mux(tone.encode(piece))
            container.mux(tone.encode())
    return {
        "text.mp4": "cannot be read as a video",
        "empty.mp4": "cannot be read as a video",
        "list.m3u8": "cannot be read as a video",
        "concat.mp4": "cannot be read as a video",
        "sound.mp4": "there is no video in it",
        "jpg.mp4": "an image, not a video",
        "png.mp4": "an image, not a video",
        "frameless.mkv": "no frame could be decoded",
        "nothing.mp4": "does not exist",
        ".": "is a folder",
    }


def test_what_is_no_video_is_refused(place: Path, tmp_path: Path) -> None:
    for name, reason in bad_inputs(tmp_path).items():
        printed = run(place, tmp_path / name, "--out", tmp_path / "out.mp4", code=2)
        assert reason in printed, name
        assert len(printed.splitlines()) <= 3
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--out", "in.mp4"], "exists"),
        (["--out", "none/out.mp4"], "no folder"),
        (["--out", "out.avi"], ".mkv"),
        (["--out", "out.mp4", "--save", "labels"], ".mkv"),
        (["--out", "out.mkv", "--save", "labels", "--side-by-side"], "--side-by-side"),
        (["--out", "out.mp4", "--motion"], "--smooth"),
        (["--out", "out.mp4", "--smooth", "1"], "--smooth"),
    ],
)
def test_wrong_options(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str) -> None:
    monkeypatch.chdir(place)
    assert text in run(place, "in.mp4", *words, code=2)
    assert {path.name for path in place.iterdir()} == {"in.mp4", "net.safetensors"}
