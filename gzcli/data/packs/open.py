"""From a data set to its pack: found in the cache, or fetched and packed now. No heavy import at the top."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.units import Size, canonical_size, packable
from gzcli.data.packs.cached import find_pack, pack_dir
from gzcli.data.packs.facts import facts_of, told
from gzcli.data.packs.forms import Report, Say, silent, unreported
from gzcli.data.packs.in_use import Use
from gzcli.data.packs.make import make
from gzcli.data.packs.pack import Pack, PackMeta
from gzcli.data.sets.names import DataSet, OwnSet, locate
from gzcli.store.files import lock, sweep


def peek(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
) -> PackMeta | None:
    """What the pack of a set holds, from its JSON alone; None where it is not packed, or packed from other
    files.

    what: the set, or its name or path.
    size: of the images; None: the set's own.
    channels: 1 or 3; None: the set's own.
    fit: how pictures of another shape come to the size.
    patch: side of the patches of the images that are used; None: whole images are.
    """
    size = size and canonical_size(size)
    found = locate(what).sized(size)
    packed = find_pack(found, found.form.asked(size, channels, fit, patch))
    return packed.cut(patch).meta if packed else None


def open_pack(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
    fetch: bool = True,
    foreign: bool = False,
    say: Say = silent,
    progress: Report = unreported,
) -> Pack:
    """The pack of a set, made now if need be: fetched (up to 200 MB, if allowed) and packed, under a lock. A
    set that would be larger than `GZ_PACK_LIMIT` is not packed but streamed. Several processes may call it at
    once.

    what: the set, or its name or path.
    size: of the images, 4 … 1024 pixels a side; None: the set's own.
    channels: 1 or 3; None: the set's own.
    fit: how pictures of another shape come to the size.
    patch: side of the patches of the images that are used: random ones are trained on, elsewhere the middle
      one stands for the image. Without a size the images may then have any. None: whole images are used.
    fetch: whether a known set may be downloaded.
    foreign: the user's own set is scored only: its `test` split is its own or, where it has none, all images.
    say: takes a line about what is done.
    progress: takes images done and in all.

    Raises UsageError (mixed sizes, size out of range, images smaller than the patch) and MissingError (files
    not there, not readable).
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`data.channels` is 1 (grey) or 3 (RGB), not {channels}")
    size = None if size is None else packable(size)
    found = locate(what).sized(size)
    form = replace(
        found.form.asked(size, channels, fit, patch), foreign=foreign and isinstance(found, OwnSet)
    )
    with Use(found) as use:
        name, folder = found.shown, pack_dir(found, form)
        if packed := find_pack(found, form):
            if form.foreign and packed.meta.notes:  # of pictures that are judged it is said each time
                say(f"`{name}`: {packed.meta.words}")
            return _cut(packed, patch, use)
        try:
            waiting = f"another process packs `{name}`: waiting"
            with lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: say(waiting)):
                if (packed := find_pack(found, form)) is None:
                    sweep(folder.parent)
                    make(found, folder, form, fetch, say, progress)
                    if packed := find_pack(found, form):
                        say(f"`{name}`: {packed.meta.words}")
                        facts = facts_of(found, size=size, channels=channels, patch=patch)
                        for line in told(found, facts) if not foreign else ():
                            say(f"`{name}`: {line}")
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            hint = "free some space, or set `GZ_HOME` to a folder on another disk"
            raise MissingError(
                f"`{name}` could not be packed into `{folder}`: {e.strerror}", hint=hint
            ) from e
        if packed is None:
            raise MissingError(
                f"`{name}` changed while it was packed", hint="try again when its files are at rest"
            )
        return _cut(packed, patch, use)


def _cut(packed: Pack, patch: int | None, use: Use) -> Pack:
    """The pack, of which patches are used, and which keeps the set from being removed."""
    pack = packed.cut(patch)
    pack.use = use
    return pack
