"""`gz data`: fetch, bring, list, verify and remove data sets."""

from __future__ import annotations

from typing import Annotated

import typer

from gzcli.cli import out
from gzcli.cli.list import list_data
from gzcli.cli.options import Json, Quiet, complete_data
from gzcli.errors import MissingError, UsageError

app = typer.Typer(help="Download, import and check data sets.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="A data set.", autocompletion=complete_data)]
_Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Data sets.", autocompletion=complete_data)]
_From = Annotated[
    str | None, typer.Option("--from", metavar="DIR|URL", help="Where to take the files from, not from the publisher.")
]


@app.command()
def download(
    names: _Names,
    source: _From = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="S", min=4, max=1024, help="Pack at this size; MedMNIST comes in 28, 64, 128 and 224."),
    ] = None,
    channels: Annotated[int | None, typer.Option(metavar="C", min=1, max=3, help="1 for grey, 3 for RGB.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch data sets, check them and pack them.

    Downloads go on where they were cut off. `GZ_MIRROR`, a folder or base URL that holds NAME/FILE, is asked first.
    """
    from gzcli.data.fetch import fetch
    from gzcli.data.pack import open_pack, pack_limit, peek
    from gzcli.data.specs import find

    if channels == 2:
        raise UsageError("`--channels` is 1 (grey) or 3 (RGB), not 2")
    rows = []
    for spec in [find(name) for name in names]:  # every name is known before the first byte
        if not spec.embedded:
            pixels = (channels or spec.channels) * (size or spec.size) ** 2
            pack_size = pixels * (spec.n_train + spec.n_val + spec.n_test)
            if pack_size > pack_limit() or peek(spec.name, size=size, channels=channels):  # streamed, or there already
                pack_size = 0
            with out.progress(spec.name) as report:
                fetch(spec.sized(size), source=source, pack_size=pack_size, progress=report, say=out.info)
        with out.progress(spec.name, unit="images") as report:
            meta = open_pack(spec.name, size=size, channels=channels, say=out.info, progress=report).meta
        rows.append({"name": spec.name, "shape": meta.shape, "classes": len(meta.classes), "counts": meta.counts})
    columns = ("data", "train", "val", "test")
    out.table(columns, [(row["name"], *(row["counts"][split] for split in columns[1:])) for row in rows])
    out.data({"data": rows})


@app.command("import")
def import_(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A folder, zip or tar of images, or an .npz.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What to call it.")],
    size: Annotated[int | None, typer.Option(metavar="S", min=4, help="Height and width to bring images to.")] = None,
    channels: Annotated[int | None, typer.Option(metavar="C", min=1, max=3, help="1 for grey, 3 for RGB.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give images of your own a name, and pack them; the files stay where they are."""
    from gzcli.data import library
    from gzcli.data.conditions import in_words
    from gzcli.data.pack import open_pack

    new = name not in library.names()
    row = library.import_set(path, name, size=size, channels=channels, skip_bad=skip_bad)
    try:
        with out.progress(name, unit="images") as report:
            meta = open_pack(name, say=out.info, progress=report).meta
        row |= {"counts": meta.counts, "shape": meta.shape, "skipped": meta.skipped, "extras": meta.extras}
        for message in meta.skipped:
            out.info(f"left out: {message}")
    except MissingError:
        if new:
            library.remove(name)
        raise
    except UsageError as error:  # sizes that the recipe may yet settle
        row |= {"shape": None, "skipped": [], "extras": []}
        out.info(f"not packed yet: {error.message}")
        out.hint(f"{error.hint}; or import them with `--size`")
    counts = ", ".join(f"{count:,} {split}" for split, count in row["counts"].items() if count)
    extras = f", {in_words(row['extras'])}" if row["extras"] else ""
    out.text(f"{row['name']}: {counts} images, {len(row['classes']) or 'no'} classes{extras}")
    out.hint(f"gz train vae --data {row['name']}")
    out.data(row)


@app.command("list")
def list_(
    long: Annotated[bool, typer.Option("--long", "-l", help="Splits, sizes, licences and citations too.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List data sets; the same as `gz list data`."""
    list_data(long=long)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="All cached ones if none.", autocompletion=complete_data)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the files of data sets against their checksums."""
    from gzcli.data import library

    cached = [row["name"] for row in library.listing() if row["cached"] and not row["embedded"]]
    rows = [library.verify(name, say=out.info) for name in names or cached]
    out.table(("data", "files", "packs", "state"), [(r["name"], len(r["files"]), len(r["packs"]), "ok") for r in rows])
    out.data({"data": rows})


@app.command()
def path(name: _Name, json: Json = False, quiet: Quiet = False) -> None:
    """Print where a data set lies."""
    from gzcli.data import library

    folder = library.data_path(name)
    out.text(str(folder))
    out.data({"name": name, "path": folder})


@app.command()
def remove(names: _Names, json: Json = False, quiet: Quiet = False) -> None:
    """Remove data sets from the cache; your own files stay."""
    from gzcli.data import library

    removed = [name for name in names if library.remove(name)]
    for name in names:
        out.info(f"removed `{name}`" if name in removed else f"nothing of `{name}` was in the cache")
    out.data({"removed": removed})
