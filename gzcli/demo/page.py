"""The page of `gz demo`, made with Gradio, and its server. It serves this machine only and sends no requests
to others."""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import functools
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Gradio reads these when it is imported. Settings for other pages of Gradio are dropped, such as folders that
# they may serve and origins that they trust; so are news of versions and telemetry.
for _name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[_name]
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from gzcli.core.devices import short_title
from gzcli.core.errors import GzError
from gzcli.core.units import percent
from gzcli.demo.guard import LARGEST_FILE, Guard
from gzcli.demo.studio import (
    PAINT,
    SLIDER_OPTIONS,
    Code,
    Controls,
    Request,
    Shown,
    Studio,
    StudioModel,
    opening,
    painted_example,
)

PAGE_TITLE = "# gz demo\n\nImages that a model draws from noise. Choose a model, and press **Draw**."
EACH_LABEL = "each in turn"  # the label that asks for none
IMAGE_SOURCES: Any = ["upload", "clipboard"]  # name of the user's images
# minimum, maximum and step of the slider of each of SLIDER_OPTIONS
RANGES = {"steps": (1, 250, 1), "guidance": (0.0, 8.0, 0.1), "temperature": (0.0, 1.5, 0.05)}
SERVER: dict[str, Any] = {"server_name": "127.0.0.1", "max_file_size": LARGEST_FILE, "show_error": True}
SERVER |= {"quiet": True, "prevent_thread_lock": True, "footer_links": []}
SERVER |= dict.fromkeys(("ssr_mode", "mcp_server", "enable_monitoring"), False)
# Gradio asks its server for the events of the start, however long that takes. It would then ask for the page,
# and end where a busy machine takes longer than 3 seconds.
SERVER["_frontend"] = False
CSS = """
.pixels img {image-rendering: pixelated}
footer {display: none !important}
@media (max-width: 640px) {
  .gradio-container {padding: 8px !important}
  .result {order: -1}
}
"""


def serve(
    choices: Sequence[StudioModel], *, port: int | None = None, share: bool = False, browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Starts the server in a thread. Returns the page, whose `close` ends it, and its address.

    port: port of the server. None: the first free one from 7860 on.
    share: whether Gradio makes it reachable from elsewhere, through a tunnel. The address then contains a
      token, which every request needs.
    browser: whether to open it in the browser.

    Raises OSError if the port is taken.
    """
    studio = Studio()
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / "gradio")  # so that dropped images are removed too
    gr.set_static_paths(studio.shown)  # served as they are, without a copy
    system: Any = ["system-ui", "sans-serif"]  # fonts of the machine, so that none is fetched
    mono: Any = ["ui-monospace", "monospace"]
    blocks = Page(studio, choices).blocks
    blocks.queue(default_concurrency_limit=1)
    token, addresses = secrets.token_urlsafe(32) if share else None, set[str]()
    guard = Middleware(Guard, addresses=addresses, token=token)
    with contextlib.redirect_stdout(sys.stderr):  # Gradio's messages on its tunnel are not data
        _, local, public = blocks.launch(
            server_port=port,
            share=share,
            allowed_paths=[str(studio.folder)],
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
            theme=gr.themes.Default(font=system, font_mono=mono),
            css=CSS,
            **SERVER,
        )
    blocks.share = False  # otherwise the page loads its scripts from one of Gradio's servers
    if public:
        addresses.add(public.rstrip("/"))
    url = (public or local) + (f"?token={token}" if token else "")
    if browser:
        webbrowser.open(url)
    return blocks, url


class Page:
    """The page. Each tab has its controls, the studio's work for them, and its changes for the chosen run."""

    def __init__(self, studio: Studio, choices: Sequence[StudioModel]):
        self.studio = studio
        self.following: list[tuple[Any, Callable[[Any, Controls], Any]]] = []
        with gr.Blocks(title="gz demo", analytics_enabled=False) as self.blocks:
            gr.Markdown(PAGE_TITLE, elem_id="title")
            menu = [(choice.title, choice.name) for choice in choices]
            self.run = gr.Dropdown(menu, value=opening(choices), label="Model", elem_id="run")
            self._follow(gr.Markdown(elem_id="facts"), lambda run, can: _facts(run))
            with gr.Tabs() as tabs:
                with gr.Tab("Draw", id="draw"):
                    draw = self._draw_tab()
                for title, name, fill, control in (
                    ("Between", "between", self._between_tab, "way"),
                    ("Fill in", "inpaint", self._inpaint_tab, "inpaints"),
                    ("Judge", "judge", self._judge_tab, "scores"),
                ):
                    with gr.Tab(title, id=name) as tab:
                        self._follow(tab, functools.partial(_shown_by, control))
                        if (example := fill()) is not None:
                            tab.select(**example)

            def opened(name: str) -> Iterator[Any]:
                yield [change(*studio.open(name)) for _, change in self.following]

            outputs = [part for part, _ in self.following]
            opens: dict[str, Any] = {"fn": _in_words(opened), "inputs": [self.run], "outputs": outputs}
            self.blocks.load(**opens).then(**draw)
            self.run.change(**opens).then(**draw)
            self.run.change(lambda: gr.update(selected="draw"), outputs=tabs)

    def _follow(self, part: Any, change: Callable[[Any, Controls], Any]) -> Any:
        """Registers a part of the page, which becomes `change(run, controls)` when a run is chosen."""
        self.following.append((part, change))
        return part

    def _label(self, place: int = 0, first: Sequence[str] = (), **keywords: Any) -> gr.Dropdown:
        """A choice among the run's classes, after `first`; hidden if it has none."""

        def change(run: Any, can: Controls) -> Any:
            names = [*first, *can.classes] if can.classes else []
            return gr.update(visible=bool(names), choices=names, value=names[place] if names else None)

        return self._follow(gr.Dropdown([], label="Class", visible=False, **keywords), change)

    def _draw_tab(self) -> dict[str, Any]:
        """Builds the tab. Returns the event that draws."""
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                label = self._label(first=[EACH_LABEL], elem_id="label")
                prompt = gr.Textbox(label="Prompt", visible=False)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                n = gr.Slider(1, 36, 16, step=1, label="Images")
                sampler = gr.Dropdown([], label="Sampler", visible=False)
                sliders = [self._slider(name) for name in SLIDER_OPTIONS]
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    following = gr.Button("Next seed", min_width=120)
            with gr.Column(scale=2, min_width=280, elem_classes="result"):
                drawn = _picture("drawn")
        outputs = [drawn, *_code()]
        self._follow(prompt, lambda run, can: gr.update(visible=can.prompts, value=""))

        def offered(run: Any, can: Controls) -> Any:
            names = list(can.samplers)
            return gr.update(choices=names, value=can.sampler, visible=len(names) > 1)

        self._follow(sampler, offered)
        self.sampling = [sampler, prompt, *sliders]

        def draw(name: str, n: int, seed: int, label: str, *settings: Any) -> Iterator[Any]:
            yield from self._shown(self.studio.draw(self._request(name, n, seed, label, *settings)))

        inputs = [self.run, n, seed, label, *self.sampling]
        event: dict[str, Any] = {"fn": _in_words(draw), "inputs": inputs, "outputs": outputs}
        go.click(**event)
        seed.submit(**event)
        following.click(lambda seed: int(seed) + 1, seed, seed).then(**event)
        return event

    def _slider(self, name: str) -> gr.Slider:
        """The slider of an option, hidden if the sampler does not take it."""
        low, high, step = RANGES[name]

        def change(run: Any, can: Controls) -> Any:
            if (value := can.numbers.get(name)) is None:
                return gr.update(visible=False)
            return gr.update(visible=True, value=value, maximum=max(high, value))

        slider = gr.Slider(low, high, high, step=step, label=name.capitalize(), visible=False)
        return self._follow(slider, change)

    def _between_tab(self) -> None:
        gr.Markdown("Interpolate between the first images of two seeds, with the sampler of the first tab.")
        with gr.Row():
            seed = gr.Number(0, label="From seed", precision=0, minimum=0, min_width=120)
            label = self._label(min_width=120)
            last_seed = gr.Number(1, label="To seed", precision=0, minimum=0, min_width=120)
            last_label = self._label(-1, min_width=120)
        frames = gr.Slider(3, 12, 8, step=1, label="Number of images")
        go = gr.Button("Go", variant="primary", elem_id="between")
        outputs = [_picture("way"), *_code()]

        def way(
            name: str, a: int, a_label: str, b: int, b_label: str, frames: int, *settings: Any
        ) -> Iterator[Any]:
            first = self._request(name, 1, a, a_label, *settings)
            last = self._request(name, 1, b, b_label, *settings)
            yield from self._shown(self.studio.interpolate(first, last, int(frames)))

        inputs = [self.run, seed, label, last_seed, last_label, frames, *self.sampling]
        go.click(_in_words(way), inputs, outputs)

    def _inpaint_tab(self) -> dict[str, Any]:
        """Builds the tab. Returns the event that fills in an example."""
        gr.Markdown("Paint over the area to fill in, on a sample or on your own image.")
        with gr.Row():
            with gr.Column(min_width=280):
                brush = gr.Brush(
                    default_size=48, colors=["#{:02x}{:02x}{:02x}".format(*PAINT)], color_mode="fixed"
                )
                how: dict[str, Any] = {
                    "brush": brush,
                    "sources": IMAGE_SOURCES,
                    "transforms": (),
                    "layers": False,
                }
                look: dict[str, Any] = {"canvas_size": (480, 480), "elem_classes": "pixels", "format": "png"}
                editor = gr.ImageEditor(label="Picture", elem_id="editor", type="numpy", **how, **look)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                    label = self._label(min_width=100)
                with gr.Row():
                    start = gr.Button("A sample to paint on", elem_id="canvas", min_width=120)
                    go = gr.Button("Fill in", variant="primary", elem_id="fill", min_width=120)
            with gr.Column(min_width=280):
                picture = _picture("filled")
                files = gr.File(label="picture.png, mask.png", file_count="multiple", height=150)
                outputs = [picture, *_code(), files]
        self._follow(editor, lambda run, can: None)

        def canvas(name: str, seed: int, label: str) -> Iterator[Any]:
            image = self.studio.file(self.studio.canvas(Request(name, 1, int(seed), _class(label))))
            yield {"background": image, "layers": [], "composite": image}

        def example(name: str, drawing: dict[str, Any] | None, seed: int, label: str) -> Iterator[Any]:
            if drawing and drawing["background"] is not None:
                yield gr.skip()
                return
            image = self.studio.canvas(Request(name, 1, int(seed), _class(label)))
            layer, composite = painted_example(image)
            files = [self.studio.file(picture) for picture in (image, layer, composite)]
            painted = {"background": files[0], "layers": [files[1]], "composite": files[2]}
            yield painted, *[gr.skip()] * len(outputs)
            for state in fill(name, {"background": image, "layers": [layer]}, seed, label):
                yield gr.skip(), *state

        def fill(name: str, drawing: dict[str, Any] | None, seed: int, label: str) -> Iterator[Any]:
            if not drawing or drawing["background"] is None:
                raise gr.Error("there is no image yet: draw one, or drop your own", print_exception=False)
            layers = [layer[..., 3] > 0 for layer in drawing["layers"]] or [np.zeros((1, 1), bool)]
            background = drawing["background"][..., :3]
            request = Request(name, 1, int(seed), _class(label))
            for state in self._shown(self.studio.inpaint(request, background, np.any(layers, 0))):
                yield *state, [str(self.studio.folder / file) for file in ("picture.png", "mask.png")]

        start.click(_in_words(canvas), [self.run, seed, label], editor)
        inputs = [self.run, editor, seed, label]
        go.click(_in_words(fill), inputs, outputs)
        return {"fn": _in_words(example), "inputs": inputs, "outputs": [editor, *outputs]}

    def _judge_tab(self) -> dict[str, Any]:
        """Builds the tab. Returns the event that opens it with an example, whose alarm takes a minute."""
        gr.Markdown("Does an image resemble the training images? If not, where does it differ?")
        with gr.Row():
            with gr.Column(min_width=280):
                dropped = gr.Image(label="Picture", type="numpy", sources=IMAGE_SOURCES, elem_id="dropped")
                look: dict[str, Any] = {"columns": 2, "height": 200, "format": "png", "elem_id": "offered"}
                look |= {"allow_preview": False, "elem_classes": "pixels"}
                offered = gr.Gallery(label="Drop an image, or click one", **look)
                n = gr.Slider(200, 1000, 200, step=100, label="Held-out images to compare it with")
                go = gr.Button("Judge", variant="primary", elem_id="judge")
            with gr.Column(min_width=280):
                verdict = gr.Markdown(elem_id="verdict")
                picture = _picture("judged", "The image as the model sees it, and where it is unusual")
        outputs = [verdict, picture, *_code()]

        def judge(name: str, picture: np.ndarray | None, n: int) -> Iterator[Any]:
            if picture is None:
                raise gr.Error("drop an image first", print_exception=False)
            result, sheet, code = self.studio.judge(name, picture, int(n))
            yield _verdict(result), self.studio.file(sheet), *code

        def offers(run: Any, can: Controls) -> Any:
            pairs = self.studio.to_judge(run) if can.scores else []
            return [(self.studio.file(picture), words) for picture, words in pairs]

        def picked(pictures: Any, event: gr.SelectData) -> Any:
            return pictures[event.index][0]

        def example(name: str, picture: np.ndarray | None) -> Iterator[Any]:
            if picture is not None:
                yield gr.skip()
                return
            _, (foreign, _) = self.studio.to_judge(self.studio.open(name)[0])
            yield self.studio.file(foreign), "Press **Judge** to compare this image with the training set."

        self._follow(offered, offers)
        for part, empty in ((dropped, None), (verdict, ""), (picture, None)):
            self._follow(part, functools.partial(_cleared, empty))
        event: dict[str, Any] = {"fn": _in_words(judge), "inputs": [self.run, dropped, n], "outputs": outputs}
        offered.select(picked, offered, dropped).then(**event)
        go.click(**event)
        return {"fn": _in_words(example), "inputs": [self.run, dropped], "outputs": [dropped, verdict]}

    def _request(
        self, name: str, n: int, seed: int, label: str, sampler: str | None, prompt: str, *numbers: float
    ) -> Request:
        """The request from the page's controls. Controls that are hidden for this run are ignored."""
        can = self.studio.open(name)[1]
        values: dict[str, Any] = dict(zip(SLIDER_OPTIONS, numbers, strict=True))
        options = {key: value for key, value in values.items() if key in can.numbers}
        options |= {"steps": int(options["steps"])} if "steps" in options else {}
        options |= {key: text for key, text in (("sampler", sampler), ("prompt", prompt)) if text}
        return Request(name, int(n), int(seed or 0), _class(label) if can.classes else None, options)

    def _shown(self, pictures: Iterator[Shown]) -> Iterator[tuple[str, str, str]]:
        """Yields the files of images with their code. The code is empty until the last image."""
        for picture, code in pictures:
            yield self.studio.file(picture), *(code or Code("", ""))


# ---------------------------------------------------------------------------- parts, values and words


def _picture(name: str, label: str = "Images") -> gr.Image:
    look: dict[str, Any] = {"format": "png", "height": 440, "elem_classes": "pixels", "interactive": False}
    return gr.Image(label=label, elem_id=name, buttons=["download", "fullscreen"], **look)


def _code() -> list[gr.Code]:
    """The command line and the Python lines that produce what is shown."""
    look: dict[str, Any] = {"interactive": False, "lines": 1, "wrap_lines": True, "show_line_numbers": False}
    with gr.Accordion("The same with the command line and with Python"):
        names: Any = {"shell": "Command line", "python": "Python"}
        return [gr.Code(language=language, label=label, **look) for language, label in names.items()]


def _class(text: str | None) -> str | None:
    return None if text == EACH_LABEL else text


def _cleared(empty: str | None, run: Any, can: Controls) -> str | None:
    return empty


def _shown_by(control: str, run: Any, can: Controls) -> Any:
    """Shows a tab if the run supports its controls."""
    return gr.update(visible=getattr(can, control))


def _facts(run: Any) -> str:
    channels, height, width = run.info.shape
    kind = "grey" if channels == 1 else "colour"
    size = sum(p.numel() for p in run.model.parameters())
    device = short_title(run.trained.device)
    return f"`{run.id}` · {kind} images of {width}×{height} · {size:,} parameters · on {device}"


def _verdict(result: dict[str, Any]) -> str:
    """The result of `gz ood --input` for one image, in words."""
    (row,) = result["files"]
    (score, value), n = next(iter(row["scores"].items())), result["compared"]["n"]
    verdict = (
        "does **not resemble** the training images" if row["flagged"] else "**resembles** the training images"
    )
    spread = f" ± {row['spread'][score]:.2g}" if result["seeds"] > 1 and value is not None else ""
    value_text = (
        "not finite, which counts as higher than all of theirs" if value is None else f"{value:.4g}{spread}"
    )
    low = result["thresholds_low"][score]
    below = f"below {low:.4g} or " if low is not None else ""
    return (
        f"### This image {verdict}\n\n"
        f"p = {row['p']:.3g}: {row['p'] * (n + 1) - 1:.0f} of {n:,} held-out images of `{result['in']}` are "
        f"at least as unusual. Its `{score}` is {value_text}; images {below}above {result['threshold']:.4g} "
        f"are flagged, which happens to {percent(result['fpr'])} of ordinary images."
    )


def _in_words(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Wraps a function so that the page shows its errors as messages."""

    @functools.wraps(function)
    def streamed(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except GzError as e:
            hint = f" — {e.hint}" if e.hint else ""
            raise gr.Error(f"{e.message}{hint}", print_exception=False) from e

    return streamed
