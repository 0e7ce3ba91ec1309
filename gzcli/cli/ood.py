"""`gz ood`: how well a trained model tells foreign images from its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.jobs import OWN_OPTIONS
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Model,
    Processes,
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
    str | None,
    typer.Option(
        "--in",
        metavar="NAME|PATH",
        help="The in-distribution set: its test split. The run's own set without it.",
        autocompletion=complete_data,
    ),
]
_Outs = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="NAME|PATH[,…]",
        help="The foreign sets: test splits of known sets; of your own the `test` folder or, without one, "
        "every "
        "picture. What is a set or a path as it stands is never split at its commas.",
        autocompletion=complete_data_list,
    ),
]
_Benchmark = Annotated[
    str | None,
    typer.Option(
        "--benchmark", metavar="B", help="The sets of openood-mnist, openood-cifar10 or openood-cifar100."
    ),
]
_Score = Annotated[
    str | None,
    typer.Option(
        "--score", metavar="S[,S…]", help="Scores; the recipe's without it.", autocompletion=complete_scores
    ),
]
_N = Annotated[
    int | None,
    typer.Option(
        "-n", metavar="N", min=10, help="Images scored of each set; without it as the budget allows."
    ),
]
_Full = Annotated[bool, typer.Option("--full", help="All images of each set.")]
_Background = Annotated[
    str | None,
    typer.Option(
        "--background", metavar="RUN", help="For the score `ratio`: a run trained on mutated images."
    ),
]

SETTINGS = OWN_OPTIONS


def ood(
    ctx: typer.Context,
    model: Model,
    in_: _In = None,
    out_: _Outs = None,
    benchmark: _Benchmark = None,
    score: _Score = None,
    n: _N = None,
    full: _Full = False,
    background: _Background = None,
    checkpoint: Checkpoint = "last",
    gpus: Gpus = None,
    cpu: Cpu = False,
    processes: Processes = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score how foreign images of other sets look to a model.

    A higher score is more out-of-distribution; baselines that know no model stand beside the model's scores.

    The scores' own options (`--starts 8`, `--steps 20`) are those of the recipe's `ood` section.
    """
    from gzcli.cli.jobs import do_job, method_options, reference, stamp, tell_run
    from gzcli.data.names import data_key, slug
    from gzcli.models.catalog import card
    from gzcli.recipe.schema import check_scores, score_options
    from gzcli.store import runs

    asked = inside_of(benchmark, in_, out_) if benchmark else None
    if asked is None and not out_:
        hint = f"gz ood {model} --in mnist --out fashionmnist"
        raise UsageError("`gz ood` needs `--out` or `--benchmark`", hint=hint)
    in_ = asked.inside if asked else in_ and reference(in_)
    key = in_ and data_key(in_)
    run = runs.find(model, data=key)
    in_ = in_ or reference(run.serving.tree()["data"]["name"])
    outs = at_hand(asked, run) if asked else [reference(name) for name in sets(out_)]
    known = card(run.serving.tree()["model"]["name"])
    scores = check_scores(split(score), known) if score else None
    options = method_options(ctx.args, score_options(known), f"`gz ood` of `{known.name}`", "ood")
    tell_run(run, model, data=key)
    job = {
        "verb": "ood",
        "run": str(run.path),
        "in": in_,
        "out": outs,
        "benchmark": asked and asked.name,
        "scores": scores,
        "n": n,
        "full": full,
        "seed": seed,
        "checkpoint": checkpoint,
        "options": options,
        "background": str(runs.find(background).path) if background else None,
    }
    label = asked.name if asked else "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]
    folder = run.path / "ood" / f"{label}-{stamp()}"
    result = do_job(folder, job, gpus=gpus, cpu=cpu, processes=processes)
    table(result)
    for note in result.get("notes", []):
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    out.data(result)


def table(result: Mapping[str, Any]) -> None:
    """A line for each foreign set and score, within 80 columns where there is one set; intervals of 95 %."""
    names, rows = result["names"], result["results"]
    several = len({row["out"] for row in rows}) > 1

    def line(row: Mapping[str, Any]) -> list[str]:
        shown = [names.get(row["out"], row["out"])] if several else []
        shown.append(row["score"] + "*" * row["baseline"])
        for key in ("auroc", "fpr95"):
            low, high = (row["ci"] or {}).get(key, (None, None))
            ends = [] if low is None else [f"{end:.3f}".removeprefix("0") for end in (low, high)]
            shown += [f"{row[key]:.4f}", "–".join(ends)]
        return shown + [f"{row[key]:.4f}" for key in ("fpr95_id", "aupr_in", "aupr_out")]

    columns = ["score", "auroc", "(95 %)", "fpr95", "(95 %)", "fpr95_id", "aupr_in", "aupr_out"]
    out.table([*(["out"] if several else []), *columns], [line(row) for row in rows])
    counts = {names[row["out"]]: row["n_out"] for row in rows if row["out"] in names}
    sizes = ", ".join(f"{n:,} of `{name}`" for name, n in counts.items())
    inside = f"{rows[0]['n_in']:,} of `{names[result['in']]}`"
    out.info(f"images: {inside} (in), {sizes} (out); * baselines, which know no model")


def sets(text: str) -> list[str]:
    """The sets of a comma-separated list: from each comma on the longest text that is a set or an existing
    path."""
    from gzcli.data.names import is_set

    parts, found = text.split(","), []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if is_set(",".join(parts[:n]).strip())), 1)
        found.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [name for name in found if name]


def inside_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark of this name. Raises UsageError where sets are given that are not its own."""
    from gzcli.data.benchmarks import find

    benchmark = find(name)
    if out_ or (in_ and in_ != benchmark.inside):
        raise UsageError(
            f"`{benchmark.name}` has sets of its own: `--in {benchmark.inside}`",
            hint="leave `--in` and `--out` out",
        )
    return benchmark


def at_hand(benchmark: Benchmark, run: Run) -> list[str]:
    """The foreign sets of a benchmark that are there, or small enough to be fetched unasked; the others are
    named.

    Raises MissingError where there is none.
    """
    from gzcli.data.open import open_named

    section, found = run.serving.tree()["data"], []
    for name in (*benchmark.near, *benchmark.far):
        try:
            open_named(name, size=section["size"], channels=section["channels"], say=out.info)
            found.append(name)
        except MissingError as e:
            out.info(f"left out: {e.message} ({e.hint})")
    for name in benchmark.absent:
        out.info(f"left out: `{name}`, which gz does not know")
    if not found:
        sets = " ".join((*benchmark.near, *benchmark.far))
        raise MissingError(
            f"none of the foreign sets of `{benchmark.name}` is at hand", hint=f"gz data download {sets}"
        )
    return found
