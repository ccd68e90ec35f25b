"""The generated tables of README.md, docs/reproduce.md and docs/deployment.md.

    python benchmarks/tables.py            # writes the tables between the marks in these pages
    python benchmarks/tables.py --count    # counts parameters and GMACs before that: benchmarks/results/costs.json

Published mIoUs, schedules and starts are those in the headers of the recipes, which tests compare with the official
configurations. Counts are of 150 classes at 512×512; counting all networks takes minutes, as each makes one pass. Times
are those of `benchmarks/networks.py`, or, if it exists, of benchmarks/results/paper_table.json, which
`ssaseg profile --paper-table --json` writes. Nothing is estimated: what was not measured is said to be so.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ssaseg.cli.weights.known import KNOWN

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks/results"
CLASSIFIERS = ("linear", "ssa")
DATA_SETS = {"ade20k": "ADE20K", "coco_stuff10k": "COCO-Stuff-10K", "pascal_context_59": "PASCAL-Context-59"}
NONE = "–"
PAGES = ("README.md", "docs/reproduce.md", "docs/deployment.md")

Pair = tuple[Any, Any]  # of linear and ssa


class Header(NamedTuple):
    """What the comment at the top of a recipe says."""

    title: str  # SeaFormer-B
    size: str  # of a crop: 512x512
    steps: str
    batch: str
    start: str  # the file of ImageNet weights
    derived: bool  # there is no official configuration
    published: str | None  # mIoU [%], validation split, single scale
    ours: str | None


def main() -> None:
    """Writes the tables, and with --count the counts before that."""
    parser = argparse.ArgumentParser(description="Write the generated tables of the pages.")
    parser.add_argument("--count", action="store_true", help="count parameters and GMACs before (minutes)")
    if parser.parse_args().count:
        write_counts()
    for page in PAGES:
        file = PROJECT / page
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """`text` of a page with current tables between its marks."""
    tables = {"networks": networks_table, "recipes": recipes_table, "forms": forms_table, "predict": predict_table}

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+), by [^>]* -->\n).*?<!-- end -->", fill, text, flags=re.DOTALL)


def networks_table() -> str:
    """One row for each network with recipes on ADE20K: what it costs, and its mIoU there. Below it: ours on CamVid."""
    costs = {(row["model"], row["classifier"]): row for row in read("costs.json")["rows"]}
    times, how = measured_times()
    rows = [
        "| network | parameters [M] | GMACs | CPU [ms] | mIoU, published [%] | ours |",
        "|---|---|---|---|---|---|",
    ]
    names = [name for name in shipped("ade20k") if (name, "ssa") in costs]
    for name in sorted(names, key=lambda name: costs[name, "linear"]["gmacs"]):
        both = [header(f"ade20k-{name}-{classifier}") for classifier in CLASSIFIERS]
        ours = arrow(*(each.ours for each in both))
        cells = (
            f"{both[0].title} `{name}`",
            arrow(*(f"{costs[name, each]['parameters'] / 1e6:.2f}" for each in CLASSIFIERS)),
            arrow(*(f"{costs[name, each]['gmacs']:.1f}" for each in CLASSIFIERS)),
            arrow(*(times.get((name, each)) for each in CLASSIFIERS)),
            arrow(*(each.published for each in both)),
            "not measured" if ours == NONE else ours,
        )
        rows.append(f"| {' | '.join(cells)} |")
    scores = [
        f"`{file.stem}` {found[1]} % ({found[2]})"
        for file in sorted((PROJECT / "recipes").glob("camvid-*.yaml"))
        if (found := re.search(r"Score: +mIoU ([\d.]+) %.*, (from \w+);", file.read_text(encoding="utf-8")))
    ]
    ours = f"Measured by us, on CamVid's validation frames: {', '.join(scores)}."
    return "\n".join([*rows, "", f"CPU: {how}. {ours}"])


def recipes_table() -> str:
    """One row for each network on each published data set: how it is trained, and what was published."""
    rows = [
        "| recipe | crop | steps × batch | starts from | values | mIoU, published [%] | ours |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {file: name for name, start in KNOWN.items() for file in start.files}
    for data_set in DATA_SETS:
        for name in shipped(data_set):
            both = [header(f"{data_set}-{name}-{classifier}") for classifier in CLASSIFIERS]
            first = both[0]
            ours = arrow(*(each.ours for each in both))
            assert first.title == both[1].title
            cells = (
                f"`{data_set}-{name}`",
                first.size.replace("x", "×"),
                " / ".join(dict.fromkeys(f"{each.steps} × {each.batch}" for each in both)),
                f"`{names.get(first.start, first.start)}`",
                " / ".join(dict.fromkeys("derived" if each.derived else "official" for each in both)),
                arrow(*(each.published for each in both)),
                "not measured" if ours == NONE else ours,
            )
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def forms_table() -> str:
    """One row for each network that `benchmarks/networks.py` measured in all forms."""
    forms = {"eager": "exact", "folded": "folded", "bf16": "bfloat16", "compiled": "compiled", "fast": "both"}
    forms["mmseg"] = "mmsegmentation"
    measured = read("networks.json")["cpu"]
    rows = [f"| network | {' | '.join(forms.values())} |", f"|---|{'---|' * len(forms)}"]
    for each in measured["cases"]:
        times = [f"{each['median [ms]'][form]:.0f}" if form in each["median [ms]"] else NONE for form in forms]
        rows.append(f"| `{each['case']['model']}` {each['case']['classifier']} | {' | '.join(times)} |")
    return "\n".join([*rows, "", conditions(measured)])


def predict_table() -> str:
    """One row for each case of `benchmarks/predict.py`."""
    sides = {"before": "one after the other, exact", "now": "the default", "onnxruntime": "ONNX Runtime"}
    sides |= {"openvino": "OpenVINO", "mmseg": "mmsegmentation"}
    names = {"seaformer_s": "SeaFormer-S ssa", "segnext_t": "SegNeXt-T linear"}
    measured = read("predict.json")
    rows = [f"| network, images | {' | '.join(sides.values())} |", f"|---|{'---|' * len(sides)}"]
    for case, values in measured["cases"].items():
        height, width = values["size (height, width)"]
        speeds = [f"{values['images/s'][side]:.1f}" if side in values["images/s"] else NONE for side in sides]
        rows.append(f"| {names[case.partition('-')[2]]}, {width}×{height} | {' | '.join(speeds)} |")
    return "\n".join([*rows, "", conditions(measured)])


def conditions(measured: dict[str, Any]) -> str:
    """Where a file of results was measured, as a line of a page."""
    return f"{measured['on']}, PyTorch {measured['versions']['torch'].partition('+')[0]}; –: not measured."


def arrow(linear: str | None, ssa: str | None) -> str:
    """Both figures; a dash for one that is not known."""
    return NONE if linear is ssa is None else f"{linear or NONE} → {ssa or NONE}"


def shipped(data_set: str) -> list[str]:
    """Networks with a recipe for both classifiers on the data set."""
    found = sorted(file.stem.split("-")[1] for file in (PROJECT / "recipes").glob(f"{data_set}-*-ssa.yaml"))
    return [name for name in found if (PROJECT / f"recipes/{data_set}-{name}-linear.yaml").exists()]


def header(recipe: str) -> Header:
    """Of a recipe by name. Raises ValueError where its comment has another form."""
    comment = (PROJECT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    text = " ".join(line.lstrip("# ") for line in comment.splitlines())

    def find(pattern: str) -> str:
        if not (found := re.search(pattern, text)):
            raise ValueError(f"recipes/{recipe}.yaml: the comment has no {pattern!r}")
        return found[1]

    published = re.search(r"published: mIoU ([\d.]+) %", text)
    ours = re.search(r"ours: mIoU ([\d.]+) %", text)
    return Header(
        find(r"^(\S+) with "),
        find(r"classes, (\d+x\d+)\)"),
        find(r"Cost: +([\d,]+) steps"),
        find(r"steps of (\d+) images"),
        find(r"ckpts/(\S+) +from"),
        "derived" in text,
        published and published[1],
        ours and ours[1],
    )


def measured_times() -> tuple[dict[tuple[str, str], str], str]:
    """Times of the network for an image of 512×512 [ms] by network and classifier, for those that were measured; and
    how they were measured.
    """
    if (RESULTS / "paper_table.json").exists():
        table = read("paper_table.json")
        times = {(row["model"], row["classifier"]): f"{row['network_ms']['p50']:.0f}" for row in table["rows"]}
        return times, f"float32, nothing folded, {table['device']}, {table['threads']} threads"
    measured = read("networks.json")["cpu"]
    keyed = [((each["case"]["model"], each["case"]["classifier"]), each["median [ms]"]) for each in measured["cases"]]
    return {key: f"{medians['folded']:.0f}" for key, medians in keyed}, f"float32, norms folded, {measured['on']}"


def read(name: str) -> Any:
    """The content of a file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def write_counts() -> None:
    """Counts every network with recipes on ADE20K, with both classifiers; one at a time is in memory."""
    import torch

    from ssaseg.cli.profiling.counting import EVERY_OPERATION, count
    from ssaseg.models import build_model

    rows = []
    for name in shipped("ade20k"):
        for classifier in CLASSIFIERS:
            print(f"{name} {classifier} is counted", flush=True)
            model = build_model(name, 150, classifier).eval().requires_grad_(False)
            counts = count(model, torch.zeros(1, 3, 512, 512))
            gmacs = round(counts["gmacs"][EVERY_OPERATION], 4)
            used = counts["parameters_deployed"]
            rows.append({"model": name, "classifier": classifier, "parameters": used, "gmacs": gmacs})
    report = {
        "command": "python benchmarks/tables.py --count",
        "versions": {"torch": torch.__version__},
        "classes": 150,
        "size": [512, 512],
        "parameters": "without what only training needs",
        "gmacs": "every operation: convolutions and matrix products",
        "rows": rows,
    }
    (RESULTS / "costs.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
