"""Makes packs: fetches a set's files if that is allowed, and packs them into a folder of the cache. No heavy
import at the top."""

from __future__ import annotations

import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gzcli.core.errors import GzError, MissingError
from gzcli.data.download.raw import check_files, is_fetched, raw_dir
from gzcli.data.packs.cached import RULE, fingerprint, pack_limit
from gzcli.data.packs.facts import measure
from gzcli.data.packs.forms import Form, Report, Say, silent
from gzcli.data.readers.kinds import counted
from gzcli.data.sets.names import DataSet, OwnSet
from gzcli.data.sets.sets import SPECS
from gzcli.data.sets.specs import DataSpec
from gzcli.store.files import new_dir
from gzcli.store.hub import HUB_SCHEME, offline

if TYPE_CHECKING:
    from gzcli.data.readers.raw_images import RawImages

FETCHED_UNASKED = 200_000_000  # bytes: larger sets are downloaded only by `gz data download`


def make(found: DataSet, folder: Path, form: Form, fetch: bool, say: Say, progress: Report) -> None:
    """Packs a set into `folder`, which appears there whole or not at all.

    found: the set.
    folder: the pack's folder.
    form: how the images are read and packed, with the set's own size and channels filled in.
    fetch: whether the files of a known set may be downloaded.
    say: takes a line about what is done.
    progress: takes images done and in all.

    Raises UsageError and MissingError.
    """
    from gzcli.data.packs.build import build

    if isinstance(found, DataSpec) and not found.embedded:
        _have_files(found, fetch, say)
        if found.download_size > FETCHED_UNASKED:
            say(f"checking the files of `{found.name}`, {found.download_size / 1e6:,.0f} MB")
        check_files(found, silent)  # a bit may have changed since they were fetched
    made_of = fingerprint(found)
    images = _read_own(found, form) if isinstance(found, OwnSet) else _read_known(found)
    facts = measure(images) if isinstance(found, OwnSet) and not form.foreign else None
    name = found.shown if isinstance(found, DataSpec) else images.title
    say(f"packing `{name}`: {counted(sum(images.counts.values()), 'image')}")
    with new_dir(folder) as part:
        extra = {"fingerprint": made_of, "rule": RULE, "facts": facts and asdict(facts)}
        build(images, part, form, limit=pack_limit(), progress=progress, extra=extra)


def _read_own(found: OwnSet, form: Form) -> RawImages:
    """The user's own images. Raises MissingError where they are gone."""
    from gzcli.data.readers.own import open_path

    if not found.path.exists():
        hint = f"`gz data remove {found.key}`, then `gz data import PATH --name {found.key}`"
        raise MissingError(f"`{found.path}`, imported as `{found.key}`, is gone", hint=hint)
    return open_path(found.path, form)


def _read_known(spec: DataSpec) -> RawImages:
    """The images of a known set. Raises MissingError where its files cannot be read."""
    if spec.embedded:
        from gzcli.data.sets.embedded import MAKERS

        return MAKERS[spec.name](spec)
    from gzcli.data.readers.parsers import PARSERS

    try:
        return PARSERS[spec.name](spec, raw_dir(spec))
    except GzError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError) as e:
        hint = f"`gz data verify {spec.name}` checks its files"
        raise MissingError(f"the files of `{spec.name}` cannot be read: {e}", hint=hint) from e


def ways_to_fetch(spec: DataSpec) -> str:
    """How a user has the files of a known set fetched."""
    if spec.linked:
        ways = f"`gz data download {spec.name} --from DIR`, where DIR has the files of {spec.page}"
        return ways + (f", or `--from {HUB_SCHEME}{spec.hub}` with `HF_TOKEN`" if spec.hub else "")
    size = "" if spec in SPECS.values() else f" --size {spec.size}"
    return f"`gz data download {spec.name}{size}` ({spec.download_size / 1e6:,.0f} MB)"


def _have_files(spec: DataSpec, fetch: bool, say: Say) -> None:
    """Fetches the files that are missing. Raises MissingError where that is not allowed, or they are
    large."""
    if is_fetched(spec):
        return
    from gzcli.data.download import fetch as fetching
    from gzcli.data.download.addresses import has_local_mirror

    hint = ways_to_fetch(spec)
    if not fetch or (offline() and not has_local_mirror()):
        why = " and `GZ_OFFLINE` is set" if offline() else ""
        raise MissingError(f"`{spec.name}` is not in the cache{why}", hint=hint)
    if spec.download_size > FETCHED_UNASKED:
        raise MissingError(f"`{spec.name}` is not in the cache, and large", hint=hint)
    say(f"downloading `{spec.name}` ({spec.download_size / 1e6:,.0f} MB, licence: {spec.licence})")
    fetching.fetch(spec, say=say)
