"""python heavy.py NAMES: prints those of the modules that the command line has imported before it is called."""

import sys

import ssaseg.cli.main  # noqa: F401

print([name for name in sys.argv[1:] if name in sys.modules])
