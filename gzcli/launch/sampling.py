"""The request of `gz sample`: the job that draws images from a run, applies the run to images, or repeats an
earlier image, and its cost."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gzcli.core.errors import GzError, MissingError, UsageError, canonical, choose, did_you_mean
from gzcli.core.sections import part_of
from gzcli.core.types import Say, silent
from gzcli.data.sets.labels import class_names, class_numbers, in_turns
from gzcli.data.sets.registry import data_key
from gzcli.launch import cost, forecast, launcher
from gzcli.launch.cost import UNKNOWN_IMAGE, Cost
from gzcli.launch.from_file import find_run, metadata, trained_run
from gzcli.models.catalog import APPLICATIONS, ModelCard, Param, card_of
from gzcli.store import claims
from gzcli.store.files import checksum
from gzcli.store.jobs import SampleJob
from gzcli.store.paths import cache_dir
from gzcli.store.png import origin_of
from gzcli.store.run_folder import Run
from gzcli.store.runs import all_runs

DEFAULT_IMAGES = 64  # images, unless another number is requested
# what an image decides by itself: key of the job → the option that would change it
DECIDED = {"n": "-n", "labels": "--label", "prompts": "--prompt", "do": "--do"}

# (name of a method in messages, its options, those of the applications by flag) → keywords of the method
Keywords = Callable[[str, Mapping[str, Param], Mapping[str, Iterable[str]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """A job on a run that can start.

    name: what the names of its folders begin with.
    key: key of the data set that was named, if any.
    applications: those that the run has.
    """

    run: Run
    job: SampleJob
    name: str
    key: str | None = None
    applications: Sequence[str] = ()

    def new_folder(self) -> Path:
        return claims.new_folder(self.run.path / "sampled", self.name)

    def with_origin(self) -> SampleJob:
        """The job with the origin of its images, for which the user's own images are hashed."""
        return replace(self.job, origin=origin_of_job(self.job, self.run))

    def cost(self, say: Say = silent) -> Cost:
        """The cost of an image, as the run measured it if the job's options are only its steps, and otherwise
        as an untrained copy takes on this machine. That of an application is unknown."""
        run, options, image = self.run, self.job.options, UNKNOWN_IMAGE
        if self.job.do:
            return image
        if options.keys() <= {"steps"}:
            image = cost.sampling(run.model, run.data, run, options.get("steps"))
        if None not in (image.each, image.calls):
            return image
        drawer = forecast.drawer_of_run(run, launcher.plan(self.job.launch, every_gpu=False), options)
        measure = partial(forecast.measured, say=say)
        return image.or_else(forecast.image_costs([drawer], measure)[0][0]) if drawer else image


def ask(
    model: str,
    typed: SampleJob,
    keywords: Keywords | None,
    *,
    data: str | None = None,
    like: Path | None = None,
) -> Request:
    """The request for the run that a name refers to, or that drew the image `like`, with the typed job
    completed from the run. Raises UsageError for what the model cannot do, MissingError if there is no run.

    keywords: the options of the model, once it is known; None: there are none.
    """
    if like:
        return request_like(like, model, typed, changed=keywords is not None)
    key = data_key(data) if data else None
    run = trained_run(model, lambda card: options_of(card, typed, keywords), data=key, typed=data)
    part = part_of(run.serving.tree())
    card, conditional = card_of(run, part.model), bool(part.options.get("conditional"))
    do = choose_application(typed.do, card) if typed.do else None
    check(card, do, run, typed, conditional=conditional)
    options = options_of(card, typed, keywords)
    classes = classes_of(run, part.data.name)
    turns = class_numbers(typed.labels, classes) if typed.labels and classes else classes
    n, from_input = typed.n, typed.input and not do
    if n is None and not from_input:  # only the engine knows how many input images there are
        n = DEFAULT_IMAGES if do else len(typed.prompts) or DEFAULT_IMAGES
        # equally many of each class, if the classes are known
        if conditional and not do and not typed.prompts:
            n = in_turns(DEFAULT_IMAGES, len(turns))
    input_as = card.inputs[0] if from_input else None
    job = replace(typed, run=str(run.path), n=n, options=options, do=do, input_as=input_as)
    able = [name for name in card.do if conditional or name not in card.with_labels]
    return Request(run, job, do or (f"n{n}" if n else "from-input"), key, able)


def options_of(card: ModelCard, typed: SampleJob, keywords: Keywords | None) -> Mapping[str, Any]:
    """The options of the model or of the application. Raises UsageError for others, and for prompts that the
    method does not take."""
    do = choose_application(typed.do, card) if typed.do else None
    what, takes = (f"`--do {do}`", card.do[do]) if do else (f"`{card.name}`", card.sample)
    if typed.prompts and "prompt" not in takes:
        alternative = "`gz list models --can prompt` shows models that do"
        hint = "choose a class with `--label`" if "conditional" in card.can else alternative
        raise UsageError(f"{what} takes no prompts", hint=hint)
    by_method = {f"--do {name}": params for name, params in card.do.items()}
    return keywords(what, takes, by_method) if keywords else {}


def classes_of(run: Run, data: str) -> list[str]:
    """The classes that a run was trained on, from its weights or its set; [] if neither records them."""
    with suppress(GzError):
        return list(map(str, json.loads(metadata(run.serving.model_file)["data"])["classes"]))
    with suppress(GzError):
        return class_names(data)
    return []


def check(model: ModelCard, do: str | None, run: Run, job: SampleJob, *, conditional: bool) -> None:
    """Raises UsageError if the application `do`, or plain sampling, does not accept the job's images or
    labels, or needs a run that was trained with labels."""
    if not do and (job.mask or (job.input and not model.inputs)):
        raise UsageError(f"`{'--mask' if job.mask else '--input'}` needs `--do`", hint=abilities(model))
    if job.mask and do not in model.masked:
        search = "`gz list models --can inpaint` shows models that take one"
        hint = f"these applications do: {', '.join(model.masked)}" if model.masked else search
        raise UsageError(f"`--do {do}` of `{model.name}` takes no mask", hint=hint)
    train = f"gz train {run.model} --data {run.data} --set {run.serving.in_owner}model.conditional=true"
    if do in model.with_labels and not conditional:
        message = f"`--do {do}` needs a run trained with labels, but `{run.id}` was not"
        raise UsageError(message, hint=train)
    if job.labels and do and do not in model.labelled:
        hint = f"applications that do: {', '.join(model.labelled) or 'none'}"
        raise UsageError(f"`--do {do}` of `{model.name}` takes no labels", hint=hint)
    if job.labels and not conditional and do not in model.labels_for:
        raise UsageError(f"`{run.id}` was not trained with labels", hint=train)


def choose_application(word: str, model: ModelCard) -> str:
    """The application of the model that a word refers to."""
    name = canonical(word)
    if name in APPLICATIONS and name not in model.do:
        hint = f"{abilities(model)}; `gz list models --can {name}` shows models that do"
        raise UsageError(f"`{model.name}` does not {name}", hint=hint)
    if not model.do:
        hint = did_you_mean(word, APPLICATIONS) or abilities(model)
        raise UsageError(f"`{model.name}` has no applications, including `{word}`", hint=hint)
    return choose(f"application of `{model.name}`", word, model.do)


def abilities(model: ModelCard) -> str:
    return f"`{model.name}` supports: {', '.join(model.do) or 'sampling only'}"


def read_prompts(typed: Sequence[str], file: Path | None) -> list[str]:
    """The prompts that were typed, then those of a file."""
    if file is None:
        return list(typed)
    if not file.is_file():
        raise MissingError(f"`{file}` does not exist", hint="pass a text file with one prompt per line")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as e:
        raise UsageError(
            f"`{file}` is not UTF-8 text", hint="save the prompts as plain text, one per line"
        ) from e
    if not (prompts := [line for line in lines if line and not line.startswith("#")]):
        hint = "write one prompt per line; lines that begin with `#` are comments"
        raise UsageError(f"`{file}` contains no prompts", hint=hint)
    return [*typed, *prompts]


# ------------------------------------------------------------------------- what images say of their making


def origin_of_job(job: SampleJob, run: Run) -> dict[str, Any]:
    """The part of the images' origin that the engine cannot know. It consists of the command without file
    paths, the origin of a shared run, and the hashes of the user's own images."""
    paths = {key: Path(path) for key, path in (("input", job.input), ("mask", job.mask)) if path}
    pictures = {key: {"name": path.name, "sha256": digest(path)} for key, path in paths.items()}
    return {"command": command(job, run), "from": run.status().get("from"), **pictures}


def command(job: SampleJob, run: Run) -> str:
    """The command line of a job in a canonical form."""
    words = ["gz", "sample", run.id, *(["-n", str(job.n)] if job.n else []), "--seed", str(job.seed)]
    pictures = {key: Path(path).name for key, path in (("input", job.input), ("mask", job.mask)) if path}
    checkpoint = None if job.checkpoint in ("last", "finished") else job.checkpoint
    flags = {"label": job.labels, "do": job.do, **pictures}
    flags |= {"checkpoint": checkpoint, "precision": job.precision}
    words += [word for name, value in flags.items() if value for word in (f"--{name}", value)]
    for prompt in job.prompts:
        words += ["--prompt", prompt]
    for key, value in job.options.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return shlex.join(words)


def digest(path: Path) -> str:
    """The sha256 of a file, or of the names and checksums of all files in a folder."""
    if path.is_file():
        return checksum(path)
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n"))
    return total.hexdigest()


# ---------------------------------------------------------------------------- an image again


def request_like(picture: Path, model: str, typed: SampleJob, *, changed: bool) -> Request:
    """The request that draws an image again, from the run that drew it, found by name or weights.
    changed: whether there are options of the model."""
    facts = origin_of(picture)
    if (verb := facts.get("verb")) != "sample":
        hint = f"it was made by `gz {verb}`" if verb else "pass an image that `gz sample` wrote"
        if verb == "train" and facts.get("run") and facts.get("step"):
            owner = facts["run"].partition("/")[0]
            hint = f"gz sample {owner} --checkpoint {facts['step']} -n {facts['n']}"
        raise UsageError(f"`{picture}` was not drawn by `gz sample`", hint=hint)
    flags = [flag for key, flag in DECIDED.items() if getattr(typed, key)] + ["options"] * changed
    if flags:
        raise UsageError(f"`--like` and `{flags[0]}` cannot be used together", hint=facts.get("command"))
    for key in ("input", "mask"):
        then, now = facts.get(key), getattr(typed, key)
        if not then and now:
            raise UsageError(f"the image was drawn without `--{key}`")
        if then and not now:
            message = f"the image was made from `{then['name']}`, which is not stored in it"
            raise UsageError(message, hint=f"pass it: `--{key} PATH`")
        if then and digest(Path(now)) != then["sha256"]:
            raise UsageError(f"`{now}` is not the `{then['name']}` that the image was made from")
    run = find_run(model) if model else next(_candidates(facts), None)
    if run is None:
        hint = f"gz sample {facts.get('from') or 'MODEL|FILE'} --like IMAGE"
        raise MissingError(
            f"the image was drawn by the run `{facts['run']}`, which is not on this machine", hint=hint
        )
    if (checkpoint := _checkpoint_with(facts, run)) is None:
        hint = (
            f"the weights were those of step {facts['step']:,} of `{facts['run']}`, sha256 "
            f"{facts['weights'][:12]}…"
        )
        raise MissingError(f"`{run.id}` does not have the weights that drew the image", hint=hint)
    drawn = {key: facts[key] for key in ("n", "seed", "labels", "options", "do", "input_as", "precision")}
    drawn |= {"prompts": tuple(facts["prompts"]), "checkpoint": checkpoint}
    if facts.get("index") is not None:  # option of the image, which is drawn to a file again
        drawn["formats"] = (*typed.formats, "png")
    return Request(run, replace(typed, run=str(run.path), **drawn), "like")


@dataclass(frozen=True)
class Difference:
    """How an image differs from its repetition `file`: by at most so many grey levels of 255; None if their
    sizes differ. why: the likely reason."""

    file: str
    most: int | None
    why: str

    @property
    def words(self) -> str:
        if self.most == 0:
            return f"identical to the last bit: {self.file}"
        how = "the image sizes differ" if self.most is None else f"pixels differ by up to {self.most} of 255"
        return f"note: {how} ({self.why}): {self.file}"


def compare(picture: Path, result: Mapping[str, Any]) -> Difference:
    """The difference between an image and its repetition."""
    import numpy as np
    from PIL import Image

    facts = origin_of(picture)
    index = facts.get("index")
    file = result["grid"] if index is None else result["files"][index]
    then, now = (np.asarray(Image.open(path)).astype(int) for path in (picture, file))
    most = int(abs(then - now).max()) if then.shape == now.shape else None
    devices = [facts.get("device"), origin_of(Path(file)).get("device")]
    moved = f"drawn on {devices[0]}, now on {devices[1]}"
    return Difference(file, most, moved if devices[0] != devices[1] else "different versions or threads")


def _candidates(facts: Mapping[str, Any]) -> Iterator[Run]:
    """Candidates for the run that drew an image: by id, from a file used before, or by weights."""
    stored = all_runs()
    yield from (run for run in stored if run.id == facts["run"])
    yield from (Run(path) for path in cache_dir("files").glob("*") if path.name == facts["run"])
    yield from (run for run in stored if run.model == facts["model"] and _checkpoint_with(facts, run))


def _checkpoint_with(facts: Mapping[str, Any], run: Run) -> str | None:
    """The checkpoint of a run that has the image's weights, as a value for `--checkpoint`."""
    step = int(facts["step"])
    places = {"finished": run.serving.model_file, str(step): run.serving.checkpoint(step).averaged}
    equal = (at for at, file in places.items() if file.is_file() and checksum(file) == facts["weights"])
    return next(equal, None)
