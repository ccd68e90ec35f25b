"""Reads and writes videos with PyAV: frames in order, with their times, and sound that is copied unchanged.

Axes: H×W pixels of a frame, upright as a player shows it.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ssaseg.datasets import DataError
from ssaseg.files.text import printable
from ssaseg.files.writing import make_temporary

# Formats that hold pictures and sound themselves. Others, such as playlists, name more files to open.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,mxf,nut,ivf,h264,hevc,av1,obu,m4v,gif,"
    "yuv4mpegpipe,dv,rm,wtv"
)
ADDRESSES = ("rtsp://", "rtmp://", "udp://", "http://", "https://")  # of cameras and servers
WAIT = 10.0  # seconds for an address to answer
# Suffix of a file to write → its format and the codecs for colours, the first that this PyAV has.
WRITTEN = {
    ".mp4": ("mp4", ("libx264", "mpeg4")),
    ".mov": ("mov", ("libx264", "mpeg4")),
    ".mkv": ("matroska", ("libx264", "mpeg4")),
    ".webm": ("webm", ("libvpx-vp9", "libvpx")),
}
QUALITY = {
    "libx264": {"crf": "20", "preset": "veryfast"},
    "libvpx-vp9": {"crf": "32", "b": "0", "deadline": "realtime"},
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
    then says why.
    """

    def __init__(self, source: str, device_format: str | None = None) -> None:
        import av

        self.source, self.damage, self.frames = source, "", 0
        address = source.startswith(ADDRESSES)
        if device_format is None and not address and not os.path.isfile(source):
            what = "is a folder" if os.path.isdir(source) else "does not exist"
            raise DataError(f"{printable(source)}: {what}\nexpected a video file, or an address such as rtsp://…")
        options = {} if address or device_format else {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        try:
            self.container = av.open(source, format=device_format, options=options, timeout=WAIT if address else None)
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(f"{printable(source)}: cannot be read as a video: {_reason(error)}") from None
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
                    return
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


def _upright(frame: Any) -> np.ndarray:
    image: np.ndarray = frame.to_ndarray(format="bgr24")
    turns = getattr(frame, "rotation", 0) // 90 % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", None) or str(error))


class Writer:
    """A video file, complete or absent: it gets its name when it is closed without an error.

    labels: grey pixels that are stored without loss, for class numbers; else colours. sound: a stream of a `Reader` to
    copy; None: without. `without_sound` says why sound cannot be copied into this format. Raises DataError for a suffix
    that is not in `WRITTEN`.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], rate: Fraction, time_base: Fraction, labels: bool, sound: Any = None
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

    def add(self, image: np.ndarray, time: int) -> None:
        """A frame BGR uint8 (H,W,3), or labels uint8 (H,W), at a time in units of the time base."""
        import av

        height, width = self.stream.height - image.shape[0], self.stream.width - image.shape[1]
        if height or width:
            image = np.pad(image, ((0, height), (0, width), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(image, format=self.format)
        frame.pts, frame.time_base = time, self.stream.codec_context.time_base
        self._mux(frame)

    def add_sound(self, packet: Any) -> None:
        """A piece of the sound."""
        if self.sound is not None:
            packet.stream = self.sound
            self.container.mux(packet)

    def _mux(self, frame: Any) -> None:
        for packet in self.stream.encode(frame):
            self.container.mux(packet)
