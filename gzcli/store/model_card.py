"""The page of a run on the hub: what its card says, as README.md with a header of YAML, and its figures as
the hub reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Our name of a set → its id on the hub.
HUB_SETS = {
    "mnist": "ylecun/mnist",
    "fashionmnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "imagenet": "ILSVRC/imagenet-1k",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def readme(card: Mapping[str, Any], name: str, licence: str, meanings: Mapping[str, str]) -> str:
    """The text of README.md.

    card: as `engine.bundle.card_of` has it.
    name: the repository, `owner/name`.
    licence: of the weights, as the hub names it.
    meanings: what figures say, by their names.
    """
    import yaml

    header = yaml.safe_dump(_header(card, name, licence), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{header}---\n\n{_body(card, name, licence, meanings)}"


def eval_results(card: Mapping[str, Any]) -> str | None:
    """The text of a file in the repository's `.eval_results`; None where the hub does not know the set, or
    nothing was measured on its test split."""
    import yaml

    measured = [row for row in card["figures"] if row["from"] == "gz bench"]
    known = HUB_SETS.get(card["data"]["name"])
    if not known or not measured:
        return None
    rows = [
        {
            "dataset": {"id": known, "task_id": f"image_generation_{row['name']}"},
            "value": row["value"],
            "notes": f"{row['n']:,} samples against the test split, by gz bench",
        }
        for row in measured
    ]
    return yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=1000)


def _header(card: Mapping[str, Any], name: str, licence: str) -> dict[str, Any]:
    data = card["data"]
    known = HUB_SETS.get(data["name"])
    arxiv = [f"arxiv:{number}" for number in _ARXIV.findall(card["paper"])]
    metrics = list(dict.fromkeys(row["name"] for row in card["figures"]))
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "gzcli",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["gz", "image-generation", card["model"], data["name"], *arxiv],
        "datasets": [known or data["name"]],
        "metrics": metrics or ["none-measured"],
    }
    task = {"type": "unconditional-image-generation", "name": "image generation"}
    results = [
        {
            "task": task,
            "dataset": {"type": known or data["name"], "name": row["on"]},
            "metrics": [{"type": row["name"], "name": row["name"], "value": row["value"]}],
        }
        for row in card["figures"]
    ]
    if results:
        header["model-index"] = [{"name": name.partition("/")[2], "results": results}]
    return header


def _body(card: Mapping[str, Any], name: str, licence: str, meanings: Mapping[str, str]) -> str:
    data = card["data"]
    channels, height, width = data["shape"]
    counts = data.get("counts") or {}
    split = ", ".join(f"{n:,} {kind}" for kind, n in counts.items()) or "not counted"
    classes = ", ".join(map(str, data["classes"])) if data["classes"] else "none"
    figures = [
        f"| {row['name']} | {row['value']:.4g} | {row['on']} | {_means(row, meanings)} |" for row in card["figures"]
    ]
    table = ["| figure | value | on | what it is |", "|---|---|---|---|", *figures]
    label = " --label 0" if card["conditional"] else ""
    versions = ", ".join(f"{key} {value}" for key, value in sorted(card["versions"].items()))
    lines = [
        f"# {name.partition('/')[2]}",
        "",
        f"{card['about'] or card['model']}. Trained by `gz` (package gzcli) on `{data['name']}`.",
        "",
        "![samples](preview.png)",
        "",
        "```",
        "pip install gzcli",
        f"gz sample hf://{name} -n 64{label}",
        "```",
        "",
        f'or in Python: `gzcli.load("hf://{name}").sample(64)`, uint8 [64, {channels}, {height}, {width}].',
        "",
        "## What it is",
        "",
        f"* model: `{card['model']}`, {card['params']:,} parameters, {card['dtype']}; {card['paper']}",
        f"* it can: {', '.join(card['can'])}",
        f"* trained for {card['step']:,} steps in {card['seconds']:,.0f} s by `{card['command']}`",
        f"* versions: {versions}",
        f"* licence of these weights: {licence}",
        "",
        "## Data",
        "",
        f"* `{data['name']}`: {data['title']}",
        f"* images of {width}×{height}, {'grey' if channels == 1 else 'colour'}; {split}; classes: {classes}",
        f"* licence of the data: {data['licence']}",
        f"* source: {data['citation']}",
        "",
        "## Figures",
        "",
        *(table if figures else ["Nothing was measured; `gz bench` does."]),
        "",
        "## Limits",
        "",
        "It makes images like those of its training set, of their size and with their biases. It is no",
        "source of facts: people and findings in its images are nobody's. Figures hold for the stated number",
        "of samples and the recipe's sampler; `gz bench` measures them again.",
        "",
    ]
    return "\n".join(lines)


def _means(row: Mapping[str, Any], meanings: Mapping[str, str]) -> str:
    by = f"{row['from']}, {row['n']:,} samples" if row["n"] else row["from"]
    return f"{meanings[row['name']]} ({by})" if row["name"] in meanings else by
