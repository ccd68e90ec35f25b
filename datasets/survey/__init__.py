"""Finds out how a user's folder is organised."""

from ssaseg.datasets.survey.finding import find_folders
from ssaseg.datasets.survey.found import Found, split_names
from ssaseg.datasets.survey.messages import NoMasks, TieError, several_error
from ssaseg.datasets.survey.places import IMAGES, MASKS, SPLITS
from ssaseg.datasets.survey.published import COMMON_FOLDERS, find_published, require_prepared

__all__ = [
    "COMMON_FOLDERS",
    "IMAGES",
    "MASKS",
    "SPLITS",
    "Found",
    "NoMasks",
    "TieError",
    "find_folders",
    "find_published",
    "require_prepared",
    "several_error",
    "split_names",
]
