"""`gz bench`: compares trained models by image quality, likelihood, class balance and speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Models,
    Precision,
    Processes,
    Quiet,
    Report,
    SeedOrZero,
    complete_data,
    split,
)
from gzcli.cli.report import check_report, with_report
from gzcli.errors import MissingError

_Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="NAME|PATH", help="The data set to compare on.", autocompletion=complete_data
    ),
]
_Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="M[,M…]",
        help="fd kid_lenet prc_lenet classes bpd own speed, and with Inception's weights fid kid is.",
    ),
]
_N = Annotated[int, typer.Option("-n", metavar="N", min=50, help="Number of samples drawn of each model.")]
_Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="FILE", help="File of Inception's weights.", exists=True, resolve_path=True
    ),
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
    precision: Precision = None,
    seed: SeedOrZero = 0,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare trained models on one data set; without a name, every model that has a finished run on it."""
    from gzcli.cli.jobs import announce, do_job, processes_of, stamp
    from gzcli.cli.weights import bring
    from gzcli.data.names import locate
    from gzcli.data.weights import needed_by
    from gzcli.jobs import BenchJob
    from gzcli.recipe.from_file import find_run
    from gzcli.store import runs
    from gzcli.store.paths import user_dir

    check_report(report)
    found = locate(data)
    if not models:
        done = [run for run in runs.all_runs(data=found.key) if run.state == "finished"]
        models = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
    if not models:
        raise MissingError(
            f"no finished run on `{found.reference}`", hint=f"gz train vae --data {found.reference}"
        )
    chosen = [find_run(model, data=found.key) for model in models]
    for run, model in zip(chosen, models, strict=True):
        announce(run, model, data=found.key)
    if not weights:
        bring(needed_by(tuple(split(metrics))))
    job = BenchJob(
        tuple(str(run.path) for run in chosen),
        found.reference,
        tuple(split(metrics)) or None,
        n,
        seed,
        str(weights) if weights else None,
        checkpoint,
        precision,
        processes_of(gpus, cpu, processes),
    )
    folder = user_dir("bench") / f"{found.key}-{stamp()}"
    result = do_job(folder, job)
    table(result)
    for note in result["notes"]:
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    out.data(with_report(result, folder, report))


def table(result: Mapping[str, Any]) -> None:
    """Prints a line for each model, and one for real images in place of samples."""
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
