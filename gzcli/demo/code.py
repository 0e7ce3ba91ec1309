"""The command line and the Python lines that make what the page shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Code:
    """The same thing twice.

    shell: lines for a shell.
    python: lines of Python.
    """

    shell: str
    python: str


def drawing(
    name: str, n: int, seed: int, label: str | None, number: int | None, options: Mapping[str, Any]
) -> Code:
    """Of n images.

    name: what the run is called.
    seed: of the noise.
    label: name of their class; None: each in turn.
    number: of that class.
    options: keywords of the model's `sample` that differ from the recipe's.
    """
    text, rest = _prompt(options)
    shell = _line(
        "gz sample", name, {"-n": n, "--seed": seed, "--label": _quoted(label)} | text | _flags(rest)
    )
    return Code(shell, _python(name, [f"images = {_sample(n, seed, number, options)}"]))


def between(
    name: str,
    ends: Sequence[tuple[int, str | None, int | None]],
    frames: int,
    options: Mapping[str, Any],
) -> Code:
    """Of the way from one image to another.

    ends: seed, name and number of the class of either.
    frames: images of the way.
    options: keywords of the model's `sample` that differ from the recipe's.
    """
    text, rest = _prompt(options)
    shell, made = ["mkdir ends"], []
    for place, (seed, label, number) in zip("ab", ends, strict=True):
        flags = {"-n": 1, "--seed": seed, "--label": _quoted(label), "--out": place} | text | _flags(rest)
        shell += [_line("gz sample", name, flags), f"cp {place}/images/000000.png ends/{place}.png"]
        made.append(_sample(1, seed, number, options))
    shell.append(_line("gz sample", name, {"--do": "interpolate", "--input": "ends", "--frames": frames}))
    lines = [
        f"ends = np.concatenate([{', '.join(made)}])",
        f'images = run.do("interpolate", ends, frames={frames})',
    ]
    return Code("\n".join(shell), _python(name, lines, "import numpy as np\n\nimport gzcli"))


def inpainting(name: str, seed: int, label: str | None, number: int | None) -> Code:
    """Of `picture.png`, filled in where `mask.png` is black."""
    flags = {
        "--do": "inpaint",
        "--input": "picture.png",
        "--mask": "mask.png",
        "--seed": seed,
        "--label": _quoted(label),
    }
    given = "" if number is None else f", labels=[{number}]"
    lines = [
        'picture = np.atleast_3d(Image.open("picture.png")).transpose(2, 0, 1)[None]',
        'mask = np.asarray(Image.open("mask.png")) > 127',
        f'images = run.do("inpaint", picture, mask=mask, seed={seed}{given})',
    ]
    return Code(
        _line("gz sample", name, flags),
        _python(name, lines, "import numpy as np\nfrom PIL import Image\n\nimport gzcli"),
    )


def judging(name: str, n: int, maps: bool) -> Code:
    """Of `picture.png`, among n held-out images."""
    flags: dict[str, Any] = {"--input": "picture.png", "-n": n}
    shell = _line("gz ood", name, flags) + (" --map" if maps else "")
    return Code(shell, _python(name, [f'found = run.judge("picture.png", n={n}, maps={maps})']))


def _line(verb: str, name: str, flags: Mapping[str, Any]) -> str:
    """A command line; flags whose value is None are left out."""
    words = [f"{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None]
    return " ".join([verb, shlex.quote(name), *words])


def _prompt(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The prompt as a flag, and the other options."""
    rest = dict(options)
    text = rest.pop("prompt", None)
    return {"--prompt": text}, rest


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"--{key.replace('_', '-')}": value for key, value in options.items()}


def _quoted(label: str | None) -> str | None:
    """A class's name as `--label` takes it: one with a comma is quoted."""
    return f'"{label}"' if label and "," in label else label


def _sample(n: int, seed: int, number: int | None, options: Mapping[str, Any]) -> str:
    """The call of `Run.sample`."""
    words = [str(n), f"seed={seed}", *([] if number is None else [f"labels=[{number}]"])]
    words += [f"{key}={value!r}" for key, value in options.items()]
    return f"run.sample({', '.join(words)})"


def _python(name: str, lines: Sequence[str], imports: str = "import gzcli") -> str:
    return "\n".join([imports, "", f"run = gzcli.load({name!r})", *lines])
