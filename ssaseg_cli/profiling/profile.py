"""`ssaseg profile`: what a network costs: parameters, multiply-accumulates, time and memory, stage by stage.

The times are those of the engine that `predict` uses, and beside it those of the exact network. The counts are those of
the network as it is trained.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssaseg.cli.console import json_target, write_json
from ssaseg.cli.device import count_cores, select_device
from ssaseg.cli.engine.opening import Opened, device_for, make_engine
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.skipping import lacks_memory
from ssaseg.cli.printing import echo
from ssaseg.cli.profiling.backends import Order, Way, measure_backends, ways_of
from ssaseg.cli.profiling.counting import COUNTINGS, count
from ssaseg.cli.profiling.latency import measure_latency
from ssaseg.cli.profiling.memory import peak_memory
from ssaseg.cli.profiling.roofline import reached, stage_bounds
from ssaseg.cli.profiling.scene import Picture, picture_of
from ssaseg.cli.profiling.stages import Pass, measure_stages
from ssaseg.cli.profiling.sweeps import measure_sweep
from ssaseg.cli.profiling.tables import print_profile
from ssaseg.cli.profiling.targets import is_name, open_targets
from ssaseg.cli.scoring.attention import describe_attention
from ssaseg.cli.scoring.engines import Engine, TorchEngine
from ssaseg.cli.scoring.limit import memory_limit

SIZE = (512, 512)  # height and width of the input, by default [pixels]

FEWER = 3  # stages, back ends, batch sizes and threads are timed so many times less often than the network


def run_profile(
    target: str,
    classifiers: Sequence[str],
    classes: int | str | None,
    size: tuple[int, int] | None,
    json_out: str | None,
    device: str,
    runs: int = 30,
    image: Path | None = None,
    roofline: bool = False,
    backends: bool = False,
    batches: Sequence[int] = (),
    threads: Sequence[int] = (),
    protocol: str | None = None,
    precision: str = "float32",
    backend: str = "auto",
) -> int:
    """Measures `target`, the name of a network or a file, on one image. Returns 0.

    classifiers: by name; empty: linear and ssa for a name, the checkpoint's own for a checkpoint. classes: number of
    classes, for a name; None: 150; for a file see `open_targets`, also `protocol`. image: a file; None: a drawn scene
    of `size` (height, width); None: 512×512, or the only size that the file takes. precision, backend: see
    `make_engine`. json_out: a file; "-": stdout, without the tables; or None. runs: timed passes. roofline, backends,
    batches, threads: what else to measure; the last two are all measured with one another. Raises CommandError if
    `target` is neither a name nor a file, if classifier or classes are not the file's, for more threads than cores, and
    if memory is used up.
    """
    select_device(device)
    json_out = json_target(json_out)
    opened = open_targets(target, classifiers, classes, protocol)
    chosen = device_for(opened[0], device)
    require_threads(threads, chosen)
    size = size or (opened[0].graph and opened[0].graph.size) or SIZE
    make = partial(make_engine, device=chosen, precision=precision, backend=backend)
    ways = ways_of(opened[0], chosen) if backends else []  # raises its errors before anything is measured
    limit = memory_limit() if chosen.type == "cpu" else nullcontext()  # CUDA reserves addresses of its own
    with limit, picture_of(opened[0], image, size) as picture, export_folder(target) as cache:
        try:
            report = measure(opened, make, picture, runs, roofline, batches, threads)
            for column, each in zip(report["columns"], opened, strict=True):
                orders = orders_of(target, each, cache, image, size, ways, chosen, max(runs // FEWER, 1))
                if orders:
                    column["backends"] = list(measure_backends(orders))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            fix = "give a smaller --image" if image else "give a smaller --size"
            raise CommandError(f"{target}: not enough memory for {picture.what}\n{fix}") from None
    report = {"target": target, **report}
    write_json(json_out, report)  # before printing, which may fail
    if json_out != "-":
        print_profile(report)
    return 0


def require_threads(threads: Sequence[int], device: torch.device) -> None:
    """Raises CommandError for numbers of threads that cannot be measured here."""
    if threads and device.type != "cpu":
        raise CommandError(f"--threads: only for a CPU, and this device is {device.type}\nadd --device cpu")
    if max(threads, default=1) > count_cores():
        raise CommandError(
            f"--threads {max(threads)}: this process may use {count_cores()} cores\ngive at most as many"
        )


def measure(
    opened: Sequence[Opened],
    make: Callable[[Opened], Engine],
    picture: Picture,
    runs: int,
    roofline: bool = False,
    batches: Sequence[int] = (),
    threads: Sequence[int] = (),
) -> dict[str, Any]:
    """The report without back ends: all networks on the same picture, in turn. make: their engines."""
    fewer = max(runs // FEWER, 1)
    on_cpu = picture.prepare(picture.image, opened[0].metadata, torch.device("cpu"))
    counts = [{} if each.model is None else count(each.model, on_cpu) for each in opened]  # before they are moved
    warn_of_attention(opened[0], on_cpu)
    engines = [make(each) for each in opened]
    exact = [exact_engine(each, engine) for each, engine in zip(opened, engines, strict=True)]
    device = engines[0].device
    pixels = picture.prepare(picture.image, opened[0].metadata, device, engines[0].takes)
    every = [engine for pair in zip(engines, exact, strict=True) for engine in pair if engine is not None]
    timings = iter(
        [
            {"engine": engine.what, **found}
            for engine, found in zip(every, measure_latency(every, pixels, runs), strict=True)
        ]
    )
    columns: list[dict[str, Any]] = []
    for each, numbers, engine, plain in zip(opened, counts, engines, exact, strict=True):
        column = {"classifier": each.metadata.get("classifier"), **numbers, **next(timings)}
        column["peak_mib"] = mebibytes(peak_memory(engine, pixels))
        column["exact"] = None
        if plain is not None:
            column["exact"] = {**next(timings), "peak_mib": mebibytes(peak_memory(plain, pixels))}
        columns.append(column)
    passes = [Pass(engine, each.metadata, picture) for engine, each in zip(engines, opened, strict=True)]
    for column, stages in zip(columns, measure_stages(passes, fewer), strict=True):
        column["stages"] = stages
    speed = reached(device=device) if roofline else None
    for column, each, one in zip(columns, opened, passes, strict=True):
        if speed is not None:
            times = {row["stage"]: row["ms"] for row in column["stages"]["rows"]}
            column["roofline"] = stage_bounds(one, speed, times)
        if batches or threads:
            column["sweep"] = measure_sweep(
                partial(make, each), pixels, batches or (1,), threads or (torch.get_num_threads(),), fewer
            )
    return {
        "model": opened[0].metadata.get("model"),
        "classes": engines[0].num_classes,
        "size": list(pixels.shape[-2:]),
        "image": picture.what,
        "weights": "random" if is_name(str(opened[0].path)) else "of the file",
        **conditions(device, runs),
        "stage_runs": fewer,
        **({} if speed is None else {"speed": speed}),
        "columns": columns,
    }


def warn_of_attention(opened: Opened, pixels: torch.Tensor) -> None:
    """Says on stderr, before the start, that inputs of this size are slow for this network, if they are."""
    text = describe_attention(opened.metadata["model"], pixels.shape[2] * pixels.shape[3])
    if text is not None:
        echo(f"note: {text}\nuse a smaller --size or --image for a quick answer", err=True)


def exact_engine(opened: Opened, engine: Engine) -> Engine | None:
    """The exact network, if there is one and `engine` is another."""
    is_exact = isinstance(engine, TorchEngine) and engine.exact
    return None if opened.model is None or is_exact else make_engine(opened, engine.device, exact=True)


@contextmanager
def export_folder(target: str) -> Iterator[str | None]:
    """Where exports are kept: those of random weights only for a while; None: in the user's folder."""
    with tempfile.TemporaryDirectory(prefix="ssaseg-") if is_name(target) else nullcontext() as folder:
        yield folder


def orders_of(
    target: str,
    opened: Opened,
    cache: str | None,
    image: Path | None,
    size: tuple[int, int],
    ways: Sequence[Way],
    device: torch.device,
    rounds: int,
) -> list[Order]:
    """What the processes of `--backends` measure."""
    classifiers = (str(opened.metadata["classifier"]),) if is_name(target) else ()
    classes, file = len(opened.metadata["classes"]), None if image is None else str(image)
    threads = torch.get_num_threads()
    return [Order(target, classifiers, classes, cache, way, file, size, device.type, threads, rounds) for way in ways]


def conditions(device: torch.device, runs: int) -> dict[str, Any]:
    """What the numbers of a report were measured with: device, threads, PyTorch, timed passes, and the countings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": runs,
        "countings": COUNTINGS,
    }


def mebibytes(count: int | None) -> float | None:
    """Bytes in MiB."""
    return None if count is None else count / 2**20
