"""The commands of `ssaseg data`: for each a signature, a docstring with an example, and one call."""

import shlex
from pathlib import Path

import click

from ssaseg.cli.completion import complete_overrides, names_of
from ssaseg.cli.help_tables import help_tables
from ssaseg.cli.options import CLASSIFIERS, device_option, json_option, network_file, refuse_options
from ssaseg.cli.printing import echo


@click.group()
def data() -> None:
    """Prepare, check and describe data sets.

    \b
    Example:
      ssaseg data init photos --out photos.yaml
      ssaseg data check photos.yaml
    """


@data.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", default=16, show_default=True, help="Number of scenes."
)
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True)
@click.option(
    "--size",
    nargs=2,
    type=click.IntRange(min=64),
    metavar="H W",
    default=(160, 160),
    help="Height and width [pixels].  [default: 160 160]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same as data.synthetic.seed."
)
@click.option(
    "--layout",
    type=click.Choice(["folder", "ade20k", "pascal_context", "coco"]),
    default="folder",
    show_default=True,
    help="Layout of folders and labels.",
)
def export(out: Path, count: int, split: str, size: tuple[int, int], seed: int, layout: str) -> None:
    """Write built-in scenes as files.

    Images are written to OUT/images/SPLIT and masks to OUT/annotations/SPLIT: a recipe with data.dataset folder reads
    this layout. The same seed, split and size give the same scenes as in training. With another --layout, images are
    JPEG files, and folders and labels are those of that data set: use it to test its reader, or another program.

    \b
    Example:
      ssaseg data export scenes --count 20
      ssaseg data export scenes-coco --layout coco --split train
    """
    from ssaseg.datasets.exporting import EXPORTS, export_scenes

    images = export_scenes(out, count, split=split, height=size[0], width=size[1], seed=seed, layout=layout)
    labels = out / EXPORTS[layout].masks[split]
    echo(f"wrote {len(images)} scenes to {images[0].parent} and their labels to {labels}")
    echo(f"look at them with: ssaseg data check {shlex.quote(str(out))}")


class _WithKinds(click.Command):
    """Its help ends with the conventions of annotation tools."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Own data: KIND and content of SOURCE"):
            formatter.write_dl(list(help_tables()["conventions"].items()))


@data.command(cls=_WithKinds)
@click.argument("kind", shell_complete=names_of("conventions", "datasets"))
@click.option(
    "--source",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the unpacked download, or of your own data.",
)
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to; required for own data.  [default: SOURCE, or VOC2010 in it]",
)
@click.option(
    "--table",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Own data: class names, and colours where masks have colours, such as lines of name,r,g,b.",
)
@click.option("--background", metavar="NAME", help="Own data: class of the pixels that no annotation covers.")
@click.option(
    "--workers", type=click.IntRange(min=0), metavar="N", help="Number of processes.  [default: one per core]"
)
def prepare(
    kind: str, source: Path, root: Path | None, table: Path | None, background: str | None, workers: int | None
) -> int:
    """Convert a published data set, or what annotation tools write, to masks that recipes read.

    No file in SOURCE is changed. Images become hard links if the disk allows it, otherwise copies. The command can be
    stopped at any time; it continues when it is run again.

    Published data sets: at the end prints the number of files on disk and the published number: exit code 1 where they
    differ. Own data: `ssaseg data init SOURCE` prints the command for a folder. Writes ROOT/images, ROOT/masks (class
    ids, one byte a pixel) and ROOT/class_dict.csv (names and colours); then `ssaseg data init ROOT` writes the recipe.

    \b
    Example:
      ssaseg data prepare coco_stuff10k --source ~/Downloads/cocostuff --root data/coco_stuff10k
      ssaseg data prepare colours --source cvat-export --root data/streets

    \b
    KIND                    content of SOURCE
    coco_stuff10k           images/, annotations/*.mat, imageLists/ (cocostuff-10k-v1.1.zip; needs ssaseg[mat])
    coco_stuff164k          train2017/, val2017/, stuffthingmaps/ (unpack stuffthingmaps_trainval2017.zip in it)
    pascal_context_59, _60  JPEGImages/ (VOC 2010's trainval) and trainval_merged.json
    cityscapes              leftImg8bit/, gtFine/ (leftImg8bit_ and gtFine_trainvaltest.zip)
    camvid                  SegNet's files: train/, trainannot/, val/, valannot/
    ade20k, voc2012, camvid need no preparation: their files are only counted
    """
    from ssaseg.cli.data.prepare import run_prepare
    from ssaseg.datasets.conventions.base import Options

    return run_prepare(name=kind, source=source, root=root, workers=workers, options=Options(table, background))


@data.command()
@click.argument("target", metavar="RECIPE|ROOT", shell_complete=names_of("recipes", files=True))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1, shell_complete=complete_overrides)
@click.option("--split", type=click.Choice(["train", "val"]), help="Check only this split.  [default: both]")
@json_option
def check(target: str, overrides: tuple[str, ...], split: str | None, json_out: str | None) -> int:
    """Read a whole data set and report what is wrong with it.

    ROOT is a folder: with a recipe in it, of a published data set, or of images and masks as `init` finds them. The
    command reports incomplete and damaged pairs, masks that differ in size from their image, masks in colours, ids out
    of range, signs of a wrong reduce_zero_label, and the pixels of each class. It does not change the data. Exit code
    0: no problems, 1: warnings, 2: errors.

    \b
    Example:
      ssaseg data check my.yaml
      ssaseg data check ade20k-seaformer_b-ssa data.root=/data/ADEChallengeData2016 --split val
      ssaseg data check photos --json report.json
    """
    refuse_options(overrides)
    from ssaseg.cli.data.check import run_check

    return run_check(target=target, overrides=overrides, split=split, json_out=json_out)


@data.command()
@click.argument("root", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE.yaml",
    type=click.Path(path_type=Path),
    help="Recipe to write.  [default: name of DIR, in the current folder]",
)
@click.option(
    "--model",
    metavar="NAME",
    shell_complete=names_of("networks"),
    help="Network to train.  [default: one that fits this machine]",
)
@click.option("--classifier", type=CLASSIFIERS, default="ssa", show_default=True)
@click.option("--images", metavar="FOLDER", help="Folder of the images, below DIR.  [default: chosen by the names]")
@click.option(
    "--masks",
    metavar="FOLDER|ENDING",
    help="Folder of the masks, below DIR, or the ending of their names, such as _mask.png.  [default: as for --images]",
)
def init(
    root: Path, out: Path | None, model: str | None, classifier: str, images: str | None, masks: str | None
) -> int:
    """Write a recipe for your own images and masks.

    DIR holds images, and for each image a mask of class ids: in folders such as images and masks, with or without train
    and val in them, side by side as X.jpg and X_mask.png, or in lists of pairs. The recipe says what was found and what
    was guessed. If there are no splits, a fifth of the pairs is used for validation; lists of names are then written
    beside the recipe. So are lists of pairs where one pair of folders does not hold all.

    Network, batch, precision and number of steps fit this machine: its GPU, or the cores of its CPU, on which two short
    steps are measured.

    \b
    Example:
      ssaseg data init photos --out photos.yaml
      ssaseg train photos.yaml
    """
    from ssaseg.cli.data.init import run_init

    return run_init(root=root, out=out, model=model, classifier=classifier, images=images, masks=masks)


@data.command()
@click.argument("checkpoint", type=network_file)
@click.argument("recipe", required=False)
@click.option("--root", type=click.Path(path_type=Path), help="Folder of the data, in place of data.root.")
@click.option("--split", type=click.Choice(["train", "val"]), default="val", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("suspects"),
    show_default=True,
    help="Folder of the results; it must have no earlier results.",
)
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", default=20, show_default=True, help="Images in the picture."
)
@json_option
@device_option
def suspects(
    checkpoint: Path,
    recipe: str | None,
    root: Path | None,
    split: str,
    out: Path,
    count: int,
    json_out: str | None,
    device: str,
) -> int:
    """Rank images whose labels a network contradicts with confidence: their labels may be wrong.

    Writes OUT/suspects.csv with all images, the most suspicious first: the class of the label, the predicted class, and
    for the first N the box of the largest such region; and OUT/suspects.png with these N images. Contradictions that
    the network makes often, such as sidewalk for road, count little. RECIPE: of the data.  [default: the checkpoint's]

    \b
    Example:
      ssaseg data suspects best.safetensors --split train --out suspects
      ssaseg data suspects best.safetensors camvid-seaformer_s-ssa --root data/camvid
    """
    from ssaseg.cli.curation.suspects import run_suspects

    return run_suspects(
        checkpoint=checkpoint,
        data=recipe,
        root=root,
        split=split,
        out=out,
        count=count,
        json_out=json_out,
        device=device,
    )


@data.command()
@click.argument("checkpoint", type=network_file)
@click.argument("images", metavar="INPUT...", nargs=-1, required=True)
@click.option("--count", type=click.IntRange(min=1), metavar="N", required=True, help="How many images to choose.")
@click.option("--labelled", metavar="RECIPE", help="Recipe whose training images have labels already.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="List to write.  [default: print it]")
@json_option
@device_option
def pick(
    checkpoint: Path,
    images: tuple[str, ...],
    count: int,
    labelled: str | None,
    out: Path | None,
    json_out: str | None,
    device: str,
) -> int:
    """Choose which unlabelled images to label next.

    INPUT: images, folders or patterns, as for `ssaseg predict`. The images of which the network is most unsure are
    chosen, but not such that resemble images chosen before, or those of --labelled. The first are the most useful.

    \b
    Example:
      ssaseg data pick best.safetensors photos --count 100 --labelled my.yaml --out label_these.txt
    """
    from ssaseg.cli.curation.pick import run_pick

    return run_pick(
        checkpoint=checkpoint,
        images=images,
        count=count,
        out=out,
        labelled=labelled,
        json_out=json_out,
        device=device,
    )
