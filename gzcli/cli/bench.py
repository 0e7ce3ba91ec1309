"""`gz bench`: trained models side by side: image quality, likelihood, class balance, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Models,
    Processes,
    Quiet,
    Seed,
    complete_data,
    split,
)
from gzcli.errors import MissingError

_Data = Annotated[
    str,
    typer.Option("--data", metavar="NAME|PATH", help="The set to compare on.", autocompletion=complete_data),
]
_Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="M[,M…]",
        help="fd kid_lenet prc_lenet classes bpd own speed, and with Inception's weights fid kid is.",
    ),
]
_N = Annotated[int, typer.Option("-n", metavar="N", min=50, help="Samples of each model.")]
_Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Inception's weights.", exists=True, resolve_path=True),
]


def bench(
    models: Models = None,
    data: _Data = "digits",
    metrics: _Metrics = None,
    n: _N = 2000,
    weights: _Weights = None,
    checkpoint: Checkpoint = "last",
    gpus: Gpus = None,
    cpu: Cpu = False,
    processes: Processes = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare trained models on one data set; without a name, every model that has a finished run on it."""
    from gzcli.cli.jobs import do_job, reference, stamp, tell_run
    from gzcli.data.names import data_key
    from gzcli.store import runs
    from gzcli.store.paths import user_dir

    data = reference(data)
    key = data_key(data)
    if not models:
        there = {run.model: None for run in reversed(runs.all_runs(data=key)) if run.state == "finished"}
        models = list(there)
    if not models:
        raise MissingError(f"no finished run on `{data}`", hint=f"gz train vae --data {data}")
    chosen = [runs.find(model, data=key) for model in models]
    for run, model in zip(chosen, models, strict=True):
        tell_run(run, model, data=key)
    job = {
        "verb": "bench",
        "runs": [str(run.path) for run in chosen],
        "data": data,
        "metrics": split(metrics) or None,
        "n": n,
        "seed": seed,
        "weights": weights and str(weights),
        "checkpoint": checkpoint,
    }
    folder = user_dir("bench") / f"{key}-{stamp()}"
    result = do_job(folder, job, gpus=gpus, cpu=cpu, processes=processes)
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["metrics"]))
    rows = [
        [row["model"], row["params"], *(row["metrics"].get(name) for name in names), row["seconds"]]
        for row in result["rows"]
    ]
    rows.append(["(real images)", None, *(result["floor"].get(name) for name in names), None])
    out.table(
        ["model", "params", *names, "seconds"],
        [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in rows],
    )
    for note in result["notes"]:
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    out.data(result)
