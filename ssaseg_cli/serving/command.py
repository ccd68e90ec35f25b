"""`ssaseg serve`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.importing import quick_imports
from ssaseg.cli.options import device_option, network_file, opening_options, protocol_changes, protocol_options

MOST = 2**28  # pixels that the decoder takes: `ssaseg.datasets.decoding.MAX_PIXELS`


@click.command()
@click.argument("checkpoint", type=network_file)
@click.argument("other", metavar="[CHECKPOINT2]", required=False, type=network_file)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen at.  [default: a free one]")
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0, MOST / 1e6, min_open=True),
    default=50,
    show_default=True,
    help="Refuse larger images.",
)
@click.option(
    "--max-megabytes",
    type=click.FloatRange(0, 1024, min_open=True),
    default=32,
    show_default=True,
    help="Refuse larger files.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    metavar="N",
    help="Images in work and waiting; more are refused for now (503).",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Most for sending an image, and for waiting.",
)
@protocol_options
@opening_options
@device_option
def serve(
    checkpoint: Path,
    other: Path | None,
    host: str,
    port: int,
    open_page: bool,
    max_megapixels: float,
    max_megabytes: float,
    queue: int,
    timeout: float,
    classes: str | None,
    protocol: str | None,
    device: str,
    **changes: Any,
) -> int:
    """Show a checkpoint, or compare two, on a local web page; and label images over HTTP.

    Prints the address of the page, with a secret token; without it, nobody gets an answer. Drop an image on the page.
    Programs send images to /v1/predict and get a label PNG, or JSON with the share of each class. Images are not
    kept. Images much larger than those in training get worse labels, which an answer says; --size 512 resizes them.
    Ctrl-C ends the server. Needs the extra `serve`: pip install 'ssaseg[serve]'

    \b
    Example:
      ssaseg serve runs/demo/best.safetensors --open
      ssaseg serve linear.safetensors ssa.safetensors --port 8000
      curl --data-binary @photo.jpg "http://127.0.0.1:8000/v1/predict?token=TOKEN"
    """
    changes = protocol_changes(changes)
    with quick_imports():
        from ssaseg.cli.serving.app import Limits
        from ssaseg.cli.serving.serve import run_serve

    return run_serve(
        files=[checkpoint] if other is None else [checkpoint, other],
        host=host,
        port=port,
        limits=Limits(int(max_megabytes * 2**20), max(int(max_megapixels * 1e6), 1), queue, timeout),
        open_page=open_page,
        device=device,
        classes=classes,
        protocol=protocol,
        changes=changes,
    )
