"""Makes packs: a set's files, fetched if they may be, as a source that is built into a folder of the cache.

Importing this imports no numpy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from gzcli.data.library import OwnSet
from gzcli.data.sets import SPECS
from gzcli.data.specs import DataSpec
from gzcli.data.walk import walk
from gzcli.errors import GzError, MissingError, UsageError
from gzcli.store.files import new_dir
from gzcli.store.weights import offline

Say = Callable[[str], None]
Report = Callable[[int, int], None]  # report(images done, images in all)

RULE = 2  # raised when packing changes what a pack holds: older packs are made anew
OWN_RULE = 5  # the same for the user's own images
FETCHED_UNASKED = 200_000_000  # bytes: larger sets are downloaded only by `gz data download`
PACK_LIMIT = 32_000_000_000  # bytes: larger sets stream, unless `GZ_PACK_LIMIT` says otherwise


def pack_limit() -> int:
    """Bytes beyond which a set is streamed. Raises UsageError."""
    text = os.environ.get("GZ_PACK_LIMIT", "")
    if text and not text.isdigit():
        raise UsageError(f"`GZ_PACK_LIMIT` is a number of bytes, not `{text}`")
    return int(text) if text else PACK_LIMIT


def fingerprint(found: DataSpec | OwnSet) -> str | None:
    """Of what a pack was made: the packing rule and the checksums, or a path's names, sizes and times and
    what its folders are said to mean; None where the path of an imported set is gone, whose pack is then all
    there is."""
    digest = hashlib.sha256(str(RULE if isinstance(found, DataSpec) else OWN_RULE).encode())
    if isinstance(found, DataSpec):
        digest.update(repr([(f.name, f.sha256 or f.md5) for f in found.files]).encode())
        return digest.hexdigest()
    if not found.path.exists():
        return None
    files, odd = walk(found.path) if found.path.is_dir() else ([], {})
    digest.update(repr((found.form, odd)).encode())
    for path in [str(found.path), *(os.path.join(found.path, name) for name in files)]:
        try:
            stat = os.stat(path)
        except OSError as e:
            raise MissingError(
                f"`{path}` cannot be read: {e.strerror}", hint="try again when the files are at rest"
            ) from e
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def make(
    found: DataSpec | OwnSet,
    folder: Path,
    size: int | None,
    channels: int | None,
    fetch: bool,
    foreign: bool,
    say: Say,
    progress: Report,
) -> None:
    """Packs a set into `folder`: it appears there whole, or not at all. Raises UsageError and
    MissingError."""
    if isinstance(found, DataSpec) and not found.embedded:
        _have_files(found, fetch, say)
    from gzcli.data.build import build

    made_of = fingerprint(found)
    source = _source(found, foreign)
    say(f"packing `{source.title}`: {sum(source.counts.values()):,} images")
    with new_dir(folder) as part:
        build(
            source,
            part,
            size=size or found.size,
            channels=channels or found.channels,
            limit=pack_limit(),
            skip_bad=isinstance(found, OwnSet) and found.skip_bad,
            foreign=foreign,
            progress=progress,
            extra={"fingerprint": made_of, "rule": RULE},
        )


def _source(found: DataSpec | OwnSet, foreign: bool):
    if isinstance(found, OwnSet):
        from gzcli.data.folder import open_path

        if not found.path.exists():
            hint = f"`gz data remove {found.key}`, then `gz data import PATH --name {found.key}`"
            raise MissingError(f"`{found.path}`, imported as `{found.key}`, is gone", hint=hint)
        return open_path(found.path, found.form, foreign=foreign)
    if found.embedded:
        from gzcli.data.embedded import SOURCES

        return SOURCES[found.name](found)
    import tarfile

    from gzcli.data.library import raw_dir
    from gzcli.data.parsers import PARSERS

    try:
        return PARSERS[found.name](found, raw_dir(found))
    except GzError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError) as e:
        hint = f"`gz data verify {found.name}` checks its files"
        raise MissingError(f"the files of `{found.name}` cannot be read: {e}", hint=hint) from e


def _have_files(spec: DataSpec, fetch: bool, say: Say) -> None:
    """Fetches what is missing, if that is allowed and small enough."""
    from gzcli.data import fetch as fetching
    from gzcli.data.library import is_fetched

    if is_fetched(spec):
        return
    size = "" if spec in SPECS.values() else f" --size {spec.size}"
    hint = f"`gz data download {spec.name}{size}` ({spec.download_size / 1e6:,.0f} MB)"
    if spec.linked:
        hint = f"`gz data download {spec.name} --from DIR`, where DIR has the files of {spec.page}"
    if not fetch or (offline() and not fetching.has_local_mirror()):
        why = " and `GZ_OFFLINE` is set" if offline() else ""
        raise MissingError(f"`{spec.name}` is not in the cache{why}", hint=hint)
    if spec.download_size > FETCHED_UNASKED:
        raise MissingError(f"`{spec.name}` is not in the cache, and large", hint=hint)
    say(f"downloading `{spec.name}` ({spec.download_size / 1e6:,.0f} MB, licence: {spec.licence})")
    fetching.fetch(spec, say=say)
