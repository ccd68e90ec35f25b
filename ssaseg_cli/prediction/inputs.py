"""Finds the images of a command: local ones as `sources.py` does, and those of addresses, tars and lists."""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.cli.errors import CommandError
from ssaseg.cli.places.addresses import connect, is_address, local_path, plain_errors, within, without_secrets
from ssaseg.cli.places.archives import read_members
from ssaseg.cli.places.lists import read_list
from ssaseg.cli.places.names import expand_braces, is_hidden, is_tar, key_of_sample, name_as_given, stem_of
from ssaseg.cli.places.objects import MAGIC, Failed, Held, find_objects, object_at, open_stream
from ssaseg.cli.prediction.journal import made_of
from ssaseg.cli.prediction.sources import (
    RESULTS,
    Image,
    LeftOut,
    Search,
    Source,
    find_sources,
    is_image,
    name_results,
    no_image,
)
from ssaseg.datasets import DataError
from ssaseg.datasets.base import evenly
from ssaseg.files.listing import FileList
from ssaseg.files.reading import open_file
from ssaseg.files.text import printable

# Images of a stream that are read before the network is, to choose how to compute; and bytes of them.
AHEAD, AHEAD_BYTES = 64, 2**26
LOOKED_AT = 8  # objects whose beginnings are read, one after the other, before the start
OUTSIDE = (
    "its name leads out of the place that it was found in\nexpected a path without '..' that does not begin with /"
)


class Stream:
    """Images that come one after the other, once, in a number that only the end tells: those of tars.

    `first`: the first of them, which are in memory. `others`: members that are no images, of what was read. The length
    is the number of those that have come.
    """

    def __init__(self, images: Iterator[Source], others: LeftOut | None = None) -> None:
        self.first: list[Source] = []
        self.others = LeftOut() if others is None else others
        self._rest, self._come, held = images, 0, 0
        while len(self.first) < AHEAD and held < AHEAD_BYTES and (source := next(images, None)) is not None:
            self.first.append(source)
            held += len(source.content.content) if isinstance(source.content, Held) else 0

    def __iter__(self) -> Iterator[Source]:
        for source in chain(self.first, self._rest):
            self._come += 1
            yield source

    def __len__(self) -> int:
        return self._come

    def __bool__(self) -> bool:
        return bool(self.first)

    def without(self, is_done: Callable[[Source], bool]) -> "Stream":
        """Those that are not done."""
        return Stream(source for source in self if not is_done(source))


def first_of(sources: Sequence[Source] | Stream) -> Sequence[Source]:
    """The images by which it is chosen how to compute: all that are known."""
    return sources.first if isinstance(sources, Stream) else sources


def headers_of(sources: Sequence[Source] | Stream) -> Sequence[Path | bytes]:
    """What sizes of images are read from, before the start: files, or the beginnings of a few of the objects."""
    first = first_of(sources)
    if all(source.content is None for source in first):
        return FileList(source.file for source in first)
    return [first[index].header() for index in evenly(len(first), LOOKED_AT)]


def origin_of(checkpoint: str, source: Source) -> str:
    """`made_of` of an image, also of one that is not a local file, by what tells its content.

    Raises OSError, DataError.
    """
    if source.content is None:
        return made_of(checkpoint, source.path)
    text = "\0".join([checkpoint, source.content.identity()])
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Tar(NamedTuple):
    """A tar with images."""

    file: str  # its path or address
    shown: str  # the same, safe to print

    def stream(self) -> Any:
        """The tar as a file that is read once from its beginning. Raises OSError, DataError."""
        if not is_address(self.file):
            return open_file(self.file)
        with plain_errors(self.file):
            return open_stream(connect(self.file))


def find_inputs(
    inputs: Sequence[str], listing: str | None, out: Path | str, others: LeftOut, keep_suffix: bool
) -> list[Source] | Stream:
    """The images of all inputs, and of a list; see `find_sources`. A stream, if there are tars among them.

    out: where results are written: a folder, or as text an address or a tar. Raises CommandError as `find_sources`;
    DataError for an address that cannot be reached, or that fsspec does not know.
    """
    inputs = [local_path(given) for given in inputs]
    if listing is None and isinstance(out, Path) and not any(is_address(each) or is_tar(each) for each in inputs):
        return find_sources(inputs, out, others, keep_suffix)
    found: dict[str, Image] = {}
    tars: list[Tar] = []
    search = Search(out if isinstance(out, Path) else None, others)
    skipped = _results_of(out)
    for given in inputs:
        if is_tar(given) and not os.path.isdir(given):
            tars += _tars(given)
            continue
        images = _objects(given, skipped, others) if is_address(given) else _local(search, given)
        for name, image in images:
            found.setdefault(name, image)
    for line in [] if listing is None else map(local_path, read_list(listing)):
        if is_tar(line):
            tars.append(_tar(line))
        else:
            name, image = _of_list(line)
            found.setdefault(name, image)
    listed = name_results(found.values(), keep_suffix)
    if not tars:
        return listed
    in_tar = not isinstance(out, Path) and is_tar(out)
    members = _members(tars, {each.name for each in listed}, keep_suffix, in_tar, others)
    return Stream(chain(listed, members), others)


def _local(search: Search, given: str) -> Iterator[tuple[str, Image]]:
    for path, relative in search.images(given):
        yield os.path.abspath(path), (path, relative, None)


def _results_of(out: Path | str) -> tuple[str, ...]:
    """How the addresses of results begin, which are no images to label."""
    if isinstance(out, Path) or not is_address(out) or is_tar(out):
        return ()
    place = connect(out)
    return tuple(f"{place.below(place.path.rstrip('/'))}/{folder}/" for folder in RESULTS)


def _objects(address: str, skipped: tuple[str, ...], others: LeftOut) -> Iterator[tuple[str, Image]]:
    """The images at an address, below it, or that match it."""
    rest: list[str] = []
    count = 0
    objects = list(find_objects(address))
    named = len(objects) == 1 and objects[0].thing.place.path == connect(address).path
    for thing, relative in objects:
        if thing.shown.startswith(skipped):
            continue
        if not (named or is_image(relative or thing.shown)):
            rest.append(thing.shown)
            continue
        count += 1
        if relative is None:
            yield thing.shown, (thing.shown, thing.shown, Failed(DataError(f"{thing.shown}: {OUTSIDE}")))
        else:
            yield thing.shown, (thing.shown, relative, thing)
    others.add(rest)
    if not count:
        raise no_image(without_secrets(address), "images at this address and below", rest)


def _of_list(line: str) -> tuple[str, Image]:
    """The image of a line of a list. What is wrong with it is reported when it is read, as that of any image."""
    name = name_as_given(line)
    shown = without_secrets(line) if is_address(line) else line
    if name is None:
        return shown, (shown, shown, Failed(DataError(f"{printable(shown)}: not the name of a file\n{OUTSIDE}")))
    if not is_address(line):
        return os.path.abspath(line), (line, name, None)
    try:
        thing = object_at(line)
    except DataError as error:
        return shown, (shown, name, Failed(error))
    return thing.shown, (thing.shown, name, thing)


# ---- tars --------------------------------------------------------------------------------------------------------
def _tar(file: str) -> Tar:
    return Tar(file, without_secrets(file))


def _tars(given: str) -> list[Tar]:
    """The tars of an input: one, or those that a pattern stands for, with braces as WebDataset has them.

    Raises CommandError for a local one that is not there; DataError if the first address of a pattern has nothing.
    """
    files = [given] if os.path.lexists(given) else list(expand_braces(given))
    if is_address(given):
        found = [each for file in files for each in _matching(file)]
        if found:
            place = connect(found[0])
            with plain_errors(found[0]):
                within(lambda: place.system.info(place.path), found[0])
    else:
        found = [
            each for file in files for each in ([file] if os.path.lexists(file) else sorted(glob.glob(file)) or [file])
        ]
        missing = [file for file in found if not os.path.lexists(file)]
        if missing:
            what = f"{len(missing)} of {len(found)} tars are not there, the first of them {printable(missing[0])}"
            raise CommandError(f"{printable(given)}: {what if len(found) > 1 else 'there is no such tar'}")
    if not found:
        raise CommandError(f"{without_secrets(given)}: no tar matches this pattern")
    return [_tar(file) for file in found]


def _matching(address: str) -> list[str]:
    """The addresses that match one with wildcards; one without, as it is."""
    place = connect(address)
    if not any(mark in place.path for mark in MAGIC):
        return [address]
    with plain_errors(address):
        found = place.system.glob(place.path)
        first, chained, rest = address.partition("::")
        if chained and "://" in first:
            return [f"{first.partition('://')[0]}://{path}::{rest}" for path in sorted(found)]
        return [str(place.system.unstrip_protocol(path)) for path in sorted(found)]


def _members(
    tars: Iterable[Tar], names: set[str], keep_suffix: bool, in_tar: bool, others: LeftOut
) -> Iterator[Source]:
    """The images in tars, which are read one after the other; what is refused, and a tar's missing rest, are some too.

    names: of results that exist already. in_tar: results are written to a tar, under the keys of their images.
    """

    def is_wanted(name: str) -> bool:
        if is_hidden(name):
            return False
        if not is_image(name):
            others.add([name])
        return is_image(name)

    for tar in tars:
        stem = stem_of(tar.file)
        try:
            with tar.stream() as file, plain_errors(tar.file, tar.shown):
                for member in read_members(file, tar.shown, is_wanted):
                    shown, key = (
                        f"{tar.shown}/{member.name}",
                        member.name if keep_suffix else key_of_sample(member.name),
                    )
                    name = key if in_tar else f"{stem}/{key}"
                    content: Held | Failed = Held(member.content)
                    if member.refused:
                        content = Failed(DataError(f"{printable(shown)}: {member.refused}"))
                    elif name in names:
                        content = Failed(DataError(f"{printable(shown)}: {_same(name, keep_suffix)}"))
                    names.add(name)
                    yield Source(shown, f"{stem}/{member.name}", name, content)
        except (DataError, OSError) as error:
            yield Source(tar.shown, stem, stem, Failed(error))


def _same(name: str, keep_suffix: bool) -> str:
    fix = "label it by a command of its own" if keep_suffix else "`predict --keep-suffix` names results by whole names"
    return f"an earlier image has the same name of results, {printable(name)}\n{fix}"
