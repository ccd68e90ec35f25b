"""The model card beside `best.safetensors`: what it says, and that names in it are no Markdown or HTML."""

import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from ssaseg.cli.model_card import Card, card_text, plain
from ssaseg.cli.scoring.metrics import Confusion, Interval
from ssaseg.cli.training import pictures
from ssaseg.cli.training.log import hours_of
from ssaseg.recipes import Recipe, load_recipe

SUM = "0123456789abcdef" * 4
NASTY = [
    "<img src=x onerror=alert(1)>", "a|b", "a\\|b", "`rm -rf`", "[x](javascript:alert(1))", "**bold** _x_ ~~y~~",
    "&lt;", "traffic_light", "_init_", "# head", "$x^2$", "![i](u)", "\\", "a\\", "<!--",
]  # fmt: skip


def card(recipe: Recipe | None = None, **changes: Any) -> str:
    facts: dict[str, Any] = {
        "step": 40,
        "classes": ["sky", "road"],
        "ious": [81.254, float("nan")],
        "pixels": [300, 100],
        "means": {"mIoU": 81.254, "aAcc": 90.0, "mAcc": float("nan")},
        "interval": Interval(70.0, 88.888, 95.0, 1000, 0),
        "statement": "val split, 3 images, whole image",
        "data": {"train": {"images": 8, "names": SUM, "content": SUM}},
        "environment": {"ssaseg": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "threads": 2, "ranks": 1, "gpu": None,
                        "command": ["ssaseg", "train", "my recipe.yaml"], "host": "secret-host"},
        "time": "2026-01-02",
        "hours": 1.5,
    }  # fmt: skip
    return card_text(recipe or load_recipe("demo"), Card(**(facts | changes)))


def test_what_it_says() -> None:
    text = card(load_recipe("demo", ["train.seed=7", "train.batch=4", "optim.ema=0.99"]))
    for part in (
        "mIoU 81.25 % (95 % interval over images: 70.00 to 88.89 %), aAcc 90.00 %, mAcc – %.",
        "| 0 | sky | 81.25 | 75.00 |\n| 1 | road | – | 25.00 |\n",
        "| train | 8 | `0123456789abcdef` | `0123456789abcdef` |",
        "images, seed 7, precision off, moving average of the weights 0.99",
        "hours of training and evaluation: 1.50",
        "ssaseg 0.1.0, torch 2.13.0, python 3.11.7",
        "\nssaseg train 'my recipe.yaml'\n",
        "val split, 3 images, whole image",
        "these weights: not stated",
        "CPU, threads: 2; processes: 1",
    ):
        assert part in text
    assert "secret-host" not in text
    assert "hours of training and evaluation: not known" in card(hours=None)
    assert "interval" not in card(interval=None)


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("swin_t", "swin_t, MIT (not verified), trained on ImageNet-1K"),
        ("/home/me/own.pth", "own.pth, licence not stated"),
    ],
)
def test_licence_of_the_weights_that_it_started_from(start: str, line: str) -> None:
    text = card(load_recipe("demo", [f"model.pretrained={start}"]))
    assert f"- weights that the training started from: {line}\n" in text
    assert "/home/me" not in text
    assert "started from" not in card()


def test_names_are_shown_as_they_are() -> None:
    """By a renderer of Markdown: of each name the same text, and of all of them no element."""
    text = card(classes=NASTY, ious=[1.0] * len(NASTY), pixels=[1] * len(NASTY))
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    rows = re.findall(r"<tr>\s*<td>\d+</td>\s*<td>(.*?)</td>\s*<td>1.00</td>", page)
    assert [html.unescape(cell) for cell in rows] == NASTY
    assert not re.search(r"<(?:img|a|em|strong|s|code|h\d)\b", "".join(rows))
    # GitHub makes links and mentions of these without any mark around them.
    assert "://" not in plain("http://x")
    assert "@" not in plain("@team")
    assert "www." not in plain("www.x.org")
    assert plain("a\x1b[2J\n\u202eb") == r"a\\x1b\[2J\\x0a\\u202eb"
    assert len(plain("x" * 5000)) == 200


def test_a_command_cannot_end_its_block() -> None:
    command = ["ssaseg", "train", "x.yaml", "name=````\n# head"]
    text = card(environment={"command": command})
    page = MarkdownIt("commonmark").render(text)
    assert r"name=````\x0a# head" in html.unescape(page)
    assert "<h1>head" not in page


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    confusion = Confusion(2)
    confusion.update(np.array([[0, 1]]), np.array([[0, 1]]))
    job: Any = SimpleNamespace(folder=tmp_path / "gone", progress=SimpleNamespace(step=1, scores={}))
    pictures.write_card(job, confusion)
    assert "warning: best.md could not be written (" in capsys.readouterr().err


def test_hours() -> None:
    records = [{"step": 10, "loss": 1.0, "images_per_s": 8}, {"step": 10, "mIoU": 1.0, "eval_seconds": 5},
               {"step": 30, "loss": 1.0, "images_per_s": 16}]  # fmt: skip
    assert hours_of(records, 16) == pytest.approx((10 * 16 / 8 + 5 + 20 * 16 / 16) / 3600)
    assert hours_of(records, None) is None
    assert hours_of([], 16) is None
