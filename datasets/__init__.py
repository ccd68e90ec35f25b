"""Data sets by name, and the error that every one of them raises.

Nothing heavy is imported here: OpenCV and NumPy come in with the data set that is built.
"""

from ssaseg.datasets.base import IGNORED, DataError, Dataset, Palette, default_palette
from ssaseg.datasets.build import build_dataset, list_datasets, stated_classes

__all__ = [
    "IGNORED",
    "DataError",
    "Dataset",
    "Palette",
    "build_dataset",
    "default_palette",
    "list_datasets",
    "stated_classes",
]
