"""Lists of pairs: one image and one mask a line, as PaddleSeg, SegNet, HRNet, BiSeNet and many others have them.

Between the two stands a tab, a comma, a semicolon or spaces. A file with a header of columns is read as CSV.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

from ssaseg.datasets.base import DataError, brief
from ssaseg.datasets.pairs import JPEG, LARGEST_LIST, TWO_FILES, Pairs, first_names, raise_or_keep
from ssaseg.files.reading import decode_text, read_file

EXPECTED = "expected an image and its mask a line, with a tab between them, as paths below data.root"
SEPARATORS = ("\t", ";", ",")
GAP = re.compile(r"\s*[\t;,]\s*|\s+")  # a place where a line may be split
LONGEST_LINE, MOST_GAPS = 10_000, 100  # characters; gaps that are tried
# Lines that are looked at to find out which folder the paths of a list start in.
MOST_TRIED = 20
# Headers of columns in CSV files, in lower case and without what stands for "path".
PATH = re.compile(r"[_ -]?(path|file|filename|file[_ -]name|name|url|dir)s?$|^(path|file)[_ -](to[_ -])?")
IMAGE = re.compile(r"(.*[_ -])?(images?|imgs?|pictures?|photos?|inputs?|frames?|rgb|src|source|x)|file|filename|path|")
MASK = re.compile(
    r"(.*[_ -])?(masks?|labels?|annotations?|anns?|annos?|gts?|ground[_ -]?truth|targets?|segs?|segmentations?|y)"
)
SPLIT = re.compile(r"split|set|subset|fold|phase|partition|usage")
# What a column of splits, or the name of a list or a folder, says.
SPLITS = {
    "train": re.compile(r"train(ing|set|annot)?|trn"),
    "val": re.compile(r"val(id|idation|set|annot)?|dev|eval(uation)?"),
    "test": re.compile(r"test(ing|set|annot)?|tst"),
}

Parts = tuple[str, ...]  # of a path


class _Row(NamedTuple):
    """One line: all ways to read it as an image and a mask, the likeliest first."""

    number: int  # from 1
    text: str
    choices: list[tuple[str, str, bool]]  # image, mask, whether more columns follow


class _Rule(NamedTuple):
    """How the paths of a list become paths below the root: without their first parts, below the folder of the list."""

    folder: Parts
    dropped: Parts

    def apply(self, path: Parts) -> Parts | None:
        """None where the path does not start with the parts to drop."""
        count = len(self.dropped)
        return self.folder + path[count:] if path[:count] == self.dropped else None


def read_pairs(
    file: Path, root: Path, split: str | None = None, incomplete: list[DataError] | None = None
) -> tuple[Pairs, list[str]]:
    """The pairs of a list, sorted by name, and notes for the user. A name is the path of the image without suffix.

    Paths are below `root` or below the folder of the list; where they start with other folders, as in
    /SegNet/CamVid/train/0001.png, the first parts are left out: as few as possible, and the same in all lines.
    Backslashes are read as /. `split`: where a CSV file has a column of splits, only the rows of this one are used.
    `incomplete` as in `pair_files`. Raises DataError for lines that are not a pair of existing files, with the number
    of the line, and where an image is listed twice.
    """
    rows, notes = _rows(file, split)
    files = _Files(root)
    folders = list(dict.fromkeys([(), _below(file.parent, root)]))
    rules = _find_rules(rows, files, folders)
    found: dict[str, tuple[Path, Path]] = {}
    wrong: list[str] = []
    first_line: dict[Path, int] = {}
    further = 0
    for row in rows:
        pair = _find_pair(row, files, rules)
        if isinstance(pair, str) and row.text.startswith("#"):
            continue  # a comment
        if isinstance(pair, str):
            wrong.append(f"line {row.number}: {pair}")
            continue
        image, mask, more = pair
        further += more
        if image in first_line:
            raise DataError(
                f"{file}: line {row.number}: {brief(row.text)}: this image is in line {first_line[image]} too\n"
                "expected each image once\nremove one of the lines"
            )
        first_line[image] = row.number
        found[image.relative_to(root).as_posix()] = image, mask
    if found and all(_is_jpeg(mask) and not _is_jpeg(image) for image, mask in found.values()):
        raise DataError(
            f"{file}: the second file of every line is a JPEG file, which cannot hold class ids; the first is none\n"
            f"{EXPECTED}\nif the mask comes first, exchange the two; else write the masks as PNG, of class ids"
        )
    if not found and not wrong:
        raise DataError(f"{file}: only comments in this file\n{EXPECTED}")
    if wrong:
        several = f" (and {len(wrong) - 1} more of {len(rows)} lines)" if len(wrong) > 1 else ""
        error = DataError(f"{file}: {wrong[0]}{several}\n{EXPECTED} ({root})\ncorrect the lines, or data.root")
        raise_or_keep(error, incomplete if found else None)
    if further:
        notes.append(f"{file.name}: columns after the image and the mask are not used ({further} lines)")
    for dropped in dict.fromkeys(rule.dropped for rule in rules or ()):
        notes += [f"{file.name}: paths are read without {'/'.join(dropped)}/ before them"] if dropped else []
    named = sorted((name, *found[path]) for path, name in name_pairs(found).items())
    return Pairs([name for name, *_ in named], [each[1] for each in named], [each[2] for each in named]), notes


def _is_jpeg(file: Path) -> bool:
    return file.suffix.lower() in JPEG


def _below(folder: Path, root: Path) -> Parts:
    try:
        return Path(os.path.realpath(folder)).relative_to(os.path.realpath(root)).parts
    except ValueError:  # the list is elsewhere
        return ()


def name_pairs(paths: Iterable[str]) -> dict[str, str]:
    """The name of each image by its path: without suffix, where this leaves them different."""
    short = {path: str(PurePosixPath(path).with_suffix("")) for path in paths}
    counts = Counter(short.values())
    return {path: name if counts[name] == 1 and name not in short else path for path, name in short.items()}


def looks_like_pairs(file: Path) -> bool:
    """Whether one of the first lines could be a pair: two names of files, or a header of such columns."""
    try:
        start = decode_text(read_file(file, LARGEST_LIST)[:LONGEST_LINE], "replace")
    except OSError:
        return False
    lines = [line.strip() for line in start.split("\n") if line.strip() and line[0] != "#"][:3]
    return any(TWO_FILES.fullmatch(line) for line in lines) or any(_header(line) for line in lines[:1])


def list_splits(file: Path) -> set[str]:
    """The splits in the column of splits of a CSV file; empty where it has none."""
    return {split for split in ("train", "val", "test") if _has_split(file, split)}


def _has_split(file: Path, split: str) -> bool:
    try:
        return bool(_rows(file, split)[1])
    except (DataError, OSError):
        return False


# ---- lines -------------------------------------------------------------------------------------------------------


def _rows(file: Path, split: str | None) -> tuple[list[_Row], list[str]]:
    try:
        text = decode_text(read_file(file, LARGEST_LIST))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file\nexpected a list of pairs\n{EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})\n{EXPECTED}\nsave it as UTF-8") from None
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: no line in this file\n{EXPECTED}")
    notes: list[str] = []
    if (header := _header(lines[0][1][:LONGEST_LINE])) is None:
        return [_Row(number, line, _choices(line)) for number, line in lines], notes
    separator, columns, at_split = header
    rows, values = [], []
    for number, line in lines[1:]:
        cells = _cells(line, separator)
        cells += [""] * (max(*columns, at_split if at_split is not None else 0) + 1 - len(cells))
        values.append("" if at_split is None else cells[at_split])
        rows.append(_Row(number, line, [(cells[columns[0]], cells[columns[1]], False)]))
    if split is not None and at_split is not None and values and all(map(split_of, values)):
        rows = [row for row, value in zip(rows, values, strict=True) if split_of(value) == split]
        notes.append(f"{file.name}: the {len(rows)} rows of the {split} split are used")
    if not rows:
        raise DataError(f"{file}: no row of pairs{f' of the {split} split' if split else ''}\n{EXPECTED}")
    return rows, notes


def split_of(text: str) -> str | None:
    """The split that the words of a text name, as the name of a list does; None where they name none or several."""
    named = _named_splits(text)
    return named.pop() if len(named) == 1 else None


def split_of_path(path: PurePosixPath) -> str | None:
    """The split that a word in a path names, the last part first: "train2017/img", "instances_train" are "train", and
    so is "train_val".
    """
    found = next(filter(None, map(_named_splits, reversed(path.parts))), set())
    return "train" if "train" in found else max(found, default=None)


def _named_splits(text: str) -> set[str]:
    words = re.split(r"[\W\d_]+", text.lower())
    return {split for split, pattern in SPLITS.items() if any(map(pattern.fullmatch, words))}


def choose_splits(found: Collection[str | None]) -> tuple[dict[str, str], list[str]] | None:
    """Which of the splits that were found are for training and validation, with a note: test data with labels are for
    validation where nothing else is. None where one of the two is missing: then all data are one set, to be divided.
    """
    second = next((split for split in ("val", "test") if split in found), None)
    if "train" not in found or second is None:
        return None
    notes = [] if second == "val" else ["no validation split: the test images, which have labels, are used instead"]
    return {"train": "train", "val": second}, notes


def _header(line: str) -> tuple[str, tuple[int, int], int | None] | None:
    """Separator, columns of image and mask, and the column of splits, where the first line names columns."""
    for separator in SEPARATORS:
        cells = [cell.strip().lower() for cell in _cells(line, separator)]
        if len(cells) < 2 or any(re.search(r"[/\\]|\.\w+$", cell) for cell in cells):
            continue
        at: dict[str, int] = {}
        # A column that says that it holds paths comes before one that only names the thing, as image_id does.
        for says_path in (True, False):
            for number, cell in enumerate(cells):
                bare = PATH.sub("", cell)
                if says_path and bare == cell:
                    continue
                kind = "mask" if MASK.fullmatch(bare) else "image" if IMAGE.fullmatch(bare) and cell else ""
                at.setdefault(kind, number)
        if "image" in at and "mask" in at:
            splits = (number for number, cell in enumerate(cells) if SPLIT.fullmatch(cell))
            return separator, (at["image"], at["mask"]), next(splits, None)
    return None


def _cells(line: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return line.split(separator)


def _choices(line: str) -> list[tuple[str, str, bool]]:
    """All ways to split a line: at its separator first, then at every gap, then with further columns left out."""
    if len(line) > LONGEST_LINE:
        return []
    separator = next((each for each in SEPARATORS if each in line), None)
    cells = _cells(line, separator) if separator else line.split()
    cells = [cell for cell in cells if cell]
    if line.count("\t") == 1:
        cells = line.split("\t")
    first = [(cells[0], cells[1], False)] if len(cells) == 2 else []
    gaps = [(line[: gap.start()], line[gap.end() :], False) for gap in islice(GAP.finditer(line), MOST_GAPS)]
    more = [(cells[0], cells[1], True)] if len(cells) > 2 else []
    return list(dict.fromkeys([*first, *gaps, *more]))


# ---- files -------------------------------------------------------------------------------------------------------


class _Files:
    """The files below a folder, each folder listed once, when it is needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[Parts, tuple[Path, dict[str, str]] | None] = {}

    def find(self, path: Parts) -> Path | None:
        """The file of a path below the root, perhaps in another composition of its letters; None without it."""
        folder = self._list(path[:-1]) if path and ".." not in path else None
        name = folder and _look_up(path[-1], folder[1])
        return folder[0] / name if folder and name else None

    def _list(self, path: Parts) -> tuple[Path, dict[str, str]] | None:
        if path not in self._listed:
            above = self._list(path[:-1]) if path else None
            name = above and _look_up(path[-1], above[1])
            folder = self._root if not path else above[0] / name if above and name else None
            self._listed[path] = None
            if folder is not None:
                try:
                    names = os.listdir(folder)
                except (FileNotFoundError, NotADirectoryError):  # a link to nothing, or a file
                    return None
                composed = {normalize("NFC", name): name for name in names if not name.isascii()}
                self._listed[path] = folder, {**composed, **{name: name for name in names}}
        return self._listed[path]


def _look_up(name: str, names: dict[str, str]) -> str | None:
    return names.get(name) or (None if name.isascii() else names.get(normalize("NFC", name)))


def _parts(text: str, plain: bool = False) -> Parts:
    """`plain`: quotes, spaces and backslashes are part of the names."""
    text = text if plain else text.strip("\"' ").replace("\\", "/")
    return tuple(part for part in text.split("/") if part not in ("", "."))


def _find_rules(rows: Sequence[_Row], files: _Files, folders: Sequence[Parts]) -> tuple[_Rule, _Rule] | None:
    """The rules for images and masks by the first line that has a pair of files; None where no line has one."""
    for row in rows[:MOST_TRIED]:
        for image, mask, _ in row.choices:
            found = [_rule(_parts(path), files, folders) for path in (image, mask)]
            if found[0] and found[1] and _parts(image) != _parts(mask):
                return found[0], found[1]
    return None


def _rule(path: Parts, files: _Files, folders: Sequence[Parts]) -> _Rule | None:
    rules = (_Rule(folder, path[:count]) for count in range(len(path)) for folder in folders)
    return next((rule for rule in rules if (below := rule.apply(path)) and files.find(below)), None)


def _find_pair(row: _Row, files: _Files, rules: tuple[_Rule, _Rule] | None) -> tuple[Path, Path, bool] | str:
    """Image and mask of a line, and whether more columns follow; or what is wrong with the line."""
    shown = brief(row.text)
    if not row.choices or not all(row.choices[0][:2]):
        return f"{shown}: one path, where an image and a mask are expected"
    if rules is None:
        return f"{shown}: these files do not exist"

    def find(rule: _Rule, text: str) -> Path | None:
        ways = (rule.apply(_parts(text, plain)) for plain in (False, True))
        return next((found for below in ways if below and (found := files.find(below))), None)

    found = []
    for image, mask, more in row.choices:
        pair = find(rules[0], image), find(rules[1], mask)
        if pair[0] and pair[1]:
            found.append((pair[0], pair[1], more))
        if found and not more and (image, mask, more) == row.choices[0]:
            break  # split at the separator of the line
    apart = [pair for pair in found if not pair[2]] or found[:1]
    if len(apart) > 1:
        return f"{shown}: the line can be split into two existing files in {len(apart)} ways"
    if apart:
        return apart[0] if apart[0][0] != apart[0][1] else f"{shown}: the image is its own mask"
    missing = [text for rule, text in zip(rules, row.choices[0][:2], strict=True) if find(rule, text) is None]
    return (
        f"{shown}: {'no such file' if len(missing) == 1 else 'no such files'}: {first_names(list(map(brief, missing)))}"
    )
