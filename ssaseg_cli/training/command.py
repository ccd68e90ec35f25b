"""`ssaseg train`: its arguments and help. PyTorch is imported inside the function, so that `--help` is fast."""

import shlex
from pathlib import Path
from typing import Any

import click

from ssaseg.cli.completion import complete_overrides, names_of
from ssaseg.cli.errors import CommandError
from ssaseg.cli.options import device_option, gpus_option, refuse_options
from ssaseg.cli.printing import echo
from ssaseg.cli.ranks.launcher import needs_ranks, run_launch


def _facts(name: str, classifier: str) -> Any:
    """`ssaseg.models.facts`, imported only for a recipe whose keys depend on it."""
    from ssaseg.models import facts

    return facts(name, classifier)


def _run_folder(recipe: str) -> Path | None:
    """The folder, where the folder of a run is given in the place of a recipe."""
    from ssaseg.recipes import recipe_file

    file = recipe_file(recipe)
    return file.parent if file.name == "config.yaml" and file.parent == Path(recipe).expanduser() else None


@click.command()
@click.argument("recipe", shell_complete=names_of("recipes", files=True))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1, shell_complete=complete_overrides)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Run folder.  [default: runs/RECIPE]")
@click.option("--resume", is_flag=True, help="Continue the run in its folder, exactly where it stopped.")
@device_option
@click.option(
    "--check",
    type=click.Choice(["sample", "all"]),
    default="sample",
    show_default=True,
    help="Which image/mask pairs to check before step 0.",
)
@gpus_option
@click.option(
    "--max-hours",
    type=click.FloatRange(min=0, min_open=True),
    metavar="H",
    help="Save and stop after H hours, with exit code 1 (0 under torchrun).",
)
@click.option(
    "--track", type=click.Choice(["tensorboard", "wandb"]), multiple=True, help="Also log to this tracker; repeatable."
)
@click.option("--verbose", is_flag=True, help="Print the terms of the loss; metrics.jsonl always has them.")
@click.option(
    "--dry-run", is_flag=True, help="Build everything, run four steps, print memory and time; write no files."
)
@click.option("--print-config", is_flag=True, help="Print the recipe with all its keys, and exit.")
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
    verbose: bool,
    dry_run: bool,
    print_config: bool,
) -> int:
    """Train the network of a recipe.

    RECIPE is the name of a recipe of ssaseg (`ssaseg recipes list`) or a YAML file, or with --resume the folder of a
    run. KEY=VALUE changes one of its keys.

    \b
    Example:
      ssaseg train demo
      ssaseg train my.yaml optim.lr=1e-4 train.micro_batch=8 --out runs/small-lr
      ssaseg train runs/small-lr --resume
    """
    refuse_options(overrides)
    from ssaseg.recipes import load_recipe

    if (folder := _run_folder(recipe)) is not None:
        if not (resume or print_config or dry_run):
            given = shlex.quote(recipe)
            raise CommandError(
                f"{recipe}: the folder of a run\nto continue it: ssaseg train {given} --resume\n"
                f"to start another run with its recipe: ssaseg train {given}/config.yaml --out FOLDER"
            )
        out = out or folder
    resolved = load_recipe(recipe, overrides, _facts)
    if print_config:
        from ssaseg.cli.data.config_text import config_text

        echo(config_text(resolved), nl=False)
        return 0
    if needs_ranks(gpus):
        return run_launch(gpus or 1)
    from ssaseg.cli.training.loop import run_train

    out = out or Path("runs") / resolved.name
    return run_train(
        recipe=resolved,
        out=out,
        resume=resume,
        device=device,
        dry_run=dry_run,
        check=check,
        max_hours=max_hours,
        track=track,
        verbose=verbose,
    )
