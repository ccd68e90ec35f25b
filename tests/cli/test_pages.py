"""README.md and docs/: every command of every page, the generated tables, and the messages that a page explains.

Every command is parsed by the program itself, without its work: options and their values, names of recipes and their
keys, weights, networks, extras, files of benchmarks and targets of the Makefile. Only files need not exist. The
commands in `REALLY_RUN` and those of `test_from_photos_to_labels` also run, on small data, exactly as the pages have
them. That the others do what the pages say is tested beside each command.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import owndata
import pytest
import yaml
from calling import call
from networks import tiny_networks
from places import PROJECT
from predicting import picture, save_checkpoint, write

from ssaseg.cli.main import cli
from ssaseg.models import build_model, list_mask_models, list_models
from ssaseg.models.segmenter import is_below
from ssaseg.recipes import list_recipes, load_recipe

PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *sorted(f"docs/{f.name}" for f in PROJECT.glob("docs/*.md"))]
PROGRAMS = ("ssaseg", "pip", "python", "python3", "make", "torchrun", "source")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Run as they stand, in a folder with the weights that are shipped and two photos.
REALLY_RUN = [
    "ssaseg recipes list",
    "ssaseg recipes show camvid-seaformer_b-ssa",
    "ssaseg recipes copy camvid-seaformer_b-ssa my.yaml",
    "ssaseg recipes keys optim",
    "ssaseg train camvid-seaformer_b-ssa --print-config",
    "ssaseg weights list segnext_t",
    "ssaseg data export scenes --count 8",
    "ssaseg predict benchmarks/weights/camvid-lite0-ssa.safetensors photos --out labels --save index,overlay",
]


def read(page: str) -> str:
    return (PROJECT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The commands in the blocks of a page, each on one line. Blocks that do not start with a program are data."""
    found = []
    for language, block in BLOCK.findall(read(page)):
        lines = block.replace("\\\n", " ").splitlines()
        if language in ("", "bash") and lines[0].split()[0].rpartition("/")[2] in PROGRAMS:
            found += [" ".join(line.split()) for line in lines if line and not line.startswith("#")]
    return found


def inline(page: str) -> list[str]:
    """Commands of `ssaseg` between backticks, without those that are cut off."""
    text = BLOCK.sub("", read(page)).replace("\n", " ")
    spans = [" ".join(span.split()) for span in re.findall(r"`(ssaseg [^`]+)`", text)]
    return [span for span in spans if not re.search(r"\.\.\.|…|\[", span)]


def parse(words: list[str]) -> click.Context:
    """The context of a command of `ssaseg` with all values, as it is just before the command's work."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    return command.make_context(command.name, words, parent=context)


def check(line: str, place: Path) -> None:
    """Fails unless the line is a command that could be run. `place`: has the file my.yaml of the page on images."""
    words = shlex.split(line, comments=True)
    program = words[0].rpartition("/")[2]
    if program == "torchrun":
        words = ["ssaseg", *words[words.index("ssaseg") + 1 :]]
    elif program == "make":
        targets = re.findall(r"^(\w+):", read("Makefile"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), line
    elif program == "pip":
        extras = read("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert all(f"\n{name} = " in extras for name in extra.split(",")), line
    elif program.startswith("python"):
        assert words[1] in ("-m", "-c") or (PROJECT / words[1]).exists(), line
    if words[0] == "ssaseg" and words[1:] != ["--version"]:
        check_values(parse(words[1:]), place)


def check_values(context: click.Context, place: Path) -> None:
    """Names that only the work of a command would look up."""
    given = context.params
    overrides = given.get("overrides", ())
    for key in ("recipe", "data", "name", "target"):
        value = given.get(key)
        if isinstance(value, str) and context.parent is not None and context.parent.info_name != "weights":
            stem = Path(value).stem
            if value.endswith(".yaml"):
                load_recipe(str(place / "my.yaml"), overrides)
            elif "-" in stem or key == "recipe":
                assert value in list_recipes(), value
                load_recipe(value, overrides)
    if given.get("model"):
        assert given["model"] in [*list_models(), *list_mask_models()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe of the page on own images as my.yaml."""
    folder = tmp_path_factory.mktemp("pages")
    (recipe,) = [block for _, block in BLOCK.findall(read("docs/images.md")) if block.startswith("# my.yaml")]
    (folder / "my.yaml").write_text(recipe)
    return folder


@pytest.fixture
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a command names need not exist."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, parameter, context: Path(value))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("any_path")
def test_every_command_of_a_page_is_one(page: str, place: Path) -> None:
    for line in commands(page):
        check(line, place)


@pytest.mark.usefixtures("any_path")
def test_commands_in_the_text(place: Path) -> None:
    lines = {line for page in PAGES for line in inline(page)}
    assert len(lines) > 30
    for line in sorted(lines):
        words = shlex.split(line)[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, line
            command, words = found, words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_command_has_its_page() -> None:
    pages = " ".join(line for page in PAGES for line in commands(page))
    for name in cli.list_commands(click.Context(cli)):
        assert f"ssaseg {name} " in pages, name
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", read("README.md")))
    assert len(read("README.md").splitlines()) <= 120
    (shown,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read("README.md"))
    assert (PROJECT / shown).stat().st_size < 200_000


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize(
    "line", ["ssaseg train nothing", "ssaseg eval x --flop", "ssaseg train my.yaml optim.rate=1", "ssaseg mend x"]
)
def test_a_wrong_command_is_seen(line: str, place: Path) -> None:
    with pytest.raises((AssertionError, click.ClickException, ValueError)):
        check(line, place)


@pytest.mark.parametrize("page", PAGES)
def test_yaml_of_a_page_has_keys_of_recipes(page: str) -> None:
    def keys(section: dict, above: str) -> Iterator[str]:
        for key, value in section.items():
            yield above + key
            if isinstance(value, dict) and key not in ("rules", "raw_to_train", "weights", "options"):
                yield from keys(value, f"{above}{key}.")

    known = set(re.findall(r"^- `([\w.]+)`:", read("docs/recipe.md"), flags=re.MULTILINE)) | {"extends"}
    known |= {key.replace("data.train.", "data.val.") for key in known}
    for language, block in BLOCK.findall(read(page)):
        if language == "yaml":
            assert set(keys(yaml.safe_load(block), "")) <= known, page


def test_commands_that_really_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.partition(" #")[0] for page in PAGES for line in commands(page)]
    assert set(REALLY_RUN) <= set(lines)
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "photos" / name)
    (tmp_path / "benchmarks").symlink_to(PROJECT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    for line in REALLY_RUN:
        result = call(*shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)
    assert [file.name for file in sorted((tmp_path / "labels").glob("*/*.*"))] == ["a.png", "b.png", "a.jpg", "b.jpg"]
    assert len(list((tmp_path / "scenes/images").rglob("*.png"))) == 8


def test_from_photos_to_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of docs/images.md. Of the training, whose first step is in test_own_whole_way.py, only the recipe
    is read; the checkpoint that it would write is there.
    """
    lines = [shlex.split(line, comments=True)[1:] for line in commands("docs/images.md")[:5]]
    assert [words[0] for words in lines] == ["data", "data", "train", "train", "predict"]
    ids = np.zeros((64, 64), np.uint8)
    ids[20:, 10:50] = 1
    for name in "abcdef":
        write(tmp_path / f"photos/images/{name}.jpg", picture(64, 64))
        owndata.save(tmp_path / f"photos/masks/{name}.png", ids)
    write(tmp_path / "new_photos/g.jpg")
    monkeypatch.setattr("ssaseg.cli.data.machine.measure_step", lambda *_: 1.0)
    monkeypatch.setattr("ssaseg.cli.data.reading.count_cores", lambda: 0)
    monkeypatch.chdir(tmp_path)
    with tiny_networks():
        (tmp_path / "runs/my").mkdir(parents=True)
        save_checkpoint(tmp_path / "runs/my/best.safetensors", network="seaformer_y")
        for words in lines:
            if words[0] == "train":
                words = [word for word in words if word != "--dry-run"] + ["--print-config"]
            result = call(*words)
            assert result.exit_code in ((0, 1) if words[:2] == ["data", "check"] else (0,)), result.output
    assert (tmp_path / "labels/index/g.png").exists()


# ---- generated tables --------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current() -> None:
    """`make tables` writes them."""
    tables = script("tables")
    for page in tables.PAGES:
        assert tables.with_tables(read(page)) == read(page), page
    assert read("README.md").count("<!-- table: ") == 1
    shown = re.findall(r"^\| `([\w-]+)` \|", tables.recipes_table(), flags=re.MULTILINE)
    pairs = {name.removesuffix("-ssa") for name in list_recipes() if name.endswith("-ssa")}
    assert set(shown) == {name for name in pairs if f"{name}-linear" in list_recipes() and "camvid" not in name}


def test_counts_of_the_table_are_those_of_the_networks() -> None:
    """Of one network, built without meta tensors, whose first use takes seconds."""
    rows = {(row["model"], row["classifier"]): row for row in script("tables").read("costs.json")["rows"]}
    assert len(rows) == 32
    for classifier in ("linear", "ssa"):
        model = build_model("segnext_t", 150, classifier)
        dropped = model.training_only()
        used = [tensor.numel() for name, tensor in model.named_parameters() if not is_below(name, dropped)]
        assert sum(used) == rows["segnext_t", classifier]["parameters"]


# ---- messages ----------------------------------------------------------------------------------------------------


def test_explained_messages_are_those_of_the_program() -> None:
    page = read("docs/troubleshooting.md")
    explained = re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)
    assert len(explained) > 25
    folders = ("ssaseg_cli", "datasets", "models", "recipes", "files", "ssaseg")
    source = "\n".join(
        file.read_text(encoding="utf-8") for folder in folders for file in PROJECT.glob(f"{folder}/**/*.py")
    )
    assert [message for message in explained if message not in source and message != "ssaseg"] == []
