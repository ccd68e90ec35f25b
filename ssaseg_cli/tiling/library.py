"""rasterio, the package that reads and writes by windows: its settings, and how it is called."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CACHE = 64  # of GDAL, for blocks that are read and written [MiB]
SETTINGS = {
    "GDAL_CACHEMAX": CACHE,
    "GDAL_PAM_ENABLED": False,  # else it writes .aux.xml files beside images
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # else other files in the folder change what an image is
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # else what is missing in a JPEG file is grey
}


@contextmanager
def windows_library() -> Iterator[None]:
    """Inside this context rasterio has our settings, and says nothing of images without georeference."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with rasterio.Env(**SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def open_raster(path: Path, mode: str = "r", **options: Any) -> Any:
    """A dataset of rasterio. Raises `rasterio.errors.RasterioError`."""
    import rasterio

    return rasterio.open(path.absolute(), mode, **options)


def of_rasterio(error: Exception) -> bool:
    """Whether rasterio has raised it: some of its errors, those of GDAL, have no public type."""
    return type(error).__module__.partition(".")[0] == "rasterio"


class Signalled(logging.Handler):
    """Collects the errors that GDAL signals inside this context: some of them rasterio only logs."""

    NAME, MARK = "rasterio", "GDAL signalled an error"

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the first errors."""
        text = record.getMessage()
        if self.MARK in text and len(self.errors) < 10:
            self.errors.append(text.partition("msg=")[2] or text)

    def __enter__(self) -> "Signalled":
        logger = logging.getLogger(self.NAME)
        self.before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logger = logging.getLogger(self.NAME)
        logger.removeHandler(self)
        logger.setLevel(self.before[0])
        logger.propagate = self.before[1]
