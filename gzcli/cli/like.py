"""`gz sample --like PICTURE`: the samples that a picture was one of, drawn again."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.cli import out
from gzcli.cli.drawn import place, tell
from gzcli.cli.jobs import announce, do_job
from gzcli.core.errors import MissingError, UsageError
from gzcli.store.files import checksum

if TYPE_CHECKING:
    from gzcli.core.jobs import SampleJob
    from gzcli.store.runs import Run

# what a picture decides by itself: key of its origin → the option that would change it
DECIDED = {"n": "-n", "labels": "--label", "prompts": "--prompt", "do": "--do", "options": "options"}


def draw_like(
    picture: Path, model: str, given: Mapping[str, Any], job: SampleJob, out_dir: Path | None
) -> None:
    """Draws again what a picture shows. Arguments and errors as of `like.job_of`; `out_dir`: `--out`."""
    run, job = job_of(picture, model, given, job)
    announce(run, str(run.path))
    result = do_job(place(out_dir, run, "like"), replace(job, origin=origin_of_job(job, run)))
    tell(result | {"like": compare(picture, result)})


def origin_of_job(job: SampleJob, run: Run) -> dict[str, Any]:
    """What the pictures of a job say of their making that the engine does not know: the command that makes
    them, without places of files, the origin of a shared run, and the hashes of the user's own pictures."""
    given = {key: Path(path) for key, path in (("input", job.input), ("mask", job.mask)) if path}
    pictures = {key: {"name": path.name, "sha256": digest(path)} for key, path in given.items()}
    return {"command": command(job, run), "from": run.status().get("from"), **pictures}


def command(job: SampleJob, run: Run) -> str:
    """The command line of a job, in one form however it was typed."""
    words = ["gz", "sample", run.id, *(["-n", str(job.n)] if job.n else []), "--seed", str(job.seed)]
    flags = {"label": job.labels, "do": job.do, "input": job.input, "mask": job.mask}
    if job.checkpoint not in ("last", "finished"):
        flags["checkpoint"] = job.checkpoint
    flags["precision"] = job.precision
    for name, value in flags.items():
        if value:
            words += [f"--{name}", Path(value).name if name in ("input", "mask") else value]
    for prompt in job.prompts:
        words += ["--prompt", prompt]
    for key, value in job.options.items():
        name = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return shlex.join(words)


def digest(path: Path) -> str:
    """The sha256 of a file; of a folder that of the names and checksums of all its files."""
    if path.is_file():
        return checksum(path)
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        found.update(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n".encode())
    return found.hexdigest()


def job_of(picture: Path, model: str, given: Mapping[str, Any], job: SampleJob) -> tuple[Run, SampleJob]:
    """The run of a picture, and the job that draws it again.

    picture: a PNG of `gz sample`.
    model: the run, model or file that the user names; "": the run that the picture names.
    given: what the user says besides, of DECIDED.
    job: says where the samples go and what is done with them; what is drawn is the picture's.

    Raises UsageError for a picture that `gz sample` did not draw, and for options that contradict it;
    MissingError where its run is not there, or has other weights.
    """
    from gzcli.store.png import origin_of

    facts = origin_of(picture)
    if facts.get("verb") != "sample":
        raise UsageError(f"`{picture}` was not drawn by `gz sample`", hint=_instead(facts))
    if both := [option for key, option in DECIDED.items() if given.get(key)]:
        raise UsageError(f"`--like` decides what is drawn, `{both[0]}` does too", hint=facts.get("command"))
    for key in ("input", "mask"):
        _check_picture(key, facts.get(key), getattr(job, key))
    run = _run_of(facts, model)
    drawn = {key: facts[key] for key in ("n", "seed", "labels", "options", "do", "input_as", "precision")}
    checkpoint = _with_weights(run, facts)
    prompts = tuple(facts["prompts"])
    png = job.png or facts.get("index") is not None
    return run, replace(job, run=str(run.path), checkpoint=checkpoint, prompts=prompts, png=png, **drawn)


def compare(picture: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Tells whether a picture was met: {file, same, most}, `most` being the largest difference of a pixel in
    grey levels, of 255; None where the sizes differ."""
    import numpy as np
    from PIL import Image

    from gzcli.store.png import origin_of

    facts = origin_of(picture)
    index = facts.get("index")
    file = result["grid"] if index is None else result["files"][index]
    then, now = (np.asarray(Image.open(path)).astype(int) for path in (picture, file))
    most = int(abs(then - now).max()) if then.shape == now.shape else None
    if most == 0:
        out.info(f"the same to the last bit: {file}")
    else:
        there, here = facts.get("device"), origin_of(Path(file)).get("device")
        why = f"drawn on {there}, now on {here}" if there != here else "other versions or threads"
        how = "of another size" if most is None else f"pixels differ by up to {most} of 255"
        out.info(f"note: {how} ({why}): {file}")
    return {"file": file, "same": most == 0, "most": most}


def _instead(facts: Mapping[str, Any]) -> str:
    """A hint: what draws a picture that another verb made."""
    run, verb = facts.get("run"), facts.get("verb")
    if verb == "train" and run and facts.get("step"):
        owner = run.partition("/")[0]
        return f"gz sample {owner} --checkpoint {facts['step']} -n {facts['n']}"
    return f"`gz {verb}` made it" if verb else "name a picture of `gz sample`"


def _check_picture(key: str, then: Mapping[str, Any] | None, now: str | None) -> None:
    """Raises UsageError unless the user names the same input, or mask, as the picture was made from."""
    if then is None and now is None:
        return
    if then is None:
        raise UsageError(f"the picture was drawn without `--{key}`")
    if now is None:
        raise UsageError(
            f"the picture was made from `{then['name']}`, which it does not hold",
            hint=f"name it: `--{key} PATH`",
        )
    if digest(Path(now)) != then["sha256"]:
        raise UsageError(f"`{now}` is not the `{then['name']}` that the picture was made from")


def _run_of(facts: Mapping[str, Any], model: str) -> Run:
    """The run that the user names, else the one that the picture names, else one with the same weights."""
    from gzcli.launch.from_file import find_run

    if model:
        return find_run(model)
    if found := next(_candidates(facts), None):
        return found
    source = facts.get("from") or "MODEL|FILE"
    raise MissingError(
        f"the picture is of the run `{facts['run']}`, which is not here",
        hint=f"gz sample {source} --like PICTURE",
    )


def _candidates(facts: Mapping[str, Any]) -> Iterator[Run]:
    """Runs that may be the picture's: by its id, of a file that was used before, by its weights."""
    from gzcli.store.paths import cache_dir
    from gzcli.store.runs import Run, all_runs

    known = all_runs()
    yield from (run for run in known if run.id == facts["run"])
    shared = cache_dir("files")
    yield from (Run(path) for path in shared.glob("*") if path.name == facts["run"])
    yield from (run for run in known if run.model == facts["model"] and _matching(run, facts))


def _matching(run: Run, facts: Mapping[str, Any]) -> str | None:
    """The checkpoint of a run that has the picture's weights, as `--checkpoint` takes it."""
    serving = run.serving
    step = f"{int(facts['step']):08d}"
    places = {
        "finished": serving.path / "model.safetensors",
        str(int(facts["step"])): serving.path / "checkpoints" / step / "ema.safetensors",
    }
    same = (at for at, file in places.items() if file.is_file() and checksum(file) == facts["weights"])
    return next(same, None)


def _with_weights(run: Run, facts: Mapping[str, Any]) -> str:
    """The checkpoint of the run with the picture's weights. Raises MissingError where it has them not."""
    if found := _matching(run, facts):
        return found
    raise MissingError(
        f"`{run.id}` does not have the weights that drew the picture",
        hint=f"they were of step {facts['step']:,} of `{facts['run']}`, sha256 {facts['weights'][:12]}…",
    )
