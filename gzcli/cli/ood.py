"""`gz ood`: how well the scores of a trained model separate foreign images from those it was trained on; and
with `--input` an alarm for each of the user's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.jobs import OWN_OPTIONS, end, quoted, took
from gzcli.cli.model_options import complete_scores
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
from gzcli.core.errors import FLAGGED, MissingError, UsageError, canonical
from gzcli.core.units import counted

if TYPE_CHECKING:
    from gzcli.core.sections import DataSection
    from gzcli.data.sets.names import DataSet
    from gzcli.data.sets.registry import Benchmark
    from gzcli.models.catalog import ModelCard

SETTINGS = OWN_OPTIONS
LINES, NAME = 20, 40  # flagged pictures in the table, and letters of a name there, at most
_of_pictures = partial(typer.Option, rich_help_panel="Single pictures")

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
_Input = Annotated[
    str | None,
    _of_pictures(
        "--input",
        metavar="PATH",
        help="Pictures to be judged one by one: a picture, or a folder, zip, tar or npz of them.",
    ),
]
_Fpr = Annotated[
    str | None,
    _of_pictures(
        "--fpr",
        metavar="1%|0.01",
        help="Share of in-distribution pictures that may be flagged; 1 % without it.",
    ),
]
_Map = Annotated[bool, _of_pictures("--map", help="Show where the strangest pictures are anomalous.")]
_Png = Annotated[
    bool, _of_pictures("--png", help="Write the map of every picture, not of the strangest alone.")
]
_Fail = Annotated[
    bool, _of_pictures("--fail", help="End with exit code 6 where a picture is flagged, for scripts.")
]


def ood(
    ctx: typer.Context,
    model: Model,
    pretrained: Pretrained = False,
    in_: _In = None,
    out_: _Outs = None,
    benchmark: _Benchmark = None,
    input_: _Input = None,
    fpr: _Fpr = None,
    map_: _Map = False,
    png: _Png = False,
    fail: _Fail = False,
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
    from gzcli.data.sets.names import local, locate, slug
    from gzcli.launch.from_file import find_run
    from gzcli.models.catalog import card_of
    from gzcli.recipe.schema import score_options

    check_report(report)
    of_pictures = {"--fpr": fpr, "--map": map_, "--png": png, "--fail": fail}
    of_sets = {"--out": out_, "--benchmark": benchmark, "--imglists": imglists}
    check_options(model, input_, of_pictures, of_sets)
    openood = benchmark_of(benchmark, in_, out_) if benchmark else None
    name = openood.inside if openood else in_
    key = locate(name).key if name else None
    model = spelled(model, pretrained)
    further, words = leading(ctx.args)
    run = find_run(model, data=key)
    part = part_of(run.serving.tree())
    home = locate(name or part.data.name)
    others = [find_run(word, data=home.key) for word in further]
    parts = [part, *(part_of(other.serving.tree()) for other in others)]
    check_same_data({each.id: p.data.name for each, p in zip([run, *others], parts, strict=True)})
    cards = [card_of(each, p.model) for each, p in zip([run, *others], parts, strict=True)]
    scores = choose_scores(split(score), cards, part.ood.scores)
    options = method_options(words, score_options(cards[0]), f"`gz ood` of `{cards[0].name}`", "ood")
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
    job: AlarmJob | OodJob
    if input_ is not None:
        if map_:
            check_maps(cards[0])
        path = local(input_)
        shared |= {"maps": map_, "png": png, "seeds": seeds}
        job = AlarmJob(str(run.path), home.reference, str(path), rate(fpr), **shared)
        label = f"input-{slug(path.stem)}"
    else:
        lists = local(imglists) if imglists else None
        foreign = foreign_sets(openood, lists, out_, part.data)
        outs = tuple(each.reference for each in foreign)
        label = openood.name if openood else "-".join(slug(name.rsplit("/", 1)[-1]) for name in outs)[:80]
        shared |= {"benchmark": openood and openood.name, "imglists": str(lists) if lists else None}
        job = OodJob(str(run.path), home.reference, outs, seeds=seeds or 1, **shared)
    if submit or slurm:
        return submit_verb("ood", model, seed, job.launch, slurm or ())
    announce(run, model, data=key)
    folder = new_folder(run.path / "ood", label)
    result = do_job(folder, job)
    (table if input_ is None else table_of_pictures)(result)
    for note in result.get("notes", []):
        out.info(f"note: {note}")
    out.info(f"files: {folder}")
    ending(result, folder, quoted(model) + (f" --in {quoted(in_)}" if in_ else ""), cards[0], took(began))
    out.data(with_report(result, folder, report))
    if fail and result["flagged"]:
        raise SystemExit(FLAGGED)


# ---------------------------------------------------------------------------- what was asked for


def check_options(
    model: str, input_: str | None, of_pictures: Mapping[str, Any], of_sets: Mapping[str, Any]
) -> None:
    """Raises UsageError for options that do not go together, MissingError where the pictures are not there.
    The options for single pictures and for sets are values by their names."""
    from gzcli.data.sets.names import local

    if input_ is None:
        if wrong := next((name for name, value in of_pictures.items() if value), None):
            raise UsageError(f"`{wrong}` goes with `--input`", hint="gz ood RUN --input ./pictures")
        if of_sets["--imglists"] and not of_sets["--benchmark"]:
            raise UsageError("`--imglists` goes with `--benchmark`", hint="--benchmark openood-cifar10")
        if not of_sets["--benchmark"] and not of_sets["--out"]:
            hint = f"gz ood {model} --in mnist --out fashionmnist"
            raise UsageError("`gz ood` needs `--out`, `--benchmark` or `--input`", hint=hint)
        return
    if wrong := next((name for name, value in of_sets.items() if value), None):
        raise UsageError(
            f"`--input` judges single pictures, `{wrong}` compares sets", hint="leave one of them out"
        )
    if of_pictures["--png"] and not of_pictures["--map"]:
        raise UsageError("`--png` writes maps", hint="add `--map`")
    if not local(input_).exists():
        raise MissingError(
            f"there is no `{input_}`", hint="give a picture, or a folder, zip, tar or npz of pictures"
        )


def leading(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, which are further runs, and the rest."""
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:at], words[at:]


def check_same_data(sets: Mapping[str, str]) -> None:
    """Raises UsageError where a run of an ensemble was trained on another set than the first one: sets by
    run."""
    from gzcli.data.sets.names import data_key

    first = next(iter(sets.values()))
    for run, name in sets.items():
        if data_key(name) != data_key(first):
            raise UsageError(
                f"`{run}` was trained on `{name}`, the first run on `{first}`",
                hint="an ensemble is of runs of one set",
            )


def choose_scores(
    names: list[str], cards: Sequence[ModelCard], of_recipe: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The scores by their proper names; None: the engine takes those of the recipe.

    Without names, several runs take those scores of the first one's recipe that all have, and `waic` where
    all have a likelihood. Raises UsageError for a score that a run does not have.
    """
    from gzcli.recipe.schema import check_scores, score_names

    if [canonical(name) for name in names] == ["all"]:
        return ("all",)
    if names or len(cards) == 1:
        plain = [name for name in names if canonical(name) != "waic"]
        for card in cards:
            plain = check_scores(plain, card)
        proper = iter(plain)
        return tuple("waic" if canonical(name) == "waic" else next(proper) for name in names) or None
    scores = [set(score_names(card)) for card in cards]
    common = [name for name in of_recipe or score_names(cards[0]) if all(name in each for each in scores)]
    waic = ["waic"] if all("nll" in each for each in scores) else []
    if not common + waic:
        raise UsageError("the runs have no score in common", hint="gz list models --can ood")
    return tuple(common + waic)


def split_sets(text: str) -> list[str]:
    """The names of a comma-separated list.

    A name may hold commas: from each start on, the longest text that is a set or an existing path is taken.
    """
    from gzcli.data.sets.names import is_set

    parts, names = text.split(","), []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if is_set(",".join(parts[:n]).strip())), 1)
        names.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [name for name in names if name]


def benchmark_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark of this name. Raises UsageError where other sets than its own are given."""
    from gzcli.data.sets.registry import find_benchmark

    benchmark = find_benchmark(name)
    if out_ or (in_ and in_ != benchmark.inside):
        raise UsageError(
            f"`{benchmark.name}` has sets of its own: `--in {benchmark.inside}`",
            hint="leave `--in` and `--out` out",
        )
    return benchmark


def foreign_sets(
    benchmark: Benchmark | None, lists: Path | None, out_: str | None, data: DataSection
) -> list[DataSet]:
    """The foreign sets: those of a benchmark that are at hand, or that OpenOOD's `data` folder has lists of;
    else those of `--out`."""
    from gzcli.data.sets.names import locate

    if benchmark:
        return with_lists(benchmark, lists) if lists else at_hand(benchmark, data)
    return [locate(name) for name in split_sets(out_ or "")]


def with_lists(benchmark: Benchmark, root: Path) -> list[DataSet]:
    """The foreign sets of a benchmark that OpenOOD's `data` folder has lists of; prints those left out."""
    from gzcli.data.sets.library import list_of
    from gzcli.data.sets.names import locate

    names = (*benchmark.near, *benchmark.far)
    sets = [locate(name) for name in names if list_of(root, benchmark, name)]
    for name in set(names).difference(one.key for one in sets):
        out.info(f"left out: `{name}`, of which `{root}` has no list")
    if not sets or not list_of(root, benchmark, benchmark.inside):
        raise MissingError(f"`{root}` has no lists of `{benchmark.name}`", hint="leave `--imglists` out")
    return sets


def at_hand(benchmark: Benchmark, data: DataSection) -> list[DataSet]:
    """The foreign sets of a benchmark that are here or small enough to be fetched; prints those left out."""
    from gzcli.data.packs.open import open_pack, pack_options
    from gzcli.data.sets.names import locate

    here = []
    for name in (*benchmark.near, *benchmark.far):
        foreign = locate(name)
        try:
            open_pack(foreign, **pack_options(data), say=out.info)
            here.append(foreign)
        except MissingError as e:
            out.info(f"left out: {e.message} ({e.hint})")
    if not here:
        sets = " ".join((*benchmark.near, *benchmark.far))
        raise MissingError(
            f"none of the foreign sets of `{benchmark.name}` is at hand", hint=f"gz data download {sets}"
        )
    return here


def rate(text: str | None) -> float:
    """The value of `--fpr`, `1%` or `0.01`, as a share. Raises UsageError outside 0 … 1."""
    word = (text or "1%").strip()
    try:
        share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"`--fpr {text}` is no share between 0 and 1", hint="`--fpr 1%`, or `--fpr 0.01`")
    return share


def check_maps(model: ModelCard) -> None:
    """Raises UsageError that names the models that can, where this one makes no maps."""
    from gzcli.models.catalog import cards

    if not model.maps:
        able = ", ".join(card.name for card in cards().values() if card.maps)
        raise UsageError(
            f"`{model.name}` does not say where a picture is anomalous", hint=f"these do: {able}"
        )


# ---------------------------------------------------------------------------- what is printed


def ending(result: Mapping[str, Any], folder: Path, name: str, model: ModelCard, time: str) -> None:
    """The end of `gz ood`: which score was best, or what was flagged, and what to do with it."""
    page = (f"gz report {quoted(folder)}", "")
    if "thresholds" in result:
        flagged = sum(row["flagged"] for row in result["files"])
        again = f"gz ood {name} --input {quoted(result['input'])}"
        more = (f"{again} --map", "where they are strange") if model.maps else (f"{again} --fpr 5%", "")
        return end([f"{flagged:,} of {counted(len(result['files']), 'picture')} flagged", time], [more])
    scores = [row for row in result["results"] if not row["baseline"]]
    best = max(scores, key=lambda row: row["auroc"], default=None)
    best_score = f"best score `{best['score']}`, AUROC {best['auroc']:.3f}" if best else None
    end([best_score, time], [page, (f"gz ood {name} --input ./pictures", "your own pictures, one by one")])


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


def table_of_pictures(result: Mapping[str, Any]) -> None:
    """Prints the flagged pictures, strangest first, and how many there are; within 80 columns."""
    flagged = [row for row in result["files"] if row["flagged"]]
    names, draws = list(result["thresholds"]), result["seeds"]
    shown = names[: 1 if draws > 1 else 2]  # as many as 80 columns hold, with their spread

    def line(row: Mapping[str, Any]) -> list[str]:
        cells = [
            row["file"] if len(row["file"]) <= NAME else f"…{row['file'][1 - NAME :]}",
            f"{row['p']:.4f}",
        ]
        for name in shown:
            score = row["scores"][name]
            cells.append("not finite" if score is None else f"{score:.4g}")
            if draws > 1:
                cells.append("" if score is None else f"{row['spread'][name]:.2g}")
        return cells

    if flagged:
        heads = [head for name in shown for head in ((name, "±") if draws > 1 else (name,))]
        out.table(["file", "p", *heads], [line(row) for row in flagged[:LINES]])
    if len(flagged) > LINES:
        out.info(f"and {len(flagged) - LINES:,} more: `alarm.csv` has all pictures, strangest first")
    total, compared = len(result["files"]), result["compared"]["n"]
    by = f"by {', '.join(names)}, against {compared:,} held-out images"
    out.info(f"flagged: {len(flagged):,} of {counted(total, 'picture')} {by}")
    if draws > 1:
        out.info(f"scores are means over {draws} draws of noise, ± is the deviation between the draws")
    if low := sum(row["side"] == "low" for row in flagged):
        out.info(f"{low:,} by a score below the usual, as that of pictures simpler than those of the set")
    named, rate_ = Path(result["in"]).name, result["fpr"]
    share = f"of pictures like those of `{named}` at most {100 * rate_:.3g} % are, on average"
    about = rate_ * total
    out.info(f"{share}: {about:.2g} of {total:,}" if about >= 1 else share)
    if len(flagged) < total:
        out.info("the others may be foreign all the same: a score of a whole picture misses small defects")
    for message in result["unreadable"]:
        out.warn(f"left out: {message}")
