"""Which images get results (`predict --where`), and which classes are in them (`--only`).

A condition compares shares of classes in an image, as in `shares.json`: `car>0.01 and not (person==0 or sky<5%)`.

Axes: H×W pixels of an image.
"""

import csv
import difflib
import hashlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.journal import Existing, Result
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.results.shares import unique
from ssaseg.cli.scoring.inference import Prediction
from ssaseg.datasets import IGNORED
from ssaseg.files.text import cut, printable

EXAMPLE = "for example: --where 'car>0.01 and (\"traffic light\">0 or person==0)'"
COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    **{"==": operator.eq, "!=": operator.ne},
}
TOKEN = re.compile(r"""\s*(?:([<>]=?|[=!]=)|([()])|"([^"]*)"|'([^']*)'|([^\s<>=!()"']+))""")
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(?:e-?\d+)?%?", re.IGNORECASE)
WORDS = ("and", "or", "not")
DEEPEST = 50  # brackets and `not` inside one another

Shares = Mapping[str, float]  # share of each class in an image, 0..1


class Token(NamedTuple):
    """A piece of a condition."""

    kind: str  # "comparison", "bracket", "name", "number" or "word"
    text: str


class Condition(NamedTuple):
    """What `--where` asks."""

    text: str  # the same for conditions that are spelt the same but for spaces and quotes
    names: tuple[str, ...]  # of classes
    holds: Callable[[Shares], bool]


class Choice(NamedTuple):
    """`--where` and `--only`, before the classes of the network are known."""

    condition: Condition | None
    only: tuple[str, ...] | None


@dataclass
class Selection:
    """The same for a network of known classes. Counts images that `--where` leaves out."""

    classes: tuple[str, ...] = ()  # names as in shares.json
    condition: Condition | None = None
    table: np.ndarray | None = None  # uint8 (256,): each label, or IGNORED for classes that `--only` does not name
    now: int = 0  # left out by this command
    earlier: int = 0  # by one that this command continues

    def holds(self, labels: np.ndarray) -> bool:
        """Whether an image with labels uint8 (H,W) gets results."""
        if self.condition is None:
            return True
        counts = np.bincount(labels.reshape(-1), minlength=len(self.classes)).tolist()
        return self.condition.holds({name: counts[k] / labels.size for k, name in enumerate(self.classes)})

    def drawn(self, prediction: Prediction) -> Prediction:
        """The prediction with IGNORED (255) in place of the classes that are not wanted."""
        if self.table is None:
            return prediction
        coarse = None if prediction.coarse is None else self.table[prediction.coarse]
        return prediction._replace(labels=self.table[prediction.labels], coarse=coarse)

    @property
    def code(self) -> str:
        """What decides the content of results; empty without `--only`."""
        return "" if self.table is None else f"only {np.flatnonzero(self.table != IGNORED).tolist()}"

    def key(self, source: Source) -> str:
        """Under which it is recorded that the condition does not hold for an image."""
        return f"where/{source.relative}"

    @property
    def asks(self) -> str:
        """The condition; empty without `--where`."""
        return "" if self.condition is None else self.condition.text

    def mark(self, origin: str) -> str:
        """What this entry was made of: the image and the network, see `made_of`, and the condition."""
        return origin + hashlib.sha256(self.asks.encode()).hexdigest()[:16]

    def left_out(self, source: Source, origin: str) -> Result:
        """The entry of an image for which the condition does not hold: it is not labelled again by --resume."""
        return Result(self.key(source), self.mark(origin), 0, 0, 0)

    def left_out_earlier(self, existing: Existing, source: Source, origin: str) -> bool:
        """Whether the record in `existing` has this entry; counts the image if it has."""
        found = self.condition is not None and existing.mentions(self.key(source), self.mark(origin))
        self.earlier += found
        return found

    def count(self, results: Sequence[Result]) -> None:
        """Counts an image by its entries in the record."""
        self.now += any(result.key.startswith("where/") for result in results)

    def state(self) -> str:
        """A part of the command's last line; empty without `--where`."""
        if self.condition is None:
            return ""
        earlier = f" ({self.earlier} of them earlier)" if self.earlier else ""
        return f"; --where left out {self.now + self.earlier}{earlier}"


def parse_choice(where: str | None, only: str | None) -> Choice:
    """Reads both options as far as this is possible without the names of the classes. Raises CommandError."""
    if only is None:
        names = None
    else:
        names = tuple(filter(None, (name.strip() for name in next(csv.reader([only], skipinitialspace=True), []))))
        if not names:
            raise CommandError(f"--only {only!r}: no class\nexpected names with commas between them: --only car,person")
    return Choice(None if where is None else parse_condition(where), names)


def selection_of(choice: Choice, classes: Sequence[str]) -> Selection:
    """The selection for a network of these classes. Raises CommandError for names that are not among them.

    Of several classes with one name, each is named as in shares.json, by its number too: "road (3)"; --only takes all.
    """
    names = unique(classes)
    if choice.condition is not None:
        for name in choice.condition.names:
            require_class("--where", name, names)
    if choice.only is None:
        return Selection(tuple(names), choice.condition)
    wanted = {require_class("--only", name, [*names, *classes]) for name in choice.only}
    table = np.full(256, IGNORED, np.uint8)
    for index, pair in enumerate(zip(names, classes, strict=True)):
        if wanted.intersection(pair):
            table[index] = index
    return Selection(tuple(names), choice.condition, table)


def require_class(option: str, name: str, classes: Sequence[str]) -> str:
    """The name, if a class has it. Raises CommandError with the nearest one."""
    if name in classes:
        return name
    folded = {each.casefold(): each for each in reversed(classes)}
    near = difflib.get_close_matches(name.casefold()[:200], folded, n=1)
    fix = f"did you mean {printable(repr(folded[near[0]]))}? " if near else ""
    listed = cut(", ".join(map(printable, dict.fromkeys(classes))), 300)
    raise CommandError(f"{option}: the network has no class {cut(printable(repr(name)))}\n{fix}classes: {listed}")


# ---- conditions --------------------------------------------------------------------------------------------------
def parse_condition(text: str) -> Condition:
    """Reads a condition: comparisons of classes' shares with numbers 0..1 or percentages, or with one another, joined
    by `and`, `or`, `not` and brackets; `and` binds more than `or`. Names with spaces or signs are in quotes.

    Raises CommandError with the place that is not understood.
    """
    tokens = tokens_of(text)
    holds = Parser(text, tokens).parse()
    names = tuple(dict.fromkeys(token.text for token in tokens if token.kind == "name"))
    return Condition(" ".join(f"{kind[0]}:{said}" for kind, said in tokens), names, holds)


def tokens_of(text: str) -> list[Token]:
    """The pieces of a condition. Raises CommandError for a character that begins none."""
    tokens, place = [], 0
    while text[place:].strip():
        if (found := TOKEN.match(text, place)) is None:
            rest = text[place:].strip()
            fix = {"=": "write == to compare", '"': "close the quotes", "'": "close the quotes"}.get(rest[0], EXAMPLE)
            raise wrong(text, f"not understood from {rest[:30]!r} on", fix)
        sign, bracket, double, single, word = found.groups()
        if sign or bracket:
            tokens.append(Token("comparison" if sign else "bracket", sign or bracket))
        elif word is None:
            tokens.append(Token("name", single if double is None else double))
        elif word.lower() in WORDS:
            tokens.append(Token("word", word.lower()))
        else:
            tokens.append(Token("number" if NUMBER.fullmatch(word) else "name", word))
        place = found.end()
    return tokens


def wrong(text: str, what: str, fix: str = EXAMPLE) -> CommandError:
    """The error for a condition."""
    return CommandError(f"--where {cut(printable(text), 100)}: {printable(what)}\n{fix}")


class Parser:
    """Reads tokens from left to right, one function for each rule of the grammar."""

    def __init__(self, text: str, tokens: Sequence[Token]) -> None:
        self.text, self.tokens, self.place, self.depth = text, tokens, 0, 0

    def parse(self) -> Callable[[Shares], bool]:
        """The whole condition, as a function of the shares."""
        if not self.tokens:
            raise wrong(self.text, "no condition")
        holds = self.any_of()
        if self.next is not None:
            raise wrong(self.text, f"expected `and` or `or` before {self.next.text!r}")
        return holds

    @property
    def next(self) -> Token | None:
        """The token that is to be read; None at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def takes(self, kind: str, text: str) -> bool:
        """Reads the next token if it is this one."""
        if self.next != Token(kind, text):
            return False
        self.place += 1
        return True

    def any_of(self) -> Callable[[Shares], bool]:
        """… or …"""
        parts = [self.all_of()]
        while self.takes("word", "or"):
            parts.append(self.all_of())
        return parts[0] if len(parts) == 1 else lambda shares: any(part(shares) for part in parts)

    def all_of(self) -> Callable[[Shares], bool]:
        """… and …"""
        parts = [self.one()]
        while self.takes("word", "and"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else lambda shares: all(part(shares) for part in parts)

    def one(self) -> Callable[[Shares], bool]:
        """A comparison, a condition in brackets, or `not` before one of them."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise wrong(self.text, f"more than {DEEPEST} brackets or `not` inside one another", "write it flatter")
        if self.takes("word", "not"):
            inner = self.one()
            holds: Callable[[Shares], bool] = lambda shares: not inner(shares)  # noqa: E731
        elif self.takes("bracket", "("):
            holds = self.any_of()
            if not self.takes("bracket", ")"):
                raise wrong(self.text, f"expected ) {self.here()}")
        else:
            holds = self.comparison()
        self.depth -= 1
        return holds

    def comparison(self) -> Callable[[Shares], bool]:
        """Values with signs between them: `car>0.01`, `0.1<sky<=50%`."""
        values, signs = [self.value()], []
        while self.next is not None and self.next.kind == "comparison":
            signs.append(COMPARISONS[self.next.text])
            self.place += 1
            values.append(self.value())
        if not signs:
            raise wrong(self.text, f"expected a comparison, such as >0.01, {self.here()}")
        if not any(isinstance(value, str) for value in values):
            raise wrong(
                self.text, "a comparison without a class", f"class names that are numbers: in quotes; {EXAMPLE}"
            )

        def holds(shares: Shares) -> bool:
            found = [shares[value] if isinstance(value, str) else value for value in values]
            return all(sign(left, right) for sign, left, right in zip(signs, found, found[1:], strict=False))

        return holds

    def value(self) -> str | float:
        """A class name, or a share 0..1."""
        token = self.next
        if token is None or token.kind not in ("name", "number"):
            raise wrong(self.text, f"expected a class or a number {self.here()}")
        self.place += 1
        if token.kind == "name":
            return token.text
        share = float(token.text.removesuffix("%")) / (100 if token.text.endswith("%") else 1)
        if share > 1:
            raise wrong(self.text, f"{token.text}: shares are from 0 to 1", "write 0.05 or 5% for five per cent")
        return share

    def here(self) -> str:
        """Where the next token is, for an error."""
        before = self.tokens[self.place - 1].text if self.place else ""
        where = f"after {before!r}" if before else "at the start"
        return (
            f"{where}, got {self.next.text!r}; names with spaces: in quotes" if self.next else f"{where}, got the end"
        )
