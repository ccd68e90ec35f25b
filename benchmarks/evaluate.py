"""`ssaseg eval` against mmsegmentation 1.2.2's evaluation, and against our own `--exact`, in turn in one run.

    python benchmarks/evaluate.py --root data/camvid --mmseg-python PYTHON   # writes benchmarks/results/evaluate.json
    python benchmarks/evaluate.py --smoke                                    # small and quick, writes nothing

Protocol: CamVid's 101 validation frames of 360×480 (--images: fewer), 2 threads, on both sides 2 processes that read
ahead; from the first image to the score, without the start of programs and the reading of weights. SegNeXt-T is
mmsegmentation's own network, with the weights of ours, which are random, as are the bases that it draws in each pass.
SeaFormer-S, which mmsegmentation does not have, is our network with the weights of benchmarks/weights, run by
mmsegmentation's evaluation as its segmentor. Ours: `now` (folded, float32), `bf16`
where the processor has it, and `exact`, which is what `eval` did before: the network as it was trained, all threads on
one image. A ratio is the median of the rounds' ratios.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "evaluate.json"
SHIPPED = Path(__file__).parent / "weights" / "camvid-seaformer_s-ssa.safetensors"
THREADS = WORKERS = 2
GOAL = 2.0  # images a second of `now`, to mmsegmentation's
FORMS = {"now": {}, "exact": {"exact": True}, "bf16": {"precision": "bf16"}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of evaluation.")
    parser.add_argument("--root", type=Path, help="folder of CamVid")
    parser.add_argument("--mmseg-python", type=Path, help="Python interpreter with mmsegmentation 1.2.2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=101, help="the first N validation frames")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--as-mmseg", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.as_mmseg:
        serve_mmseg(json.loads(options.as_mmseg.read_text()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            return smoke(Path(folder))
        if options.root is None:
            parser.error("--root: the folder of CamVid is missing")
        report = measure(Path(folder), options)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def smoke(folder: Path) -> int:
    """All forms of ours on a few scenes; the labels must agree."""
    import yaml

    recipe = folder / "scenes.yaml"
    data = {"dataset": "synthetic", "synthetic": {"height": 64, "width": 96, "train": 1, "val": 5, "seed": 0}}
    sections = {"augment": {"scale": [96, 64], "crop": [64, 64]}, "optim": {"lr": 0.001}, "train": {"steps": 1}}
    sections |= {"model": {"name": "seaformer_t"}, "data": data, "test": {"scale": None}}
    recipe.write_text(yaml.safe_dump(sections))
    found = {form: ours(random_weights(folder, "seaformer_t", recipe), recipe, None, form) for form in able_forms()}
    assert all(speed > 0 for speed, _ in found.values())
    assert abs(found["now"][1] - found["exact"][1]) < 0.5, found
    print(f"smoke: {found}")
    return 0


# ---- our side ----------------------------------------------------------------------------------------------------


def able_forms() -> list[str]:
    """Of ours, those that this processor computes."""
    from ssaseg.models.fast import has_bfloat16

    return [form for form in FORMS if form != "bf16" or has_bfloat16(torch.device("cpu"))]


def random_weights(folder: Path, name: str, recipe: Path | str, root: Path = Path()) -> Path:
    """A checkpoint of a network with random weights that fits the recipe, the same in every run."""
    from network_sides import Case, official_weights, our_network

    from ssaseg.datasets import build_dataset
    from ssaseg.models import save_model
    from ssaseg.recipes import load_recipe

    found = load_recipe(str(recipe))
    classes = build_dataset(found.data.dataset, "val", root=root, options=found.data.model_dump()).classes
    model = our_network(Case(name, "linear", len(classes), 256))
    path = folder / f"{name}.safetensors"
    header = {"classes": list(classes), "recipe": found.model_dump(mode="json")}
    save_model(path, model, header | {"protocol": found.test.model_dump(mode="json")})
    torch.save(official_weights(model)[""], path.with_suffix(".pt"))
    return path


def ours(
    checkpoint: Path, recipe: Path | str, root: Path | None, form: str, images: int | None = None
) -> tuple[float, float]:
    """Images a second of `ssaseg eval`, and the mIoU [%]."""
    from ssaseg.cli.evaluation.report import Request, run_eval

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        request = Request(data=str(recipe), root=root, limit=images, **FORMS[form])
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_eval([checkpoint], request, str(file), "cpu") == 0
        report = json.loads(file.read_text())
    return report["images_per_s"], report["mIoU"]


# ---- mmsegmentation's side ---------------------------------------------------------------------------------------


class Mmseg:
    """This file in the other interpreter; it answers each line with seconds and mIoU of one evaluation."""

    def __init__(self, python: Path, folder: Path, case: dict[str, Any]) -> None:
        (folder / "case.json").write_text(json.dumps(case))
        package = folder / "package" / "ssaseg"  # our networks, for SeaFormer
        package.mkdir(parents=True, exist_ok=True)
        for name in ("models", "files"):
            if not (package / name).exists():
                (package / name).symlink_to(ROOT / name)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(THREADS),
            "GOMP_SPINCOUNT": "1000",  # it must not spin while it waits for its turn
            "PYTHONPATH": str(package.parent),
        }
        self.log = (folder / "mmseg.log").open("w+")
        pipe = subprocess.PIPE
        command = [str(python), __file__, "--as-mmseg", str(folder / "case.json")]
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment, cwd=folder
        )

    def ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("answer "):  # mmengine prints too
                return json.loads(line.removeprefix("answer "))
        self.log.seek(0)
        raise SystemExit(f"mmsegmentation's side ended without an answer:\n{self.log.read()[-2000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def serve_mmseg(case: dict[str, Any]) -> None:
    """mmsegmentation's test loop on the same files, with its own reading, network's surroundings and metric."""
    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    from make_mmseg_stub import stub_mmcv_ops

    stub_mmcv_ops()
    import mmengine
    import mmseg
    from mmengine.evaluator import Evaluator
    from mmengine.runner import Runner
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    preprocessor = {"type": "SegDataPreProcessor", "mean": case["mean"], "std": case["std"], "bgr_to_rgb": True}
    network = mmseg_network(case) if case["file"] is None else our_segmentor(case)
    network.data_preprocessor = MODELS.build(preprocessor)
    network = network.eval()
    resize = [{"type": "ResizeToMultiple", "size_divisor": case["multiple"]}] if case["multiple"] else []
    loader = Runner.build_dataloader(
        {
            "batch_size": 1,
            "num_workers": WORKERS,
            "persistent_workers": True,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {
                "type": "BaseSegDataset",
                "data_root": case["root"],
                "data_prefix": {"img_path": "images/val", "seg_map_path": "annotations/val"},
                "img_suffix": ".jpg",
                "seg_map_suffix": ".png",
                "metainfo": {"classes": case["classes"], "palette": case["palette"]},
                "reduce_zero_label": False,
                "test_mode": True,
                "indices": case["images"],
                # As in its configurations: the label is read after the image is resized, and keeps its size.
                "pipeline": [
                    {"type": "LoadImageFromFile"},
                    *resize,
                    {"type": "LoadAnnotations"},
                    {"type": "PackSegInputs"},
                ],
            },
        }
    )
    evaluator = Evaluator({"type": "IoUMetric", "iou_metrics": ["mIoU"]})
    evaluator.dataset_meta = loader.dataset.metainfo
    for line in sys.stdin:
        if line.strip() == "about":
            answer: Any = {"mmsegmentation": mmseg.__version__, "mmengine": mmengine.__version__}
        else:
            started = time.perf_counter()
            with torch.no_grad():
                for batch in loader:
                    evaluator.process(data_samples=network.test_step(batch), data_batch=batch)
            scores = evaluator.evaluate(len(loader.dataset))
            answer = [len(loader.dataset) / (time.perf_counter() - started), float(scores["mIoU"])]
        print("answer " + json.dumps(answer), flush=True)


def mmseg_network(case: dict[str, Any]) -> Any:
    """mmsegmentation's own SegNeXt-T with the weights of ours."""
    import network_peers
    from network_sides import Case

    network = network_peers.mmseg_network(Case(case["network"], "linear", len(case["classes"])))
    del network.forward  # set by `mmseg_network`, for logits alone
    # In mmsegmentation 0.30 this layer had another name.
    weights = {key.replace("dwconv.dwconv", "dwconv"): value for key, value in torch.load(case["weights"]).items()}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    wrong = [key for key in (*missing, *unexpected) if not key.endswith("num_batches_tracked")]
    assert not wrong, wrong
    return network


def our_segmentor(case: dict[str, Any]) -> Any:
    """Our network as mmsegmentation's encoder and decoder."""
    from mmengine import ConfigDict
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import MODELS

    from ssaseg.models import load_model

    model, _ = load_model(case["file"])

    @MODELS.register_module()
    class OurBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, images: Any) -> Any:
            return self.network.feature(images)

    @MODELS.register_module()
    class OurHead(BaseDecodeHead):
        def forward(self, feature: Any) -> Any:
            return model.classifier(feature)

    head = {"type": "OurHead", "in_channels": 1, "channels": 1, "num_classes": len(case["classes"])}
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "OurBackbone"},
            "decode_head": head,
            "test_cfg": ConfigDict(mode="whole"),
        }
    )


# ---- both sides --------------------------------------------------------------------------------------------------


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, for both networks."""
    from networks import processor, rounded

    from ssaseg.models import load_model
    from ssaseg.recipes import load_recipe

    recipe = "camvid-seaformer_s-ssa"
    root = options.root.absolute()
    _, header = load_model(SHIPPED)
    segnext = random_weights(folder, "segnext_t", recipe, root)
    test = load_recipe(recipe).test
    case = {
        **{key: header[key] for key in ("classes", "palette", "mean", "std")},
        **{"root": str(root), "images": options.images, "multiple": test.multiple},
        **dict.fromkeys(("file", "weights", "network")),
    }
    cases = {
        "seaformer_s ssa": (SHIPPED, case | {"file": str(SHIPPED)}),
        "segnext_t linear": (segnext, case | {"network": "segnext_t", "weights": str(segnext.with_suffix(".pt"))}),
    }
    forms = able_forms()
    report: dict[str, Any] = {
        "command": "python benchmarks/evaluate.py --root DIR" + " --mmseg-python PYTHON" * bool(options.mmseg_python),
        "processor": processor("cpu"),
        "threads": THREADS,
        "images": options.images,
        "versions": {"torch": torch.__version__},
        "goal": {"now/mmsegmentation": GOAL},
    }
    for name, (checkpoint, given) in cases.items():
        peer = Mmseg(options.mmseg_python, folder, given) if options.mmseg_python else None
        speeds: dict[str, list[float]] = defaultdict(list)
        scores: dict[str, float] = {}
        for turn in range(-1, options.rounds):  # the first warms up
            for side in [*forms, *(["mmsegmentation"] if peer else [])]:
                if peer and side == "mmsegmentation":
                    found = peer.ask("time")
                else:
                    found = ours(checkpoint, recipe, root, side, options.images)
                scores[side] = found[1]
                if turn >= 0:
                    speeds[side].append(found[0])
        ratios = {
            f"now/{side}": statistics.median(a / b for a, b in zip(speeds["now"], speeds[side], strict=True))
            for side in speeds
            if side != "now"
        }
        if peer:
            report["versions"] |= peer.ask("about")
            peer.close()
        medians = {side: statistics.median(each) for side, each in speeds.items()}
        report[name] = rounded({"images/s": medians, "ratios": ratios, "all": dict(speeds)}) | {"mIoU [%]": scores}
        print(f"{name}: {json.dumps(report[name]['images/s'])} images/s; {json.dumps(report[name]['ratios'])}")
        print(f"  mIoU [%]: {json.dumps(scores)}")
    return report


if __name__ == "__main__":
    sys.exit(main())
