"""Large images: the memory that `predict --tile` takes, and how many labels differ from those of the whole image.

    python benchmarks/tiles.py --root data/camvid   # writes benchmarks/results/tiles.json
    python benchmarks/tiles.py --only memory        # or seams; the other part of the results stays
    python benchmarks/tiles.py --smoke              # small and quick, writes nothing

Memory: an image of 20,000 × 20,000 pixels, a TIFF with tiles of 512 pixels in JPEG compression, is drawn into a
temporary folder and labelled by SeaFormer-T (random weights, 11 classes) with the options of `VARIANTS`; and one of
64 × 64 pixels by the same commands, which is what they take beside it: Python, PyTorch, GDAL, the network. Each is a
process of its own, whose peak of resident memory the system reports. Seconds are wall-clock time.

Seams: images that fit into memory are labelled whole and in tiles, at their own size; counted is the share of pixels
whose labels differ, for several overlaps. Networks with SSA: also of the labels from before SSA adapts to the image,
`coarse`, which is what their backbone and decoder see of the image outside of a tile. CamVid's weights are those in
benchmarks/weights, on its validation images; the other networks have random weights, of which one image says no more
than whether labels depend on what is outside of a tile.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ssaseg.cli.engine.opening import make_engine, open_file
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.cli.tiling.labelling import Wanted, label_strips
from ssaseg.cli.tiling.library import windows_library
from ssaseg.cli.tiling.planning import Tiling
from ssaseg.cli.tiling.reading import open_large
from ssaseg.datasets.decoding import read_image
from ssaseg.datasets.synthetic import SyntheticScenes
from ssaseg.models import build_model, save_model
from ssaseg.models.fast import for_inference
from ssaseg.recipes import parse_protocol

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "tiles.json"
OWN_SIZE = parse_protocol({}, "benchmark")
CPU = torch.device("cpu")
TRAINED = ("camvid-seaformer_s-ssa", "camvid-lite0-ssa")
RANDOM = ("seaformer_s", "segnext_t", "afformer_t", "cgrseg_t", "segformer_b0")
SIDE, OVERLAPS = 192, (0, 32, 64, 96, 128)  # of tiles, in images of 480×360 pixels
VARIANTS = {
    "512": ["--tile", "512"],
    "auto": ["--tile", "auto"],
    "polygons": ["--tile", "512", "--save", "index,polygons"],
}


# ---- memory ------------------------------------------------------------------------------------------------------
def draw(path: Path, width: int, height: int) -> None:
    """A TIFF with tiles: smooth colours and rectangles, by rows of tiles, so that this process stays small, too."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    options = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "jpeg", "photometric": "ycbcr"}
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.1, 0.1)}
    generator = np.random.default_rng(0)
    with (
        windows_library(),
        rasterio.open(
            path, "w", driver="GTiff", width=width, height=height, count=3, dtype="uint8", **options, **place
        ) as file,
    ):
        for top in range(0, height, 512):
            rows = min(512, height - top)
            small = generator.integers(0, 256, (6, max(width // 100, 2), 3), dtype=np.uint8)
            band = cv2.resize(small, (width, rows), interpolation=cv2.INTER_CUBIC)
            for _ in range(width // 200):
                x, y = int(generator.integers(0, width)), int(generator.integers(0, rows))
                cv2.rectangle(band, (x, y), (x + 150, y + 90), generator.integers(0, 256, 3).tolist(), -1)
            file.write(np.moveaxis(band, 2, 0), window=Window(0, top, width, rows))


def measured(words: list[str]) -> dict[str, float]:
    """Runs `ssaseg` with these words as a process; its peak of resident memory [MiB] and seconds."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ssaseg", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"ssaseg {' '.join(words)}: exit code {process.returncode}")
    return {"peak_mib": usage.ru_maxrss / 1024, "seconds": round(time.perf_counter() - start, 1)}


def memory(side: int, rows: int, variants: Iterable[str]) -> dict[str, Any]:
    """Peaks of the commands on the large image and on a small one, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.manual_seed(0)
        names = [f"class {index}" for index in range(11)]
        save_model(
            place / "net.safetensors",
            build_model("seaformer_t", 11, "ssa"),
            {"classes": names, "palette": None, "protocol": {"scale": None, "multiple": None}},
        )
        draw(place / "large.tif", side, rows)
        draw(place / "small.tif", 64, 64)
        found = {}
        for name in variants:
            words = [str(place / "net.safetensors"), "--device", "cpu", *VARIANTS[name]]
            sides = {}
            for which in ("small", "large"):
                out = place / f"{which}-{name}"
                sides[which] = measured(
                    ["predict", words[0], str(place / f"{which}.tif"), "--out", str(out), *words[1:]]
                )
                sides[which]["written_mib"] = round(sum(f.stat().st_size for f in out.rglob("*.*")) / 2**20, 1)
            sides["beside the model [MiB]"] = round(sides["large"]["peak_mib"] - sides["small"]["peak_mib"], 1)
            found[name] = sides
            print(f"--tile {name}: {sides['beside the model [MiB]']} MiB beside the model, {sides}", flush=True)
        return {"image": f"{side}x{rows}, TIFF, {(place / 'large.tif').stat().st_size / 2**20:.0f} MiB", "sides": found}


# ---- seams -------------------------------------------------------------------------------------------------------
def apart(inference: Inference, files: list[Path], tilings: Iterable[Tiling]) -> dict[str, dict[str, float]]:
    """Share of pixels whose labels in tiles differ from those of the whole image, in percent."""
    differ: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    pixels = 0
    for file in files:
        image = read_image(file)
        inputs = [torch.from_numpy(each) for each in inference.inputs(image, file.name)]
        whole = inference.predict(inputs, image.shape[:2])
        pixels += whole.labels.size
        for tiling in tilings:
            with windows_library(), open_large(file, 3) as opened:
                wanted = Wanted(coarse=not tiling.blend, confidence=False)
                strips = [*label_strips(opened, inference, tiling, wanted, lambda _: nullcontext(), lambda _: None)]
            for name in ("labels", "coarse"):
                parts = [getattr(strip.prediction, name) for strip in strips]
                if getattr(whole, name) is not None and parts[0] is not None:
                    count = int((np.concatenate(parts) != getattr(whole, name)).sum())
                    differ[f"overlap {tiling.overlap}{', blended' * tiling.blend}"][name] += count
    return {key: {name: round(100 * n / pixels, 3) for name, n in each.items()} for key, each in differ.items()}


def networks(smoke: bool) -> Iterator[tuple[str, Inference]]:
    """Networks with weights from CamVid, and some with random ones."""
    for name in TRAINED[:1] if smoke else TRAINED:
        opened = open_file(HERE / "weights" / f"{name}.safetensors")
        engine = make_engine(opened, CPU)
        yield name, Inference(engine, OWN_SIZE, opened.metadata["mean"], opened.metadata["std"])
    for name in RANDOM[:1] if smoke else RANDOM:
        torch.manual_seed(0)
        model = build_model(name, 11, "ssa").eval()
        yield (
            f"{name}, random weights",
            Inference(
                TorchEngine(for_inference(model), CPU, exact=False),
                OWN_SIZE,
                (123.675, 116.28, 103.53),
                (58.395, 57.12, 57.375),
            ),
        )


def seams(root: Path | None, count: int, smoke: bool) -> dict[str, Any]:
    """For each network: shares in percent by overlap, without and with blending."""
    with tempfile.TemporaryDirectory() as folder:
        files = sorted((root / "images" / "val").iterdir()) if root is not None else []
        files = files[:: max(len(files) // count, 1)][:count]
        if root is None:
            scenes = SyntheticScenes(count, 360, 480)
            for index in range(count):
                files.append(Path(folder) / f"{index}.png")
                cv2.imwrite(str(files[-1]), scenes.load_image(index))
        found: dict[str, Any] = {}
        for name, inference in networks(smoke):
            few = smoke or "random" in name
            tilings = [
                Tiling(SIDE, SIDE, overlap, blend)
                for overlap in (OVERLAPS[2:3] if few else OVERLAPS)
                for blend in (False, True)[: 1 + bool(overlap)]
            ]
            found[name] = apart(inference, files[: 1 if few else len(files)], tilings)
            print(f"{name}: % of pixels that differ: {found[name]}", flush=True)
        return {
            "images": f"{len(files)} of {'CamVid, validation' if root else 'built-in scenes'}",
            "tile": SIDE,
            "networks": found,
        }


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--only", choices=("memory", "seams"))
    parser.add_argument("--variants", metavar="A,B", help=f"of the memory part: {', '.join(VARIANTS)}")
    parser.add_argument("--root", type=Path, help="CamVid")
    parser.add_argument("--note", help="to be stored with the results, such as what else the machine did")
    parser.add_argument("--side", type=int, default=20_000, help="width of the large image [pixels]")
    parser.add_argument("--rows", type=int, help="its height; default: as its width")
    parser.add_argument("--images", type=int, default=8, help="images that seams are counted in")
    options = parser.parse_args()
    side = 1500 if options.smoke else options.side
    variants = ["512"] if options.smoke else (options.variants or ",".join(VARIANTS)).split(",")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: memory(side, options.rows or side, variants),
        "seams": lambda: seams(options.root, 1 if options.smoke else options.images, options.smoke),
    }
    results: dict[str, Any] = {}
    for name, part in parts.items():
        if options.only in (None, name):
            root = [] if options.root is None else ["--root", options.root.name]
            command = ["python benchmarks/tiles.py", *(word for word in sys.argv[1:] if word != str(options.root))]
            results[name] = {
                "command": " ".join(word if word != "--root" else " ".join(root) for word in command),
                "versions": versions(),
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
                **({"note": options.note} if options.note else {}),
                **part(),
            }
    if not options.smoke:
        results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | results
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def versions() -> dict[str, str]:
    """Of what decides the results."""
    import rasterio

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rasterio": rasterio.__version__,
        "gdal": rasterio.__gdal_version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
