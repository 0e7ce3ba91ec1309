"""`gz ood`: how well the scores of a trained model separate foreign images from those it was trained on."""

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
    Precision,
    Processes,
    Quiet,
    Report,
    SeedOrZero,
    complete_data,
    complete_data_list,
    complete_scores,
    split,
)
from gzcli.cli.report import check_report, with_report
from gzcli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from gzcli.data.benchmarks import Benchmark
    from gzcli.data.names import DataSet
    from gzcli.sections import DataSection

_In = Annotated[
    str | None,
    typer.Option(
        "--in",
        metavar="NAME|PATH",
        help="The in-distribution set, scored on its test split; without it the run's own set.",
        autocompletion=complete_data,
    ),
]
_Outs = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="NAME|PATH[,…]",
        help="The foreign sets: test splits of known sets; of your own images the `test` folder or, without "
        "one, every picture. A path that holds a comma is not split there.",
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
        "--score",
        metavar="S[,S…]",
        help="Scores; without it those of the recipe.",
        autocompletion=complete_scores,
    ),
]
_N = Annotated[
    int | None,
    typer.Option(
        "-n",
        metavar="N",
        min=10,
        help="Images scored of each set; without it as many as the time budget allows.",
    ),
]
_Full = Annotated[bool, typer.Option("--full", help="All images of each set.")]
_Background = Annotated[
    str | None,
    typer.Option(
        "--background",
        metavar="RUN",
        help="The run that the score `ratio` divides by, trained on mutated images.",
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
    precision: Precision = None,
    seed: SeedOrZero = 0,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score images of other data sets by how foreign they are to a model.

    A higher score is more out-of-distribution. Baselines that use no model are listed beside its scores.

    The scores' own options (`--starts 8`, `--steps 20`) are those of the recipe's `ood` section.
    """
    from gzcli.cli.jobs import announce, do_job, method_options, processes_of, stamp
    from gzcli.data.names import locate, slug
    from gzcli.jobs import OodJob
    from gzcli.models.catalog import card_of
    from gzcli.parts import part_of
    from gzcli.recipe.from_file import find_run
    from gzcli.recipe.schema import check_scores, score_options

    check_report(report)
    asked = inside_of(benchmark, in_, out_) if benchmark else None
    if asked is None and not out_:
        hint = f"gz ood {model} --in mnist --out fashionmnist"
        raise UsageError("`gz ood` needs `--out` or `--benchmark`", hint=hint)
    named = asked.inside if asked else in_
    home = locate(named) if named else None
    key = home.key if home else None
    run = find_run(model, data=key)
    part = part_of(run.serving.tree())
    home = home or locate(part.data.name)
    foreign = at_hand(asked, part.data) if asked else [locate(name) for name in sets(out_ or "")]
    known = card_of(run, part.model)
    scores = tuple(check_scores(split(score), known)) if score else None
    options = method_options(ctx.args, score_options(known), f"`gz ood` of `{known.name}`", "ood")
    announce(run, model, data=key)
    outs = tuple(found.reference for found in foreign)
    job = OodJob(
        str(run.path),
        home.reference,
        outs,
        checkpoint,
        scores,
        n,
        full,
        seed,
        options,
        benchmark=asked.name if asked else None,
        background=str(find_run(background).path) if background else None,
        precision=precision,
        launch=processes_of(gpus, cpu, processes),
    )
    label = asked.name if asked else "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]
    folder = run.path / "ood" / f"{label}-{stamp()}"
    result = do_job(folder, job)
    table(result)
    for note in result.get("notes", []):
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    out.data(with_report(result, folder, report))


def table(result: Mapping[str, Any]) -> None:
    """Prints a line for each foreign set and score, with 95 % intervals; within 80 columns for one set."""
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
    """The names of a comma-separated list.

    A name may hold commas: from each start on, the longest text that is a set or an existing path is taken.
    """
    from gzcli.data.names import is_set

    parts, found = text.split(","), []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if is_set(",".join(parts[:n]).strip())), 1)
        found.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [name for name in found if name]


def inside_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark of this name. Raises UsageError where other sets than its own are given."""
    from gzcli.data.benchmarks import find

    benchmark = find(name)
    if out_ or (in_ and in_ != benchmark.inside):
        raise UsageError(
            f"`{benchmark.name}` has sets of its own: `--in {benchmark.inside}`",
            hint="leave `--in` and `--out` out",
        )
    return benchmark


def at_hand(benchmark: Benchmark, data: DataSection) -> list[DataSet]:
    """The foreign sets of a benchmark that are here or small enough to be fetched; prints those left out.

    benchmark: whose sets.
    data: form of the run's images, in which the sets are packed.

    Raises MissingError where there is none.
    """
    from gzcli.data.names import locate
    from gzcli.data.open import open_pack
    from gzcli.data.wanted import wanted

    found = []
    for name in (*benchmark.near, *benchmark.far):
        foreign = locate(name)
        try:
            open_pack(foreign, **wanted(data), say=out.info)
            found.append(foreign)
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
