"""`ssaseg doctor`: its arguments and help. The rest is imported inside the function, so that `--help` is quick."""

import click

from ssaseg.cli.options import device_option, json_option


@click.command()
@json_option
@device_option
def doctor(json_out: str | None, device: str) -> int:
    """Check this installation and this machine, for a bug report.

    Prints versions, processor, memory, GPUs, threads, allocator, folders that can be written, extras, and whether one
    network of each family computes: all of it can be pasted into an issue. Names of users in paths become ~, and no
    names of machines, passwords or addresses are printed. Then each problem, with its fix.

    Takes some seconds. Exit code 0: all is well, perhaps with notes; 1: something is broken.

    \b
    Example:
      ssaseg doctor
      ssaseg doctor --json doctor.json
    """
    from ssaseg.cli.diagnosis.doctor import run_doctor

    return run_doctor(json_out=json_out, device=device)
