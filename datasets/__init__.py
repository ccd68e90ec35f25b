"""Data sets by name, what each of them offers, and the error that they raise.

Nothing heavy is imported here: OpenCV and NumPy are imported with the data set that is built.
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
