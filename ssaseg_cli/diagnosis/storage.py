"""Folders that commands write to: whether a file can be written there, and how much space is left."""

import os
import shutil
import tempfile
from pathlib import Path

from ssaseg.cli.diagnosis.finding import Finding, Report, one_line
from ssaseg.cli.weights import fetching
from ssaseg.files.machine import cache_folder
from ssaseg.files.writing import make_temporary

ENOUGH = 2**30  # bytes that should be free on a disk
SHARED, ENOUGH_SHARED = Path("/dev/shm"), 2**28  # loaders pass images through it; Docker gives 64 MiB
GIB = 2**30


def look_at_folders(report: Report) -> dict[str, str]:
    """Folders by what they are for. Reports those that cannot be written, and full disks."""
    places = {
        "current folder": (Path.cwd(), "change to a folder of your own"),
        "weights": (fetching.folder(), "set TORCH_HOME to a folder of your own"),
        "exports": (cache_folder(), "set SSASEG_CACHE to a folder of your own"),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR to a folder of your own"),
    }
    found = {what: _look_at(what, folder, fix, report) for what, (folder, fix) in places.items()}
    if SHARED.is_dir():
        usage = shutil.disk_usage(SHARED)
        found["shared memory"] = f"{SHARED}, {usage.free / GIB:.1f} GiB free"
        if usage.free < ENOUGH_SHARED:
            what = f"{SHARED} has {usage.free / 2**20:.0f} MiB free, too few for the workers of large images"
            report(Finding(what, "docker run --shm-size=2g, or train.workers=0", broken=False))
    return found


def _look_at(what: str, folder: Path, fix: str, report: Report) -> str:
    """What is found of a folder, or of the folder that it would be made in."""
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        temporary, descriptor = make_temporary(place)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(b"ssaseg")
                file.flush()
                os.fsync(descriptor)
        finally:
            temporary.unlink()
        free = shutil.disk_usage(place).free
    except OSError as error:
        report(Finding(f"{what}: {folder} cannot be written: {one_line(error)}", fix))
        return f"{folder}, cannot be written"
    if free < ENOUGH:
        left = f"{free / 2**20:.0f} MiB free"
        report(Finding(f"{what}: the disk of {folder} has {left}", f"delete something, or {fix}", broken=False))
    return f"{folder}, {'can be written' if place == folder else 'can be made'}, {free / GIB:.1f} GiB free"
