"""`gz sample`: images from a trained model, or one of its applications."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.options import Checkpoint, Cpu, Data, Gpus, Json, Model, Quiet, Seed, choose, complete_do
from gzcli.errors import UsageError

_N = Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many images.")]
_Label = Annotated[str | None, typer.Option("--label", metavar="L[,L…]", help="Class names or numbers, for conditional models.")]
_Do = Annotated[
    str | None,
    typer.Option("--do", metavar="METHOD", help="An application: inpaint, interpolate, …", autocompletion=complete_do),
]
_Input = Annotated[
    Path | None,
    typer.Option("--input", metavar="PATH", help="Pictures for `--do`; test images without it.", exists=True, resolve_path=True),
]
_Mask = Annotated[
    Path | None, typer.Option("--mask", metavar="PATH", help="White is kept, black filled in.", exists=True, resolve_path=True)
]
_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write; into the run's folder without it.")]
_Npz = Annotated[bool, typer.Option("--npz", help="Write samples.npz too: uint8 [N, H, W, C].")]
_Animate = Annotated[bool, typer.Option("--animate", help="Write animation.gif: the first 16 images as they come about.")]
_Png = Annotated[bool, typer.Option("--png", help="Write single PNGs of more than 256 images too.")]

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}  # the options of the model's own method


def sample(
    ctx: typer.Context, model: Model, data: Data = None, n: _N = 64, label: _Label = None, seed: Seed = 0,
    do: _Do = None, input: _Input = None, mask: _Mask = None, checkpoint: Checkpoint = "last", gpus: Gpus = None, cpu: Cpu = False,
    out_dir: _Out = None, npz: _Npz = False, png: _Png = False, animate: _Animate = False, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Draw images from a trained model, or apply it to pictures (`--do`).

    The model's own options (`--steps 50`, `--temperature 0.7`) are those of its recipe's `sample` section, or of the method.
    """
    from gzcli.cli.jobs import do_job, method_options, stamp
    from gzcli.data.library import data_key
    from gzcli.models.catalog import card
    from gzcli.store import runs

    run = runs.find(model, data=data_key(data) if data else None)
    recipe = run.serving.tree()
    known = card(recipe["model"]["name"])
    if do:
        do = choose(f"application of `{known.name}`", do, known.do)
    elif input or mask:
        raise UsageError(
            "`--input` and `--mask` go with `--do`", hint=f"`{known.name}` can: {', '.join(known.do) or 'sample only'}"
        )
    if label and not recipe["model"].get("conditional"):
        raise UsageError(
            f"`{run.id}` was not trained with labels",
            hint=f"gz train {run.model} --data {run.data} --set {run.serving.in_owner}model.conditional=true",
        )
    options = method_options(ctx.args, known.do[do] if do else known.sample, f"`--do {do}`" if do else f"`{known.name}`")
    out.info(f"run: {run.id}")
    folder = (out_dir or run.path / "sampled" / f"{do or f'n{n}'}-{stamp()}").absolute()
    job = {
        "verb": "sample", "run": str(run.path), "checkpoint": checkpoint, "n": n, "seed": seed, "labels": label, "options": options,
        "do": do, "input": input and str(input), "mask": mask and str(mask), "npz": npz, "png": png, "animate": animate,
    }  # fmt: skip
    result = do_job(folder, job, gpus=gpus, cpu=cpu)
    out.text(result["grid"])
    out.data(result)
