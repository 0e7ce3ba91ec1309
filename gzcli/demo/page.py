"""The page of `gz demo`, by Gradio: how its parts (parts.py) are wired to what they do (studio.py)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from gzcli.core.errors import GzError
from gzcli.demo import parts
from gzcli.demo.choices import NUMBERS, Choice, Controls, opening
from gzcli.demo.code import Code
from gzcli.demo.parts import EACH, RANGES
from gzcli.demo.studio import Asked, Shown, Studio

CSS = """
.pixels img {image-rendering: pixelated}
footer {display: none !important}
@media (max-width: 640px) {.gradio-container {padding: 8px !important}}
"""


def page(studio: Studio, choices: Sequence[Choice]) -> gr.Blocks:
    """The page, on which one of the choices is drawn at once."""
    options = [(choice.title, choice.name) for choice in choices]
    with gr.Blocks(title="gz demo", analytics_enabled=False) as blocks:
        gr.Markdown(parts.TITLE, elem_id="title")
        run = gr.Dropdown(options, value=opening(choices), label="Model", elem_id="run")
        facts = gr.Markdown(elem_id="facts")
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                draws = parts.draw_tab()
            with gr.Tab("Between", id="between") as between_tab:
                ways = parts.between_tab()
            with gr.Tab("Fill in", id="inpaint") as inpaint_tab:
                fills = parts.inpaint_tab()
            with gr.Tab("Judge", id="judge") as judge_tab:
                judges = parts.judge_tab()
        named = [draws["label"], ways["label"], ways["last_label"], fills["label"]]
        numbers = [draws[name] for name in NUMBERS]
        chosen = [facts, draws["sampler"], draws["prompt"], *numbers, *named]
        chosen += [between_tab, inpaint_tab, judge_tab, fills["editor"]]

        def opened(name: str) -> list[Any]:
            found, can = studio.open(name)
            return [
                _facts(found),
                gr.update(choices=list(can.samplers), value=can.sampler, visible=len(can.samplers) > 1),
                gr.update(visible=can.prompts, value=""),
                *(_slider(can, option) for option in NUMBERS),
                _labels([EACH, *can.classes] if can.classes else []),
                *(_labels(can.classes, place) for place in (0, -1, 0)),
                gr.update(visible=can.way),
                gr.update(visible=can.inpaints),
                gr.update(visible=can.scores),
                None,
            ]

        settings = [
            run,
            draws["n"],
            draws["seed"],
            draws["label"],
            draws["sampler"],
            draws["prompt"],
            *numbers,
        ]
        drawn = [draws["picture"], draws["shell"], draws["python"]]

        def draw(name: str, n: int, seed: int, label: str, *rest: Any) -> Iterator[Any]:
            yield from _said(studio, studio.draw(_asked(studio.open(name)[1], name, n, seed, label, *rest)))

        def way(
            name: str, a: int, a_label: str, b: int, b_label: str, frames: int, *rest: Any
        ) -> Iterator[Any]:
            _, can = studio.open(name)
            ends = [_asked(can, name, 1, seed, label, *rest) for seed, label in ((a, a_label), (b, b_label))]
            yield from _said(studio, studio.between(ends[0], ends[1], int(frames)))

        def canvas(name: str, seed: int, label: str) -> dict[str, Any]:
            image = studio.file(studio.canvas(name, int(seed), _label(label)))
            return {"background": image, "layers": [], "composite": image}

        def fill(name: str, drawing: dict[str, Any] | None, seed: int, label: str) -> Iterator[Any]:
            if not drawing or drawing["background"] is None:
                raise gr.Error("there is no picture yet: draw one, or drop your own", print_exception=False)
            layers = [layer[..., 3] > 0 for layer in drawing["layers"]] or [np.zeros((1, 1), bool)]
            picture = drawing["background"][..., :3]
            work = studio.inpaint(name, picture, np.any(layers, 0), int(seed), _label(label))
            for shown, shell, python in _said(studio, work):
                files = [str(studio.folder / file) for file in ("picture.png", "mask.png")]
                yield shown, shell, python, files

        def judge(name: str, picture: np.ndarray | None, n: int) -> tuple[Any, ...]:
            if picture is None:
                raise gr.Error("drop a picture first", print_exception=False)
            found, shown, made = studio.judge(name, picture, int(n))
            return _verdict(found), studio.file(shown), made.shell, made.python

        opens: dict[str, Any] = {"inputs": [run], "outputs": chosen, "fn": _told(opened)}
        draw_it: dict[str, Any] = {"fn": _told(draw), "inputs": settings, "outputs": drawn}
        blocks.load(**opens).then(**draw_it)
        run.change(**opens).then(**draw_it)
        draws["go"].click(**draw_it)
        draws["seed"].submit(**draw_it)
        draws["next"].click(lambda seed: int(seed) + 1, draws["seed"], draws["seed"]).then(**draw_it)
        way_inputs = [run, ways["seed"], ways["label"], ways["last_seed"], ways["last_label"], ways["frames"]]
        rest = [draws["sampler"], draws["prompt"], *numbers]
        outputs = [ways["picture"], ways["shell"], ways["python"]]
        ways["go"].click(_told(way), [*way_inputs, *rest], outputs)
        start: dict[str, Any] = {"fn": _told(canvas), "inputs": [run, fills["seed"], fills["label"]]}
        fills["start"].click(**start, outputs=fills["editor"])
        outputs = [fills["picture"], fills["shell"], fills["python"], fills["files"]]
        inputs = [run, fills["editor"], fills["seed"], fills["label"]]
        fills["go"].click(_told(fill), inputs, outputs)
        outputs = [judges["verdict"], judges["picture"], judges["shell"], judges["python"]]
        judges["go"].click(_told(judge), [run, judges["input"], judges["n"]], outputs)
        run.change(lambda: gr.update(selected="draw"), outputs=tabs)
    return blocks


# ------------------------------------------------------------------------------------ values and words


def _asked(
    can: Controls,
    name: str,
    n: int,
    seed: int,
    label: str | None,
    sampler: str | None,
    prompt: str,
    *numbers: float,
) -> Asked:
    """What the parts of the page say; those that are not shown for this run have no say."""
    sliders = {key: v for key, v in zip(NUMBERS, numbers, strict=True) if key in can.numbers}
    if "steps" in sliders:
        sliders["steps"] = int(sliders["steps"])
    options: dict[str, Any] = {**sliders, "sampler": sampler or None, "prompt": prompt or None}
    given = {key: value for key, value in options.items() if value is not None}
    return Asked(name, int(n), int(seed or 0), _label(label) if can.classes else None, given)


def _label(text: str | None) -> str | None:
    return None if text in (None, EACH) else text


def _slider(can: Controls, option: str) -> Any:
    """The slider of an option, hidden where the sampler does not take it."""
    if option not in can.numbers:
        return gr.update(visible=False)
    value, (_, most, _) = can.numbers[option], RANGES[option]
    return gr.update(visible=True, value=value, maximum=max(most, value))


def _labels(names: Sequence[str], place: int = 0) -> Any:
    """The choice among classes, of which the one at a place is taken; hidden where there are none."""
    return gr.update(visible=bool(names), choices=list(names), value=names[place] if names else None)


def _facts(run: Any) -> str:
    """A line about a run."""
    channels, height, width = run.info.shape
    kind = "grey" if channels == 1 else "colour"
    size = sum(p.numel() for p in run.model.parameters())
    return (
        f"`{run.id}` · {kind} images of {width}×{height} · {size:,} parameters "
        f"· on {run.trained.device.type.upper().replace('CUDA', 'GPU')}"
    )


def _verdict(found: dict[str, Any]) -> str:
    """What `gz ood --input` found of one picture, in words."""
    (row,) = found["files"]
    (score, value), n = next(iter(row["scores"].items())), found["compared"]["n"]
    said = "is **none of them**" if row["flagged"] else "could be **one of them**"
    spread = f" ± {row['spread'][score]:.2g}" if found["seeds"] > 1 and value is not None else ""
    measured = "not finite, beyond all of theirs" if value is None else f"{value:.4g}{spread}"
    low = found["thresholds_low"][score]
    below = f"below {low:.4g} or " if low is not None else ""
    return (
        f"### This picture {said}\n\n"
        f"p = {row['p']:.3g}: of {n:,} held-out images of `{found['in']}`, {row['p'] * (n + 1) - 1:.0f} are "
        f"at least as strange. Its `{score}` is {measured}; {below}above {found['threshold']:.4g} a "
        f"picture is flagged, which {100 * found['fpr']:.3g} % of ordinary ones are."
    )


def _said(studio: Studio, shown: Iterator[Shown]) -> Iterator[tuple[str, str, str]]:
    """Files of pictures with their code, which is empty until the last one."""
    for picture, made in shown:
        found = made or Code("", "")
        yield studio.file(picture), found.shell, found.python


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors the page shows in words."""

    def words(e: GzError) -> gr.Error:
        hint = f" — {e.hint}" if e.hint else ""
        return gr.Error(f"{e.message}{hint}", print_exception=False)

    @functools.wraps(function)
    def streamed(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except GzError as e:
            raise words(e) from e

    @functools.wraps(function)
    def plain(*values: Any) -> Any:
        try:
            return function(*values)
        except GzError as e:
            raise words(e) from e

    return streamed if inspect.isgeneratorfunction(function) else plain
