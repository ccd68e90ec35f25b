"""Quick imports: without garbage collection, which would scan PyTorch's objects again and again."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside this context nothing is collected; what exists at its end is left out of later collections, too.

    While modules are imported, hundreds of thousands of objects are made, and all of them stay: each full collection
    scans them in vain. That is a fifth of the time of `import torch` and of our modules. Where PyTorch is imported
    already, nothing changes: what exists then may be garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
