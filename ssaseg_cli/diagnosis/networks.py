"""One small pass of each family of networks: whether it is built, computes, and gives finite numbers."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from ssaseg.cli.diagnosis.finding import Finding, Report, one_line
from ssaseg.cli.errors import CommandError

CLASSES, SIDE = 5, 64  # pixels
EXTRA = dict.fromkeys(("maskformer", "mask2former"), ("transformers", "scipy"))  # packages of the extra `peers`


def look_at_networks(device: str, report: Report, progress: Callable[[str], object]) -> dict[str, str]:
    """For the first network of each family, "ok" with its time, or why not.

    device: "auto", "cpu" or "cuda". progress: gets the name of each network. Reports what fails, and "cuda" without a
    GPU.
    """
    try:
        import torch

        from ssaseg.cli.device import select_device
        from ssaseg.models.build import FAMILIES, MASK_FAMILIES
    except Exception as error:
        report(Finding(f"networks cannot be imported: {one_line(error)}", "fix what is named above first"))
        return {}
    try:
        chosen = select_device(device)
    except CommandError as error:
        what, _, fix = str(error).partition("\n")
        report(Finding(what, fix))
        return {}
    torch.manual_seed(0)
    found: dict[str, str] = {}
    for family, facts in {**FAMILIES, **MASK_FAMILIES}.items():
        name = next(iter(facts.variants))
        progress(name)
        if not all(map(find_spec, EXTRA.get(family, ()))):
            found[name] = "not tried: needs the extra peers"
            continue
        started = time.perf_counter()
        try:
            problem = _try(name, "masks" if family in MASK_FAMILIES else "ssa", chosen)
        except Exception as error:
            problem = one_line(error)
        found[name] = problem or f"ok, {time.perf_counter() - started:.1f} s"
        if problem:
            report(
                Finding(f"{name} does not compute on {chosen}: {problem}", "report this, with all that is printed here")
            )
    return found


def _try(name: str, classifier: str, device: Any) -> str:
    """What is wrong with the logits of a network with random weights; "" if nothing is."""
    import torch

    from ssaseg.models import build_model

    model = build_model(name, CLASSES, classifier).eval().to(device)
    with torch.inference_mode():
        logits = model(torch.randn(1, 3, SIDE, SIDE, device=device))
    if logits.shape[:2] != (1, CLASSES):
        return f"logits {tuple(logits.shape)}, expected (1, {CLASSES}, H, W)"
    return "" if bool(logits.isfinite().all()) else "logits that are not finite"
