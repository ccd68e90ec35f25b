"""What int8 costs and gives: `ssaseg quantize` on the weights that we trained, and two networks with random weights.

    python benchmarks/quantize.py --root ../shared/data/camvid    # writes benchmarks/results/quantize.json
    python benchmarks/quantize.py --smoke                         # small and quick, writes nothing

Protocol: 2 threads on 2 cores; CamVid's frames of 480×360. SeaFormer-S has the weights of benchmarks/weights: mIoU
before and after on the 101 validation frames, with the default limits, calibrated on 32 training frames. SegNeXt-T and
CGRSeg-T have random weights: there is no mIoU to lose; what is reported is the share of equal labels, all layers in
int8, on the frames that layers are ranked on. Times are those that the command prints: float32 and int8 in turn, in
ONNX Runtime, and in OpenVINO if it is installed; ratios are to float32 in ONNX Runtime.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import processor

from ssaseg.cli.engine.opening import open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.quantization.quantize import Request, Work, run_quantize
from ssaseg.cli.quantization.verdict import Limits
from ssaseg.datasets import stated_classes
from ssaseg.models import build_model, save_model
from ssaseg.models.networks import seaformer
from ssaseg.recipes import load_recipe

RESULTS = Path(__file__).parent / "results" / "quantize.json"
SHIPPED = Path(__file__).parent / "weights" / "camvid-seaformer_s-ssa.safetensors"
RECIPE = "camvid-seaformer_s-ssa"
RANDOM = ("segnext_t", "cgrseg_t")
# For --smoke: without attention, which takes most of the time to export.
SMALL = seaformer.Variant(
    stem=8,
    mobile=tuple(((3, 1, width, 2),) for width in (8, 16, 24, 32, 40)),
    depths=(0,),
    key_dims=(8,),
    heads=2,
    mlp_ratios=(2,),
    fuse=(24,),
)
GOAL = 1.8  # int8 to float32 in ONNX Runtime, SeaFormer-S
THREADS = 2


def trained(folder: Path, root: Path) -> dict[str, Any]:
    """The report of the command on the shipped weights; of a refusal only its message."""
    out = folder / "seaformer_s.onnx"
    request = Request(SHIPPED, out, root=root, minutes=1.0, json_out=str(out.with_suffix(".json")))
    try:
        run_quantize(request, Limits(0.5, 2.0))
    except CommandError as error:
        return {"refused": str(error)}
    report = json.loads(out.with_suffix(".json").read_text())
    return {key: value for key, value in report.items() if key not in ("checkpoint", "out")}


def untrained(folder: Path, name: str, recipe: str, root: Path | None, images: int) -> dict[str, Any]:
    """Speed and share of equal labels of a network with random weights, all layers in int8."""
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    data = load_recipe(recipe).data
    classes, _ = stated_classes(data.dataset, data.model_dump())
    save_model(path, build_model(name, len(classes), "ssa").eval(), {"classes": classes, "protocol": {"scale": None}})
    request = Request(path, folder / f"{name}.onnx", data=recipe, root=root, images=images, limit=2)
    work = Work(open_file(path), request, Limits(100.0, 100.0))
    made = work.full()
    engine = work.engine(made.content)
    equal = [
        (engine.logits(torch.from_numpy(pixels)).final.numpy().argmax(1) == before.argmax(1)).mean()
        for pixels, before in zip(work.inputs, work.expected, strict=True)
    ]
    speed = work.measure_speed(made)
    for line in speed.lines():
        print(f"{name}: {line}")
    return {
        "weights": "random",
        "layers": len(work.graph.layers),
        "equal_labels": float(np.mean(equal)),
        "MiB_before": len(work.content) / 2**20,
        "MiB_after": len(made.content) / 2**20,
        "speed": {**speed._asdict(), "ratios": {runtime: speed.ratio(runtime) for runtime in speed.times}},
    }


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="CamVid's folder")
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    options = parser.parse_args()
    if not options.smoke and options.root is None:
        parser.error("give --root, CamVid's folder")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        parser.error(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.smoke:
            os.environ["SSASEG_CACHE"] = place
            seaformer.VARIANTS["seaformer_x"] = SMALL
            found = {"seaformer_x": untrained(folder, "seaformer_x", "demo", None, 2)}
        else:
            found = {"seaformer_s": trained(folder, options.root)}
            found |= {name: untrained(folder, name, RECIPE, options.root, 8) for name in RANDOM}
    if not options.smoke:
        packages = ("torch", "onnx", "onnxruntime", *(["openvino"] if find_spec("openvino") else []))
        report = {
            "command": "python benchmarks/quantize.py --root CAMVID",
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "on": processor("cpu"),
            "threads": THREADS,
            "goal": GOAL,
            "seconds": time.perf_counter() - started,
            "networks": found,
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
