"""Shell completion: names of recipes, networks, keys and their values, without anything that is slow to import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete, ShellComplete, get_completion_class
from places import PROJECT

from ssaseg.cli.completion import recipe_keys
from ssaseg.cli.main import cli
from ssaseg.cli.recipe_keys import read_schema
from ssaseg.cli.weights.known import KNOWN
from ssaseg.models import list_mask_models, list_models
from ssaseg.recipes import list_recipes


def complete(*words: str) -> list[str]:
    """What is offered for the last word; a file stands for all files."""
    items = ShellComplete(cli, {}, "ssaseg", "_SSASEG_COMPLETE").get_completions([*words[:-1]], words[-1])
    return [f"<{item.type}>" if item.type != "plain" else item.value for item in items]


@pytest.mark.parametrize("words", ["train", "recipes show", "recipes copy", "data check", "eval x --data"])
def test_recipes(words: str) -> None:
    assert complete(*words.split(), "") == ["<file>", *list_recipes()]
    assert complete(*words.split(), "camvid-seaformer_b-s") == ["<file>", "camvid-seaformer_b-ssa"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("profile", ["<file>", *list_models(), *list_mask_models()]),
        ("convert a.pth b.safetensors --model", [*list_models(), *list_mask_models()]),
        ("data init photos --model", list_models()),
        ("weights list", list_models()),
        ("weights fetch", list(KNOWN)),
        ("weights fetch mscan_t", list(KNOWN)),
        ("weights path", list(KNOWN)),
    ],
)
def test_networks_and_weights(words: str, offered: list[str]) -> None:
    assert complete(*words.split(), "") == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("data prepare cv", ["cvat"]),
        ("data prepare coco_stuff", ["coco_stuff10k", "coco_stuff164k"]),
        ("convert a.pth b.pth --dataset ade", ["ade20k", *[name for name in list_recipes() if name[:3] == "ade"]]),
        ("predict x y --save index,o", ["index,overlay"]),
        (
            "recipes keys optim.rules",
            ["optim.rules", "optim.rules.NAME.lr", "optim.rules.NAME.decay", "optim.rules.NAME"],
        ),
        ("recipes keys train.batch", ["train.batch"]),
    ],
)
def test_other_names(words: str, offered: list[str]) -> None:
    assert sorted(complete(*words.split())) == sorted(offered)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train.s", ["train.steps=", "train.seed=", "train.save_every="]),
        ("data.val.m", ["data.val.masks=", "data.val.masks=null"]),  # no space after the "=", as there are two
        ("model.classif", ["model.classifier=", *(f"model.classifier={name}" for name in
                                                  ("ssa", "cac", "dnc", "gmmseg", "linear", "protoseg"))]),
        ("optim.lr", ["optim.lr=", "optim.lr=..."]),
        ("train.amp=b", ["train.amp=bf16"]),
        ("train.deterministic=", ["train.deterministic=false", "train.deterministic=true"]),
        ("loss.weights.sp", ["loss.weights.spatial=", "loss.weights.spatial=0.4"]),
        ("train.nothing=", []),
    ],
)  # fmt: skip
def test_keys_and_their_values(typed: str, offered: list[str]) -> None:
    for words in (["train", "demo"], ["train", "demo", "optim.power=1"], ["data", "check", "demo"]):
        assert complete(*words, typed) == offered


def test_bash_takes_an_equals_sign_for_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_bash(*words: str) -> str:
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        return BashComplete(cli, {}, "ssaseg", "_SSASEG_COMPLETE").complete()

    assert in_bash("ssaseg", "train", "demo", "train.amp", "=") == "plain,off\nplain,bf16\nplain,fp16"
    assert in_bash("ssaseg", "train", "demo", "train.amp", "=", "b") == "plain,bf16"
    assert in_bash("ssaseg", "train", "demo", "train.amp", "=", "off", "train.am").startswith("plain,train.amp=")


def test_every_plain_key_is_offered() -> None:
    plain = {key.name for group in read_schema() for key in group.keys if not key.section and ".NAME." not in key.name}
    assert plain <= set(recipe_keys())
    added = set(recipe_keys()) - plain
    assert {name.rpartition(".")[0] for name in added} == {"data.val", "loss.weights", "model.options"}


def test_completion_is_quick() -> None:
    """It imports nothing that takes long."""
    code = "import sys, click.shell_completion as c; from ssaseg.cli.main import cli; \
complete = c.ShellComplete(cli, {}, 'ssaseg', '').get_completions; \
print(len(complete(['train'], '')), len(complete(['train', 'demo'], '')), len(complete(['profile'], '')), \
{'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & set(sys.modules))"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path.home()).split()
    assert min(map(int, printed[:3])) > 20
    assert printed[3:] == ["set()"]


def test_the_page_names_what_click_reads() -> None:
    """Each line of docs/completion.md, as click would take it: `_SSASEG_COMPLETE=bash_source ssaseg`."""
    page = (PROJECT / "docs" / "completion.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(\w+)=(\w+)_source ssaseg", page))
    assert named == {("_SSASEG_COMPLETE", shell) for shell in ("bash", "zsh", "fish")}
    for _, shell in named:
        assert get_completion_class(shell) is not None
