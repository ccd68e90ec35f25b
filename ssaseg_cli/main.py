"""The commands: each a signature, a docstring with an example, and one call into its verb's file.

Heavy imports (torch, pydantic, rich) stay inside the functions, so that every `--help` answers at once.
"""

import os
from pathlib import Path
from typing import Any

import click

from ssaseg.cli.data.commands import data
from ssaseg.cli.errors import CommandGroup
from ssaseg.cli.options import CLASSIFIERS, device_option, existing_file, gpus_option, json_option
from ssaseg.cli.ranks.launcher import needs_ranks, run_launch
from ssaseg.cli.recipes import recipes

# PyTorch's CPU threads wait for one another by spinning. Where a loader's worker needs the same core, they spin through
# its whole time slice, and a step can take many times as long; a short spin gives the core away soon.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

SAVED = ("index", "color", "overlay", "probs", "rle", "coarse")


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ssaseg", prog_name="ssaseg")
def cli() -> None:
    """Light semantic segmentation with the SSA classifier: train, evaluate, predict, measure, convert.

    \b
    Example:
      ssaseg train demo --out runs/demo
      ssaseg predict runs/demo/best.safetensors photos --out labels --save index,overlay

    Exit codes: 0 done; 1 done in part; 2 wrong input; 3 numerical failure; 130 Ctrl-C; 143 SIGTERM.
    SSASEG_DEBUG=1 shows an error's traceback.
    """


@cli.command()
@click.argument("recipe")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Run folder.  [default: runs/RECIPE]")
@click.option("--resume", is_flag=True, help="Go on in the run folder, exactly where it stopped.")
@device_option
@click.option(
    "--check",
    type=click.Choice(["sample", "all"]),
    default="sample",
    show_default=True,
    help="Pairs to look at before step 0.",
)
@gpus_option
@click.option(
    "--max-hours",
    type=click.FloatRange(min=0, min_open=True),
    metavar="H",
    help="Save and stop after H hours: exit code 1, or 0 under torchrun.",
)
@click.option("--track", type=click.Choice(["tensorboard", "wandb"]), multiple=True, help="Log there too; repeatable.")
@click.option("--dry-run", is_flag=True, help="Build everything, run one step, tell memory and time, write nothing.")
@click.option("--print-config", is_flag=True, help="Print the recipe with every key, and stop.")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    device: str,
    check: str,
    gpus: int | None,
    max_hours: float | None,
    track: tuple[str, ...],
    dry_run: bool,
    print_config: bool,
) -> int:
    """Train a recipe.

    RECIPE is a shipped name (`ssaseg recipes list`) or a YAML file; KEY=VALUE changes any of its keys.

    \b
    Example:
      ssaseg train demo
      ssaseg train my.yaml optim.lr=1e-4 train.micro_batch=8 --out runs/small-lr
      ssaseg train my.yaml --out runs/small-lr --resume
    """
    from ssaseg.recipes import dump_recipe, load_recipe

    resolved = load_recipe(recipe, overrides)
    if print_config:
        click.echo(dump_recipe(resolved), nl=False)
        return 0
    if needs_ranks(gpus):
        return run_launch(gpus or 1)
    from ssaseg.cli.training.loop import run_train

    out = out or Path("runs") / resolved.name
    return run_train(resolved, out, resume, device, dry_run, check, max_hours, track)


def _ratios(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(ratio) for ratio in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0.5,1,1.5", context, parameter) from None


@cli.command("eval")
@click.argument("checkpoint", type=existing_file)
@click.option("--data", metavar="RECIPE", help="Recipe that names the data.  [default: the one in the checkpoint]")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, instead of the recipe's data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True)
@json_option
@device_option
@gpus_option
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images.")
@click.option("--ratios", metavar="A,B,...", callback=_ratios, help="Scales to average, factors of the protocol's.")
@click.option("--flip/--no-flip", default=None, help="Average with the mirrored image, or not.")
@click.option("--slide", nargs=2, type=int, metavar="CROP STRIDE", help="Square sliding windows [pixels].")
@click.option("--whole", is_flag=True, help="The image at once, where the protocol has windows.")
@click.option("--boundary", is_flag=True, help="Boundary IoU as well (Cheng et al. 2021).")
def evaluate(
    checkpoint: Path,
    data: str | None,
    root: Path | None,
    split: str,
    json_out: str | None,
    device: str,
    gpus: int | None,
    limit: int | None,
    boundary: bool,
    slide: tuple[int, int] | None,
    whole: bool,
    **changes: Any,
) -> int:
    """Score a checkpoint on labelled images.

    Prints IoU and accuracy per class, mIoU with its 95 % interval over images, fwIoU, aAcc and mAcc [%], and the
    protocol they belong to: the checkpoint's, or that of --data, but for what --ratios, --flip, --slide and --whole
    change. Every ratio is a forward pass of its own, the flip doubles them.

    \b
    Example:
      ssaseg eval runs/demo/best.safetensors
      ssaseg eval best.safetensors --data camvid-seaformer_b-ssa --root data/camvid --json scores.json
      ssaseg eval best.safetensors --ratios 0.5,0.75,1,1.25,1.5,1.75 --flip
    """
    if slide and whole:
        raise click.UsageError("give either --slide or --whole", click.get_current_context())
    if needs_ranks(gpus):
        return run_launch(gpus or 1)
    from ssaseg.cli.scoring.report import run_eval

    changes = {key: value for key, value in changes.items() if value is not None}
    if slide or whole:
        crop, stride = ([side, side] for side in slide) if slide else (None, None)
        changes |= {"mode": "slide" if slide else "whole", "crop": crop, "stride": stride}
    return run_eval(checkpoint, data, root, split, json_out, device, limit, changes, boundary)


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in value.split(",")))
    unknown = [kind for kind in kinds if kind not in SAVED]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(SAVED)}", context, parameter)
    return kinds


@cli.command()
@click.argument("checkpoint", type=existing_file)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--save", default="index", show_default=True, callback=_kinds, help=f"Comma list of {', '.join(SAVED)}.")
@click.option("--skip-existing", is_flag=True, help="Leave out images whose results are all there.")
@device_option
def predict(
    checkpoint: Path, inputs: tuple[str, ...], out: Path, save: tuple[str, ...], skip_existing: bool, device: str
) -> int:
    """Label images.

    Each INPUT is a file, a folder (searched recursively, structure kept) or a quoted glob. Results are written to
    OUT/KIND/; an image that cannot be read is reported and left out, and the exit code is 1. Results of earlier runs
    stay unless the same image is labelled again; so do the entries of OUT/rle.json.

    \b
    index    palette PNG of class numbers      color    PNG of class colours
    overlay  colours over the image            probs    .npz of probabilities
    rle      COCO run lengths, OUT/rle.json    coarse   the labels before SSA adapts them

    \b
    Example:
      ssaseg predict best.safetensors photos 'more/**/*.jpg' --out labels --save index,overlay
    """
    from ssaseg.cli.prediction.predict import run_predict

    return run_predict(checkpoint, inputs, out, save, skip_existing, device)


@cli.command()
@click.argument("target", metavar="[NAME|CHECKPOINT]", required=False)
@click.option("--paper-table", is_flag=True, help="The published networks, beside the paper's figures.")
@click.option("--classifier", type=CLASSIFIERS, help="Only this one.  [default: both, or the checkpoint's]")
@click.option("--classes", type=click.IntRange(2, 255), help="For a NAME.  [default: 150]")
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=32),
    metavar="H W",
    default=(512, 512),
    help="Input [pixels].  [default: 512 512]",
)
@json_option
@device_option
@click.option("--runs", type=click.IntRange(min=1), default=30, show_default=True, help="Timed passes.")
def profile(
    target: str | None,
    paper_table: bool,
    classifier: str | None,
    classes: int | None,
    size: tuple[int, int],
    json_out: str | None,
    device: str,
    runs: int,
) -> int:
    """Measure parameters, compute, time, memory.

    Parameters [M], multiply-accumulates [GMACs], latency [ms] and peak memory; linear and ssa side by side.

    \b
    Example:
      ssaseg profile seaformer_b --size 512 512
      ssaseg profile runs/demo/best.safetensors --json profile.json
      ssaseg profile --paper-table
    """
    if (target is None) != paper_table:
        raise click.UsageError("give either NAME|CHECKPOINT or --paper-table", click.get_current_context())
    if target is None:
        if classifier or classes or size != (512, 512):
            raise click.UsageError(
                "--paper-table has its own classifiers, classes and size; leave those options out",
                click.get_current_context(),
            )
        from ssaseg.cli.profiling.paper_table import run_paper_table

        return run_paper_table(json_out, device, runs)
    from ssaseg.cli.profiling.profile import run_profile

    return run_profile(target, classifier, classes, size, json_out, device, runs)


@cli.command()
@click.argument("source", type=existing_file)
@click.argument("destination", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", metavar="NAME", help="Network the weights are of; ours know it themselves.")
@click.option("--classifier", type=CLASSIFIERS, help="Classifier the weights are of; ours know it themselves.")
@click.option("--dataset", metavar="NAME", help="Data set of the class names.  [default: ade20k where there are 150]")
@click.option("--classes", metavar="NAME|A,B,...", help="Give the head these classes: rows of the same name are kept.")
@click.option("--allow-partial", is_flag=True, help="Go on where keys are missing, unexpected or of another shape.")
@click.option("--deploy", is_flag=True, help="Of ours a small .safetensors: float16, without what only training needs.")
@click.option("--output", type=click.Choice(["logits", "logits-full", "labels"]), help="What .onnx and .pt2 give.")
@click.option("--input", type=click.Choice(["normalized", "rgb"]), help="What .onnx and .pt2 take.")
@click.option("--size", nargs=2, type=click.IntRange(min=32), metavar="H W", help="The only size .onnx and .pt2 take.")
@click.option("--verify", metavar="FILE|DIR", help="Images to verify .onnx and .pt2 on, beside random ones and scenes.")
def convert(
    source: Path,
    destination: Path,
    model: str | None,
    classifier: str | None,
    dataset: str | None,
    classes: str | None,
    allow_partial: bool,
    deploy: bool,
    **form: Any,
) -> int:
    """Convert official weights to ours, or back, or into a deploy form.

    DESTINATION's suffix says into what: .safetensors (ours) or .pth (official names). Prints which keys matched,
    were missing, unexpected or of another shape. .onnx and .pt2 (torch.export) are for other programs: without what
    only training needs, for any batch and size, written once they are verified against PyTorch.

    \b
    --input   normalized  float32 (N,3,H,W), (RGB - mean) / std    --output  logits       (N,K,h,w), the default
              rgb         uint8 (N,3,H,W)                                    logits-full  (N,K,H,W)
                                                                             labels       uint8 (N,H,W)

    \b
    Example:
      ssaseg convert official.pth ours.safetensors --model seaformer_b --classifier ssa
      ssaseg convert ours.safetensors official.pth
      ssaseg convert ade20k.pth start.safetensors --classes camvid-seaformer_b-ssa
      ssaseg convert ours.safetensors ours.onnx --input rgb --output labels
      ssaseg convert ours.safetensors small.safetensors --deploy
    """
    from ssaseg.cli.weights.convert import run_convert

    given = {key: value for key, value in form.items() if value is not None}
    return run_convert(source, destination, model, classifier, dataset, allow_partial, given, classes, deploy)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default="compare.png", show_default=True, help="Picture to write."
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, json_out: str | None) -> int:
    """Compare training runs.

    Each RUN is a folder of `ssaseg train`. Prints a table, what the recipes differ in, and the IoU per class where the
    runs have it; draws their curves into one picture. Hours are training and evaluation, by the logged speeds.

    \b
    Example:
      ssaseg compare runs/linear runs/ssa
      ssaseg compare runs/* --out all.png --json all.json
    """
    from ssaseg.cli.comparison.compare import run_compare

    return run_compare(runs, out, json_out)


cli.add_command(data)
cli.add_command(recipes)
