"""The parts of the page of `gz demo`: what stands on each tab, by name."""

from __future__ import annotations

from typing import Any

import gradio as gr

TITLE = "# gz demo\n\nImages that a model draws from noise. Choose a model, and press **Draw**."
EACH = "each in turn"  # the label that asks for none
# least, most and step of the slider of an option of `choices.NUMBERS`
RANGES = {"steps": (1, 250, 1), "guidance": (0.0, 8.0, 0.1), "temperature": (0.0, 1.5, 0.05)}


def draw_tab() -> dict[str, Any]:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = gr.Dropdown([EACH], value=EACH, label="Class", visible=False, elem_id="label")
            prompt = gr.Textbox(label="Prompt", visible=False)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            n = gr.Slider(1, 36, 16, step=1, label="Images")
            sampler = gr.Dropdown([], label="Sampler", visible=False)
            sliders = {
                name: gr.Slider(low, high, high, step=step, label=name.capitalize(), visible=False)
                for name, (low, high, step) in RANGES.items()
            }
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                following = gr.Button("Next seed", min_width=120)
        with gr.Column(scale=2, min_width=280):
            picture = _picture("drawn")
            shell, python = _code()
    return {
        "label": label,
        "prompt": prompt,
        "seed": seed,
        "n": n,
        "sampler": sampler,
        "go": go,
        "next": following,
        "picture": picture,
        "shell": shell,
        "python": python,
        **sliders,
    }


def between_tab() -> dict[str, Any]:
    gr.Markdown("From the first image of one seed to that of another, with the sampler of the first tab.")
    with gr.Row():
        seed = gr.Number(0, label="From seed", precision=0, minimum=0, min_width=120)
        label = gr.Dropdown([], label="Class", visible=False, min_width=120)
        last_seed = gr.Number(1, label="To seed", precision=0, minimum=0, min_width=120)
        last_label = gr.Dropdown([], label="Class", visible=False, min_width=120)
    frames = gr.Slider(3, 12, 8, step=1, label="Images of the way")
    go = gr.Button("Go", variant="primary", elem_id="between")
    picture = _picture("way")
    shell, python = _code()
    return {
        "seed": seed,
        "label": label,
        "last_seed": last_seed,
        "last_label": last_label,
        "frames": frames,
        "go": go,
        "picture": picture,
        "shell": shell,
        "python": python,
    }


def inpaint_tab() -> dict[str, Any]:
    gr.Markdown("Paint over what the model shall fill in: of a sample, or of a picture of your own.")
    with gr.Row():
        with gr.Column(min_width=280):
            editor = gr.ImageEditor(
                label="Picture",
                type="numpy",
                brush=gr.Brush(default_size=48, colors=["#e8590c"], color_mode="fixed"),
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                format="png",
                canvas_size=(520, 520),
                elem_id="editor",
                elem_classes="pixels",
            )
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                label = gr.Dropdown([], label="Class", visible=False, min_width=100)
            with gr.Row():
                start = gr.Button("A sample to paint on", elem_id="canvas", min_width=120)
                go = gr.Button("Fill in", variant="primary", elem_id="fill", min_width=120)
        with gr.Column(min_width=280):
            picture = _picture("filled")
            files = gr.File(label="picture.png, mask.png", file_count="multiple", height=150)
            shell, python = _code()
    return {
        "editor": editor,
        "seed": seed,
        "label": label,
        "start": start,
        "go": go,
        "picture": picture,
        "files": files,
        "shell": shell,
        "python": python,
    }


def judge_tab() -> dict[str, Any]:
    gr.Markdown("Drop a picture: is it one of those that the model was trained on, and if not, where?")
    with gr.Row():
        with gr.Column(min_width=280):
            given = gr.Image(
                label="Picture", type="numpy", sources=["upload", "clipboard"], elem_id="dropped"
            )
            n = gr.Slider(200, 1000, 200, step=100, label="Held-out images to compare it with")
            go = gr.Button("Judge", variant="primary", elem_id="judge")
        with gr.Column(min_width=280):
            verdict = gr.Markdown(elem_id="verdict")
            picture = _picture("judged", "As the model sees it, and where it is strange")
            shell, python = _code()
    return {
        "input": given,
        "n": n,
        "go": go,
        "verdict": verdict,
        "picture": picture,
        "shell": shell,
        "python": python,
    }


def _picture(name: str, label: str = "Images") -> gr.Image:
    return gr.Image(
        label=label,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="pixels",
        height=440,
    )


def _code() -> tuple[gr.Code, gr.Code]:
    """The command line and the Python lines of what is shown."""
    with gr.Accordion("The same from the command line, and from Python"):
        shell = gr.Code(
            language="shell",
            label="Command line",
            interactive=False,
            lines=1,
            wrap_lines=True,
            show_line_numbers=False,
        )
        python = gr.Code(
            language="python",
            label="Python",
            interactive=False,
            lines=1,
            wrap_lines=True,
            show_line_numbers=False,
        )
    return shell, python
