"""A command called as a user would, and image files for it to meet."""

import zlib
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from ssaseg.cli.main import cli


def call(*words: str | Path) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert "Traceback" not in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def put(file: Path, values: tuple[int, ...] | None = None, size: tuple[int, int] = (40, 50), mode: str = "RGB") -> Path:
    """A mask of these ids, or a picture, which differs from those of other names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        pixels = np.full((*size, 3), 99, np.uint8)
        pixels[:8, :8] = list(zlib.crc32(str(file).encode()).to_bytes(4, "big")[:3])
        Image.fromarray(pixels).convert(mode).save(file)
    else:
        Image.fromarray(np.resize(np.array(values, np.uint8), size)).save(file)
    return file
