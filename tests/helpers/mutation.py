"""Files changed at random, from a seed: bytes, text, and trees of JSON values."""

import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

Mutate = Callable[[bytes, random.Random], bytes]

NUMBERS = (-1, 0, 1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
DEEP = "@deep@"  # in a tree of values: stands for lists inside lists, which json.dumps could not write
# Values in the place of others.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, 10**12, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "x" * 5000, "../../x", "/etc/passwd", "\x1b[31m\a", "\ud800", "a\nb", "1e9", "null", [], [[]], {},
    {"x": 1}, [1, 2], [None], DEEP,
)  # fmt: skip
# Pieces of YAML and of command lines.
WORDS = (
    "&a", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!binary", "!x", "---", "...", "? ", "[", "]", "{",
    "}", ": ", "- ", "#", "|", ">", "'", '"', "\t", "\x00", "\x1b[31m", "\ufeff", "\u2028", "~", "null", "true",
    "1e999", ".nan", ".inf", "-1", "0x7fffffffffffffff", "1" * 400, "[" * 3000, "{a: " * 500, "../..", "/dev/zero",
    "extends: x",
)  # fmt: skip


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to eight changes: flipped bits, numbers, pieces left out, doubled or moved; now and then the end is cut."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not content:
            return bytes(rng.randbytes(rng.randrange(9)))
        at, size = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 40))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            order = rng.choice("<>")
            number = rng.choice(NUMBERS) & 0xFFFFFFFF
            content[at : at + 4] = struct.pack(f"{order}I", number)
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 5:
            other = rng.randrange(len(content))
            content[at : at + size] = content[other : other + size]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def change_near_start(data: bytes, rng: random.Random) -> bytes:
    """`change_bytes` of the first 200 bytes: most formats have their sizes there."""
    return change_bytes(data[:200], rng) + data[200:]


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Lines and words changed, doubled, moved and left out."""
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[at:at] = [lines[rng.randrange(len(lines))]]
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at] = " " * rng.choice((1, 2, 4)) + lines[at]
        else:
            place = rng.randrange(len(lines[at]) + 1)
            end = place if kind == 3 else len(lines[at])
            lines[at] = lines[at][:place] + rng.choice(WORDS) + lines[at][end:]
    return "\n".join(lines).encode(errors="surrogatepass")


def places_of(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key or index) of a tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(inner) for place in [(tree, key), *places_of(value)]]


def change_tree(tree: Any, rng: random.Random, odd: tuple[Any, ...] = ODD) -> Any:
    """A tree of dicts and lists with one to three values changed in place, taken from elsewhere, or left out."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = places_of(tree)
        if not places:
            return rng.choice(odd)
        container, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, its_key = rng.choice(places)
            if other is container or not isinstance(other[its_key], dict | list):
                container[key] = other.get(its_key) if isinstance(other, dict) else other[its_key % len(other)]
        else:
            container[key] = rng.choice(odd)
    return tree


def json_text(tree: Any, rng: random.Random) -> bytes:
    """A tree as JSON, with very deep lists in the place of `DEEP`."""
    deep = rng.choice((900, 5000, 100_000))
    text = json.dumps(tree).replace(f'"{DEEP}"', "[" * deep + "]" * deep)
    return text.encode(errors="surrogatepass")


def change_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with changed values; now and then changed bytes."""
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    return json_text(change_tree(json.loads(data), rng), rng)


def change_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG with a changed chunk whose checksum is right, so that the change reaches the decoder."""
    at, chunks = 8, []
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    if name == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(change_bytes(zlib.decompress(content), rng))
    else:
        content = change_bytes(content, rng)
    chunks[index] = name, content
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
