"""OpenVINO compiles a graph for a size that comes again and again."""

from pathlib import Path

import pytest
import torch

from ssaseg.cli.weights import openvino_files
from ssaseg.cli.weights.openvino_files import REPEATS, SIZES, SizedRunner, read_graph

pytest.importorskip("openvino")
GRAPHS = Path(__file__).parents[1] / "fixtures" / "graphs"


def test_repeated_sizes_are_compiled_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SizedRunner(read_graph((GRAPHS / "model.onnx").read_bytes()), 1)
    compiled: list[object] = []
    compile_graph = openvino_files.compile_graph
    monkeypatch.setattr(openvino_files, "compile_graph", lambda *given: compiled.append(given) or compile_graph(*given))
    small, large = torch.randn(1, 3, 64, 96), torch.randn(2, 3, 96, 96)
    first = run(small)
    for _ in range(REPEATS - 1):
        run(small)
    assert compiled == []
    torch.testing.assert_close(run(small), first, rtol=1e-4, atol=1e-4)
    assert (run(large).shape[0], len(compiled)) == (2, 1)
    for side in range(SIZES + 1):
        for _ in range(REPEATS + 1):
            run(torch.randn(1, 3, 64, 64 + 8 * side))
    assert len(compiled) == SIZES
