"""The page: one file, with its style and its program inside, that loads nothing from elsewhere."""

import base64
import hashlib
from functools import cached_property
from pathlib import Path

from ssaseg.cli.serving.requests import Reply
from ssaseg.files.reading import read_text


class Page:
    """The page, put together once."""

    @cached_property
    def reply(self) -> Reply:
        """Style and program run by their hashes: what would get into the page otherwise would not run."""
        html, style, program = (read_text(Path(__file__).with_name(f"page.{kind}")) for kind in ("html", "css", "js"))
        allowed = {
            "default-src": "'none'",
            "style-src": source(style),
            "script-src": source(program),
            "connect-src": "'self'",
            "img-src": "data:",  # the icon
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        policy = "; ".join(f"{name} {value}" for name, value in allowed.items())
        text = html.replace("/* page.css */", style).replace("/* page.js */", program)
        return Reply(text.encode(), "text/html; charset=utf-8", headers={"content-security-policy": policy})


def source(text: str) -> str:
    """What a Content-Security-Policy calls a style or program of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
