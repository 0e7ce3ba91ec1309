"""The addresses at which the files of a set are looked for: the user's own place, a mirror, the publisher."""

from __future__ import annotations

import os
import urllib.request

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.download.request import joined, split
from gzcli.data.sets.specs import DataFile, DataSpec
from gzcli.store.hub import offline


def addresses(spec: DataSpec, file: DataFile, source: str | None) -> list[str]:
    """Where to look for a file, in order: paths or http(s) URLs.

    source: the folder, file or URL of `--from`, which alone is then looked at.

    Raises MissingError where all of them are on a network that the user forbids, or the source is not there.
    """
    if source is not None:
        return _from_source(spec, file, local_path(source))
    found = [*of_mirror(spec.name, file), *file.urls]
    if offline() and any(map(is_url, found)):
        found = [address for address in found if not is_url(address)]
        if not found:
            raise MissingError(
                f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set",
                hint=f"unset `GZ_OFFLINE`, then `gz data download {spec.name}`; or `--from DIR` with "
                f"`{file.name}`",
            )
    return found


def _from_source(spec: DataSpec, file: DataFile, source: str) -> list[str]:
    """The addresses of a file in the user's own place: a folder that holds FILE or NAME/FILE, or the file."""
    if is_url(source):
        if offline():
            raise MissingError(
                f"`{source}` is on the network and `GZ_OFFLINE` is set", hint="unset `GZ_OFFLINE`"
            )
        last = split(source).path.rsplit("/", 1)[-1]
        is_folder = last not in {f.name for f in spec.files}
    elif os.path.exists(source):
        last, is_folder = os.path.basename(source), os.path.isdir(source)
    else:
        raise MissingError(f"there is no `{source}`", hint="`--from` takes a folder, a file or a URL")
    if is_folder:
        both = [_join(source, file.name), _join(source, spec.name, file.name)]
        return both if is_url(source) else [next(filter(os.path.exists, both), both[0])]
    if last != file.name and len(spec.files) > 1:
        every = ", ".join(f"`{f.name}`" for f in spec.files)
        raise UsageError(
            f"`{spec.name}` has {len(spec.files)} files, `{source}` is one",
            hint=f"give the folder of {every}",
        )
    return [source]


def of_mirror(folder: str, file: DataFile) -> list[str]:
    """The address of a file in the mirror; empty where `GZ_MIRROR` is not set.

    folder: of the file, below the mirror.
    """
    mirror = os.environ.get("GZ_MIRROR")
    return [_join(local_path(mirror), folder, file.name)] if mirror else []


def has_local_mirror() -> bool:
    """Whether `GZ_MIRROR` is a folder: then fetching needs no network."""
    mirror = os.environ.get("GZ_MIRROR", "")
    return bool(mirror) and not is_url(mirror)


def is_url(address: str) -> bool:
    """Whether an address is of http or https."""
    return address.startswith(("http://", "https://"))


def local_path(address: str) -> str:
    """The path of a `file://` URL; anything else unchanged, but for `~`."""
    if not address.startswith("file://"):
        return os.path.expanduser(address)
    return urllib.request.url2pathname(split(address).path)


def _join(base: str, *parts: str) -> str:
    return joined(base, *parts) if is_url(base) else "/".join([base.rstrip("/"), *parts])
