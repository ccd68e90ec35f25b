"""The sides of networks.py, each in its own process: `python network_sides.py SIDE` answers one question per line.

`ours` and `plain` differ in the package that they import. `mmseg` and `transformers` run in interpreters that have
these packages: see network_peers.py.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from network_peers import peer_network, versions
from torch import Tensor, nn

PEERS = ("mmseg", "transformers")
SIDES = ("ours", "plain", *PEERS)
THREADS = 2
PASSES = 3  # passes of a side before the next side's turn: fewer
TURN = 2000  # if a turn has taken this long [ms]


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    classifier: str
    classes: int = 150
    side: int = 512  # of the image [pixels]

    def images(self, batch: int = 1) -> Tensor:
        return torch.randn(batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_network(case: Case) -> nn.Module:
    """A network with random weights from a seed. The statistics of its norms are those of two images.

    The weights of the norms are random, too: as initialised they would set whole branches to zero. With statistics that
    do not fit, activations would grow until rounding alone makes the float32 sides differ.
    """
    from ssaseg.models import build_model

    torch.manual_seed(0)
    model = build_model(case.model, case.classes, case.classifier).eval().requires_grad_(False)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.train().momentum = 1.0
    model(case.images(2))
    return model.eval()


def in_form(model: Any, form: str) -> nn.Module:
    if form in ("eager", "ssa"):
        return model
    from ssaseg.models.deploy import fold
    from ssaseg.models.fast import accelerate

    if form == "folded":
        return fold(model)
    if form == "bf16":
        return accelerate(model, torch.bfloat16, compiled=False)
    return accelerate(model, torch.float32 if form == "compiled" else None)


def official_weights(model: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of our network under the names of other programs: mmsegmentation's, and those that its family has."""
    from ssaseg.models.build import family_of
    from ssaseg.models.official import official_entries

    layouts = ["", *(layout.name for layout in family_of(model.name).layouts)]
    state = model.state_dict()
    named = {name: official_entries(model, layout=name) for name in layouts}
    return {
        name: {key: value for entry in found for key, value in entry.give(state).items()}
        for name, found in named.items()
    }


@torch.no_grad()
def serve(side: str) -> None:
    """Reads questions: what to build, how long its passes take, how its labels agree. Each answer is a line of JSON."""
    torch.set_num_threads(THREADS)
    networks: dict[str, nn.Module] = {}
    images = torch.empty(0)

    def once(form: str) -> tuple[float, Tensor]:
        return seconds(lambda: networks[form](images))

    for line in sys.stdin:
        question, given = json.loads(line)
        answer: Any = None
        if question == "build":
            case, form = Case(**given["case"]), given["form"]
            images = case.images()
            if side in PEERS:
                networks[form], same = peer_network(side, case, given["weights"])
            else:
                model, same = our_network(case), 1.0
                if given["weights"] and form == "eager":
                    torch.save(official_weights(model), given["weights"])
                networks[form] = in_form(model, form)
            first, logits = once(form)
            torch.save(logits.float().contiguous(), given["logits"])
            answer = [first, same]
        elif question == "time":
            answer = []
            while len(answer) < PASSES and sum(answer) < TURN:
                answer.append(1e3 * once(given["form"])[0])
        elif question == "forget":
            networks.clear()
            torch.compiler.reset()  # the compiler stops compiling after a number of recompilations
        elif question == "agree":
            torch.compiler.reset()
            answer = agreement(Path(given["checkpoint"]), Path(given["images"]), given["count"], given["compiled"])
        elif question == "about":
            answer = about(side)
        print("answer " + json.dumps(answer), flush=True)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def about(side: str) -> dict[str, str]:
    if side in PEERS:
        return versions(side)
    import ssaseg.models

    return {"from": str(ssaseg.models.__file__)}


def agreement(checkpoint: Path, folder: Path, count: int, compiled: bool | None) -> dict[str, Any]:
    """Share of pixels with the same label from the eager network and from the fast path, at the size of the images.

    Measured on `count` images, spread over a folder.
    """
    import cv2

    from ssaseg.datasets.colour import normalize
    from ssaseg.datasets.transforms import test_image
    from ssaseg.models import load_model
    from ssaseg.models.fast import accelerate
    from ssaseg.models.labelling import label_map

    model, metadata = load_model(checkpoint)
    fast = accelerate(model, compiled=compiled)
    files = sorted(file for file in folder.iterdir() if file.suffix in {".jpg", ".jpeg", ".png"})
    shares = []
    for file in files[:: max(len(files) // count, 1)][:count]:
        image = cv2.imread(str(file))
        resized = test_image(image, metadata["protocol"]["scale"], metadata["protocol"]["multiple"])
        pixels = normalize(torch.from_numpy(resized)[None], metadata["mean"], metadata["std"])
        maps = [label_map(network(pixels), resized.shape[:2], image.shape[:2]) for network in (model, fast)]
        shares.append((maps[0] == maps[1]).double().mean().item())
    return {
        "model": f"{model.name} {model.classifier_name}",
        "step": metadata["step"],
        "images": len(shares),
        "same labels": statistics.mean(shares),
        "worst image": min(shares),
    }


if __name__ == "__main__" and sys.argv[1] in SIDES:
    serve(sys.argv[1])
