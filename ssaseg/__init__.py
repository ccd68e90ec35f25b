"""Light semantic segmentation with the SSA classifier.

>>> from ssaseg import Predictor
>>> labels = Predictor("best.safetensors")("photo.jpg")  # uint8 (H, W)

The names below are imported when they are first used, so that `import ssaseg` and every `--help` need no PyTorch.
"""

import os
from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__all__ = ["Predictor", "__version__", "load_model"]

# In the root folder of the source, Python finds this folder first, but not the packages that are installed with it.
__path__ = extend_path(__path__, __name__)

# PyTorch's CPU threads spin while they wait for one another. If a loader's worker needs the same core, they spin for
# their whole time slice, and a step can take many times as long. After a short spin the core is free for the worker.
# OpenMP reads this when PyTorch is imported; OMP_WAIT_POLICY is its other setting for the same.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# OpenCV's own limit, which it reads when it is imported: for files whose size only OpenCV can tell. As
# `ssaseg.datasets.decoding.MAX_PIXELS`.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**28))

_HOMES = {"Predictor": "ssaseg.predictor", "load_model": "ssaseg.models"}

if TYPE_CHECKING:
    from ssaseg.models import load_model
    from ssaseg.predictor import Predictor

    __version__: str
else:  # a type checker would take every name for one that this function knows

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            found = version("ssaseg")
        elif name in _HOMES:
            found = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
