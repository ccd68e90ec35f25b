"""The page of `ssaseg serve` in a headless Chromium: what a user does, and what the page then says."""

from pathlib import Path

import numpy as np
import pytest
from asgi import Strongest, network, png
from chromium import Page, browser, needs_chromium
from PIL import Image

from ssaseg.cli.serving import server
from ssaseg.cli.serving.app import App, Limits
from ssaseg.cli.serving.server import bound_socket, listening

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(server.find_spec("uvicorn") is None, reason="needs the extra serve: uvicorn"),
    pytest.mark.usefixtures("one_thread"),
]
EVIL = "<img src=x onerror=alert(1)>\u202e"


def text(page: Page, selector: str) -> str:
    found = page.run(f"document.querySelector({selector!r}).innerText")
    assert isinstance(found, str)
    return found.replace("\xa0", " ")


def legend(page: Page, pane: int = 0) -> list[str]:
    found = page.run(f"[...document.querySelectorAll('.classes')][{pane}].innerText.trim()")
    return [line.strip() for line in found.replace("\xa0", " ").splitlines() if line.strip()]


def choose(page: Page, file: Path) -> None:
    """Chooses an image, and waits until it is labelled, or refused."""
    page.run("byId('status').textContent = byId('error').textContent = ''")
    page.choose("#file", file)
    page.wait("byId('error').textContent || /\\d\\ss/.test(byId('status').textContent)")


def point(page: Page, x: float, y: float) -> str:
    """Moves the pointer to a place of the first image, in shares of its size; what the page then says."""
    box = page.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.stack').getBoundingClientRect())"
    )
    page.move(box[0] + x * box[2], box[1] + y * box[3])
    return text(page, "#readout")


def test_the_page(tmp_path: Path) -> None:
    halves = np.full((40, 80, 3), (9, 0, 0), np.uint8)  # red on the left, green on the right
    halves[:, 48:] = (0, 9, 0)
    picture, other, broken = (tmp_path / name for name in ("a & <b>.png", "blue.png", "text.png"))
    Image.fromarray(halves).save(picture)
    other.write_bytes(png((0, 0, 9)))
    broken.write_bytes(b"no image")
    networks = [network(Strongest(adapts=True), name=f"{EVIL}.safetensors"), network(names=("rot", EVIL, "blau"))]
    app = App(networks, "t0ken", Limits(bytes=50_000))
    with bound_socket("127.0.0.1", 0) as bound, listening(app, bound, 30), browser(tmp_path) as page:
        page.resize(1600)
        page.open(f"http://127.0.0.1:{bound.getsockname()[1]}/?token=t0ken")
        page.wait("document.readyState === 'complete' && byId('about').textContent.includes(' and ')")
        assert "At most 50 megapixels and 0.0477 MiB" in text(page, "#kept")

        choose(page, picture)
        assert text(page, "#status").startswith("a & <b>.png: 80 × 40 pixels, ")
        assert legend(page) == ["red", "60 %", "green", "40 %"]
        assert legend(page, 1) == ["rot", "60 %", EVIL.replace("\u202e", "\\u202e"), "40 %"]
        assert "Both give the same" not in text(page, "#result")  # their classes differ
        said = point(page, 0.2, 0.5)
        assert "adapted red (100 %), coarse blue (100 %)" in said
        assert said.endswith("column 16, row 20")
        assert "adapted green (100 %), coarse green (100 %)" in point(page, 0.9, 0.5)

        page.run("document.querySelector('input[value=coarse]').click()")
        assert legend(page) == ["blue", "60 %", "green", "40 %"]
        pixel = "[...results[0].canvas.getContext('2d').getImageData(5, 5, 1, 1).data]"
        assert page.run(pixel) == [30, 30, 200, 255]
        page.run("document.querySelectorAll('.classes button')[1].click()")  # only green
        assert page.run(pixel) == [0, 0, 0, 0]
        page.run("document.querySelectorAll('.classes button')[1].click()")
        page.run("byId('opacity').value = 20; byId('opacity').dispatchEvent(new Event('input'))")
        assert page.run("getComputedStyle(results[1].canvas).opacity") == "0.2"

        page.run("document.querySelector('input[value=slider]').click()")
        assert page.run("document.querySelectorAll('.stack').length") == 1
        page.run("byId('split').value = 25; byId('split').dispatchEvent(new Event('input'))")
        clips = "results.map(({canvas}) => getComputedStyle(canvas).clipPath)"
        assert page.run(clips) == ["inset(0px 75% 0px 0px)", "inset(0px 0px 0px 25%)"]

        page.run("byId('choose').focus()")
        for _ in range(10):  # with the keyboard alone
            page.key("Tab")
            if page.run("document.activeElement.className") == "stack":
                break
        page.key("ArrowRight")
        assert text(page, "#readout").endswith("column 44, row 20")
        name = page.run("document.activeElement.ariaLabel")
        assert f"{EVIL[:-1]}\\u202e.safetensors, coarse labels of a & <b>.png: blue 60\xa0%, green 40\xa0%" in name

        choose(page, broken)
        assert text(page, "#error").startswith("text.png: damaged image: not an image of a known type")
        assert legend(page) == ["blue", "60 %", "green", "40 %"]  # of the image before
        (tmp_path / "large.png").write_bytes(bytes(50_001))
        choose(page, tmp_path / "large.png")
        assert text(page, "#error").startswith("large.png: larger than")
        choose(page, other)
        assert text(page, "#error") == ""
        assert legend(page) == ["red", "100 %"]  # coarse

        papers = set()
        for width, dark in ((400, False), (800, True), (1600, False)):
            page.resize(width, dark=dark)
            assert page.run("document.documentElement.scrollWidth") <= width
            papers.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2
        assert page.run("document.querySelectorAll('img').length") == 0
        assert [each for each in page.complaints if "status of 415" not in each] == []

        page.open("about:blank")
        page.open(f"http://127.0.0.1:{bound.getsockname()[1]}/?token=wrong")
        page.wait("document.body && document.body.innerText.includes('the token is missing or wrong')")
    app.pool.shutdown()
