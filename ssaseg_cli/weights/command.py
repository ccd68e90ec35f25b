"""`ssaseg convert`: its arguments and help. PyTorch is imported inside the function, so that `--help` is fast."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import names_of
from ssaseg.cli.options import CLASSIFIERS, network_file


@click.command()
@click.argument("source", type=network_file)
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="NAME",
    shell_complete=names_of("networks", "masks"),
    help="Network of official weights; checkpoints of ssaseg name it.",
)
@click.option("--classifier", type=CLASSIFIERS, help="Classifier of official weights; checkpoints of ssaseg name it.")
@click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=names_of("label_spaces", "recipes"),
    help="Data set with the names of the classes.  [default for 150 classes: ade20k]",
)
@click.option(
    "--classes",
    metavar="NAME|A,B,...",
    shell_complete=names_of("label_spaces", "recipes"),
    help="New classes; weights of classes with the same name are kept.",
)
@click.option("--allow-partial", is_flag=True, help="Accept missing and unexpected keys, and tensors of another shape.")
@click.option("--deploy", is_flag=True, help="Write a small .safetensors: float16, no training-only weights.")
@click.option("--output", type=click.Choice(["logits", "logits-full", "labels"]), help="What exported files return.")
@click.option("--input", type=click.Choice(["normalized", "rgb"]), help="What exported files take as input.")
@click.option("--size", nargs=2, type=click.IntRange(min=32), metavar="H W", help="Fixed input size of exported files.")
@click.option("--verify", metavar="FILE|DIR", help="More images to verify exported files on.")
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
    """Convert official weights to ssaseg's format, or back, or export a model.

    The suffix of DESTINATION decides the format: .safetensors (ssaseg's), .pth (official names), .onnx, .pt2
    (torch.export) or .xml (OpenVINO); without a suffix, or where a folder is, a folder of Hugging Face transformers.
    SOURCE may be such a folder too. Prints which keys matched, were missing, were unexpected or had another shape. An
    exported file has no training-only weights, and accepts any batch size and image size. It is compared with PyTorch
    before it is written.

    \b
    --input normalized    float32 (N,3,H,W), (RGB - mean) / std; the default
            rgb           uint8 (N,3,H,W)
    --output logits       (N,K,h,w); the default
             logits-full  (N,K,H,W)
             labels       uint8 (N,H,W)

    \b
    Example:
      ssaseg convert official.pth ours.safetensors --model seaformer_b --classifier ssa
      ssaseg convert ours.safetensors official.pth
      ssaseg convert segformer-b0-ade-folder ours.safetensors
      ssaseg convert ade20k.pth start.safetensors --classes camvid-seaformer_b-ssa
      ssaseg convert ours.safetensors ours.onnx --input rgb --output labels
      ssaseg convert ours.safetensors small.safetensors --deploy
    """
    from ssaseg.cli.weights.convert import run_convert

    given = {key: value for key, value in form.items() if value is not None}
    return run_convert(
        source=source,
        destination=destination,
        model=model,
        classifier=classifier,
        dataset=dataset,
        allow_partial=allow_partial,
        classes=classes,
        form=given,
        deploy=deploy,
    )
