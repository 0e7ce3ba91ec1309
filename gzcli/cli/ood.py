"""`gz ood`: how well a trained model tells foreign images from its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gzcli.cli import out
from gzcli.cli.jobs import OWN_OPTIONS
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
from gzcli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from gzcli.data.benchmarks import Benchmark
    from gzcli.store.runs import Run

_In = Annotated[
    str | None, typer.Option("--in", metavar="NAME", help="The in-distribution set: its test split.", autocompletion=complete_data)
]
_Outs = Annotated[
    str | None, typer.Option("--out", metavar="NAME[,NAME…]", help="The foreign sets.", autocompletion=complete_data_list)
]
_Benchmark = Annotated[
    str | None,
    typer.Option("--benchmark", metavar="B", help="The sets of openood-mnist, openood-cifar10 or openood-cifar100."),
]
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

SETTINGS = OWN_OPTIONS


def ood(
    ctx: typer.Context, model: Model, in_: _In = None, out_: _Outs = None, benchmark: _Benchmark = None, score: _Score = None,
    n: _N = None, full: _Full = False, background: _Background = None, checkpoint: Checkpoint = "last", gpus: Gpus = None,
    cpu: Cpu = False, seed: Seed = 0, json: Json = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Score how foreign images of other sets look to a model.

    A higher score is more out-of-distribution; baselines that know no model stand beside the model's scores.

    The scores' own options (`--starts 8`, `--steps 20`) are those of the recipe's `ood` section.
    """
    from gzcli.cli.jobs import do_job, method_options, reference, stamp, tell_run
    from gzcli.data.library import data_key
    from gzcli.models.catalog import card
    from gzcli.recipe.schema import check_scores, score_options
    from gzcli.store import runs

    asked = inside_of(benchmark, in_, out_) if benchmark else None
    if asked is None and not (in_ and out_):
        raise UsageError(
            "`gz ood` needs `--in` and `--out`, or `--benchmark`", hint=f"gz ood {model} --in mnist --out fashionmnist"
        )
    in_ = asked.inside if asked else reference(in_)
    run = runs.find(model, data=data_key(in_))
    outs = at_hand(asked, run) if asked else [reference(name) for name in split(out_)]
    known = card(run.serving.tree()["model"]["name"])
    scores = check_scores(split(score), known) if score else None
    options = method_options(ctx.args, score_options(known), f"`gz ood` of `{known.name}`", "ood")
    tell_run(run, model, data=data_key(in_))
    job = {
        "verb": "ood", "run": str(run.path), "in": in_, "out": outs, "benchmark": asked and asked.name, "scores": scores,
        "n": n, "full": full, "seed": seed, "checkpoint": checkpoint, "options": options,
        "background": str(runs.find(background).path) if background else None,
    }  # fmt: skip
    folder = run.path / "ood" / f"{asked.name if asked else '-'.join(name.rsplit('/', 1)[-1] for name in outs)}-{stamp()}"
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


def inside_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark of this name. Raises UsageError where sets are given that are not its own."""
    from gzcli.data.benchmarks import find

    benchmark = find(name)
    if out_ or (in_ and in_ != benchmark.inside):
        raise UsageError(f"`{benchmark.name}` has sets of its own: `--in {benchmark.inside}`", hint="leave `--in` and `--out` out")
    return benchmark


def at_hand(benchmark: Benchmark, run: Run) -> list[str]:
    """The foreign sets of a benchmark that are there, or small enough to be fetched unasked; the others are named.

    Raises MissingError where there is none.
    """
    from gzcli.data.pack import open_pack

    section, found = run.serving.tree()["data"], []
    for name in (*benchmark.near, *benchmark.far):
        try:
            open_pack(name, size=section["size"], channels=section["channels"], say=out.info)
            found.append(name)
        except MissingError as e:
            out.info(f"left out: {e.message} ({e.hint})")
    for name in benchmark.absent:
        out.info(f"left out: `{name}`, which gz does not know")
    if not found:
        sets = " ".join((*benchmark.near, *benchmark.far))
        raise MissingError(f"none of the foreign sets of `{benchmark.name}` is at hand", hint=f"gz data download {sets}")
    return found
