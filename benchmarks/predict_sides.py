"""The other programs of predict.py, each in its own interpreter: `python predict_sides.py SIDE` answers questions.

`mmseg`: mmsegmentation 1.2.2's inferencer, with our weights under its names. `ultralytics`: a network from its YAML
file with random weights. Both read images one after the other and write a PNG of class numbers for each.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

THREADS = 2
YAML = "yolo26n-sem.yaml"
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")

Label = Callable[[list[str], Path, tuple[int, int]], None]  # files, folder of the results, (height, width)


def mmseg_side(network: str, classes: int, weights: str) -> Label:
    """mmsegmentation's configuration of this network; images keep their size, as with ours, and are not padded."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
    from make_mmseg_stub import stub_mmcv_ops
    from network_peers import CONFIGS

    stub_mmcv_ops()
    import mmseg
    from mmengine import Config
    from mmseg.apis import MMSegInferencer

    start = next(start for start in CONFIGS if network.startswith(start))
    name = CONFIGS[start].format(network.removeprefix(start))
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / "configs" / name)
    config.model.backbone.init_cfg = None
    config.model.decode_head.num_classes = classes
    config.model.data_preprocessor.test_cfg = None
    config.test_dataloader.dataset.pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackSegInputs"}]
    inferencer = MMSegInferencer(config, weights, device="cpu")
    inferencer.show_progress = False
    inferencer.visualize = lambda *given, **named: None  # it would draw a picture of each image

    def label(files: list[str], out: Path, size: tuple[int, int]) -> None:
        inferencer.num_pred_imgs = 0
        inferencer(files, batch_size=1, out_dir=str(out), pred_out_dir="")

    return label


def ultralytics_side(network: str, classes: int, weights: str) -> Label:
    """Random weights; the network's input is as large as the image, its sides rounded up to multiples of 32."""
    # torchvision's operators, which this network does not need, are missing where its build is for another PyTorch.
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import numpy as np
    from PIL import Image
    from ultralytics import YOLO

    model = YOLO(YAML)

    def label(files: list[str], out: Path, size: tuple[int, int]) -> None:
        found = model.predict(files, imgsz=size, stream=True, verbose=False, device="cpu")
        for file, result in zip(files, found, strict=True):
            labels = result.semantic_mask.data.cpu().numpy().astype(np.uint8).squeeze()
            Image.fromarray(labels).save(out / f"{Path(file).stem}.png")

    return label


SIDES = {"mmseg": mmseg_side, "ultralytics": ultralytics_side}


def main(side: str) -> None:
    torch.set_num_threads(THREADS)
    label: Label | None = None
    for line in sys.stdin:
        question, given = json.loads(line)
        answer: Any = None
        if question == "build":
            label = SIDES[side](**given)
        elif question == "label":
            assert label is not None
            out = Path(given["out"])
            out.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            label(given["files"], out, tuple(given["size"]))
            answer = time.perf_counter() - start
        elif question == "about":
            from importlib.metadata import version

            answer = {name: version(name) for name in ("mmsegmentation", "ultralytics", "torch") if installed(name)}
        print("answer " + json.dumps(answer), flush=True)


def installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1])
