"""`gz data`: download, import, show, list, verify, audit and remove data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gzcli.cli import options as opt
from gzcli.cli import out
from gzcli.cli.jobs import do_job, end, new_set, quoted, took
from gzcli.cli.list import group, list_data
from gzcli.cli.options import a_set, argument, option
from gzcli.core.errors import FLAGGED_CODE, MissingError, UsageError, choose
from gzcli.core.units import Size, counted, packable, sides
from gzcli.data import library
from gzcli.data.sets.registry import DataSpec, Form, find, is_fetched, locate, names, slug

if TYPE_CHECKING:
    from gzcli.data.packs.facts import Facts
    from gzcli.data.packs.pack import Pack, PackMeta
    from gzcli.data.sets.registry import DataSet

app = group("data", list_data)


@contextmanager
def _flags_in_hints() -> Iterator[None]:
    """Replaces recipe keys in hints by the flags of this verb, such as `--size 32`."""
    try:
        yield
    except (UsageError, MissingError) as error:
        error.advise(error.hint and re.sub(r"--set data\.(size|channels)=", r"--\1 ", error.hint))
        raise


def _packable(text: str | None) -> Size | None:
    """The value of `--size`. Raises UsageError for a size in which images cannot be packed."""
    with _flags_in_hints():
        return packable(text) if text else None


def _one_or_three(channels: int | None) -> int | None:
    """The value of `--channels`. Raises UsageError for 2, which the range in Typer allows."""
    if channels == 2:
        raise UsageError("`--channels` must be 1 (grey) or 3 (RGB), not 2")
    return channels


_Name = Annotated[str, argument("NAME", "A data set.", a_set)]
_Names = Annotated[list[str], argument("NAME", "Data sets.", a_set)]
_Some = Annotated[list[str] | None, argument("NAME", "Data sets. Default: all cached ones.", a_set)]
_Shown = Annotated[str, argument("NAME|PATH", "A data set, or your own images.", a_set)]
_Path = Annotated[str, argument("PATH", "A folder, zip, tar, npz or parquet of images.")]
_NEW_NAME_HELP = "Name of the data set. Default: the name of the folder or file."
_NewName = Annotated[str | None, option("--name NAME", _NEW_NAME_HELP)]
_FROM_HELP = "Folder or URL to get the files from, instead of the publisher."
_From = Annotated[str | None, option("--from DIR|URL", _FROM_HELP)]
_SIZE_HELP = "Image size: a side, or width and height, such as 48x32. MedMNIST comes in 28, 64, 128 and 224."
# the functions below get the result of `_packable`
_Size = Annotated[str | None, option("--size S|WxH", _SIZE_HELP, callback=_packable)]
_CHANNELS = option("--channels C", "1 for grey, 3 for RGB.", min=1, max=3, callback=_one_or_three)
_Channels = Annotated[int | None, _CHANNELS]
_LAYOUT_HELP = "Folder layout: flat, classes, splits or class-splits. Default: inferred from folder names."
_FIT_HELP = "How images of another shape are resized: crop, pad or stretch. Default: crop."
_Fit = Annotated[str, option("--fit F", _FIT_HELP)]
_Layout = Annotated[str | None, option("--layout L", _LAYOUT_HELP)]
_SkipBad = Annotated[bool, option("--skip-bad", "Skip images that cannot be read.")]
_AUDITED_HELP = "Number of images, drawn at random. Default: all."
_AuditedImages = Annotated[int | None, option("-n N", _AUDITED_HELP, min=1)]
_FAIL_HELP = "Exit with code 6 if there is a fault, for scripts."
_Fail = Annotated[bool, option("--fail", _FAIL_HELP)]
_Long = Annotated[bool, option("--long -l", "Also show splits, sizes, licences and citations.")]


def _opened(data_set: DataSet, size: Size | None, channels: int | None) -> Pack:
    """The pack of a data set. A progress bar is shown while it is created."""
    from gzcli.data.packs.open import open_pack

    form: dict[str, Any] = {"size": size, "channels": channels, "fit": data_set.form.fit}
    with _flags_in_hints(), out.progress(data_set.reference, unit="images") as report:
        return open_pack(data_set, **form, say=out.info, progress=report)


@app.command()
def download(names: _Names, source: _From = None, size: _Size = None, channels: _Channels = None) -> None:
    """Download, verify and pack data sets.

    Interrupted downloads resume. gz first tries `GZ_MIRROR`, a folder or base URL with files as NAME/FILE.
    """
    from gzcli.data.download.fetch import fetch
    from gzcli.data.packs.open import pack_limit, peek

    lines, rows, images = [], list[dict[str, Any]](), 0
    for spec in [find(name) for name in names]:  # an unknown name is refused before anything is fetched
        if not spec.embedded:
            pixels = (channels or spec.channels) * prod(sides(size or spec.size))
            pack_size = pixels * (spec.n_train + spec.n_val + spec.n_test)
            packed = peek(spec, size=size, channels=channels)
            if packed or pack_size > pack_limit():  # a set beyond the limit is streamed
                pack_size = 0
            with out.progress(spec.name) as report:
                fetch(spec.sized(size), source=source, pack_size=pack_size, progress=report, say=out.info)
        meta = _opened(spec, size, channels).meta
        images += sum(meta.counts.values())
        lines.append((spec.name, *(meta.counts[split] for split in ("train", "val", "test"))))
        facts = {"shape": meta.shape, "classes": len(meta.classes), "counts": meta.counts}
        rows.append({"name": spec.name, **facts})
    out.table(("data", "train", "val", "test"), lines)
    new_set(images, names[0], rows[0]["classes"], show=True)
    out.data({"data": rows})


@app.command("import")
def import_(
    path: _Path,
    name: _NewName = None,
    size: _Size = None,
    channels: _Channels = None,
    fit: _Fit = "crop",
    layout: _Layout = None,
    skip_bad: _SkipBad = False,
) -> None:
    """Name and pack your own images. The files stay where they are."""
    from gzcli.data.packs.open import facts_of
    from gzcli.data.readers.layouts import LAYOUTS

    layout = choose("layout", layout, LAYOUTS) if layout else None
    name = name or slug(Path(path).expanduser().absolute().name.partition(".")[0])
    new = name not in names()
    how: Any = choose("fit", fit, ("crop", "pad", "stretch"))
    row = library.import_set(path, name, Form(size, channels, skip_bad, layout, fit=how))
    if (replaced := row["replaced"]) is not None:
        words = {None: "automatic", True: "on", False: "off"}
        flags = {key: key.replace("_", "-") for key in replaced} | {"form": "layout"}
        changes = [
            f"{flags[key]} {words.get(now, now)} instead of {words.get(before, before)}"
            for key, (before, now) in replaced.items()
        ]
        out.info(f"`{name}` was imported before, now with {', '.join(changes) or 'the same settings'}")
    more, classes = "", None
    try:
        meta = _opened(locate(name), size, channels).meta
        row |= {"counts": meta.counts, "shape": meta.shape}
        classes = len(meta.classes)
        row |= {"skipped": meta.skipped, "notes": meta.notes, "extras": meta.extras}
        for line in _settings(facts_of(locate(name), size=size, channels=channels, meta=meta)):
            out.info(line)
        for message in meta.skipped:
            out.info(f"left out: {message}")
    except MissingError:
        if new:
            library.remove(name)
        raise
    except UsageError as error:  # as for images of several sizes, which a recipe may still resize
        row |= {"shape": None, "skipped": [], "notes": [], "extras": []}
        out.info(f"not packed yet: {error.message}")
        if flag := re.search(r"`--(size|channels) (\w+)`", error.hint or ""):
            more = f" --set data.{flag[1]}={flag[2]}"
            out.hint(f"import it again with {flag[0]}, or pass the setting when you train, as below")
        else:
            out.hint(str(error.hint))
    out.text(row["name"])
    images = sum(row["counts"].values()) if row["shape"] else None
    new_set(images, row["name"] + more, classes, show=bool(row["shape"]))
    out.data(row)


@app.command()
def show(name: _Shown, size: _Size = None, channels: _Channels = None) -> None:
    """Show a data set: classes, counts and a contact sheet.

    If the data set is not downloaded, gz shows its description.
    """
    from gzcli.data.packs.open import counts_of, facts_of, peek
    from gzcli.data.packs.source import ways_to_fetch

    data_set = locate(name)
    spec = data_set.sized(size) if isinstance(data_set, DataSpec) else None
    if spec and not (spec.embedded or is_fetched(spec) or peek(spec, size=size, channels=channels)):
        facts = facts_of(spec, size=size, channels=channels)
        height, width = (facts.height, facts.width) if facts else (spec.size, spec.size)
        counts = counts_of(spec) or {}
        row = _described(spec, (channels or spec.channels, height, width), counts, facts)
        kind = "attributes (several per image)" if spec.multilabel else "classes"
        names = "" if isinstance(spec.classes, int) else f": {', '.join(spec.classes)}"
        out.info(f"{spec.n_classes:,} {kind}{names}")
        out.info(f"licence: {spec.licence}; {spec.citation}")
        out.table(("data", *counts), [(spec.name, *counts.values())])
        out.hint(f"the images are not on this machine: {ways_to_fetch(spec)}")
        row |= {"classes": [{"name": name} for name in spec.class_names], "notes": (), "skipped": ()}
        row |= {"digest": None, "sheet": None, "licence": spec.licence, "download": spec.download_size}
        return out.data(row)
    from gzcli.data.packs.pack import PackFolder
    from gzcli.data.packs.sheet import class_counts, draw

    pack = _opened(data_set, size, channels)
    facts, meta, classes = facts_of(data_set, size=size, channels=channels), pack.meta, class_counts(pack)
    row = _described(meta, meta.shape, meta.counts, facts)
    lines = [(each["name"], *(each[split] for split in meta.counts)) for each in classes]
    out.table(("class", *meta.counts), [*lines, ("images", *meta.counts.values())])
    for message in meta.skipped:
        out.info(f"left out: {message}")
    sheet = draw(pack, PackFolder(pack.folder).sheet_picture)
    out.picture(sheet)
    new_set(sum(meta.counts.values()), quoted(name), len(meta.classes), show=False)
    row |= {"classes": classes, "notes": meta.notes, "skipped": meta.skipped, "digest": meta.digest}
    out.data(row | {"sheet": sheet})


def _described(
    described: PackMeta | DataSpec,
    shape: Sequence[int],
    counts: Mapping[str, int],
    facts: Facts | None,
) -> dict[str, Any]:
    """Prints the facts that a pack shares with the description of an unpacked set. Returns them for
    scripts."""
    c, h, w = shape
    out.info(f"{described.title}: {w}×{h} pixels, {'grey' if c == 1 else 'RGB'}, {described.levels} levels")
    for note in (*_settings(facts), *getattr(described, "notes", ())):
        out.info(note)
    row = {key: getattr(described, key) for key in ("name", "title", "levels", "multilabel", "extras")}
    row |= {"shape_class": facts and facts.shape_class, "traits": facts.traits if facts else ()}
    return row | {"shape": shape, "counts": counts}


def _settings(facts: Facts | None) -> list[str]:
    from gzcli.data.packs.facts import settings_lines

    return [line.replace("--set data.channels=", "--channels ") for line in settings_lines(facts)]


@app.command("list")
def list_(long: _Long = False, wide: opt.Wide = False) -> None:
    """List data sets; the same as `gz list data`."""
    list_data(long=long, wide=wide)


@app.command()
def verify(names: _Some = None) -> None:
    """Check the files of data sets against their checksums."""
    cached = [row["name"] for row in library.listing() if row["cached"] and not row["embedded"]]
    rows = [library.verify(name, say=out.info) for name in names or cached]
    lines = [(row["name"], len(row["files"]), len(row["packs"]), "ok") for row in rows]
    out.table(("data", "files", "packs", "state"), lines)
    out.data({"data": rows})


@app.command()
def audit(name: _Shown, n: _AuditedImages = None, fail: _Fail = False, open_: opt.Open = False) -> None:
    """Find copies, wrong labels, foreign images and unusable files.

    gz changes nothing. It lists the faults in `audit.csv`, and draws the images on the sheet `audit.png`.
    """
    from gzcli.launch import auditing
    from gzcli.report.audit import faults_table

    request = auditing.ask(name, n)
    folder = request.new_folder()
    result = do_job(folder, request.job)
    shown = faults_table(result)
    if shown.rows:
        out.table(shown.head, shown.rows)
    for text in (*shown.notes, *(f"note: {note}" for note in result["notes"]), f"files: {folder}"):
        out.info(text)
    if result["sheet"]:
        out.picture(Path(result["sheet"]), opened=open_)
    files = {row["file"] for row in result["faults"]}
    words = f"gz data audit {quoted(name)}{f' -n {n}' if n else ''} --fail"
    again = (words, f"exit with code {FLAGGED_CODE} if there is a fault")
    end([f"{len(files):,} of {counted(result['images'], 'image')} with faults", took()], [again])
    out.data(result)
    if fail and files:
        raise SystemExit(FLAGGED_CODE)


@app.command()
def path(name: _Name) -> None:
    """Print the path of a data set."""
    folder = library.data_path(name)
    out.text(str(folder))
    out.data({"name": name, "path": folder})


@app.command()
def remove(names: _Names, yes: opt.Yes = False) -> None:
    """Remove data sets from the cache. Your own files stay."""
    sets = {name: locate(name) for name in names}  # an unknown name is refused before anything is removed
    if not opt.may_remove(" and ".join(f"`{name}`" for name in sets) + " from the cache", yes):
        sets = {}
    removed = [name for name, data_set in sets.items() if library.remove(data_set)]
    for name in sets:
        out.info(f"removed `{name}`" if name in removed else f"`{name}` was not in the cache")
    out.data({"removed": removed})
