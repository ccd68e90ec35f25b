"""`ssaseg convert`: the signature. PyTorch is imported inside, so that `--help` answers at once."""

from pathlib import Path
from typing import Any

import click

from ssaseg.cli.options import CLASSIFIERS, existing_file


@click.command()
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
