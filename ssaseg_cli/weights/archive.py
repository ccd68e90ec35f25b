"""Reads what `torch.save` wrote as a zip file, if it holds only plain values and tensors: such as a training state.

Not with `torch.load(weights_only=True)`, for the reasons in `pickles`. Also, a tensor here has memory of its own, since
optimisers write into it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ssaseg.cli.weights.stand_ins import Array
from ssaseg.cli.weights.torch_files import Archive, open_archive
from ssaseg.files.reading import open_file

LARGEST = 2**37  # bytes; a classifier's memory of pixels may be most: 9.8 GB with GMMSeg's settings for ADE20K
MOST_VALUES, DEEPEST = 1_000_000, 50  # of a file: values, also those that are shared, and nested containers


def read_archive(path: Path) -> Any:
    """The content: None, bool, int, float, text, list, tuple, dict with such keys, and dense tensors on the CPU.

    Tensors keep their strides where these leave no gaps. Raises OSError if the file cannot be read, and ValueError,
    BadZipFile, or what a damaged pickle raises, for everything else.
    """
    with open_file(path, LARGEST) as file:
        if file.read(4) != b"PK\x03\x04":  # older formats have no checksums
            raise ValueError("it is not a file of torch.save")
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        archive = open_archive(file, size, most=size)
        if not archive.checked:
            raise ValueError("it has no checksums")
        return _Builder(archive, 2 * size).build(archive.content)


class _Builder:
    """Makes plain values and tensors of what the pickle described."""

    def __init__(self, archive: Archive, most: int) -> None:
        """most: bytes of all tensors together."""
        self.archive, self.bytes, self.values = archive, most, MOST_VALUES
        self.tensors: dict[int, Tensor] = {}  # by the identity of their description: a shared tensor is made once

    def build(self, value: Any, depth: int = 0) -> Any:
        """Raises ValueError for values that are too many, nested too deeply, or not plain."""
        self.values -= 1
        if self.values < 0 or depth > DEEPEST:
            raise ValueError("its values are too many, or nested too deeply")
        if isinstance(value, Array):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._tensor(value)
            return self.tensors[id(value)]
        if isinstance(value, dict):
            if any(type(key) not in (str, int) for key in value):
                raise ValueError("a key is neither text nor a whole number")
            return {key: self.build(inner, depth + 1) for key, inner in value.items()}
        if type(value) in (list, tuple):
            made: Callable[[Any], Any] = type(value)
            return made([self.build(inner, depth + 1) for inner in value])
        if value is None or type(value) in (bool, float, str) or (type(value) is int and abs(value) < 2**63):
            return value
        raise ValueError("it holds a value that is neither plain nor a tensor")

    def _tensor(self, array: Array) -> Tensor:
        tensor = self.archive.tensor(array)
        self.bytes -= tensor.numel() * tensor.itemsize
        if self.bytes < 0:
            raise ValueError("its tensors are larger than the file")
        return tensor.clone()
