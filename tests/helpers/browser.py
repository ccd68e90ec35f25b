"""Pages in a real browser: headless Chromium, and a page that looks at another one in frames of several widths."""

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from chromium import CHROMIUM

# Loads HTML in a frame and says what is wrong with it. A frame's width is that of the page's window; the page's own
# policy forbids scripts, so that this one stays outside.
LOOKING = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre><script>
const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
const blend = ([r, g, b, a = 1], below) => [r, g, b].map((value, at) => a * value + (1 - a) * below[at]);
const light = colour => colour.slice(0, 3)
  .map(value => value / 255)
  .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
const papers = new WeakMap();
function paper(element, view) {
  if (!element) return [255, 255, 255];
  if (!papers.has(element)) {
    const own = parts(view.getComputedStyle(element).backgroundColor);
    papers.set(element, own[3] === undefined ? own : blend(own, paper(element.parentElement, view)));
  }
  return papers.get(element);
}
function contrast(page, view) {
  let lowest = [99, ""];
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode, parent = text.parentElement;
    if (!text.data.trim() || parent.closest("style")) continue;
    const style = view.getComputedStyle(parent);
    const below = paper(parent, view);
    const ink = blend(parts(parent.closest("svg") ? style.fill : style.color), below);
    const pair = [light(ink), light(below)].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, text.data.trim().slice(0, 40)];
  }
  return lowest;
}
async function look(html, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.srcdoc = html; });
  const page = frame.contentDocument, view = frame.contentWindow, all = [...page.querySelectorAll("*")];
  const scrolls = all.filter(each => view.getComputedStyle(each).overflowX === "auto");
  const found = {
    title: page.title,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    scripts: all.filter(each => each.localName === "script" || each.getAttributeNames().some(name => /^on/.test(name)))
      .map(each => each.outerHTML),
    pictures: page.images.length,
    broken: [...page.images].filter(each => !each.naturalWidth || !each.alt).length,
    loaded: view.performance.getEntriesByType("resource").map(each => each.name).filter(name => !/^data:/.test(name)),
    out_of_reach: scrolls.filter(each => each.tabIndex !== 0 || !each.getAttribute("aria-label")).length,
    dead: [...page.links].filter(each => !page.getElementById(each.getAttribute("href").slice(1))).length,
    twice: all.filter(each => each.id).length - new Set(all.map(each => each.id).filter(id => id)).size,
    contrast: contrast(page, view),
    paper: paper(page.body, view),
    text: page.body.innerText,
  };
  frame.remove();
  return found;
}
(async () => {
  const html = HTML, dark = html.replaceAll("(prefers-color-scheme: dark)", "(min-width: 1px)");
  const found = {};
  for (const width of WIDTHS) for (const [name, each] of [["light", html], ["dark", dark]])
    found[`${width} ${name}`] = await look(each, width);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


def look_at(page: Path, widths: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """What is found at each width [pixels], light and dark, as "400 light"; `folder`: for the browser's files."""
    html = json.dumps(page.read_text()).replace("<", "\\u003c")  # else it could end the script
    looking = folder / "looking.html"
    looking.write_text(LOOKING.replace("HTML,", f"{html},").replace("WIDTHS)", f"{json.dumps(widths)})"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=20000"]
    command = [str(CHROMIUM), *words, f"--user-data-dir={folder / 'profile'}", "--dump-dom", looking.as_uri()]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search('<pre id="found">(.*?)</pre>', dump, flags=re.DOTALL)
    assert found is not None, dump[:500]
    return json.loads(unescape(found[1]))
