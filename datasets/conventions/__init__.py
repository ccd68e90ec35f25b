"""Conventions of annotation tools, in the order in which they are tried."""

from __future__ import annotations

from ssaseg.datasets.conventions.base import Convention, Tree

# A convention whose files prove more comes before one that would accept the same folder.
CONVENTIONS: tuple[Convention, ...] = ()


def recognise(tree: Tree) -> tuple[Convention, str] | None:
    """The first convention that a folder has, and what shows it; None where it has none."""
    for convention in CONVENTIONS:
        if seen := convention.recognise(tree):
            return convention, seen
    return None
