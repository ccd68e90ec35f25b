"""A short run of the fuzzer, always the same inputs; `make fuzz` runs longer, on others. Figures: docs/security.md."""

import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS
from fuzzing import Target, attempt, fuzz

SEED = 12
# Inputs of each kind: seconds of work on one core.
COUNTS = {"images": 200, "masks": 200, "bands": 100, "recipes": 60, "annotations": 150, "outlines": 60, "commands": 100,
          "checkpoints": 40, "pickles": 150, "states": 80}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_every_input_ends_in_a_result_or_in_one_short_error(kind: str, tmp_path: Path) -> None:
    report = fuzz(kind, SEED, COUNTS[kind], 120, tmp_path)
    assert report["failures"] == []
    assert sum(report["found"].values()) == COUNTS[kind]
    assert len(report["found"]) > 1, "all inputs ended alike: they were not changed, or never read"


def raising(error: Exception) -> Target:
    def read(_: bytes) -> None:
        raise error

    return Target(b"", lambda _: b"", read, Path("nothing"))


def test_the_fuzzer_sees_what_is_wrong(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    assert attempt(raising(OSError(2, "No such file", "x")), b"") == ("FileNotFoundError", "")
    outcome, wrong = attempt(raising(TypeError("a bug")), b"")
    assert outcome == "TypeError"
    assert "a bug" in wrong
    (tmp_path / "marker").touch()
    assert attempt(Target(b"", lambda _: b"", len, tmp_path / "marker"), b"")[0] == "code was run"


def test_inputs_depend_only_on_the_seed(tmp_path: Path) -> None:
    target = TARGETS["images"](tmp_path)
    first, same, other = (target.make(random.Random(f"images {seed}")) for seed in (1, 1, 2))
    assert first == same != other
