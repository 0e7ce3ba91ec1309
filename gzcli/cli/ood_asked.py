"""What `gz ood` was asked for: its runs, scores and sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gzcli.cli import out
from gzcli.core.errors import MissingError, UsageError, canonical

if TYPE_CHECKING:
    from gzcli.core.sections import DataSection
    from gzcli.data.sets.benchmarks import Benchmark
    from gzcli.data.sets.names import DataSet
    from gzcli.models.catalog import ModelCard


def leading(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first option, which are further runs, and the rest."""
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:at], words[at:]


def check_same_data(name: str, others: Mapping[str, str]) -> None:
    """Raises UsageError where a run of an ensemble was trained on another set than the first one."""
    from gzcli.data.sets.names import data_key

    for run, other in others.items():
        if data_key(other) != data_key(name):
            raise UsageError(
                f"`{run}` was trained on `{other}`, the first run on `{name}`",
                hint="an ensemble is of runs of one set",
            )


def chosen(
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
        found = iter(plain)
        return tuple("waic" if canonical(name) == "waic" else next(found) for name in names) or None
    have = [set(score_names(card)) for card in cards]
    common = [name for name in of_recipe or score_names(cards[0]) if all(name in own for own in have)]
    waic = ["waic"] if all("nll" in own for own in have) else []
    if not common + waic:
        raise UsageError("the runs have no score in common", hint="gz list models --can ood")
    return tuple(common + waic)


def sets(text: str) -> list[str]:
    """The names of a comma-separated list.

    A name may hold commas: from each start on, the longest text that is a set or an existing path is taken.
    """
    from gzcli.data.sets.names import is_set

    parts, found = text.split(","), []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if is_set(",".join(parts[:n]).strip())), 1)
        found.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return [name for name in found if name]


def inside_of(name: str, in_: str | None, out_: str | None) -> Benchmark:
    """The benchmark of this name. Raises UsageError where other sets than its own are given."""
    from gzcli.data.sets.benchmarks import find

    benchmark = find(name)
    if out_ or (in_ and in_ != benchmark.inside):
        raise UsageError(
            f"`{benchmark.name}` has sets of its own: `--in {benchmark.inside}`",
            hint="leave `--in` and `--out` out",
        )
    return benchmark


def with_lists(benchmark: Benchmark, root: Path) -> list[DataSet]:
    """The foreign sets of a benchmark that OpenOOD's `data` folder has lists of; prints those left out.

    Raises MissingError where there is none, or none of the in-distribution set.
    """
    from gzcli.data.sets.imglists import list_of
    from gzcli.data.sets.names import locate

    names = (*benchmark.near, *benchmark.far)
    found = [locate(name) for name in names if list_of(root, benchmark, name)]
    for name in set(names).difference(one.key for one in found):
        out.info(f"left out: `{name}`, of which `{root}` has no list")
    if not found or not list_of(root, benchmark, benchmark.inside):
        raise MissingError(f"`{root}` has no lists of `{benchmark.name}`", hint="leave `--imglists` out")
    return found


def at_hand(benchmark: Benchmark, data: DataSection) -> list[DataSet]:
    """The foreign sets of a benchmark that are here or small enough to be fetched; prints those left out.

    Raises MissingError where there is none.
    """
    from gzcli.data.packs.open import open_pack
    from gzcli.data.packs.wanted import wanted
    from gzcli.data.sets.names import locate

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
