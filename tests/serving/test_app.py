"""The end points of `ssaseg serve`, asked without a server: who gets an answer, what it is, and what is refused."""

import asyncio
import base64
import gzip
import hashlib
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from asgi import NAMES, Answer, Strongest, ask, ask_now, network, png, together
from calling import call
from PIL import Image
from predicting import CLASSES, picture, save_checkpoint

from ssaseg.cli.engine.opening import open_file
from ssaseg.cli.errors import CommandError
from ssaseg.cli.serving import networks
from ssaseg.cli.serving.app import App, Limits
from ssaseg.cli.serving.networks import Network, names_of

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PATHS = ["/", "/v1/checkpoints", "/v1/predict", "/other"]


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    made = App([network()], "t0ken", Limits(bytes=20_000, pixels=90_000, places=3, seconds=5))
    yield made
    made.pool.shutdown()


@pytest.fixture
def engine() -> Iterator[Strongest]:
    made = Strongest()
    yield made
    made.may_run.set()


def app_of(engine: Strongest, **limits: Any) -> App:
    return App([network(engine)], "t0ken", Limits(**limits))


def save(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def colours(seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(seed=seed))


# ---- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", [None, "", "t0ke", "t0kenn", "T0KEN", "\xe9"])
def test_without_the_token_nothing_is_answered(app: App, path: str, token: str | None) -> None:
    answer = ask(app, path, token=token)
    assert answer.status == 403
    assert "token" in answer.error
    assert "t0ken" not in answer.error


def test_the_token_may_be_in_the_address(app: App) -> None:
    assert ask(app, "/?token=t0ken", token=None).status == 200
    assert ask(app, "/?token=wrong&token=t0ken", token=None).status == 403
    assert ask(app, "/?token=t0ken", token="wrong").status == 403


def test_the_health_needs_no_token_and_says_nothing_else(app: App) -> None:
    answer = ask(app, "/healthz", token=None)
    assert (answer.status, answer.body) == (200, b"ok\n")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost:80", "LocalHost", "[::1]:8000", "192.168.0.9:8", "box.lan:80"]
)
def test_own_names_are_answered(host: str) -> None:
    app = App([network()], "t0ken", Limits(), hosts=["box.lan"])
    assert ask(app, "/v1/checkpoints", headers={"host": host}).status == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/predict"])
@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "", "[::1", "@", "a b"]
)
def test_other_names_are_refused(app: App, path: str, host: str) -> None:
    answer = ask(app, path, headers={"host": host})
    assert answer.status == 403
    assert "Host" in answer.error


def test_what_is_not_there(app: App) -> None:
    assert ask(app, "/v1/other").status == 404
    for path, method, allowed in (("/", "POST", "GET"), ("/healthz", "PUT", "GET"), ("/v1/predict", "GET", "POST")):
        answer = ask(app, path, method=method)
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert ask(app, "/", method="HEAD").status == 200
    for query in ("format=gif", "checkpoint=2", "checkpoint=0", "checkpoint=x", "labels=coarse", "format="):
        answer = ask(app, f"/v1/predict?{query}", png((9, 0, 0)))
        assert answer.status == 400, query
        assert query.partition("=")[0] in answer.error
    assert ask(app, "/v1/predict?" + "&".join(f"a{i}=1" for i in range(30)), png((9, 0, 0))).status == 400


def test_every_answer_is_closed_to_other_pages(app: App) -> None:
    for path in (*PATHS, "/healthz"):
        for token in (None, "t0ken"):
            headers = ask(app, path, token=token).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["cache-control"] == "no-store"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers


def test_the_page_loads_nothing_and_runs_only_its_own(app: App) -> None:
    page = ask(app, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = page.body.decode()
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(inside) > 1000
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert re.findall(r"https?:|[\"'(]//|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text) == []
    assert re.findall(r"\son\w+=|\sstyle=", text) == []  # which the policy would refuse


# ---- labels --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of all sorts that `predict` takes."""
    folder = tmp_path_factory.mktemp("files")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = picture()[..., 0]
    contents = {
        "turned.jpg": save(colours(), "JPEG", exif=turned),
        "grey.png": save(Image.fromarray(grey), "PNG"),
        "deep.png": cv2.imencode(".png", picture().astype(np.uint16) * 257)[1].tobytes(),
        "alpha.png": save(colours().convert("RGBA").quantize(16), "PNG"),
        "moving.gif": save(colours(), "GIF", save_all=True, append_images=[colours(1)]),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", header={"range": [0, 60000]})


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> App:
    return App([Network.of(open_file(checkpoint), CPU, "tiny")], "t0ken", Limits())


def test_labels_are_those_of_predict(tmp_path: Path, real: App, checkpoint: Path, files: dict[str, Path]) -> None:
    words = ("predict", checkpoint, *files.values(), "--out", tmp_path, "--save", "index,coarse", "--device", "cpu")
    assert call(*words).exit_code == 0
    for name, path in files.items():
        folder, labels = ("coarse", "coarse") if name == "deep.png" else ("index", "adapted")
        answer = ask(real, f"/v1/predict?format=png&labels={labels}", path.read_bytes())
        assert (answer.status, answer.headers["content-type"]) == (200, "image/png"), name
        assert answer.body == (tmp_path / folder / f"{path.stem}.png").read_bytes(), name
        assert Image.open(io.BytesIO(answer.body)).size == ((40, 56) if name == "turned.jpg" else (56, 40))


def test_shares_are_those_of_the_labels(real: App, files: dict[str, Path]) -> None:
    content = files["turned.jpg"].read_bytes()
    for kind in ("adapted", "coarse"):
        answer = ask(real, f"/v1/predict?labels={kind}", content).json
        image = ask(real, f"/v1/predict?labels={kind}&format=png", content).body
        labels = np.array(Image.open(io.BytesIO(image)))
        assert (answer["height"], answer["width"]) == labels.shape
        assert (answer["checkpoint"], answer["labels"]) == ("tiny", kind)
        assert [each["name"] for each in answer["classes"]] == CLASSES
        assert [each["pixels"] for each in answer["classes"]] == np.bincount(labels.ravel(), minlength=5).tolist()
        assert sum(each["share"] for each in answer["classes"]) == pytest.approx(1)


def read_view(answer: Answer) -> tuple[dict[str, Any], dict[str, bytes]]:
    assert answer.headers["content-encoding"] == "gzip"
    content = gzip.decompress(answer.body)
    at = 4 + int.from_bytes(content[:4], "big")
    header = json.loads(content[4:at])
    parts = {}
    for name, size in header["parts"]:
        parts[name] = content[at : at + size]
        at += size
    assert at == len(content)
    return header, parts


def test_what_the_page_gets(monkeypatch: pytest.MonkeyPatch, real: App) -> None:
    monkeypatch.setattr(networks, "VIEW", 60)
    image = picture(64, 120)
    content = cv2.imencode(".png", image)[1].tobytes()
    header, parts = read_view(ask(real, "/v1/predict?format=view", content))
    view = (header["view"]["height"], header["view"]["width"])
    assert (header["width"], header["height"], view) == (120, 64, (32, 60))
    assert cv2.imdecode(np.frombuffer(parts["picture"], np.uint8), 1).shape == (*view, 3)
    for kind in ("adapted", "coarse"):
        png = ask(real, f"/v1/predict?format=png&labels={kind}", content).body
        labels = np.array(Image.open(io.BytesIO(png)))
        assert parts[kind] == labels[1::2, 1::2].tobytes()
        assert header["shares"][kind] == [float((labels == index).mean()) for index in range(5)]
        sure = np.frombuffer(parts[f"{kind}_confidence"], np.uint8)
        assert sure.size == view[0] * view[1]
        assert 255 / 5 - 1 <= sure.min() <= sure.max() <= 255
    assert parts["adapted"] != parts["coarse"]
    inference = real.networks[0].inference
    (made,) = inference.predict_batch([[torch.from_numpy(image)]], [(64, 120)], ["image"], probabilities=True)
    likely = made.probabilities.max(axis=0)[1::2, 1::2].astype(np.float32) * 255
    sure = np.frombuffer(parts["adapted_confidence"], np.uint8).reshape(view)
    np.testing.assert_allclose(sure, likely, rtol=0, atol=0.7)


def test_without_adaptation_there_is_no_coarse(app: App) -> None:
    header, parts = read_view(ask(app, "/v1/predict?format=view", png((9, 200, 0))))
    assert list(parts) == ["picture", "adapted", "adapted_confidence"]
    assert header["shares"] == {"adapted": [0, 1, 0]}
    assert set(parts["adapted_confidence"]) == {255}


def test_two_checkpoints(app: App) -> None:
    both = App([network(), network(names=("a", "\x1b[2J<b>", "c"), name="b\u202e")], "t0ken", Limits(pixels=7))
    found = ask(both, "/v1/checkpoints").json
    assert found["limits"] == {"bytes": 2**25, "pixels": 7}
    assert [each["number"] for each in found["checkpoints"]] == [1, 2]
    first, second = found["checkpoints"]
    assert [each["name"] for each in first["classes"]] == list(NAMES)
    assert first["classes"][1] == {"id": 1, "name": "green", "color": [30, 200, 30]}
    assert (second["name"], second["classes"][1]["name"]) == ("b\\u202e", "\\x1b[2J<b>")
    assert (first["adapts"], first["protocol"]) == (False, "not resized; whole image, single scale, no flip")
    both.limits = Limits()
    for number, name in ((1, "green"), (2, "\\x1b[2J<b>")):
        answer = ask(both, f"/v1/predict?checkpoint={number}", png((9, 200, 0))).json
        assert [each["name"] for each in answer["classes"] if each["share"] == 1] == [name]
    paths = [Path("a/best.st"), Path("b/best.st"), Path("b/x.st")]
    assert names_of(paths) == ["a/best.st", "b/best.st", "x.st"]


# ---- what is refused -----------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header promises more pixels than its data has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
REFUSED = {
    "empty": (b"", 415, "empty file"),
    "text": (b"hello, world", 415, "not an image of a known type"),
    "html": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", 415, "curl --data-binary @FILE"),
    "zip": (b"PK\x03\x04" + bytes(50), 415, "an archive"),
    "form": (b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + png((1, 2, 3)) + b"\r\n--x--", 415, "curl"),
    "bomb": (bomb(16_000, 16_000), 422, "16000×16000 pixels"),
    "larger bomb": (bomb(60_000, 60_000), 422, "more than 536,870,912 pixels"),
    "above the limit": (png((1, 1, 1), (301, 301)), 422, "expected at most 90,000 pixels"),
    "cut PNG": (save(Image.fromarray(NOISE), "PNG")[:5000], 422, "its end is missing"),
    "cut JPEG": (save(Image.fromarray(NOISE), "JPEG")[:1000], 422, "its end is missing"),
    "damaged": (bomb(100, 100), 422, "damaged image"),
    "too small": (png((1, 1, 1), (1, 1)), 422, "too small"),
    "floating": (save(Image.fromarray(np.zeros((50, 50), np.float32)), "TIFF"), 422, "float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_labelled_is_refused_with_a_reason(app: App, case: str) -> None:
    content, status, reason = REFUSED[case]
    for form in ("json", "png", "view"):
        answer = ask(app, f"/v1/predict?format={form}", content, method="POST")
        assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
        assert reason in answer.error
        assert "\n" not in answer.error
    assert ask(app, "/v1/predict", png((9, 0, 0))).status == 200


def test_too_many_bytes(app: App) -> None:
    large = app.limits.bytes + 1
    for headers in ({}, {"content-length": str(large)}, {"content-length": str(large), "expect": "100-continue"}):
        answer = ask(app, "/v1/predict", [b"x" * 15_000, b"x" * 5_001], headers=headers)
        assert (answer.status, answer.error) == (413, "larger than 0.0190735 MiB: send a smaller image")
        assert ("connection" in answer.headers) == ("expect" in headers)  # else all has been read
    answer = ask(app, "/v1/predict", [b"x" * 15_000] * 10, stalls=True)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert app.taken == 0


def test_a_slow_client(engine: Strongest) -> None:
    app = app_of(engine, seconds=0.05)
    answer = ask(app, "/v1/predict", b"\x89PNG", stalls=True)
    assert (answer.status, answer.error) == (408, "not received within 0.05 seconds: send a smaller image")
    assert (app.taken, engine.runs) == (0, 0)


def test_a_client_that_does_not_read(engine: Strongest) -> None:
    app = app_of(engine, seconds=0.05)
    began = []

    async def deaf(message: dict[str, Any]) -> None:
        began.append(message["type"])
        await asyncio.Event().wait()

    async def never() -> dict[str, Any]:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/healthz",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
    }
    asyncio.run(asyncio.wait_for(app(scope, never, deaf), 5))
    assert began == ["http.response.start"]


# ---- the queue -----------------------------------------------------------------------------------------------------


async def began(engine: Strongest) -> None:
    while not engine.started.is_set():
        await asyncio.sleep(0.005)


def test_a_full_queue_says_so_at_once(engine: Strongest) -> None:
    app = app_of(engine, places=2)
    engine.may_run.clear()

    async def run() -> list[Answer]:
        first = [asyncio.ensure_future(ask_now(app, "/v1/predict", png((0, 9, 0)))) for _ in range(2)]
        await began(engine)
        refused = await ask_now(app, "/v1/predict", png((0, 9, 0)))
        others = [await ask_now(app, path) for path in ("/healthz", "/")]  # which do not wait
        engine.may_run.set()
        return [*await asyncio.gather(*first), refused, *others]

    answers = asyncio.run(run())
    assert [answer.status for answer in answers] == [200, 200, 503, 200, 200]
    assert answers[2].error == "2 images are waiting: try again later"
    assert int(answers[2].headers["retry-after"]) >= 1
    assert (engine.runs, app.taken) == (2, 0)


def test_nobody_waits_for_ever(engine: Strongest) -> None:
    app = app_of(engine, seconds=0.1)
    engine.may_run.clear()

    async def run() -> list[Answer]:
        first = asyncio.ensure_future(ask_now(app, "/v1/predict", png((0, 9, 0))))
        await began(engine)
        late = await ask_now(app, "/v1/predict", png((0, 9, 0)))
        engine.may_run.set()
        return [await first, late, await ask_now(app, "/v1/predict", png((0, 9, 0)))]

    answers = asyncio.run(run())
    assert [answer.status for answer in answers] == [200, 503, 200]
    assert "waited longer than 0.1 seconds" in answers[1].error
    assert "retry-after" in answers[1].headers


def test_nothing_is_done_for_clients_that_are_gone(engine: Strongest) -> None:
    app = app_of(engine)
    engine.may_run.clear()

    async def run() -> list[Answer]:
        gone = asyncio.Event()
        first = [asyncio.ensure_future(ask_now(app, "/v1/predict", png((0, 9, 0)), gone=gone)) for _ in range(3)]
        await began(engine)
        gone.set()
        answers = list(await asyncio.gather(*first))
        assert app.taken == 0
        last = asyncio.ensure_future(ask_now(app, "/v1/predict", png((0, 0, 9))))
        await asyncio.sleep(0.02)
        assert not last.done()  # the image in work is not given up: its thread is not free
        engine.may_run.set()
        return [*answers, await last]

    answers = asyncio.run(run())
    assert [answer.status for answer in answers] == [0, 0, 0, 200]
    assert engine.runs == 2  # of the four
    assert answers[-1].json["classes"][2]["share"] == 1


def test_answers_are_not_mixed_up(app: App) -> None:
    app.limits = app.limits._replace(places=9)
    sent = [[9 if channel == number % 3 else 0 for channel in range(3)] for number in range(9)]
    answers = together(*(ask_now(app, "/v1/predict", png(colour)) for colour in sent))
    assert [[each["share"] for each in answer.json["classes"]] for answer in answers] == [
        [channel / 9 for channel in colour] for colour in sent
    ]


# ---- failures ------------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_fit_into_memory(engine: Strongest) -> None:
    app = app_of(engine)
    engine.fails = MemoryError
    answer = ask(app, "/v1/predict", png((9, 0, 0)))
    assert (answer.status, answer.error) == (422, "image: not enough memory for this image")
    assert ask(app, "/healthz").status == 200


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (lambda: FloatingPointError("image: the network's output is not finite"), False),
        (lambda: RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (lambda: CommandError("the runtime\nis gone"), True),
    ],
)
def test_failures_of_the_network(engine: Strongest, capsys: Any, error: Any, lasting: bool) -> None:
    app = app_of(engine)
    engine.fails = error
    answer = ask(app, "/v1/predict", png((9, 0, 0)))
    assert answer.status == 500
    assert capsys.readouterr().err == f"an image could not be labelled: {answer.error}\n"
    health = ask(app, "/healthz")
    assert health.status == (503 if lasting else 200)
    assert app.taken == 0


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_images_that_are_too_large_for_the_network_are_noted(tmp_path: Path) -> None:
    recipe = {"augment": {"scale": [48, 32]}}
    opened = open_file(save_checkpoint(tmp_path / "x.safetensors", "linear", header={"recipe": recipe}))
    plain, fitted = Network.of(opened, CPU, "x"), Network.of(opened, CPU, "x", {"scale": [48, 32]})
    assert plain.note((32, 48)) is None
    assert plain.note((80, 120)) is None
    assert "3.0 times as large as in training (48x32)" in (plain.note((96, 144)) or "")
    assert fitted.note((96, 144)) is None
    assert fitted.inference.protocol.scale == (48, 32)
    data = png((90, 120, 30), (96, 144))
    answer = json.loads(networks.as_json(plain, data, 10**6, "adapted"))
    assert answer["note"] == plain.note((96, 144))
    assert json.loads(networks.as_json(fitted, data, 10**6, "adapted"))["note"] is None
