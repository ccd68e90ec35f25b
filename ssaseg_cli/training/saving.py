"""What a run saves: its state, to resume from, and checkpoints that describe themselves."""

from typing import TYPE_CHECKING, Any

import torch

from ssaseg.cli.training.faults import advice
from ssaseg.cli.training.state import save_state
from ssaseg.models import CheckpointError, save_model
from ssaseg.models.checkpoint import read_header
from ssaseg.models.segmenter import is_below

if TYPE_CHECKING:
    from ssaseg.cli.training.job import Job


def save(job: "Job") -> None:
    """Writes the training state, then its weights. Every rank calls it.

    Raises FloatingPointError, before anything is written, if a weight is not finite, and OSError if the run
    folder was deleted or replaced.
    """
    job.ranks.same_statistics(job.model)
    require_finite(job)
    if not job.ranks.main:
        job.saved = job.progress.step
        return
    job.require_folder()
    extra: dict[str, Any] = {"data": job.fingerprints}
    if job.average is not None:
        extra["ema"] = job.average.state_dict()
    recipe = job.recipe.model_dump(mode="json")
    save_state(job.folder, job.progress, job.model, job.optimizer, job.scaler, recipe, extra)
    job.saved = job.progress.step
    # The trained weights. If there is an average of them, the scores belong to the average, not to these.
    save_model(job.folder / "last.safetensors", job.model, metadata(job, scored=job.average is None), root=job.folder)


def complete(job: "Job") -> None:
    """Called when a run resumes: writes `last.safetensors` from the state, if the run was killed between the two."""
    path, header = job.folder / "last.safetensors", metadata(job, scored=job.average is None)
    try:
        found, _ = read_header(path)
    except (FileNotFoundError, CheckpointError):
        found = {"step": 0}
    # A later file stays: its state could not be read, and the run will reach its step again.
    older = type(found["step"]) is not int or found["step"] <= header["step"]
    other = any(found.get(key) != header[key] for key in ("step", "scores"))
    if older and other:
        save_model(path, job.model, header, root=job.folder)


def save_best(job: "Job") -> None:
    """Writes `best.safetensors`: the weights that were just scored. Called inside `job.averaged()`."""
    require_finite(job)
    if job.ranks.main:
        job.require_folder()
        save_model(job.folder / "best.safetensors", job.model, metadata(job), root=job.folder)


def require_finite(job: "Job") -> None:
    """Raises FloatingPointError if a weight or a statistic is not finite. Waits for the device."""
    memory = job.model.memory()  # large, and made of features that gave finite losses
    state = job.model.state_dict().items()
    values = [value for key, value in state if value.is_floating_point() and not is_below(key, memory)]
    if not torch.stack([value.isfinite().all() for value in values]).all():
        raise FloatingPointError(
            f"step {job.progress.step}: a weight or a norm's statistic is not finite; nothing was overwritten\n"
            + advice(job)
        )


def metadata(job: "Job", scored: bool = True) -> dict[str, Any]:
    """The header of the run's checkpoints; `scored`: whether the scores in the progress belong to these weights."""
    data, progress = job.recipe.data, job.progress
    return {
        "classes": list(job.val_set.classes),
        "palette": [list(colour) for colour in job.val_set.palette],
        "mean": list(data.mean),
        "std": list(data.std),
        "range": None if data.range is None else list(data.range),
        "protocol": job.recipe.test.model_dump(mode="json"),
        "recipe": job.recipe.model_dump(mode="json"),
        "step": progress.step,
        "scores": progress.scores if scored and progress.evaluated == progress.step else {},
    }
