"""Text from outside, made safe to show: names of files and classes may hold codes that change a terminal or a page."""

import re

# Control characters of ASCII and Latin-1, separators of lines, marks that change the direction of writing, and halves
# of surrogate pairs, which stand for the bytes of a file name that is not UTF-8.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

KEPT = "\n\t"  # what text of several lines needs


def printable(text: str, kept: str = "") -> str:
    r"""`text` with `\x1b` or `\u202e` in the place of each character that must not reach a terminal, a picture or HTML.

    `kept`: unsafe characters that stay, such as `KEPT`.
    """
    return UNSAFE.sub(lambda found: found[0] if found[0] in kept else escape(found[0]), text)


def cut(text: str, most: int = 60) -> str:
    """At most the first `most` characters of a text, for a message; three dots stand for the rest."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def describe(error: Exception) -> str:
    """The text of an error; of an OSError its file and the reason, where Python's text starts with "[Errno 22]"."""
    if not isinstance(error, OSError):
        return str(error)
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{printable(str(error.filename))}: {reason}"


def escape(character: str) -> str:
    r"""`\x1b`, `\u202e`, or the byte `\xff` that half of a surrogate pair stands for."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
