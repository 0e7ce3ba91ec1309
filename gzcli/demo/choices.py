"""What `gz demo` offers: runs, models that come with gz, and of the chosen one the options of its sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gzcli.models.catalog import card_of
from gzcli.models.labelled import Labelled
from gzcli.recipe.kinds import literals
from gzcli.store import pretrained, runs
from gzcli.store.run_folder import Run as StoredRun

if TYPE_CHECKING:
    from gzcli.api.handles import Run

OPENS = "cfm"  # of the models that come with gz the one that draws best
NUMBERS = ("steps", "guidance", "temperature")  # options that have a slider, where the sampler takes them


@dataclass(frozen=True)
class Choice:
    """A model that can be chosen.

    name: what `gz sample` and `gzcli.load` take.
    title: what a person reads.
    """

    name: str
    title: str


def choices(named: Sequence[StoredRun] = ()) -> list[Choice]:
    """What can be chosen, in the order in which it is offered.

    named: the runs to choose from; (): every run of the store that has weights, newest first, then the models
      that come with gz.
    """
    found = named or [run for run in runs.all_runs() if run.weights is not None]
    ready = [] if named else sorted(pretrained.every(), key=lambda one: _rank(one.data))
    own = [Choice(_name(run), _title(run)) for run in found]
    return own + [
        Choice(pretrained.PREFIX + one.name, f"{one.model} on {one.data}, comes with gz") for one in ready
    ]


def opening(choices: Sequence[Choice]) -> str:
    """The name of the choice that the page opens with: a model that comes with gz, where one is offered. The
    newest run may have trained for three steps, and draw noise."""
    best = pretrained.PREFIX + pretrained.file_of(pretrained.PREFIX + OPENS).stem
    return best if any(choice.name == best for choice in choices) else choices[0].name


def _rank(data: str) -> int:
    """The place of a set among those that models are taken of first."""
    return pretrained.FIRST.index(data) if data in pretrained.FIRST else len(pretrained.FIRST)


def _name(run: StoredRun) -> str:
    """The run's id; of one outside the store where it comes from, or its folder."""
    return run.id if runs.by_name(run.id) else str(run.status().get("from") or run.path)


def _title(run: StoredRun) -> str:
    status = run.serving.status()
    step = f", {status['step']:,} steps" if status.get("step") else ""
    return f"{run.alias or run.model} on {run.data}{step} ({run.id.rsplit('-', 1)[-1]})"


@dataclass(frozen=True)
class Controls:
    """What the page shows for a run.

    classes: names of the classes that it can be asked for; () without.
    numbers: the options of NUMBERS that its sampler takes, with their present values.
    samplers: names of its samplers; () where there is one alone.
    sampler: the one that is taken.
    prompts: whether it draws what a text says.
    way: whether it goes from image to image.
    inpaints: whether it fills in what is painted over.
    maps: whether it shows where a picture is anomalous.
    scores: whether it judges pictures at all.
    """

    classes: tuple[str, ...]
    numbers: Mapping[str, float]
    samplers: tuple[str, ...]
    sampler: str | None
    prompts: bool
    way: bool
    inpaints: bool
    maps: bool
    scores: bool


def controls(run: Run) -> Controls:
    """What the page shows for a run, by the signatures of its model and the values of its recipe."""
    part, model = run.trained.part, run.model
    card = card_of(run.trained.run, part.model)
    values: dict[str, Any] = {name: param.default for name, param in card.sample.items()} | dict(part.sample)
    guided = isinstance(model, Labelled) and model.labelled and model.label_dropout > 0
    if isinstance(model, Labelled):
        values["guidance"] = model.strength(values.get("guidance"))
    known = [name for name in NUMBERS if isinstance(values.get(name), int | float)]
    names = literals(card.sample["sampler"].annotation) if "sampler" in card.sample else ()
    return Controls(
        run.info.classes if model.conditional else (),
        {name: values[name] for name in known if name != "guidance" or guided},
        tuple(names),
        values.get("sampler"),
        "prompt" in card.can,
        "frames" in card.do.get("interpolate", ()),
        "inpaint" in card.masked,
        "map" in card.can,
        "ood" in card.can and run.trained.space is None,
    )
