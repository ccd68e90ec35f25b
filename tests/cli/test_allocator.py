"""glibc's allocator keeps the memory of a tensor for the next one, unless the user turns this off."""

import os
import platform
import subprocess
import sys

import pytest

# Prints whether it is calm, and how many pages were cleared for four arrays of 32 MiB, each freed before the next.
CODE = """
import resource
import numpy as np
from ssaseg.cli.device import calm_allocator
calm = calm_allocator()
np.ones(2**25, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(2**25, np.uint8)
print(calm, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these parameters")
@pytest.mark.parametrize(("value", "calm"), [(None, True), ("calm", True), ("system", False)])
def test_freed_memory_is_kept(value: str | None, calm: bool) -> None:
    environment = {key: word for key, word in os.environ.items() if key != "SSASEG_ALLOCATOR"}
    environment |= {} if value is None else {"SSASEG_ALLOCATOR": value}
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=True)
    said, faults = result.stdout.split()
    assert said == str(calm)
    assert (int(faults) < 50) == calm, "32 MiB have 8,192 pages, or 16 large ones"
