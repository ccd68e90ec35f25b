"""Decodes image and mask files to pixels, with an error where a file is damaged or means something else."""

from ssaseg.datasets.base import Levels
from ssaseg.datasets.decoding.formats import FORMATS, MAX_PIXELS, open_image
from ssaseg.datasets.decoding.images import header_size, image_facts, read_complete, read_image
from ssaseg.datasets.decoding.masks import Mask, read_mask

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "Levels",
    "Mask",
    "header_size",
    "image_facts",
    "open_image",
    "read_complete",
    "read_image",
    "read_mask",
]
