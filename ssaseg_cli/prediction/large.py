"""`predict --tile`: labels images tile by tile and writes as it goes: memory does not grow with their height."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssaseg.cli.console import progress_bar
from ssaseg.cli.drawing.panels import overlay
from ssaseg.cli.errors import CommandError
from ssaseg.cli.prediction.journal import Journal, Result, made_of, objects_result, require_folder
from ssaseg.cli.prediction.labelling import Labeller, Written, free_gpu
from ssaseg.cli.prediction.skipping import Skip, skip_reason
from ssaseg.cli.prediction.sources import Source
from ssaseg.cli.printing import echo
from ssaseg.cli.results.kinds import KINDS, Style, is_needed
from ssaseg.cli.results.manifest import Entry
from ssaseg.cli.results.shares import share_line
from ssaseg.cli.scoring.inference import state_views
from ssaseg.cli.signals import StopSignal
from ssaseg.cli.tiling.labelling import Stopped, Strip, Wanted, label_strips
from ssaseg.cli.tiling.library import windows_library
from ssaseg.cli.tiling.options import SMALLEST, Tiles
from ssaseg.cli.tiling.planning import Memory, Tiling, choose
from ssaseg.cli.tiling.polygons import Polygons
from ssaseg.cli.tiling.rasters import FORMS, Raster, new_file
from ssaseg.cli.tiling.reading import LargeImage, open_large
from ssaseg.cli.weights.export import require_packages
from ssaseg.files.reading import content_sum
from ssaseg.files.text import printable
from ssaseg.recipes import Test

# From a strip and the style to the rows of a `Raster`.
ROWS: Mapping[str, Callable[[Strip, Style], np.ndarray]] = {
    "index": lambda strip, style: strip.prediction.labels,
    "coarse": lambda strip, style: _known(strip.prediction.coarse),
    "color": lambda strip, style: np.take(style.colours, strip.prediction.labels, axis=0),
    "overlay": lambda strip, style: overlay(
        strip.image, strip.prediction.labels, style.colours[: len(style.classes)].tolist()
    )[..., ::-1],
    "confidence": lambda strip, style: np.rint(_known(strip.prediction.confidence) * 255).astype(np.uint8),
}


def _known(part: np.ndarray | None) -> np.ndarray:
    assert part is not None  # `Wanted` asks for it
    return part


def require_tileable(tiles: Tiles | None, save: Sequence[str]) -> None:
    """Raises CommandError for kinds of results that cannot be made with these tiles, and where rasterio is missing."""
    if tiles is None:
        if "polygons" in save:
            raise CommandError("--save polygons: made with tiles only\nadd --tile auto")
        return
    wrong = [kind for kind in save if KINDS[kind].tiled is None]
    if wrong:
        can = ", ".join(kind for kind in KINDS if KINDS[kind].tiled)
        what = f"--save {','.join(wrong)}: cannot be made row by row, which --tile does"
        raise CommandError(f"{what}\nexpected some of {can}\nremove it from --save")
    if tiles.blend and is_needed("coarse", save):
        raise CommandError("--save coarse: --blend averages the final logits only\nleave out --blend or coarse")
    require_packages(Path("--tile"), ("rasterio",))


def state_tiles(stored: Mapping[str, Any], protocol: Test, tiles: Tiles) -> None:
    """Says on stderr how tiles are prepared, which is not the protocol that checkpoints are scored by.

    stored: the protocol of the file. Raises CommandError for tiles that are too small for the network.
    """
    ratio = min(protocol.ratios)
    if tiles.side is not None and int(min(tiles.side) * ratio) < SMALLEST:
        got = f"--tile {tiles.side[0]}x{tiles.side[1]} at scale {ratio:g}"
        raise CommandError(f"{got}: the network takes {SMALLEST}x{SMALLEST} pixels or more\nuse larger tiles")
    if tiles.blend and (protocol.flip or len(protocol.ratios) > 1):
        raise CommandError("--blend: the checkpoint's protocol has several views\nadd --no-flip --ratios 1")
    scale = stored.get("scale")
    instead = f", in place of the {scale[0]}x{scale[1]} that the checkpoint's protocol fits them into" if scale else ""
    scaled = "at their own size" if protocol.ratios == (1.0,) else f"at {', '.join(map(str, protocol.ratios))} times it"
    echo(f"tiles: images are labelled {scaled}{instead}; the network gets each tile as an image of its own", err=True)


def state_large(protocol: Test, tiles: Tiles, scores: bool) -> str:
    """`state_views` of tiles."""
    size = "as large as fit into memory" if tiles.side is None else f"{tiles.side[0]}x{tiles.side[1]}"
    shared = "of a quarter" if tiles.overlap is None else f"{tiles.overlap} pixels"
    how = f"tiles of {size}, overlap {shared}{', logits averaged there' * tiles.blend}"
    return state_views(protocol, scores).replace("whole image", how)


def label_large(
    labeller: Labeller, tiles: Tiles, metadata: Mapping[str, Any], sources: Sequence[Source], stop: StopSignal
) -> int:
    """Labels all sources, one after the other. Returns the number of images done; others are in `labeller.skips`."""
    inference = labeller.inference
    ratio = max(inference.protocol.ratios)
    memory = Memory(metadata["model"], len(metadata["classes"]), inference.engine.channels, ratio, inference.device)
    done = 0
    with labeller.skips, windows_library():
        work = Work(labeller.with_engine(labeller.times.engine(inference.engine)), tiles, memory, stop)
        for source in sources:
            if stop.requested:
                break
            try:
                results = work.label(source)
            except Stopped:
                break
            if isinstance(results, Skip):
                labeller.skip(source, results)
                free_gpu(inference.device)
            else:
                labeller.journal.add(*results)
                done += 1
    return done


@dataclass(frozen=True)
class Work:
    """Labels one image after the other."""

    labeller: Labeller
    tiles: Tiles
    memory: Memory
    stop: StopSignal

    def label(self, source: Source) -> Written | Skip:
        """What is written of one image; or the reason to skip it."""
        labeller, started = self.labeller, time.perf_counter()
        with ExitStack() as stack:
            try:
                origin = made_of(labeller.code, source.path)
                channels = labeller.inference.engine.channels
                image = stack.enter_context(open_large(source.path, channels, labeller.levels))
                size = image.height, image.width
                tiling = choose(size, self.tiles.side, self.tiles.overlap, self.tiles.blend, self.memory)
            except Exception as error:
                return skip_reason(error, source.file)
            try:
                results, objects = self._write(source, image, tiling, origin)
            except (FloatingPointError, Stopped):
                raise
            except Exception as error:
                return skip_reason(error, source.file, writing=True)
            outputs = [labeller.journal.output_of(kind, source) for kind in labeller.save]
            seconds = time.perf_counter() - started
            return Written(Entry(source.relative, outputs, size[::-1], seconds, None), results, objects)

    def _write(
        self, source: Source, image: LargeImage, tiling: Tiling, origin: str
    ) -> tuple[list[Result], dict[str, list[bytes]]]:
        labeller, size, selection = self.labeller, (image.height, image.width), self.labeller.selection
        classes, colours = labeller.style.classes, labeller.style.colours
        counts = np.zeros(256, np.int64)
        assert isinstance(labeller.journal, Journal)  # `preparing.require_local` refuses other places
        out = labeller.journal.out
        keys = {kind: labeller.journal.key_of(kind, source) for kind in labeller.save}
        with ExitStack() as stack:
            files: dict[str, Raster | Polygons] = {}
            for kind in labeller.save:
                if kind == "shares":
                    continue
                require_folder(out / kind)
                temporary = stack.enter_context(new_file(out / keys[kind], out / kind))
                files[kind] = (
                    Polygons(temporary, classes, size, image.place)
                    if kind == "polygons"
                    else Raster(temporary, FORMS[kind], size, image.place, colours)
                )
                stack.callback(files[kind].close)
            for strip in self._strips(image, tiling):
                drawn = strip._replace(prediction=selection.drawn(strip.prediction))
                for kind, file in files.items():
                    rows = drawn.prediction.labels if isinstance(file, Polygons) else ROWS[kind](drawn, labeller.style)
                    with labeller.times.stage("writing"):
                        file.add(rows)
                if "shares" in labeller.save:
                    counts += np.bincount(strip.prediction.labels.reshape(-1), minlength=256)
                labeller.journal.check()
            with labeller.times.stage("writing"):
                for file in files.values():
                    file.finish()
        results = [_result(out, keys[kind], origin) for kind in files]
        objects: dict[str, list[bytes]] = {}
        if "shares" in labeller.save:
            objects["shares"] = [share_line(source.relative, counts[: len(classes)], size, classes)]
            results.append(objects_result("shares", source.relative, origin, objects["shares"]))
        return results, objects

    def _strips(self, image: LargeImage, tiling: Tiling) -> Any:
        """The strips of an image. Raises `Stopped` after a request to stop."""
        labeller = self.labeller
        wanted = Wanted(is_needed("coarse", labeller.save), is_needed("confidence", labeller.save))
        count = tiling.count(image.height, image.width)
        if count > 1:
            name = printable(image.path.name)
            echo(f"{name}: {image.width}x{image.height} pixels, {count} {tiling}", err=True)
        with progress_bar(count, "labelled", "tiles") as advance:

            def tick(number: int) -> None:
                advance(number)
                if self.stop.requested:
                    raise Stopped

            yield from label_strips(image, labeller.inference, tiling, wanted, labeller.times.stage, tick)


def _result(out: Path, key: str, origin: str) -> Result:
    """The result that was just written to `out / key`."""
    path = out / key
    size, code = content_sum(path)
    return Result(key, origin, size, path.lstat().st_mtime_ns, code)
