"""Class names of a user's masks: from files of names, or made from the ids."""

from ssaseg.datasets.classnames.guessing import Labels, guess_labels
from ssaseg.datasets.classnames.names import Names
from ssaseg.datasets.classnames.searching import known_names, read_class_names, read_names

__all__ = ["Labels", "Names", "guess_labels", "known_names", "read_class_names", "read_names"]
