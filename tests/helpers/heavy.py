"""python heavy.py NAMES: prints those of the modules that are imported by what should be quick, in three lines: by
every `--help`, `--version`, `recipes keys` and an error; then also by `recipes list` and what `compare` needs; and by
`import ssaseg` alone, before these.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module

import click

import ssaseg  # noqa: F401

FIRST = [name for name in sys.argv[1:] if name in sys.modules]

from ssaseg.cli.main import cli  # noqa: E402


def call(*words: str) -> None:
    with suppress(SystemExit), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        cli(words)
    assert out.getvalue() or words == ("tarin",), words


def help_of(group: click.Group, *above: str) -> None:
    call(*above, "--help")
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            help_of(command, *above, name)
        else:
            call(*above, name, "--help")


def imported() -> list[str]:
    return [name for name in sys.argv[1:] if name in sys.modules]


help_of(cli)
call("--version")
call("tarin")
call("recipes", "keys")
call("recipes", "keys", "model")
quick = imported()
call("recipes", "list")
import_module("ssaseg.cli.comparison.compare")
print(quick, imported(), FIRST, sep="\n")
