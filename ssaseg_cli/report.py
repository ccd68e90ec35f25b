"""What a training run leaves for people to look at: metrics, curves, pictures of batches and of predictions."""

import io
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.models.checkpoint import write_atomic

TERMS_APART = {"step", "lr", "loss", "images_per_s", "data_wait"}


class MetricsLog:
    """`metrics.jsonl`: a line per log interval (mean losses) and per evaluation (`mIoU` in percent)."""

    def __init__(self, path: Path, step: int, evaluated: int) -> None:
        """Goes on after `step`, last evaluated at `evaluated`: what a killed run wrote beyond its state is dropped."""
        self.path = path
        before = read_metrics(path) if path.exists() else []
        kept = [record for record in before if record["step"] <= (evaluated if "mIoU" in record else step)]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_environment(path: Path, device: str, command: Sequence[str], extra: dict[str, Any]) -> None:
    """`env.json`: versions, device and threads, and what else the run wants to be remembered by."""
    import cv2
    import torch

    content = {
        "command": list(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "device": device,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        **extra,
    }
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def draw_curves(metrics: Path, destination: Path) -> None:
    """`curves.png`: each loss term, the learning rate and the mIoU over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(metrics)
    logs = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "mIoU" in record]
    figure, (losses, rate, score) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = [record["step"] for record in logs]
    for term in [key for key in (logs[-1] if logs else {}) if key not in TERMS_APART]:
        losses.plot(steps, [record.get(term) for record in logs], label=term, linewidth=1)
    losses.set(title="losses, weighted", xlabel="step", yscale="log")
    if logs:
        losses.legend(fontsize=7)
    rate.plot(steps, [record["lr"] for record in logs], color="tab:gray")
    rate.set(title="learning rate of the backbone", xlabel="step")
    score.plot([r["step"] for r in evaluations], [r["mIoU"] for r in evaluations], marker="o", color="tab:green")
    score.set(title="validation mIoU [%]", xlabel="step")
    for axes in (losses, rate, score):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    write_atomic(destination, picture.getvalue())


def overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Half image, half class colours; ignored pixels (255) stay as they are. BGR uint8 (H,W,3), (H,W) → BGR uint8."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = np.asarray(palette, np.uint8)[:, ::-1]
    mixed = (image.astype(np.uint16) + colours[labels] + 1) // 2
    return np.where((labels == 255)[..., None], image, mixed.astype(np.uint8))


def write_grid(path: Path, rows: Iterable[Sequence[np.ndarray]], width: int = 320) -> None:
    """A picture of pictures: each row's BGR images side by side, brought to `width` pixels each."""
    import cv2

    def fit(image: np.ndarray) -> np.ndarray:
        height = max(round(image.shape[0] * width / image.shape[1]), 1)
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    lines = [np.concatenate([fit(image) for image in row], axis=1) for row in rows]
    if lines:
        widest = max(line.shape[1] for line in lines)
        lines = [np.pad(line, ((0, 4), (0, widest - line.shape[1]), (0, 0))) for line in lines]
        write_atomic(path, cv2.imencode(".png", np.concatenate(lines))[1].tobytes())


def command_line() -> list[str]:
    """The command as it was typed, its program's path left out."""
    return ["ssaseg", *sys.argv[1:]]
