"""`gz ood`: how well a trained model tells foreign images from its own."""

from __future__ import annotations

from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Model,
    Quiet,
    Seed,
    complete_data,
    complete_data_list,
    complete_scores,
    split,
)

_In = Annotated[
    str, typer.Option("--in", metavar="NAME", help="The in-distribution set: its test split.", autocompletion=complete_data)
]
_Outs = Annotated[str, typer.Option("--out", metavar="NAME[,NAME…]", help="The foreign sets.", autocompletion=complete_data_list)]
_Score = Annotated[
    str | None,
    typer.Option("--score", metavar="S[,S…]", help="Scores; the recipe's without it.", autocompletion=complete_scores),
]
_N = Annotated[
    int | None, typer.Option("-n", metavar="N", min=10, help="Images of each set; as many as the budget allows without it.")
]
_Full = Annotated[bool, typer.Option("--full", help="The whole test splits.")]
_Background = Annotated[
    str | None, typer.Option("--background", metavar="RUN", help="For the score `ratio`: a run trained on mutated images.")
]


def ood(
    model: Model, in_: _In, out_: _Outs, score: _Score = None, n: _N = None, full: _Full = False, background: _Background = None,
    checkpoint: Checkpoint = "last", gpus: Gpus = None, cpu: Cpu = False, seed: Seed = 0, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Score how foreign images of other sets look to a model.

    A higher score is more out-of-distribution; baselines that know no model stand beside the model's scores.
    """
    from gzcli.cli.jobs import do_job, reference, stamp
    from gzcli.data.library import data_key
    from gzcli.models.catalog import card
    from gzcli.recipe.schema import check_scores
    from gzcli.store import runs

    outs = [reference(name) for name in split(out_)]
    in_ = reference(in_)
    run = runs.find(model, data=data_key(in_))
    scores = check_scores(split(score), card(run.model)) if score else None
    out.info(f"run: {run.id}")
    job = {
        "verb": "ood", "run": str(run.path), "in": in_, "out": outs, "scores": scores, "n": n, "full": full, "seed": seed,
        "checkpoint": checkpoint, "options": {}, "background": str(runs.find(background).path) if background else None,
    }  # fmt: skip
    folder = run.path / "ood" / f"{'-'.join(name.rsplit('/', 1)[-1] for name in outs)}-{stamp()}"
    result = do_job(folder, job, gpus=gpus, cpu=cpu)
    columns = ["out", "score", "auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_id", "n_in", "n_out"]
    shown = [[f"{row[c]:.4f}" if isinstance(row[c], float) else row[c] for c in columns] for row in result["results"]]
    for line, row in zip(shown, result["results"], strict=True):
        line[1] += " (baseline)" if row["baseline"] else ""
    out.table(columns, shown)
    for note in result.get("notes", []):
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    out.data(result)
