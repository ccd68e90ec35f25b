"""`ssaseg explain`: its arguments and help. PyTorch is imported inside the function, so that `--help` is quick."""

from pathlib import Path

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.options import device_option, existing_file


@click.command()
@click.argument("checkpoint", type=existing_file)
@click.argument("images", metavar="[IMAGE...]", nargs=-1)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write to.")
@click.option("--against", type=existing_file, metavar="CHECKPOINT", help="A second checkpoint to compare with.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Class to draw; may be repeated.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="DIR", help="Folder with the masks of IMAGE.")
@click.option(
    "--data",
    metavar="RECIPE",
    shell_complete=names_of("recipes", files=True),
    help="Recipe with the data.  [default: the checkpoint's]",
)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Images, without IMAGE.  [default: val]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N images.")
@click.option(
    "--pictures",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Images to draw.",
)
@device_option
def explain(
    checkpoint: Path,
    images: tuple[str, ...],
    out: Path,
    against: Path | None,
    classes: tuple[str, ...],
    masks: Path | None,
    data: str | None,
    root: Path | None,
    split: str | None,
    limit: int | None,
    pictures: int,
    device: str,
) -> int:
    """Show what a classifier's adaptation changes.

    Each IMAGE is a file, a folder or a glob pattern in quotes, as for `ssaseg predict`. Labels come from --masks: the
    mask of a/b.jpg is DIR/a/b.png; the recipe says the meaning of ids, and other suffixes of images and masks. Without
    --masks the predicted masks take their place, and nothing is called better or worse. Without IMAGE the recipe's
    split is used, with its labels.

    OUT/activation/ has a picture per image: the activation of each class by the classifier before its adaptation, after
    it, and by the classifier of --against; pixels that changed for better and worse; and where SSA's spatial prototypes
    look. Pictures of an earlier run stay; explain.json lists those of this one. Activation is the class's softmax
    probability, 0 to 1, the only number with the same meaning for all classifiers. Without --class the six classes with
    most pixels are drawn.

    OUT/explain.json and OUT/summary/ have the figures over all images: confidence from the rim of the masks to their
    middle, pairs of classes that are confused less or more, and how far the semantic prototypes of SSA or CAC moved.
    What a classifier does not have is left out, and printed. An image that cannot be read is skipped; the exit code is
    then 1. Each image is one input, without windows, several scales or mirrored images. After Ctrl-C the report is of
    the images so far; a second one ends the command without it.

    \b
    Example:
      ssaseg explain best.safetensors street.jpg --class car --class person --out why
      ssaseg explain ssa.safetensors --root data/camvid --against linear.safetensors --out why
    """
    if images and (root or split):
        raise click.UsageError("--root and --split choose images: leave out IMAGE", click.get_current_context())
    if masks is not None and not images:
        raise click.UsageError("--masks needs IMAGE", click.get_current_context())
    if data is not None and images and masks is None:
        raise click.UsageError("--data with IMAGE says how --masks is read: give it, too", click.get_current_context())
    from ssaseg.cli.explanation.explain import run_explain

    return run_explain(
        checkpoint=checkpoint,
        images=images,
        out=out,
        against=against,
        classes=classes,
        masks=masks,
        data=data,
        root=root,
        split=split or "val",
        limit=limit,
        pictures=pictures,
        device=device,
    )
