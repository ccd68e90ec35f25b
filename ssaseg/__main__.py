"""`python -m ssaseg`, and with it `torchrun … -m ssaseg train …`: the command `ssaseg`."""

from ssaseg.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="ssaseg")
