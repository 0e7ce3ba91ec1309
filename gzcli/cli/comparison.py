"""What `gz bench` and `gz league` share: options on metrics, the table, and notes on the judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.options import a_set, option
from gzcli.metrics.metric import help_text, metrics

DATA_HELP = "Real images: a data set or a path. Default: the data set of the first run."
Data = Annotated[str | None, option("--data NAME|PATH", DATA_HELP, complete=a_set)]
_SPLIT_HELP = "Split of the real images. Papers on CIFAR-10 use `train`."
Split = Annotated[Literal["test", "val", "train", "all"], option("--split", _SPLIT_HELP)]
Metrics = Annotated[str | None, option("--metrics M[,M…]", help_text(), complete=metrics())]
_N_HELP = "Maximum number of samples per model and of real images. Default: "
N = Annotated[int | None, option("-n N", f"{_N_HELP}2,000.", min=50)]
NOfLeague = Annotated[int | None, option("-n N", f"{_N_HELP}10,000.", min=50)]
_WEIGHTS_HELP = "File with Inception weights."
Weights = Annotated[Path | None, option("--weights FILE", _WEIGHTS_HELP, exists=True, resolve_path=True)]
_STATS_HELP = "`mu` and `sigma` of real images for the Fréchet distance, in pytorch-fid format."
Stats = Annotated[Path | None, option("--real-stats FILE", _STATS_HELP, exists=True, resolve_path=True)]
_EXPORT_HELP = "Write `mu` and `sigma` of the real images."
Export = Annotated[Path | None, option("--export-stats FILE", _EXPORT_HELP, resolve_path=True)]
BUDGET_HELP = "Training time per model: CPU time on CPUs, wall-clock time on GPUs."


class Shown(NamedTuple):
    """A column of a table. keep: priority if space is short, the lowest is omitted first; None: it is always
    shown. name: its name in the note on omitted columns; "": the heading."""

    heading: str
    cells: Sequence[Any]
    keep: int | None = None
    name: str = ""


def print_table(
    columns: Sequence[Shown], *, wide: bool = False, elsewhere: str = out.HIDDEN_COLUMNS_NOTE
) -> None:
    """Prints columns. Of those with equal priority, the last is omitted first."""
    places = {column.heading: i for i, column in enumerate(columns)}
    spare = {column.heading: column for column in columns if column.keep is not None}
    leaving = sorted(spare.values(), key=lambda column: (column.keep, -places[column.heading]))
    names = {column.heading: column.name or column.heading for column in leaving}
    rows = list(zip(*(column.cells for column in columns), strict=True))
    out.table([column.heading for column in columns], rows, spare=names, wide=wide, elsewhere=elsewhere)


def cite(result: Mapping[str, Any], columns: str) -> None:
    """Prints the table for citation, with these columns only."""
    from gzcli.report import cited

    if chosen := cited.table(result, opt.split(columns)):
        marked = [
            [f"{cell.text}{'*' * cell.best} {cell.small}".strip() for cell in row] for row in chosen.rows
        ]
        out.table([column.name for column in chosen.columns], marked)
        out.info(cited.caption((model for model, *_ in marked), f"*: {cited.BEST}"))


def judges(provenance: Mapping[str, Any]) -> str:
    """The accuracies of the networks whose features are compared."""
    titles = {"features_accuracy": "first judge", "second_accuracy": "second"}
    parts = [f"{title} {provenance[key]:.1%}" for key, title in titles.items() if provenance.get(key)]
    return f"accuracy on real test images: {', '.join(parts)}" if parts else ""


def disagreement(result: Mapping[str, Any]) -> list[str]:
    """A note on how far the second judge agrees with the order of the first."""
    if not (second := result.get("second")):
        return []
    by = f"rank correlation between {result['metric']} and {second['metric']}"
    lines = [f"{by}: {second['spearman']:.3f}"]
    if second["apart"]:
        apart = (f"{name} ({first}, {second_name})" for name, first, second_name in second["apart"])
        lines += out.wrapped_text(", ".join(apart), "models ranked differently: ")
    return lines
