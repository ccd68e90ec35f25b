"""`ssaseg`: the table of commands. A command is imported when it is called, so that every `--help` is quick."""

from importlib import import_module

import click

from ssaseg.cli.console import fit_lines
from ssaseg.cli.errors import CommandGroup

# Name -> the module and the function that declare the command. These modules import nothing that is slow to import.
COMMANDS = {
    "train": ("ssaseg.cli.training.command", "train"),
    "eval": ("ssaseg.cli.evaluation.command", "evaluate"),
    "predict": ("ssaseg.cli.prediction.command", "predict"),
    "serve": ("ssaseg.cli.serving.command", "serve"),
    "video": ("ssaseg.cli.video.command", "video"),
    "explain": ("ssaseg.cli.explanation.command", "explain"),
    "profile": ("ssaseg.cli.profiling.command", "profile"),
    "quantize": ("ssaseg.cli.quantization.command", "quantize"),
    "convert": ("ssaseg.cli.weights.command", "convert"),
    "weights": ("ssaseg.cli.weights.fetch_commands", "weights"),
    "merge": ("ssaseg.cli.merging.command", "merge"),
    "compare": ("ssaseg.cli.comparison.command", "compare"),
    "doctor": ("ssaseg.cli.diagnosis.command", "doctor"),
    "data": ("ssaseg.cli.data.commands", "data"),
    "recipes": ("ssaseg.cli.recipes", "recipes"),
}


class Formatter(click.HelpFormatter):
    """Breaks the lines of examples and lists too, where the terminal is narrower than they are."""

    def write_text(self, text: str) -> None:
        """Writes a text of several paragraphs."""
        before = len(self.buffer)
        super().write_text(text)
        self.buffer[before:] = [fit_lines("".join(self.buffer[before:]), self.width)]


class Context(click.Context):
    """What all commands are called with."""

    formatter_class = Formatter


class Commands(CommandGroup):
    """The group of all `COMMANDS`; imports a command when it is needed."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which the help lists them."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), function)
        for each in (command, *getattr(command, "commands", {}).values()):
            each.context_class = Context
            each.short_help = " ".join((each.help or "").partition("\n\n")[0].split())  # in full: click's is cut
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ssaseg", prog_name="ssaseg")
def cli() -> None:
    """Light semantic segmentation with the SSA classifier: train, evaluate, predict, measure, convert.

    \b
    Example:
      ssaseg train demo --out runs/demo
      ssaseg predict runs/demo/best.safetensors photos --out labels --save index,overlay

    Exit codes: 0 done; 1 partly done; 2 wrong input; 3 numerical failure; 130 Ctrl-C; 143 SIGTERM.
    Set SSASEG_DEBUG=1 to see the traceback of an error.
    """
