"""`ssaseg convert` in the process of the test."""

from pathlib import Path

from click.testing import CliRunner, Result

from ssaseg.cli.main import cli


def convert(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, words)])


def done(*words: str | Path) -> str:
    """The output of a conversion that must succeed whole."""
    result = convert(*words)
    assert result.exit_code == 0, result.output
    return result.output
