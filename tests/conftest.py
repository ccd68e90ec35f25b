"""What must hold before PyTorch is imported by any test."""

import os

# As in ssaseg.cli.main: threads that spin for long make the suite many times slower on a machine that is not idle.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
