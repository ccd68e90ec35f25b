"use strict";
// The page of `ssaseg serve`. Names of classes and files come from outside: they are shown by textContent only.

const byId = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token") || "";
const headers = { Authorization: `Bearer ${token}` };
const unit = (number, name) => `${number}\u00a0${name}`; // on one line

const mebibytes = (bytes) => unit(Number((bytes / 2 ** 20).toPrecision(3)), "MiB");

function percent(share) {
  if (share > 0 && share < 0.0005) return unit("<\u00a00.1", "%");
  return unit(share >= 0.0995 || share === 0 ? Math.round(100 * share) : (100 * share).toFixed(1), "%");
}

let checkpoints = []; // of /v1/checkpoints
let limits = {};
let file = null;
let asked = 0; // number of the newest image, so that older answers are dropped
let results = []; // one a checkpoint, see `read`
let chosen = null; // the only class that is shown, [checkpoint, id]
let place = null; // what is under the pointer, in pixels of the view

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function selected(name) {
  return document.querySelector(`input[name="${name}"]:checked`).value;
}

function kindOf(result) {
  return "coarse" in result.parts ? selected("kind") : "adapted";
}

// ---- the server ---------------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new Error("the server does not answer: is the command still running?");
  }
  if (answer.ok) return answer;
  let reason = `error ${answer.status}`;
  try {
    reason = (await answer.json()).error || reason;
  } catch { /* not JSON: the number must do */ }
  throw new Error(reason);
}

// The form of `as_view` in networks.py: the length of a JSON text, the text, and its parts.
async function read(answer) {
  const buffer = await answer.arrayBuffer();
  const length = new DataView(buffer).getUint32(0);
  const result = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let start = 4 + length;
  const parts = {};
  for (const [name, size] of result.parts) {
    parts[name] = new Uint8Array(buffer, start, size);
    start += size;
  }
  result.parts = parts;
  result.picture = await createImageBitmap(new Blob([parts.picture], { type: "image/jpeg" }));
  return result;
}

async function label(image) {
  if (!image) return;
  const number = ++asked;
  byId("error").textContent = "";
  if (image.size > limits.bytes) {
    byId("error").textContent = `${image.name}: larger than ${mebibytes(limits.bytes)}: choose a smaller image`;
    return;
  }
  const name = image.name || "pasted image";
  byId("status").textContent = `Labelling ${name}…`;
  document.body.setAttribute("aria-busy", "true");
  try {
    const found = [];
    for (const checkpoint of checkpoints) {
      const path = `v1/predict?format=view&checkpoint=${checkpoint.number}`;
      const result = await read(await ask(path, { method: "POST", body: image }));
      if (number !== asked) return;
      found.push(Object.assign(result, { checkpoint }));
    }
    byId("panes").replaceChildren(); // while `results` are those of the panes, which may lose the focus now
    file = image;
    results = found;
    chosen = place = null;
    const { width, height } = found[0];
    const seconds = found.map((each) => unit(each.seconds.toFixed(2), "s")).join(" and ");
    const notes = [...new Set(found.map((each) => each.note).filter(Boolean))].join("; ");
    byId("status").textContent = `${name}: ${width}\u00a0×\u00a0${height} pixels, ${seconds}${notes && `; ${notes}`}`;
    byId("result").hidden = false;
    document.body.classList.add("filled");
    build(name);
  } catch (error) {
    if (number !== asked) return;
    byId("status").textContent = "";
    byId("error").textContent = `${name}: ${error.message}`.replace(`${name}: image: `, `${name}: `);
  } finally {
    if (number === asked) document.body.removeAttribute("aria-busy");
  }
}

async function save(result, button) {
  button.disabled = true;
  try {
    const path = `v1/predict?format=png&checkpoint=${result.checkpoint.number}&labels=${kindOf(result)}`;
    const url = URL.createObjectURL(await (await ask(path, { method: "POST", body: file })).blob());
    const stem = (file.name || "image").replace(/\.[^.]*$/, "");
    element("a", { href: url, download: `${stem}-${kindOf(result)}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  } catch (error) {
    byId("error").textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

// ---- what is shown ------------------------------------------------------------------------------------------------

function build(name) {
  const slider = results.length > 1 && selected("layout") === "slider";
  const panes = byId("panes");
  panes.replaceChildren();
  panes.classList.toggle("two", results.length > 1 && !slider);
  byId("split-row").hidden = !slider;
  const groups = slider ? [results] : results.map((result) => [result]);
  for (const group of groups) panes.append(makePane(group, name));
  refresh();
}

function makePane(group, name) {
  const { width, height } = group[0].view;
  const stack = element("div", { className: "stack", tabIndex: 0 });
  stack.setAttribute("role", "img");
  const picture = element("canvas", { width, height });
  picture.getContext("2d").drawImage(group[0].picture, 0, 0, width, height);
  stack.append(picture);
  for (const result of group) {
    result.canvas = element("canvas", { width, height });
    result.canvas.style.clipPath = "";
    result.stack = stack;
    result.name = name;
    stack.append(result.canvas);
  }
  if (group.length > 1) stack.append(element("div", { className: "divider" }));
  stack.append(element("div", { className: "cross", hidden: true }));
  stack.addEventListener("pointermove", (event) => {
    const box = stack.getBoundingClientRect();
    if (group.length > 1 && event.buttons === 1) setSplit((100 * (event.clientX - box.left)) / box.width);
    point(((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height);
  });
  stack.addEventListener("pointerleave", () => point());
  stack.addEventListener("blur", () => point());
  stack.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 20 : 4;
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!way) return;
    event.preventDefault();
    const [x, y] = place || [width / 2, height / 2];
    point(x + way[0], y + way[1]);
  });
  const pane = element("figure", { className: "pane" });
  pane.style.setProperty("--ratio", width / height);
  const sides = group.length > 1 ? ["left: ", "right: "] : [""];
  const heads = group.map((result, index) => makeHead(result, sides[index]));
  const legends = group.map((result) => makeLegend(result, group.length > 1));
  pane.append(...heads, element("div", { className: "pane-body" }, stack, element("div", {}, ...legends)));
  return pane;
}

function makeHead(result, side) {
  const text = element("h2", { textContent: side + result.checkpoint.name });
  const button = element("button", { type: "button", className: "plain", textContent: "Save labels as PNG" });
  button.addEventListener("click", () => save(result, button));
  return element("div", { className: "pane-head" }, text, button);
}

function makeLegend(result, titled) {
  const list = element("ul", { className: "classes" });
  list.setAttribute("aria-label", `Classes of ${result.checkpoint.name}: show only one`);
  result.list = list;
  const parts = [list];
  if (titled) parts.unshift(element("p", { className: "facts", textContent: result.checkpoint.name }));
  return element("div", {}, ...parts);
}

function fillLegend(result) {
  const shares = result.shares[kindOf(result)];
  const order = result.checkpoint.classes.filter(({ id }) => shares[id] > 0).sort((a, b) => shares[b.id] - shares[a.id]);
  const focused = document.activeElement && result.list.contains(document.activeElement)
    ? document.activeElement.dataset.id : null;
  result.list.replaceChildren(...order.map(({ id, name, color }) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `rgb(${color.join(",")})`;
    const button = element("button", { type: "button" },
      swatch,
      element("span", { className: "class-name", textContent: name }),
      element("span", { className: "share", textContent: percent(shares[id]) }));
    button.dataset.id = id;
    const pressed = chosen !== null && chosen[0] === result && chosen[1] === id;
    button.setAttribute("aria-pressed", pressed);
    button.addEventListener("click", () => {
      chosen = pressed ? null : [result, id];
      refresh();
    });
    return element("li", {}, button);
  }));
  if (focused !== null) result.list.querySelector(`[data-id="${focused}"]`)?.focus();
  const first = order.slice(0, 5).map(({ id, name }) => `${name} ${percent(shares[id])}`).join(", ");
  const kind = "coarse" in result.parts ? `${kindOf(result)} ` : "";
  return `${result.checkpoint.name}, ${kind}labels of ${result.name}: ${first}${order.length > 5 ? ", …" : ""}`;
}

function paint(result) {
  const { width, height } = result.view;
  const labels = result.parts[kindOf(result)];
  const colours = result.checkpoint.classes.map(({ color: [r, g, b] }, id) => {
    const shown = chosen === null || chosen[0] !== result || chosen[1] === id;
    return shown ? ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0 : 0;
  });
  const pixels = new ImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // little-endian, as all machines of today that run browsers
  for (let index = 0; index < words.length; index++) words[index] = colours[labels[index]];
  result.canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function refresh() {
  const texts = new Map();
  for (const result of results) {
    paint(result);
    texts.set(result.stack, [...(texts.get(result.stack) || []), fillLegend(result)]);
  }
  for (const [stack, lines] of texts) {
    stack.setAttribute("aria-label", `${lines.join(". ")}. Arrow keys move a mark that names the class under it.`);
  }
  fade();
  setSplit(Number(byId("split").value));
  compareAll();
  point(...(place || []));
}

function fade() {
  const value = byId("opacity").value;
  byId("opacity-value").textContent = unit(value, "%");
  for (const { canvas } of results) canvas.style.opacity = value / 100;
}

function setSplit(value) {
  const at = Math.min(Math.max(Math.round(value), 0), 100);
  byId("split").value = at;
  byId("split-value").textContent = unit(at, "%");
  if (results.length < 2 || results[0].stack !== results[1].stack) return;
  results[0].canvas.style.clipPath = `inset(0 ${100 - at}% 0 0)`;
  results[1].canvas.style.clipPath = `inset(0 0 0 ${at}%)`;
  results[0].stack.querySelector(".divider").style.left = `${at}%`;
}

function compareAll() {
  const [first, second] = results;
  const names = (result) => JSON.stringify(result.checkpoint.classes.map(({ name }) => name));
  byId("agreement").textContent = "";
  if (!second || names(first) !== names(second)) return;
  const [ours, theirs] = [first, second].map((result) => result.parts[kindOf(result)]);
  let equal = 0;
  for (let index = 0; index < ours.length; index++) equal += ours[index] === theirs[index];
  byId("agreement").textContent = `Both give the same label to ${(100 * equal / ours.length).toFixed(1)} % of the pixels.`;
}

// What is at a place of the view; without one, nothing.
function point(x, y) {
  for (const { stack } of results) stack.querySelector(".cross").hidden = true;
  if (x === undefined || !results.length) {
    place = null;
    byId("readout").textContent = "Point at the image: the class and how sure the network is.";
    return;
  }
  const { width, height } = results[0].view;
  place = [Math.min(Math.max(x, 0), width - 1), Math.min(Math.max(y, 0), height - 1)];
  const at = Math.floor(place[1]) * width + Math.floor(place[0]);
  const scale = results[0].width / width;
  const lines = results.map((result) => {
    const kinds = ["adapted", "coarse"].filter((kind) => kind in result.parts);
    const said = kinds.map((kind) => {
      const { name } = result.checkpoint.classes[result.parts[kind][at]];
      const sure = `${name} (${percent(result.parts[`${kind}_confidence`][at] / 255)})`;
      return kinds.length > 1 ? `${kind} ${sure}` : sure;
    });
    const cross = result.stack.querySelector(".cross");
    cross.hidden = false;
    cross.style.left = `${(100 * place[0]) / width}%`;
    cross.style.top = `${(100 * place[1]) / height}%`;
    return results.length > 1 ? `${result.checkpoint.name}: ${said.join(", ")}` : said.join(", ");
  });
  const [column, row] = place.map((value) => Math.floor(value * scale));
  byId("readout").textContent = `${lines.join(" · ")} · column ${column}, row ${row}`;
}

// ---- input --------------------------------------------------------------------------------------------------------

const firstImage = (files) => [...files].find((each) => each.type.startsWith("image/")) || files[0];

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  label(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  label(firstImage(event.dataTransfer.files));
});
document.addEventListener("paste", (event) => label(firstImage(event.clipboardData.files)));
byId("opacity").addEventListener("input", fade);
byId("split").addEventListener("input", (event) => setSplit(Number(event.target.value)));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
for (const each of document.querySelectorAll('input[name="kind"]')) each.addEventListener("change", refresh);
for (const each of document.querySelectorAll('input[name="layout"]')) {
  each.addEventListener("change", () => {
    chosen = place = null;
    if (results.length) build(results[0].name);
  });
}

ask("v1/checkpoints").then((answer) => answer.json()).then((found) => {
  ({ checkpoints, limits } = found);
  byId("about").textContent = checkpoints.map(({ name, network, classes }) => `${name} (${network}, ${classes.length} classes)`).join(" and ");
  const most = `${unit(limits.pixels / 1e6, "megapixels")} and ${mebibytes(limits.bytes)}`;
  byId("kept").textContent = `At most ${most}. It is sent to this server only, which does not keep it.`;
  byId("kinds").hidden = !checkpoints.some(({ adapts }) => adapts);
  byId("layouts").hidden = checkpoints.length < 2;
}).catch((error) => {
  byId("about").textContent = "";
  byId("error").textContent = error.message;
});
