"""Reads and writes videos with PyAV: frames in order, with their times, and sound that is copied unchanged.

Axes: H×W pixels of a frame, upright as a player shows it.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ssaseg.datasets import DataError
from ssaseg.datasets.decoding.images import shown_size
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary

# Formats that hold pictures and sound themselves. Others, such as playlists, name more files to open.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,ivf,h264,hevc,av1,obu,m4v,gif,"
    "yuv4mpegpipe,dv,rm,wtv"
)
ADDRESSES = ("rtsp://", "rtmp://", "udp://", "http://", "https://")  # of cameras and servers
# Formats whose header states how long they are; of others FFmpeg guesses it.
HEADED = {"mov", "matroska", "avi"}
WAIT = 10.0  # seconds for an address to answer
# Suffix of a file to write → its format and the codecs for colours, the first that this PyAV has.
WRITTEN = {
    ".mp4": ("mp4", ("libx264", "mpeg4")),
    ".mov": ("mov", ("libx264", "mpeg4")),
    ".mkv": ("matroska", ("libx264", "mpeg4")),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
}
QUALITY = {
    # Half the time of "veryfast", with the same PSNR, in files that are a tenth larger.
    "libx264": {"crf": "20", "preset": "superfast"},
    # A seventeenth of the time of "cpu-used" 1, its default, with the same PSNR, in files of twice the size.
    "libvpx-vp9": {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6"},
}


class Frame(NamedTuple):
    """One picture of a video."""

    number: int  # from 0
    time: int  # in units of the video's time base, increasing
    image: np.ndarray  # BGR uint8 (H,W,3)


class Sound(NamedTuple):
    """A piece of the sound, as it is stored."""

    packet: Any


class Reader:
    """The frames and the sound of a file, camera or address, in the order in which they are stored.

    Raises DataError if it cannot be opened or has no pictures. Reading ends early where the rest is damaged; `damage`
    says what is damaged or missing, after the last frame.
    """

    def __init__(self, source: str, device_format: str | None = None) -> None:
        import av

        self.source, self.damage, self.frames = source, "", 0
        self.ended = 0.0  # the latest end of a packet [s]
        address = source.startswith(ADDRESSES)
        self.from_file = device_format is None and not address
        if self.from_file and not os.path.isfile(source):
            what = "is a folder" if os.path.isdir(source) else "does not exist"
            raise DataError(f"{printable(source)}: {what}\nexpected a video file, or an address such as rtsp://…")
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"} if self.from_file else {}
        try:
            self.container = av.open(source, format=device_format, options=options, timeout=WAIT if address else None)
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(_no_video(source, error, bool(options))) from None
        videos = self.container.streams.video
        if not videos:
            self.container.close()
            raise DataError(f"{printable(source)}: there is no video in it, only sound or text")
        self.video = videos[0]
        self.video.thread_type = "AUTO"
        self.sound = next(iter(self.container.streams.audio), None)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def in_one_thread(self) -> None:
        """Decodes in the thread that iterates. To be called before."""
        self.video.thread_count = 1

    @property
    def rate(self) -> Fraction:
        """Frames a second, as stated; 25 if nothing is stated."""
        return Fraction(self.video.average_rate or self.video.guessed_rate or 25)

    @property
    def time_base(self) -> Fraction:
        """Seconds of a unit of `Frame.time`."""
        return Fraction(self.video.time_base or 1 / self.rate)

    @property
    def expected(self) -> int | None:
        """The number of frames; None if it is not stated."""
        if self.video.frames:
            return int(self.video.frames)
        return round(self.container.duration / 1e6 * self.rate) if self.container.duration else None

    def __iter__(self) -> Iterator[Frame | Sound]:
        import av

        last = -1
        packets = self.container.demux([stream for stream in (self.video, self.sound) if stream is not None])
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    self.damage = self.damage or self._missing()
                    return
                self._note(packet)
                if packet.stream is not self.video:
                    if packet.dts is not None:
                        yield Sound(packet)
                    continue
                decoded: list[Any] = [*packet.decode()]
            except av.error.FFmpegError as error:
                self.damage = _reason(error)
                if isinstance(error, av.error.EOFError):
                    return
                continue  # the next packets may be whole
            for each in decoded:
                last = max(
                    last + 1, each.pts if each.pts is not None else round(self.frames / self.rate / self.time_base)
                )
                yield Frame(self.frames, last, _upright(each))
                self.frames += 1

    def _note(self, packet: Any) -> None:
        """Notes how far the video goes, and packets that are said to be damaged."""
        if packet.pts is not None and (packet.stream is self.video or not self.video.duration):
            self.ended = max(self.ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.is_corrupt and self.from_file:
            self.damage = "a piece of the data is wrong or missing"

    def _missing(self) -> str:
        """What a file that was cut off has lost; empty for a complete one."""
        if not self.frames or not self.from_file or self.container.format.name.split(",")[0] not in HEADED:
            return ""
        stream, unit = (self.video, float(self.time_base)) if self.video.duration else (self.container, 1e-6)
        seconds, lasted = (stream.duration or 0) * unit, self.ended - (stream.start_time or 0) * unit
        return f"it ends after {lasted:.1f} of {seconds:.1f} s" if seconds - lasted > max(0.5, 0.05 * seconds) else ""


def _no_video(source: str, error: Exception, limited: bool) -> str:
    """Why a source cannot be opened. limited: only files of `FORMATS` are."""
    text = f"{printable(source)}: cannot be read as a video: {_reason(error)}"
    if not limited:
        return text
    with suppress(OSError):
        if shown_size(Path(source)) is not None:
            return f"{printable(source)}: an image, not a video\n`ssaseg predict` labels images"
    expected = "expected a file that holds a video; playlists are not read"
    return f"{text}\n{expected}\nan .mp4 file that was cut off lacks the index at its end: it cannot be read"


def _upright(frame: Any) -> np.ndarray:
    image: np.ndarray = frame.to_ndarray(format="bgr24")
    turns = getattr(frame, "rotation", 0) // 90 % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or str(error))


class Writer:
    """A video file, complete or absent: it gets its name when it is closed without an error.

    labels: grey pixels that are stored without loss, for class numbers; else colours. threads: that encode; 1: the one
    that calls; 0: the codec decides, and what is written depends on the number of cores. sound: a stream of a `Reader`
    to copy; None: without. `without_sound` says why sound cannot be copied into this format. Raises DataError for a
    suffix that is not in `WRITTEN`.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
        labels: bool,
        sound: Any = None,
        threads: int = 1,
    ) -> None:
        import av

        if path.suffix.lower() not in WRITTEN:
            raise DataError(f"{printable(str(path))}: expected a name that ends with {' '.join(WRITTEN)}")
        self.path, self.size, self.without_sound = path, size, ""
        kind, codecs = WRITTEN[path.suffix.lower()]
        self.temporary, descriptor = make_temporary(path.parent)
        os.close(descriptor)
        self.container = av.open(str(self.temporary), "w", format=kind)
        codec = "ffv1" if labels else next(name for name in codecs if name in av.codecs_available)
        self.stream = cast(Any, self.container.add_stream(codec, rate=rate, options=QUALITY.get(codec, {})))
        height, width = size
        self.format = "gray" if labels else "bgr24"
        if not labels:  # colours are stored for two by two pixels
            height, width = height + height % 2, width + width % 2
        self.stream.height, self.stream.width = height, width
        self.stream.pix_fmt = "gray" if labels else "yuv420p"
        self.stream.codec_context.thread_count = threads
        self.stream.codec_context.time_base = time_base
        self.stream.time_base = time_base
        self.sound = None
        if sound is not None:
            try:
                self.sound = self.container.add_stream_from_template(sound)
            except (av.error.FFmpegError, ValueError) as error:
                self.without_sound = _reason(error)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._mux(None)
            self.container.close()
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def add(self, image: np.ndarray, time: int) -> int:
        """A frame BGR uint8 (H,W,3), or labels uint8 (H,W), at a time in units of the time base. Returns 1, a frame."""
        import av

        height, width = self.stream.height - image.shape[0], self.stream.width - image.shape[1]
        if height or width:
            image = np.pad(image, ((0, height), (0, width), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(image, format=self.format)
        frame.pts, frame.time_base = time, self.stream.codec_context.time_base
        self._mux(frame)
        return 1

    def add_sound(self, packet: Any) -> int:
        """A piece of the sound. Returns 0, no frame."""
        if self.sound is not None:
            packet.stream = self.sound
            self.container.mux(packet)
        return 0

    def _mux(self, frame: Any) -> None:
        for packet in self.stream.encode(frame):
            self.container.mux(packet)
