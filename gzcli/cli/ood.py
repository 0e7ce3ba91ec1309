"""`gz ood`: how well the scores of a trained model separate foreign images from those it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import alarm, out
from gzcli.cli.ends import end, quoted, took
from gzcli.cli.jobs import OWN_OPTIONS
from gzcli.cli.model_options import complete_scores
from gzcli.cli.ood_asked import at_hand, check_same_data, chosen, inside_of, leading, sets, with_lists
from gzcli.cli.options import (
    Checkpoint,
    Cpu,
    Gpus,
    Json,
    Model,
    Precision,
    Pretrained,
    Processes,
    Quiet,
    Report,
    SeedOrZero,
    Slurm,
    Submit,
    complete_data,
    complete_data_list,
    spelled,
    split,
)
from gzcli.cli.report import check_report, with_report
from gzcli.core.errors import FLAGGED, UsageError
from gzcli.data.readers.kinds import counted

if TYPE_CHECKING:
    from gzcli.models.catalog import ModelCard

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
        help="Scores, or `all`; without it those of the recipe, of `--input` its first.",
        autocompletion=complete_scores,
    ),
]
_N = Annotated[
    int | None,
    typer.Option(
        "-n",
        metavar="N",
        min=10,
        help="Images scored of each set, or compared with pictures; without it as many as the time budget "
        "allows.",
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
_Seeds = Annotated[
    int | None,
    typer.Option(
        "--seeds",
        metavar="K",
        min=1,
        help="Seeds of the noise: means over K of them, ± spread. Without it one; 4 of `--input`, where "
        "scores draw noise.",
    ),
]
_Imglists = Annotated[
    str | None,
    typer.Option(
        "--imglists",
        metavar="DIR",
        help="OpenOOD's `data` folder: its image lists then say the images of `--benchmark`.",
    ),
]

SETTINGS = OWN_OPTIONS


def ood(
    ctx: typer.Context,
    model: Model,
    pretrained: Pretrained = False,
    in_: _In = None,
    out_: _Outs = None,
    benchmark: _Benchmark = None,
    input_: alarm.Input = None,
    fpr: alarm.Fpr = None,
    map_: alarm.Map = False,
    png: alarm.Png = False,
    fail: alarm.Fail = False,
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
    seeds: _Seeds = None,
    imglists: _Imglists = None,
    report: Report = None,
    submit: Submit = None,
    slurm: Slurm = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score images of other data sets, or single pictures, by how foreign they are to a model.

    A higher score is more out-of-distribution. Baselines that use no model are listed beside its scores.
    Further runs after the first one make an ensemble with it, as in `gz ood RUN RUN2 RUN3 --out mnist`.

    The scores' own options (`--starts 8`, `--steps 20`) are those of the recipe's `ood` section.
    """
    began = monotonic()
    from gzcli.cli.jobs import announce, do_job, method_options, new_folder, processes_of
    from gzcli.cli.submit import submit_verb
    from gzcli.core.jobs import AlarmJob, OodJob
    from gzcli.core.parts import part_of
    from gzcli.data.sets.names import locate, slug
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of
    from gzcli.recipe.schema import score_options

    check_report(report)
    compares = {"--out": out_, "--benchmark": benchmark, "--imglists": imglists}
    alarm.check(input_, {"--fpr": fpr, "--map": map_, "--png": png, "--fail": fail}, compares)
    if imglists and not benchmark:
        raise UsageError("`--imglists` goes with `--benchmark`", hint="--benchmark openood-cifar10")
    asked = inside_of(benchmark, in_, out_) if benchmark else None
    if asked is None and not out_ and input_ is None:
        hint = f"gz ood {model} --in mnist --out fashionmnist"
        raise UsageError("`gz ood` needs `--out`, `--benchmark` or `--input`", hint=hint)
    named = asked.inside if asked else in_
    home = locate(named) if named else None
    key = home.key if home else None
    model = spelled(model, pretrained)
    run = find_run(model, data=key)
    part = part_of(run.serving.tree())
    home = home or locate(part.data.name)
    known = card_of(run, part.model)
    further, words = leading(ctx.args)
    others = [find_run(word, data=home.key) for word in further]
    parts = [part_of(other.serving.tree()) for other in others]
    check_same_data(part.data.name, {run.id: own.data.name for run, own in zip(others, parts, strict=True)})
    cards = [known, *(card_of(other, own.model) for other, own in zip(others, parts, strict=True))]
    scores = chosen(split(score), cards, part.ood.scores)
    options = method_options(words, score_options(known), f"`gz ood` of `{known.name}`", "ood")
    shared: dict[str, Any] = {
        "checkpoint": checkpoint,
        "scores": scores,
        "n": n,
        "full": full,
        "seed": seed,
        "options": options,
        "background": str(find_run(background).path) if background else None,
        "others": tuple(str(other.path) for other in others),
        "precision": precision,
        "launch": processes_of(gpus, cpu, processes),
    }
    lists = alarm.path_of(imglists) if imglists else None
    if input_ is not None:
        if map_:
            alarm.check_maps(known)
        path = alarm.path_of(input_)
    elif asked:
        foreign = with_lists(asked, lists) if lists else at_hand(asked, part.data)
    else:
        foreign = [locate(name) for name in sets(out_ or "")]
    if submit or slurm:
        return submit_verb("ood", model, seed, shared["launch"], slurm or ())
    announce(run, model, data=key)
    if input_ is not None:
        folder = new_folder(run.path / "ood", f"input-{slug(path.stem)}")
        result = do_job(
            folder,
            AlarmJob(
                str(run.path),
                home.reference,
                str(path),
                alarm.rate(fpr),
                maps=map_,
                png=png,
                seeds=seeds,
                **shared,
            ),
        )
        alarm.table(result)
    else:
        outs = tuple(found.reference for found in foreign)
        label = asked.name if asked else "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]
        folder = new_folder(run.path / "ood", label)
        result = do_job(
            folder,
            OodJob(
                str(run.path),
                home.reference,
                outs,
                benchmark=asked.name if asked else None,
                imglists=str(lists) if lists else None,
                seeds=seeds or 1,
                **shared,
            ),
        )
        table(result)
    for note in result.get("notes", []):
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    ended(result, folder, quoted(model) + (f" --in {quoted(in_)}" if in_ else ""), known, took(began))
    out.data(with_report(result, folder, report))
    if fail and result["flagged"]:
        raise SystemExit(FLAGGED)


def ended(result: Mapping[str, Any], folder: Path, name: str, model: ModelCard, time: str) -> None:
    """The end of `gz ood`: which score was best, or what was flagged, and what to do with it.

    folder: of the results.
    name: the words that mean the run.
    time: that the verb took.
    """
    page = (f"gz report {quoted(folder)}", "")
    if "thresholds" in result:
        flagged = sum(row["flagged"] for row in result["files"])
        again = f"gz ood {name} --input {quoted(result['input'])}"
        more = (f"{again} --map", "where they are strange") if model.maps else (f"{again} --fpr 5%", "")
        return end([f"{flagged:,} of {counted(len(result['files']), 'picture')} flagged", time], [more])
    own = [row for row in result["results"] if not row["baseline"]]
    best = max(own, key=lambda row: row["auroc"], default=None)
    told = f"best score `{best['score']}`, AUROC {best['auroc']:.3f}" if best else None
    end([told, time], [page, (f"gz ood {name} --input ./pictures", "your own pictures, one by one")])


def table(result: Mapping[str, Any]) -> None:
    """Prints a line for each foreign set and score, with 95 % intervals."""
    names, rows = result["names"], result["results"]
    several = len({row["out"] for row in rows}) > 1

    def line(row: Mapping[str, Any]) -> list[str]:
        shown = [names.get(row["out"], row["out"])] if several else []
        shown.append(row["score"] + "*" * row["baseline"])
        for key in ("auroc", "fpr95"):
            low, high = (row["ci"] or {}).get(key, (None, None))
            ends = [] if low is None else [f"{end:.3f}".removeprefix("0") for end in (low, high)]
            spread = f"±{row['spread'][key]:.4f}" if "spread" in row else None
            shown += [f"{row[key]:.4f}", spread or "–".join(ends)]
        return shown + [f"{row[key]:.4f}" for key in ("fpr95_id", "aupr_in", "aupr_out")]

    error = "± seeds" if any("spread" in row for row in rows) else "(95 %)"
    columns = ["score", "auroc", error, "fpr95", error, "fpr95_id", "aupr_in", "aupr_out"]
    out.table(
        [*(["out"] if several else []), *columns],
        [line(row) for row in rows],
        spare=("aupr_in", "aupr_out", "fpr95_id", error),
        elsewhere="`gz report` shows them, `--json` too",
    )
    counts = {names[row["out"]]: row["n_out"] for row in rows if row["out"] in names}
    sizes = ", ".join(f"{n:,} of `{name}`" for name, n in counts.items())
    inside = f"{rows[0]['n_in']:,} of `{names[result['in']]}`"
    out.info(f"images: {inside} (in), {sizes} (out); * baselines, which know no model")
