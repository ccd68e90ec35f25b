"""What the machine offers to this process."""

import os
from pathlib import Path


def count_cores() -> int:
    """Number of cores that this process may use; the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where what can be made again is kept. Raises OSError if the user has no home folder."""
    given = os.environ.get("SSASEG_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssaseg"
    except RuntimeError:  # neither HOME nor an entry of the user
        raise OSError("the home folder is not known\nset HOME, or SSASEG_CACHE to a folder for exports") from None
