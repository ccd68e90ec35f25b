"""What `data init` chooses for the machine: network, batch, precision and steps."""

from collections.abc import Callable

import pytest
import torch

from ssaseg.cli.data import machine
from ssaseg.cli.data.machine import fit_machine, measure_step
from ssaseg.cli.weights.known import KNOWN
from ssaseg.models import fast

Seconds = Callable[[str, str, str], float]


@pytest.fixture(autouse=True)
def start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are here: none, until a test adds some."""
    here: list[str] = []
    monkeypatch.setattr(machine, "find", lambda start: start.file if start.file in here else None)
    return here


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float, float], None]:
    """A function (cores, seconds of a step in float32, in bf16) that makes this machine one."""

    def change(cores: int, off: float, bf16: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(fast, "has_bfloat16", lambda _: True)
        monkeypatch.setattr(machine, "count_cores", lambda: cores)
        monkeypatch.setattr(machine, "measure_step", lambda *words: {"off": off, "bf16": bf16}[words[2]])

    return change


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    for whole, amp in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, whole=whole: whole)
        fit = fit_machine(None, "ssa", 367, [512, 512])
        assert (fit.model, fit.batch, fit.amp, fit.steps) == ("seaformer_b", 16, amp, 4500)
        assert "Card" in fit.cost
    assert fit_machine("segnext_t", "ssa", 9, [512, 512])[:3] == ("segnext_t", "", 8)


def test_a_cpu(on_a_cpu: Callable[[int, float, float], None]) -> None:
    on_a_cpu(2, 0.5, 0.48)
    fit = fit_machine(None, "ssa", 367, [320, 320])
    assert (fit.model, fit.batch, fit.amp, fit.steps, fit.workers) == ("seaformer_s", 8, "off", 2700, 1)
    # A step of 8 images of 11 times the pixels takes 22 times as long: 11 s, 8 hours for all.
    assert fit.cost.startswith("about 8 hours on this CPU (2 cores)")
    on_a_cpu(32, 0.5, 0.2)
    fit = fit_machine(None, "ssa", 3, [320, 320])
    assert (fit.model, fit.amp, fit.steps, fit.workers) == ("seaformer_b", "bf16", 1000, 2)
    assert "bf16 is 2.5 times as fast" in fit.why_amp
    on_a_cpu(2, 1.5, 0.1)  # of a busy machine, bf16 is not measured
    assert fit_machine(None, "ssa", 3, [320, 320]).amp == "off"
    on_a_cpu(1, float("nan"), float("nan"))  # of a network that the user names, no step is measured
    fit = fit_machine("upernet_swin_l", "linear", 100, [512, 512])
    assert (fit.model, fit.amp, fit.batch) == ("upernet_swin_l", "off", 8)
    assert "(1 core)" in fit.cost


def test_weights_that_are_here(
    on_a_cpu: Callable[[int, float, float], None], start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start.append(KNOWN["efficientnet_lite0"].file)
    on_a_cpu(2, 0.5, 0.48)
    fit = fit_machine(None, "ssa", 367, [320, 320])
    assert (fit.model, fit.batch, fit.steps) == ("lite0", 8, 1100)
    assert fit_machine(None, "ssa", 200, [320, 320]).steps == 600
    assert fit_machine("seaformer_s", "ssa", 367, [320, 320])[:1] == ("seaformer_s",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert fit_machine(None, "ssa", 367, [512, 512]).model == "lite0"


def test_a_step_is_measured_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SIDE", 32)
    state = torch.get_rng_state()
    measure_step.cache_clear()
    assert 0 < measure_step("seaformer_t", "linear", "bf16") == measure_step("seaformer_t", "linear", "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    measure_step.cache_clear()
