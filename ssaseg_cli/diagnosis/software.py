"""Versions of what is installed: required packages, whether they can be imported, and extras."""

import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ssaseg.cli.diagnosis.finding import Finding, Report, one_line

NAME = "ssaseg"
# Names of modules that are not those of their packages.
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
RIVALS = ("opencv-python", "opencv-contrib-python")  # with modules of the same name as opencv-python-headless
OURS = ("test", "dev", "docs")  # extras for those who change ssaseg


def installed(name: str) -> str | None:
    """The version of a package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What this ssaseg requires, with its extras; nothing where it was not installed."""
    try:
        return [Requirement(line) for line in metadata.requires(NAME) or ()]
    except metadata.PackageNotFoundError:
        return []


def look_at_software(report: Report) -> dict[str, Any]:
    """Versions by name. Reports what is missing, too old, or cannot be imported."""
    here = Path(sys.modules[NAME].__path__[0])
    versions: dict[str, Any] = {
        "python": f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}",
        NAME: f"{installed(NAME) or 'not installed'}, {here}",
    }
    if installed(NAME) is None:
        report(Finding("ssaseg is not installed, only its folder was found", "run pip install -e . in that folder"))
    for required in requirements():
        if required.marker is None:
            versions[required.name] = _look_at(required, report)
    rivals = [name for name in RIVALS if installed(name)]
    if rivals and installed("opencv-python-headless"):
        names = " ".join(rivals)
        fix = f"pip uninstall {names} opencv-python-headless, then pip install opencv-python-headless"
        report(Finding(f"two packages have the module cv2: {names}, opencv-python-headless", fix, broken=False))
    _look_at_arrays(report)
    return versions


def _look_at(required: Requirement, report: Report) -> str:
    """The version of a required package, or what is wrong with it."""
    version, module = installed(required.name), MODULES.get(required.name, required.name)
    install = f"pip install '{required}'"
    try:
        import_module(module)
    except Exception as error:  # also OSError for a missing library, AttributeError for another NumPy
        if version is None:
            report(Finding(f"{required.name} is not installed", install))
            return "not installed"
        again = f"pip install --force-reinstall '{required}'"
        report(Finding(f"{required.name} {version} cannot be imported: {one_line(error)}", again))
        return f"{version}, cannot be imported"
    if version is None:
        report(Finding(f"{required.name} is not installed, but its module {module} is", install, broken=False))
        return f"not installed, but {module} is"
    if not required.specifier.contains(version, prereleases=True):
        report(Finding(f"{required.name} {version} is installed, expected {required.specifier}", install))
    return version


def _look_at_arrays(report: Report) -> None:
    """PyTorch and NumPy may each work, but not together."""
    if "torch" in sys.modules and "numpy" in sys.modules:
        import numpy as np
        import torch

        try:
            torch.from_numpy(np.zeros(1)).numpy()
        except Exception as error:
            fix = "pip install --upgrade torch numpy"
            report(Finding(f"PyTorch does not work with this NumPy: {one_line(error)}", fix))


def look_at_extras(report: Report) -> dict[str, str]:
    """For each extra the versions of its packages. Reports those that are too old."""
    extras: dict[str, str] = {}
    names = metadata.metadata(NAME).get_all("Provides-Extra") or () if installed(NAME) else ()
    for extra in (name for name in names if name not in OURS):
        added = [each for each in requirements() if each.marker and each.marker.evaluate({"extra": extra})]
        found = {each.name: installed(each.name) for each in added if each.name != NAME}
        for each in added:
            if (version := found.get(each.name)) and not each.specifier.contains(version, prereleases=True):
                what = f"extra {extra}: {each.name} {version} is installed, expected {each.specifier}"
                report(Finding(what, f"pip install '{NAME}[{extra}]'", broken=False))
        extras[extra] = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    return extras
