"""`ssaseg video`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path

import click

from ssaseg.cli.importing import quick_imports
from ssaseg.cli.options import backend_option, device_option, network_file, precision_option


@click.command()
@click.argument("checkpoint", type=network_file)
@click.argument("source", metavar="INPUT")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Video to write: .mp4 .mkv .mov .webm")
@click.option(
    "--save",
    type=click.Choice(["overlay", "labels"]),
    default="overlay",
    show_default=True,
    help="Colours over the frames; or class numbers as grey values, without loss (.mkv).",
)
@click.option("--every", type=click.IntRange(min=1), metavar="N", default=1, help="Label only each Nth frame.")
@click.option("--side-by-side", is_flag=True, help="The frame as it was, beside the overlay.")
@click.option(
    "--smooth",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="A",
    default=0.0,
    help="Average logits over frames: A of the past, 1-A of the frame.",
)
@click.option("--motion", is_flag=True, help="With --smooth: the past moves along with the image.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N frames.")
@click.option("--input-format", metavar="NAME", help="FFmpeg's name of a camera's interface, such as v4l2.")
@click.option("--timings", is_flag=True, help="Print where the time went.")
@precision_option("auto is float32")
@backend_option
@device_option
def video(
    checkpoint: Path,
    source: str,
    out: Path,
    save: str,
    every: int,
    side_by_side: bool,
    smooth: float,
    motion: bool,
    limit: int | None,
    input_format: str | None,
    timings: bool,
    precision: str,
    backend: str,
    device: str,
) -> int:
    """Label a video.

    INPUT is a video file, an address such as rtsp://…, or a camera with its --input-format. Frames keep their order and
    their times, and the sound is copied. Where a file is damaged, what could be decoded is kept, and the exit code is
    1. At the end it prints how much labels flicker: the share of pixels whose label changes from a frame to the next
    one where the image does not change. Needs: pip install 'ssaseg[video]'

    \b
    Example:
      ssaseg video best.safetensors drive.mp4 --out labelled.mp4
      ssaseg video best.safetensors drive.mp4 --out steady.mp4 --smooth 0.7 --motion --side-by-side
      ssaseg video best.safetensors /dev/video0 --input-format v4l2 --out camera.mkv
    """
    if motion and not smooth:
        raise click.UsageError("--motion needs --smooth A", click.get_current_context())
    if save == "labels" and (side_by_side or out.suffix.lower() != ".mkv"):
        what = "leave out --side-by-side" if side_by_side else "name the file .mkv: other formats change pixels"
        raise click.UsageError(f"--save labels: {what}", click.get_current_context())
    with quick_imports():
        from ssaseg.cli.video.run import Request, run_video

    chosen = "float32" if precision == "auto" else precision
    request = Request(save, every, side_by_side, smooth, motion, limit, chosen, backend, input_format, timings)
    return run_video(checkpoint, source, out, request, device)
