"""The images of a set, which are generated, read, or fetched and read. No heavy import at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gzcli.core.errors import GzError, MissingError
from gzcli.core.formats import ARCHIVE, ARRAY, IMAGE, SET, endings_of
from gzcli.core.types import Say, silent
from gzcli.core.units import size as size_in_words
from gzcli.data.readers.images import METADATA
from gzcli.data.sets.registry import (
    SPECS,
    DataSet,
    DataSpec,
    Form,
    HubSet,
    OwnSet,
    check_files,
    hub_set,
    is_fetched,
    raw_dir,
)
from gzcli.store.hub import HUB_SCHEME, data_repository, offline

if TYPE_CHECKING:
    from gzcli.data.readers.images import RawImages

HUB_FILES = (*endings_of(IMAGE, ARRAY, SET, ARCHIVE), METADATA)  # endings of the files to fetch
HUB_PAGES = "https://huggingface.co/datasets"
FETCHED_UNASKED = 200_000_000  # bytes above which only `gz data download` downloads a set


def read(data: DataSet, form: Form, say: Say = silent) -> RawImages:
    """The images of a set. Missing files are downloaded unless they are large. Raises MissingError."""
    if isinstance(data, OwnSet):
        return _imported(data, form)
    return _embedded(data) if data.embedded else _published(data, say)


def at_hand(data: DataSet, say: Say = silent) -> DataSet:
    """The set. If it is on the hub, its files are downloaded into the hub's cache. Raises MissingError."""
    if not isinstance(data, HubSet) or data.path.exists():
        return data
    folder = f"{data.config}/" if data.config else ""
    say(f"fetching `{data.reference}`")
    data_repository(data.address, [f"{folder}*{ending}" for ending in HUB_FILES])
    data_set = hub_set(data.reference)
    if not data_set.path.exists():
        lacking = f"`{data.config}`" if data.config else "image files"
        message = f"the hub's data set `{data.address}` has no {lacking}"
        hint = f"see its parts at {HUB_PAGES}/{data.address}"
        command = f"hf download {data.address} --repo-type dataset"
        raise MissingError(message, hint=f"{hint}, or download it whole with `{command}`")
    return data_set


def _imported(data: OwnSet, form: Form) -> RawImages:
    from gzcli.data.readers.folder import open_path

    if not data.path.exists():
        hint = f"run `gz data remove {data.key}`, then `gz data import PATH --name {data.key}`"
        raise MissingError(f"`{data.path}`, imported as `{data.key}`, no longer exists", hint=hint)
    return open_path(data.path, form)


def _embedded(spec: DataSpec) -> RawImages:
    from gzcli.data.readers.embedded import MAKERS

    return MAKERS[spec.name](spec)


def _published(spec: DataSpec, say: Say) -> RawImages:
    """The images of a publisher's files."""
    import tarfile

    from gzcli.data.readers.publishers import PARSERS

    _fetch_files(spec, say)
    try:
        return PARSERS[spec.name](spec, raw_dir(spec))
    except GzError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError) as e:
        hint = f"run `gz data verify {spec.name}` to check its files"
        raise MissingError(f"the files of `{spec.name}` cannot be read: {e}", hint=hint) from e


def _fetch_files(spec: DataSpec, say: Say) -> None:
    """Downloads missing files unless they are large, and verifies the checksums of all files."""
    megabytes = size_in_words(spec.download_size)
    if not is_fetched(spec):
        from gzcli.data.download.fetch import fetch, has_local_mirror

        if offline() and not has_local_mirror():
            message = f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set"
            raise MissingError(message, hint=ways_to_fetch(spec))
        if spec.download_size > FETCHED_UNASKED:
            raise MissingError(
                f"`{spec.name}` is not in the cache, and is too large to download automatically",
                hint=ways_to_fetch(spec),
            )
        say(f"downloading `{spec.name}` ({megabytes}, licence: {spec.licence})")
        fetch(spec, say=say)
    if spec.download_size > FETCHED_UNASKED:
        say(f"checking the files of `{spec.name}` ({megabytes})")
    check_files(spec, silent)


def ways_to_fetch(spec: DataSpec) -> str:
    """The commands that download the files of a known set."""
    if spec.linked:
        ways = f"run `gz data download {spec.name} --from DIR`, where DIR has the files from {spec.page}"
        return ways + (f", or `--from {HUB_SCHEME}{spec.hub}` with `HF_TOKEN`" if spec.hub else "")
    size = "" if spec in SPECS.values() else f" --size {spec.size}"
    return f"run `gz data download {spec.name}{size}` ({size_in_words(spec.download_size)})"
