"""`gz runs export`, `push` and `pull`: runs as files, for other libraries and for other people."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gzcli.cli import out
from gzcli.cli.ends import bytes_of, end, quoted, took
from gzcli.cli.options import Checkpoint, Json, Quiet, complete_model_or_run
from gzcli.core.errors import MissingError, UsageError

if TYPE_CHECKING:
    from gzcli.store.runs import Run

_To = Literal["file", "onnx", "torch", "diffusers"]
_Ref = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Id, alias, folder or model.", autocompletion=complete_model_or_run),
]
_Repository = Annotated[
    str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the Hugging Face hub.")
]
_Dtype = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--dtype", help="Of the weights in a file; bf16 halves it, and changes samples a little."),
]


def export(
    run: _Ref,
    to: Annotated[
        _To, typer.Option("--to", help="One file that `gz` reads anywhere, or another library's format.")
    ] = "file",
    out_: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Where to write; into the run's folder without it."),
    ] = None,
    dtype: _Dtype = "fp32",
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run as one file to share, or its weights in the format of another library."""
    from gzcli.store.claims import check_empty

    found = find(run)
    if to == "file":
        place = (out_ or found.path / "export" / f"{found.id}.safetensors").resolve()
        check_file(place, replaceable=out_ is None)
    else:
        if dtype != "fp32":
            raise UsageError("`--dtype` goes with `--to file`")
        place = (out_ or found.path / "export" / to).resolve()
        check_empty(place) if out_ else None
    began = monotonic()
    result = exported(found, run, place, to=to, dtype=dtype, checkpoint=checkpoint)
    out.text(str(place))
    then = [(f"gz sample {quoted(place)}", "pictures from it, on any machine")]
    if to != "file":
        then = [
            (f"ls {quoted(place)}", "what it holds, and how it is loaded"),
            (f"gz sample {quoted(run)}", ""),
        ]
    end(
        [f"{bytes_of(place)} for {to}" if to != "file" else f"one file of {bytes_of(place)}", took(began)],
        then,
    )
    out.data(result)


def push(
    run: _Ref,
    repository: _Repository,
    licence: Annotated[
        str, typer.Option("--licence", metavar="ID", help="Of the weights, as the hub names licences.")
    ] = "mit",
    private: Annotated[bool, typer.Option("--private", help="For you alone.")] = False,
    dtype: _Dtype = "fp32",
    checkpoint: Checkpoint = "last",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a run on the Hugging Face hub, with a card that says what it is."""
    import tempfile

    from gzcli.metrics.metric import meanings
    from gzcli.store import files, hub
    from gzcli.store.run_folder import Run

    name = hub.name_of(repository)
    found = find(run)
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        result = exported(found, run, folder / hub.FILE, to="file", dtype=dtype, checkpoint=checkpoint)
        card = result["card"]
        write_preview(folder / hub.FILE, folder / Run.preview_picture)
        files.write_atomic(folder / "README.md", hub.readme(card, name, licence, meanings()))
        if results := hub.eval_results(card):
            files.write_atomic(folder / ".eval_results" / "gz.yaml", results)
        sent = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        address = hub.push(folder, name, private=private)
    out.text(address)
    out.hint(f"gz sample hf://{name}")
    out.data({"run": found.id, "repository": name, "url": address, "files": sent})


def pull(
    repository: _Repository,
    name: Annotated[
        str | None, typer.Option("--name", metavar="ALIAS", help="A second name for the run.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get a run from the Hugging Face hub into the store; `gz sample hf://OWNER/NAME` draws without that."""
    from gzcli.launch import from_file
    from gzcli.store import hub, runs

    address = hub.PREFIX + repository.removeprefix(hub.PREFIX)
    file = hub.fetched(address)
    held = from_file.run_of(file, source=address)  # which checks it, before there is a run
    run = runs.create(held.model, held.data, alias=name)
    status = run.status()
    try:
        from_file.write(
            file, run.path, source=address, **{k: status[k] for k in ("alias", "created", "order")}
        )
    except BaseException:
        runs.remove(run)
        raise
    out.text(run.id)
    out.hint(f"gz sample {run.alias or run.id}")
    out.data({"run": run.id, "path": run.path, "from": address})


def find(ref: str) -> Run:
    """The run of this id, alias or folder, in any state; else the finished one that `ref` means."""
    from gzcli.launch.from_file import find_run
    from gzcli.store.runs import by_name

    return by_name(ref) or find_run(ref)


def exported(found: Run, ref: str, place: Path, **how: Any) -> dict[str, Any]:
    """Exports a run to a path. Returns the JSON of `gz runs export`.

    ref: what the user called the run.
    how: further fields of the job.
    """
    from gzcli.cli.jobs import announce, do_job, new_folder
    from gzcli.core.jobs import ExportJob
    from gzcli.core.sections import LaunchSection

    announce(found, ref)
    job = ExportJob(str(found.path), out=str(place), launch=LaunchSection(cpu=True), **how)
    return do_job(new_folder(found.path / "export"), job)


def check_file(place: Path, *, replaceable: bool) -> None:
    """Raises UsageError for the path of a file that has another ending, or that there is already."""
    if place.suffix != ".safetensors":
        raise UsageError(f"`{place.name}` must end in `.safetensors`", hint="--out my-model.safetensors")
    if place.exists() and not replaceable:
        raise UsageError(f"there is a `{place}` already", hint="name a new file")


def write_preview(file: Path, place: Path) -> None:
    """Writes the picture that an exported file carries. Raises MissingError where it has none."""
    import base64

    from gzcli.launch.from_file import metadata
    from gzcli.store.files import write_atomic

    picture = metadata(file).get("preview")
    if picture is None:
        raise MissingError("the run has no picture of its samples", hint="gz train RUN --resume draws one")
    write_atomic(place, base64.b64decode(picture))
