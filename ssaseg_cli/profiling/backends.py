"""The same network in each way in which this machine can run it: exact, folded, compiled, and in other runtimes.

Each way is built and measured in a process of its own, one after the other, so that its memory is its own. In this
process it takes turns with the exact network: the ratio of the two does not depend on the load of the machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssaseg.cli.console import write_json
from ssaseg.cli.device import select_device
from ssaseg.cli.engine.exports import export_path
from ssaseg.cli.engine.opening import Opened, make_engine
from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.latency import now, quantiles
from ssaseg.cli.profiling.memory import process_peak
from ssaseg.cli.profiling.scene import picture_of
from ssaseg.cli.profiling.targets import open_targets
from ssaseg.files.structured import parse_json, read_json
from ssaseg.models.fast import accelerate, has_bfloat16, has_compiler
from ssaseg.models.labelling import label_map
from ssaseg.models.masks.base import MaskSegmenter

PAUSE = 0.02  # seconds between two turns: threads of the other runtime that still spin would slow down this one


PROGRAM = "import sys; from ssaseg.cli.profiling.backends import serve; serve(*sys.argv[1:])"


class Way(NamedTuple):
    """A way to run a network."""

    backend: str
    precision: str
    form: str = ""  # of torch: exact, folded or compiled

    @property
    def name(self) -> str:
        """For example "torch, folded, float32"."""
        return ", ".join(filter(None, (self.backend, self.form, self.precision)))


class Order(NamedTuple):
    """What a process measures, in values of JSON."""

    target: str
    classifiers: tuple[str, ...]
    classes: int | None
    cache: str | None  # folder of exports; None: the user's
    way: Way
    image: str | None
    size: tuple[int, int]
    device: str
    threads: int
    rounds: int


def ways_of(opened: Opened, device: torch.device) -> list[Way]:
    """All ways for a network on this device; packages may be missing for some. Raises CommandError for other files."""
    if opened.model is None:
        raise CommandError(
            f"--backends: {opened.path}: only {opened.kind} runs this file\ngive the checkpoint that it was made from"
        )
    precisions = ["float32", *["bf16"] * has_bfloat16(device), *["fp16"] * (device.type == "cuda")]
    ways = [Way("torch", "float32", "exact")]
    if isinstance(opened.model, MaskSegmenter):  # nothing is folded, and other runtimes do not have its operations
        return ways
    ways += [Way("torch", precision, "folded") for precision in precisions]
    if has_compiler(device):
        ways += [Way("torch", precision, "compiled") for precision in precisions]
    if device.type == "cpu":
        ways += [Way("onnxruntime", "float32"), *(Way("openvino", precision) for precision in precisions)]
    return ways


def measure_backends(orders: Sequence[Order]) -> Iterator[dict[str, Any]]:
    """A row for each order: `name`, and what `measure_way` returns or, where that failed, `failed`: why."""
    for order in orders:
        echo(f"{order.way.name} is built and measured", err=True)
        yield {"name": order.way.name, **in_own_process(order)}


def measure_way(order: Order) -> dict[str, Any]:
    """Builds one way and measures it in turn with the exact network; for a process that does only this.

    Keys: `build_s`: building and the first pass; `cached`: whether its export was there before; `network_ms`; `ratio`:
    the exact network's time divided by this one's; `same_labels`: share of pixels; `peak_mib` of the process, and
    `before_mib` of it before building; None where the system does not say it.
    """
    if order.cache is not None:
        os.environ["SSASEG_CACHE"] = order.cache
    torch.set_num_threads(order.threads)
    device = select_device(order.device)
    (opened,) = open_targets(order.target, order.classifiers, order.classes)
    with picture_of(opened, None if order.image is None else Path(order.image), order.size) as picture:
        pixels, shown = picture.prepare(picture.image, opened.metadata, device), picture.image.shape[:2]
    assert opened.model is not None
    cached = order.way.backend != "torch" and export_path(opened.model).exists()
    before = process_peak()
    started = now(device)
    run = build(opened, order.way, device)
    with torch.no_grad():  # not inference_mode, whose tensors compiled code cannot always use
        logits = run(pixels)
        spent = now(device) - started
        for _ in range(2):
            run(pixels)
        peak = process_peak()
        exact = build(opened, Way("torch", "float32", "exact"), device)
        size = tuple(pixels.shape[-2:])
        equal = (label_map(logits, size, shown) == label_map(exact(pixels), size, shown)).double().mean()
        times = take_turns([exact, run], pixels, order.rounds)
    return {
        "build_s": spent,
        "cached": cached,
        **quantiles({"network_ms": times[1]}),
        "ratio": median(slow / quick for slow, quick in zip(*times, strict=True)),
        "same_labels": equal.item(),
        "peak_mib": None if peak is None else peak / 2**20,
        "before_mib": None if before is None else before / 2**20,
    }


def build(opened: Opened, way: Way, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from pixels to logits float32. Raises CommandError where packages are missing."""
    if way.form == "compiled":
        assert opened.model is not None
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[way.precision]
        return accelerate(opened.model.to(device), dtype, compiled=True)
    engine = make_engine(opened, device, way.precision, way.backend, exact=way.form == "exact")
    return lambda pixels: engine.logits(pixels).final


def take_turns(runs: Sequence[Callable[[Tensor], Tensor]], pixels: Tensor, rounds: int) -> list[list[float]]:
    """Times [ms] of each function, one per round. A pause and a pass that is not timed come before each."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, spent in zip(runs, times, strict=True):
            time.sleep(PAUSE)
            run(pixels)
            started = now(pixels.device)
            run(pixels)
            spent.append(1e3 * (now(pixels.device) - started))
    return times


def in_own_process(order: Order) -> dict[str, Any]:
    """What `measure_way` returns in a new process; {"failed": why} if it raises an error or is killed."""
    with tempfile.TemporaryDirectory(prefix="ssaseg-") as folder:
        answer = Path(folder, "answer.json")
        # In a session of its own: Ctrl-C reaches only this process, which then ends that one and its compilers.
        command = [sys.executable, "-c", PROGRAM, json.dumps(order), str(answer)]
        # Its stdin ends when this process ends, also if this one is killed.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if answer.exists():
            found: dict[str, Any] = read_json(answer)
            return found
    why = "killed, for example as memory was used up" if code == -signal.SIGKILL else f"exit code {code}"
    return {"failed": f"its process ended without a result: {why}"}


def serve(order: str, answer: str) -> None:
    """Measures an order given as JSON, and writes a file `answer`; for the new process."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    fields = parse_json(order)
    fields[Order._fields.index("way")] = Way(*fields[Order._fields.index("way")])
    try:
        found = measure_way(Order(*fields))
    except Exception as error:  # each runtime and the compiler have their own types
        if os.environ.get("SSASEG_DEBUG") == "1":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Of ours all lines: they have the pip command.
        found = {"failed": "; ".join(lines) if isinstance(error, CommandError) else lines[0]}
    write_json(answer, found)


def _end_with_stdin() -> None:
    """Ends this process when the one that started it has ended."""
    while os.read(0, 1):  # not sys.stdin, whose lock the interpreter's end would wait for
        pass
    os._exit(1)
