"""Notes about networks whose work grows with the square of the number of pixels."""

from pathlib import Path

import pytest
from PIL import Image

from ssaseg.cli.scoring.attention import describe_attention, warn_of_attention
from ssaseg.cli.scoring.engines import TorchEngine
from ssaseg.cli.scoring.inference import Inference
from ssaseg.recipes import parse_protocol


@pytest.mark.parametrize("name", ["cgrseg_t", "cgrseg_l"])
def test_cgrseg_says_its_memory(name: str) -> None:
    """6.3 GB were measured for 2048×2048 pixels, weights and other layers included."""
    text = describe_attention(name, 2048**2)
    assert text is not None
    assert f"{name} compares all positions" in text
    assert "about 6.0 GiB here; an input has 4.2 million pixels" in text
    assert describe_attention(name, 512**2) is None


def test_other_networks() -> None:
    text = describe_attention("segformer_b0", 2048**2)
    assert text is not None
    assert "GiB" not in text, "PyTorch's fused attention keeps no matrix"
    for name in ("seaformer_b", "segnext_t", "fcn_r50", "pem_r50", "unknown"):
        assert describe_attention(name, 2048**2) is None


def test_the_largest_input_counts_and_windows_make_it_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "small.png", tmp_path / "large.png", tmp_path / "damaged.png"]
    for file, side in zip(files, (64, 2048, 0), strict=True):
        if side:
            Image.new("L", (side, side)).save(file)
        else:
            file.write_bytes(b"no image")

    def note(**protocol: object) -> str:
        engine: TorchEngine = None  # type: ignore[assignment]  # nothing is computed
        inference = Inference(engine, parse_protocol({"scale": None, **protocol}, "test"), (), ())
        warn_of_attention("cgrseg_b", inference, files, "use windows")
        return capsys.readouterr().err

    assert note().splitlines()[1] == "use windows"
    assert "4.2 million pixels" in note()
    assert note(ratios=[0.25]) == note(mode="slide", crop=[512, 512], stride=[400, 400]) == ""
