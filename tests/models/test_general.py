"""The paper's general networks against figures of the official code: see `golden/README.md`.

`make parity` compares all of them. The tests have those that take little time and memory.
"""

import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import INPUTS, filled, losses_on_stored_input
from networks import BUILT, tiny_networks
from places import GOLDEN

from ssaseg.models import Segmenter, build_model
from ssaseg.models.official import official_entries

FIGURES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "general.json").read_text())
ALL = bool(os.environ.get("SSASEG_PARITY"))
STATUS = Path("/proc/self/status")  # of Linux
LIGHT = ("segformer_b0", "ocrnet_hr18", "upernet_swin_t")  # the last with one classifier
KNOWN = [tuple(key.split("/")) for key in FIGURES]


def is_light(name: str, classifier: str) -> bool:
    return name == LIGHT[0] or (name in LIGHT and classifier in ("ssa", "cac"))


HEAVY = pytest.mark.skip(reason="takes seconds and gigabytes: `make parity`")
TRIED = [pytest.param(*each, id="-".join(each), marks=[] if ALL or is_light(*each) else HEAVY) for each in KNOWN]
# Of FCN, the losses alone: at 128×128 pixels they take a twentieth of the logits at 512×512.
REDUCED = [("fcn_r101", "linear")]
WITH_LOSSES = [
    pytest.param(*each.values, id=each.id) if each.values in REDUCED else each
    for each in TRIED
    if "train" in FIGURES["/".join(map(str, each.values))]
]
CAC_LOSSES = {"MainLoss": "main_ce", "PreSelfLoss": "coarse_ce", "PreLoss": "teacher_ce", "KLLoss": "response"}
# Their names of losses → ours. A sum of several is compared with `total` alone.
LOSSES = {
    "decode.loss_ce": "main_ce",
    "aux.loss_ce": "aux_ce",
    "decode_0.loss_ce": "first_ce",
    "decode_1.loss_ce": "main_ce",
    # Those of CAC, which the official code adds to loss_ce.
    **{f"{head}.{theirs}": ours for head in ("decode", "decode_1") for theirs, ours in CAC_LOSSES.items()},
}


@pytest.fixture(autouse=True)
def cost(request: pytest.FixtureRequest) -> Iterator[None]:
    """`make parity` prints what each test took."""
    began = time.perf_counter()
    yield
    if ALL:
        now, most = (int(re.search(rf"{key}:\s+(\d+)", STATUS.read_text())[1]) / 2**20 for key in ("VmRSS", "VmHWM"))
        print(f"\n{request.node.name}: {time.perf_counter() - began:.1f} s, {now:.1f} GB, so far at most {most:.1f} GB")


@pytest.fixture(scope="module")
def golden() -> Any:
    """Networks with the figures' weights; of all of them one at a time, since the largest takes 1.5 GB."""
    return functools.lru_cache(maxsize=1 if ALL else None)(filled)


@pytest.mark.parametrize(("name", "classifier"), TRIED)
def test_names_and_shapes_are_the_official_ones(name: str, classifier: str, golden: Any) -> None:
    model, figures = golden(name, classifier), FIGURES[f"{name}/{classifier}"]
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["params"]
    state = model.state_dict()
    given = [(key, value) for entry in official_entries(model) for key, value in entry.give(state).items()]
    text = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in given))
    assert hashlib.sha256(text.encode()).hexdigest() == figures["keys"]


@pytest.mark.parametrize("key", INPUTS if ALL else ["logits_512"])
@pytest.mark.parametrize(("name", "classifier"), TRIED)
def test_logits(name: str, classifier: str, key: str, golden: Any) -> None:
    model = golden(name, classifier)
    seed, scale, size = INPUTS[key]
    images = scale * torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    stored = torch.from_numpy(np.load(GOLDEN / "general.npz")[f"{name}/{classifier}/{key}"])
    with torch.no_grad():
        found = model(images)
    largest = FIGURES[f"{name}/{classifier}"]["logits"][key]["absmax"]
    tolerance = 1e-4 * largest if largest > 10 else 5e-5
    assert float((found[:, ::7, ::8, ::8] - stored).abs().max()) < tolerance
    assert found.std().item() == pytest.approx(FIGURES[f"{name}/{classifier}"]["logits"][key]["std"], rel=1e-4)


@pytest.mark.parametrize("size", [128, 256] if ALL else [128])
@pytest.mark.parametrize(("name", "classifier"), WITH_LOSSES)
def test_losses_and_gradients(name: str, classifier: str, size: int, golden: Any) -> None:
    """All losses of the whole network, also of auxiliary heads and a first stage."""
    model: Segmenter = golden(name, classifier)
    figures = FIGURES[f"{name}/{classifier}"]["train"][str(size)]
    losses = losses_on_stored_input(model, size)
    assert sum(losses.values()) == pytest.approx(figures["total"], rel=1e-4)
    for theirs, ours in LOSSES.items():
        if theirs in figures["losses"] and (
            classifier == "linear" or not theirs.endswith(".loss_ce") or ours != "main_ce"
        ):
            assert losses[ours] == pytest.approx(figures["losses"][theirs], rel=1e-4)
    gradients = {
        key: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for key, parameter in model.named_parameters()
    }
    everything = model.state_dict() | gradients
    norms = {
        key: value.norm().item()
        for entry in official_entries(model)
        if set(entry.ours) <= gradients.keys()
        for key, value in entry.give(everything).items()
    }
    assert {key: norms[key] for key in figures["grad_norm"]} == pytest.approx(figures["grad_norm"], rel=1e-3)
    assert math.hypot(*norms.values()) == pytest.approx(figures["grad_norm_total"], rel=1e-3)


@pytest.mark.parametrize("name", [*BUILT, "segformer_x"])
def test_any_size_from_64_and_training_in_bfloat16(name: str) -> None:
    """Networks with every part and next to no blocks."""
    torch.manual_seed(0)
    with tiny_networks():
        model = build_model(name, 3, "ssa")
    with torch.no_grad():
        for size in ((64, 64), (75, 101)):
            logits = model.eval()(torch.randn(1, 3, *size))
            assert logits.shape == (1, 3, *(-(-side // model.stride) for side in size))
    labels = torch.randint(0, 3, (2, 64, 96))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(torch.randn(2, 3, 64, 96), labels)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
