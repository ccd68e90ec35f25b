"""Networks: ours against mmsegmentation 1.2.2, transformers and our own first version, plain and on the fast path.

    python benchmarks/networks.py --mmseg-python PATH_TO_PYTHON          # writes benchmarks/results/networks.json
    python benchmarks/networks.py --general --mmseg-python PYTHON --transformers-python PYTHON  # its part "general"
    python benchmarks/networks.py --checkpoint X.safetensors --images DIR  # also the labels of the fast path
    python benchmarks/networks.py --device cuda [--model NAME ...]       # latencies on a GPU instead
    python benchmarks/networks.py --smoke                                # small and quick, writes nothing

Protocol: 2 threads, one image of 512×512, 150 classes, float32 unless stated. Each side has its own process: `ours`,
`plain` (this repository at the commit --plain, exported by git), `mmseg` (the environment that
tests/fixtures/make_mmseg_metrics.py describes, in eager float32), `transformers` (any version, with the same PyTorch).
The sides run in turn, so that the machine's load is the same for all. A time is the median of its rounds; a ratio is
the median of the rounds' ratios. Ours has several forms: `eager`, as built; `folded`; `bf16`, the fast path without its
compiler; `compiled`, the fast path in float32; `fast`, the full `accelerate`; `ssa`, as built with this classifier. Our
sides have the same weights and must agree if they compute in float32. Peers have our weights where our families know
the peer's names; the results say for which share of the tensors, and how far apart the logits are. SegFormer's head in
transformers is NVIDIA's: where no variant of ours has it, only the backbones do the same work.

--general measures the paper's other networks, and what SSA costs on top of linear in each family, beside the paper.
Roofline, see ssaseg.cli.profiling.roofline: of all operations for the eager network, of products for compiled ones.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from network_peers import peer_of
from network_sides import PEERS, THREADS, Case, in_form, our_network, seconds

from ssaseg.cli.profiling.roofline import reached, roofline
from ssaseg.models.fast import has_bfloat16

ROOT = Path(__file__).parents[1]
SIDES = Path(__file__).with_name("network_sides.py")
RESULTS = Path(__file__).parent / "results" / "networks.json"
PLAIN = "59d4974"  # the commit before any network was optimised for speed
TOLERANCE = 1e-3  # of the largest logit, between float32 sides
GOALS = {"mmseg/eager": 1.0, "plain/eager": 1.0, "mmseg/fast": 3.0, "plain/fast": 2.0, "labels": 0.995}
GENERAL_GOALS = {"mmseg/eager": 1.0, "transformers/eager": 1.0, "eager/fast": 1.8}
FORMS = ("eager", "folded", *("bf16",) * has_bfloat16(torch.device("cpu")), "compiled", "fast")

# The linear classifier, because mmsegmentation has only this one.
CASES = [Case("segnext_t", "linear")] + [
    Case(name, "ssa") for name in ("segnext_t", "afformer_b", "cgrseg_b", "seaformer_b")
]
GENERAL = [
    Case(name, "linear") for name in ("segformer_nvidia_b0", "segformer_b0", "upernet_swin_t", "ocrnet_hr18", "fcn_r50")
]
COST_ROUNDS = 3  # the largest network takes 10 s a pass


# ---- the sides ---------------------------------------------------------------------------------------------------


class Worker:
    """network_sides.py in another process, possibly with another Python interpreter."""

    def __init__(self, side: str, python: Path | str, folder: Path, path: Path | None = None, at: Path = SIDES) -> None:
        self.side, self.folder = side, folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(THREADS),
            "GOMP_SPINCOUNT": "1000",  # a side must not spin while it waits for its turn
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),  # no compiled kernels from an earlier run
        }
        if path:
            environment["PYTHONPATH"] = str(path)
        pipe = subprocess.PIPE
        self.log = (folder / f"{side}.log").open("w+")
        command = [str(python), str(at), side]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment)

    def ask(self, question: str, **given: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([question, given]), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):  # mmengine prints too
                return json.loads(line.removeprefix("answer "))
        self.log.seek(0)
        raise SystemExit(f"side {self.side!r} ended without an answer to {question!r}:\n{self.log.read()[-2000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def plain_package(revision: str, folder: Path) -> Path | None:
    """The folder of the package at an earlier commit, below `folder`; None if git does not have this commit."""
    names = {"cli": "ssaseg_cli", **{name: name for name in ("models", "datasets", "recipes", "files")}}
    archive, source = folder / "plain.tar", folder / "plain"
    try:
        subprocess.run(["git", "-C", ROOT, "archive", "-o", archive, revision], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    with tarfile.open(archive) as files:
        files.extractall(source, filter="data")
    (source / "ssaseg").mkdir(exist_ok=True)  # a newer commit has this folder
    (source / "ssaseg" / "__init__.py").touch()  # without it, Python would prefer an installed ssaseg
    for name, room in names.items():  # of an old commit, the link to files leads nowhere
        (source / "ssaseg" / name).symlink_to(source / room)
    return source


@contextmanager
def workers(peers: dict[str, Path | None], revision: str | None) -> Iterator[dict[str, Worker]]:
    """The sides that can run on this machine, by name."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = {"ours": Worker("ours", sys.executable, folder)}
        if plain := revision and plain_package(revision, folder):
            found["plain"] = Worker("plain", sys.executable, folder, plain)
        found |= {name: Worker(name, python, folder) for name, python in peers.items() if python}
        for worker in found.values():
            stack.callback(worker.close)
        if plain and not found["plain"].ask("about")["from"].startswith(str(plain)):
            raise SystemExit("the plain side imports the wrong package, not the one from its commit")
        yield found


# ---- measuring ---------------------------------------------------------------------------------------------------


def measure(case: Case, sides: dict[str, Worker], forms: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Runs all sides and forms in turn: first pass, median, ratios, and the differences of the results."""
    turns = {form: (sides["ours"], form) for form in forms}
    peer = peer_of(case.model)
    turns |= {side: (sides[side], "eager") for side in ("plain", peer) if side in sides}
    first, same, logits = {}, {}, {}
    for name, (worker, form) in turns.items():
        file, weights = worker.folder / "logits.pt", worker.folder / "weights.pt"
        built = replace(case, classifier="ssa") if form == "ssa" else case
        given = {"case": asdict(built), "form": form, "logits": str(file), "weights": str(weights) if peer else None}
        first[name], same[name] = worker.ask("build", **given)
        logits[name] = torch.load(file)
        progress(f"{case.model} {case.classifier} {name}: first pass {first[name]:.1f} s")
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(-1, rounds):  # the first warms up
        for name, (worker, form) in turns.items():
            spent = statistics.median(worker.ask("time", form=form))
            if turn >= 0:
                times[name].append(spent)
    for worker in sides.values():
        worker.ask("forget")
    base = logits["plain" if "plain" in logits else "eager"]
    return {
        "case": asdict(case),
        "first pass [s]": first,
        "median [ms]": {name: statistics.median(spent) for name, spent in times.items()},
        "all [ms]": times,
        "ratios": {
            f"{slow}/{quick}": statistics.median(a / b for a, b in zip(times[slow], times[quick], strict=True))
            for slow in (*PEERS, "plain", "eager")
            for quick in forms
            if slow in times and slow != quick
        },
        "apart, of the largest logit": {
            name: ((found - base).abs().max() / base.abs().max()).item()
            for name, found in logits.items()
            if name != "ssa" and found.shape == base.shape
        },
        "tensors with our weights": same,
    }


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    """Prints a line per side and form, with the ratios that have goals."""
    case, median = result["case"], result["median [ms]"]
    print(f"{case['model']} {case['classifier']}, {case['side']}×{case['side']}")
    for name, spent in median.items():
        ratios = [(slow, result["ratios"].get(f"{slow}/{name}")) for slow in (*PEERS, "plain", "eager")]
        said = [f"{slow}/it {ratio:.2f}{verdict(f'{slow}/{name}', ratio)}" for slow, ratio in ratios if ratio]
        print(f"  {name:9}{spent:8.1f} ms, first pass {result['first pass [s]'][name]:5.1f} s  " + "  ".join(said))


def show_bounds(result: dict[str, Any]) -> None:
    case, bound = result["case"], result["roofline"]
    size, least = bound["MB"], bound["at least [ms]"]
    print(
        f"{case['model']} {case['classifier']}: GMAC "
        + ", ".join(f"{name} {macs:.3f}" for name, macs in bound["GMAC"].items()),
        end="; ",
    )
    print("MB " + ", ".join(f"{name} {value:.1f}" for name, value in size.items()))
    print("  at least [ms]: " + ", ".join(f"{name} {value:.1f}" for name, value in least.items()), end="; ")
    print("measured/bound: " + ", ".join(f"{name} {value:.1f}" for name, value in result["measured/bound"].items()))


def verdict(what: str, value: float) -> str:
    return "" if what not in GOALS else f" (goal {GOALS[what]:g}, {'met' if value >= GOALS[what] else 'MISSED'})"


def on_cpu(options: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    forms = ("eager", "folded", "bf16", "ssa") if options.smoke else (*FORMS, "ssa") if options.general else FORMS
    peers = {"mmseg": options.mmseg_python, "transformers": options.transformers_python}
    measured, labels = [], {}
    with workers(peers, None if options.smoke or options.general else options.plain) as sides:
        missing = {side: "not measured" for side in (*peers, "plain") if side not in sides}
        about = {key: value for side in PEERS if side in sides for key, value in sides[side].ask("about").items()}
        speed: dict[str, float] = {}
        for case in cases:
            # The best of all measurements: while another program runs, the speed is too low for a bound.
            speed = {
                name: max(value, speed.get(name, 0.0)) for name, value in reached(1 if options.smoke else 20).items()
            }
            measured.append(measure(case, sides, forms, options.rounds))
            show(measured[-1])
        costs = ssa_costs(sides["ours"]) if options.general and not options.smoke else {}
        for file in options.checkpoint:
            given = {"checkpoint": str(file), "images": str(options.images), "count": options.count}
            found = sides["ours"].ask("agree", **given, compiled=False if options.smoke else None)
            labels[f"{file.parent.name}/{file.name}"] = found
            share = f"{100 * found['same labels']:.3f} %{verdict('labels', found['same labels'])}"
            print(f"labels of {found['model']}, step {found['step']}: {share}, worst image {found['worst image']:.4f}")
    for case, result in zip(cases, measured, strict=True):
        bound = result["roofline"] = roofline(our_network(case), case.images(), speed)
        kinds = {"eager": "all, float32", "compiled": "products, float32"}
        kinds["fast"] = "products, bfloat16" if "bf16" in FORMS else kinds["compiled"]
        result["measured/bound"] = {
            form: result["median [ms]"][form] / bound["at least [ms]"][kind]
            for form, kind in kinds.items()
            if form in forms
        }
        show_bounds(result)
    print("reached: " + ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in speed.items()))
    return {"threads": THREADS, "missing": missing, "versions": about, "reached": speed, "cases": measured} | (
        {"cost of ssa": costs} if options.general else {"same labels, eager float32 and fast": labels}
    )


def ssa_costs(ours: Worker) -> dict[str, Any]:
    """ssa's latency divided by linear's, for the networks of the paper's table, ours on this CPU beside the paper's."""
    from ssaseg.cli.profiling.paper_table import PAPER

    costs = {}
    for name, rows in PAPER.items():
        if {"linear", "ssa"} <= rows.keys():
            result = measure(Case(name, "linear"), {"ours": ours}, ("eager", "ssa"), COST_ROUNDS)
            median, published = result["median [ms]"], [rows[kind].latency for kind in ("linear", "ssa")]
            cost = costs[name] = {
                "ours": 1 / result["ratios"]["eager/ssa"],
                "ours [ms]": [median["eager"], median["ssa"]],
                "paper": published[1] / published[0] if all(published) else None,
                "paper [ms]": published,
            }
            print(f"{name}: ssa/linear {cost['ours']:.3f}, paper {cost['paper'] or math.nan:.3f}", flush=True)
    return costs


@torch.no_grad()
def on_cuda(options: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    """Medians [ms] at batch 1 and 16: eager, and `accelerate` with and without the compiler and its CUDA graphs."""
    found = {}
    for case in cases:
        for form in ("eager", "bf16", "fast"):
            for batch in (1, 16):
                model = in_form(our_network(case).cuda(), form)
                images, times = case.images(batch).cuda(), []
                for turn in range(-5, 30):  # the first compile, capture and warm up
                    torch.cuda.synchronize()
                    spent = seconds(lambda model=model, images=images: (model(images), torch.cuda.synchronize()))[0]
                    if turn >= 0:
                        times.append(1e3 * spent)
                key = f"{case.model} {case.classifier}, batch {batch}, {form}"
                found[key] = statistics.median(times)
                print(f"{key:45}{found[key]:8.2f} ms", flush=True)
                del model
                torch.compiler.reset()
    return {"median [ms]": found}


def main() -> int:
    """Measures, prints, writes; returns 1 if sides that compute in float32 disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmseg-python", type=Path, help="Python interpreter with mmsegmentation 1.2.2")
    parser.add_argument("--transformers-python", type=Path, help="Python interpreter with transformers")
    parser.add_argument("--general", action="store_true", help="the paper's other networks, and the cost of ssa")
    parser.add_argument(
        "--plain", default=PLAIN, metavar="COMMIT", help="commit of the plain first version (default %(default)s)"
    )
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="trained with ssaseg; repeatable")
    parser.add_argument("--images", type=Path, help="folder of images for --checkpoint")
    parser.add_argument("--count", type=int, default=30, help="number of these images (default %(default)s)")
    parser.add_argument("--model", action="append", help="only these networks; repeatable")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if options.checkpoint and not options.images:
        parser.error("--checkpoint needs --images")
    with tempfile.TemporaryDirectory() as folder:
        cases = CASES
        if options.general:
            cases = GENERAL
            GOALS.clear()
            GOALS.update(GENERAL_GOALS)
        if options.smoke:
            GOALS.clear()  # they are for trained weights and large images
            cases = [Case("seaformer_t", "ssa", 5, 64), Case("afformer_t", "linear", 5, 64)]
            options.rounds, options.count = 1, 2
            options.checkpoint, options.images = [tiny_checkpoint(Path(folder), cases[0])], Path(folder)
        elif options.device == "cuda":
            from ssaseg.models import list_models

            cases = [Case(name, classifier) for name in list_models() for classifier in ("linear", "ssa")]
        cases = [case for case in cases if case.model in (options.model or [case.model])]
        found = on_cuda(options, cases) if options.device == "cuda" else on_cpu(options, cases)
    if not options.smoke and (options.device == "cuda" or not options.model):
        write(options, found)
    apart = [
        f"{case['case']['model']} {form} {value:.1e}"
        for case in found.get("cases", [])
        for form, value in case["apart, of the largest logit"].items()
        if form in {"eager", "folded", "compiled"} and not value < TOLERANCE
    ]
    print(f"the sides DISAGREE by more than {TOLERANCE}: {apart}" if apart else "the sides agree")
    return bool(apart)


def tiny_checkpoint(folder: Path, case: Case) -> Path:
    """The checkpoint of an untrained model; also writes two images beside it."""
    import cv2
    import numpy as np

    from ssaseg.models import save_model

    for i in range(2):
        cv2.imwrite(str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 255, (60, 80, 3), np.uint8))
    save_model(folder / "tiny.safetensors", our_network(case), {})  # type: ignore[arg-type]
    return folder / "tiny.safetensors"


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Writes the results; keeps those of the other device. On a GPU, networks may be measured one by one."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = f"python benchmarks/networks.py --device {options.device} --rounds {options.rounds}"
    command += " --general" * options.general + " --mmseg-python PYTHON" * bool(options.mmseg_python)
    command += " --transformers-python PYTHON" * bool(options.transformers_python)
    if options.checkpoint:
        command += "".join(f" --checkpoint {file.parent.name}/{file.name}" for file in options.checkpoint)
        command += f" --images DIR --count {options.count}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, **found.pop("versions", {})}
    head = {"command": command, "plain": options.plain, "versions": versions, "on": processor(options.device)}
    if options.device == "cuda" and results.get("cuda", {}).get("versions") == versions:
        found["median [ms]"] = results["cuda"]["median [ms]"] | found["median [ms]"]
    # A load average above the number of cores: other programs ran at the same time.
    results["general" if options.general else options.device] = {
        **head,
        "load average": os.getloadavg()[0],
        **rounded(found),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"


def rounded(value: Any) -> Any:
    """The value with all numbers rounded to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, max(3 - math.floor(math.log10(abs(value))), 0))
    return value


if __name__ == "__main__":
    sys.exit(main())
