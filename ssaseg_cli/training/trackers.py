"""Copies of a run's metrics and pictures for TensorBoard and Weights & Biases. Both packages are optional.

`metrics.jsonl` is the complete log; a tracker gets a copy. If a tracker fails, at the start or later, one warning is
printed and the tracker gets nothing more. Training continues.
"""

import errno
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ssaseg.cli.errors import CommandError
from ssaseg.cli.printing import echo
from ssaseg.datasets.decoding import open_image
from ssaseg.files.reading import read_file, read_text
from ssaseg.files.writing import write_atomic
from ssaseg.recipes import Recipe, dump_recipe


def open_trackers(names: Iterable[str], folder: Path, recipe: Recipe) -> "list[Tracker]":
    """Trackers by name (tensorboard, wandb) for the run in `folder`. They write nothing until `MetricsLog` starts them.

    Raises CommandError if a package is missing, or if a new run of Weights & Biases has no account to log in to.
    """
    kinds: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
    names = list(dict.fromkeys(names))
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder of that name; both packages make such folders
            raise CommandError(
                f"--track {name}: the package {name} is not installed\n"
                f"install it with: pip install 'ssaseg[{name}]', or leave out --track; metrics.jsonl is always written"
            )
    return [kinds[name](folder, recipe) for name in names]


class Tracker(ABC):
    """Receives metrics and pictures. What its library raises becomes a warning on stderr."""

    name: str

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self.working = False

    def start(self, step: int) -> None:
        """Opens it for a run that continues after `step` (0: a new run)."""
        self.working = True
        self._try(lambda: self._start(step))

    def log(self, record: dict[str, Any]) -> None:
        """Logs a record of `metrics.jsonl`."""
        self._try(lambda: self._log(named(record), record["step"]))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Logs a picture file that was written for `step`."""
        self._try(lambda: self._picture(name, path, step))

    def close(self) -> None:
        """Writes or sends what is waiting. Does nothing if the tracker was closed before or has failed."""
        self._try(self._close)
        self.working = False

    def _try(self, action: Callable[[], object]) -> None:
        if not self.working:
            return
        try:
            action()
        except Exception as error:  # such a library may raise anything; this must not end the training
            self.working = False
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            echo(f"warning: {self.name} failed and is not used any more ({text})", err=True)

    @abstractmethod
    def _start(self, step: int) -> None: ...

    @abstractmethod
    def _log(self, values: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def _picture(self, name: str, path: Path, step: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


def named(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers as `train/…` or `val/…`, its class scores as `val/IoU/…`. Leaves out what is not a number."""
    split = "val" if "mIoU" in record else "train"
    values = {f"{split}/{key}": value for key, value in record.items() if key not in ("step", "IoU")}
    values |= {f"val/IoU/{key}": value for key, value in record.get("IoU", {}).items()}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def own_folder(path: Path) -> Path:
    """`path`. Raises OSError if it is a link: a run folder from elsewhere must not decide where files are written."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, expected a folder in the run folder", str(path))
    return path


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard. Show them with `tensorboard --logdir RUN`, or give the folder with all runs."""

    name = "tensorboard"

    def _start(self, step: int) -> None:
        from torch.utils import tensorboard

        writer: Any = tensorboard.SummaryWriter
        # Removes what a killed run wrote after its last state: the resumed run writes those steps again.
        folder = str(own_folder(self.folder / "tensorboard"))
        self.writer = writer(folder, purge_step=step + 1)
        if step == 0:
            text = "".join(f"    {line}\n" for line in dump_recipe(self.recipe).splitlines())  # Markdown's code
            self.writer.add_text("recipe", text)

    def _log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def _picture(self, name: str, path: Path, step: int) -> None:
        from torch.utils.tensorboard.summary import Summary

        content = read_file(path)
        with open_image(content) as image:
            width, height = image.size
        # The file unchanged: `add_image` would convert it to PNG, five times as large as a JPEG.
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        value = Summary.Value(tag=name, image=picture)
        self.writer.file_writer.add_summary(Summary(value=[value]), step)

    def _close(self) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases. Its id is kept in RUN/wandb-id, so that a resumed training continues the same run.

    WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline (then `wandb sync`) have their usual effect.
    """

    name = "wandb"

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        super().__init__(folder, recipe)
        self.wandb: Any = import_module("wandb")
        self.id_file = folder / "wandb-id"
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        # A resumed run, perhaps restarted by a machine at night, should rather continue without W&B than fail.
        if not offline and not self.id_file.exists():
            self._log_in()

    def _log_in(self) -> None:
        try:
            self.wandb.login()
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
            fix = "run `wandb login`, or set WANDB_MODE=offline and send the run later with `wandb sync`"
            raise CommandError(f"--track wandb: {reason}\n{fix}") from None

    def _start(self, step: int) -> None:
        own_folder(self.folder / "wandb")  # where W&B writes
        if not self.id_file.exists():
            write_atomic(self.id_file, secrets.token_hex(4).encode(), root=self.folder)
        known = read_text(self.id_file, 1000).strip()
        if not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
            raise ValueError(f"{self.id_file}: expected the id of a run: letters, digits and dashes")
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ssaseg"),
            dir=str(self.folder),
            id=known,
            name=Path(os.path.realpath(self.folder)).name,
            resume="allow",
            config=self.recipe.model_dump(mode="json"),
            settings={"console": "off"},  # W&B must not capture what ssaseg prints
        )
        # W&B's own step can only increase: it would refuse the steps that a resumed run computes again.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def _log(self, values: dict[str, float], step: int) -> None:
        self.run.log({"step": step, **values})

    def _picture(self, name: str, path: Path, step: int) -> None:
        self.run.log({"step": step, name: self.wandb.Image(str(path))})

    def _close(self) -> None:
        self.run.finish()
