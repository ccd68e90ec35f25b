"""Quick imports: no collection while modules are imported, and all as before afterwards."""

import gc
import sys

import pytest

from ssaseg.cli.importing import quick_imports


def test_nothing_is_collected_while_pytorch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", sys)
    with quick_imports():
        assert gc.isenabled(), "PyTorch is here already"
    assert gc.get_freeze_count() == frozen
    monkeypatch.delitem(sys.modules, "torch")
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
