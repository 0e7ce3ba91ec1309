"""From a data set to its pack, found in the cache or fetched and packed now; and the facts of a set that
determine the settings of models. No heavy import at the top."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from gzcli.core.errors import DISK, GzError, MissingError, UsageError
from gzcli.core.sections import DataSection, Fit
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import Size, by_sides, canonical_size, counted, packable, sides
from gzcli.core.units import size as size_in_words
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.pack import (
    RULE,
    SPLITS,
    Pack,
    PackMeta,
    Use,
    find_pack,
    fingerprint,
    pack_dir,
    pack_limit,
    packs_of,
)
from gzcli.data.sets.names import DataSet, OwnSet, locate
from gzcli.data.sets.registry import SPECS, DataSpec, Form, check_files, is_fetched, raw_dir
from gzcli.store.files import lock, new_dir, sweep, write_json
from gzcli.store.hub import HUB_SCHEME, offline
from gzcli.store.run_folder import Run

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.readers.images import RawImages

FETCHED_UNASKED = 200_000_000  # bytes of a set, beyond which only `gz data download` downloads it
NAMED = 5  # most classes that a message names
RECORDED = ("name", "digest", "shape", "classes", "counts", "extras")  # keys of a run's data record

# Shape classes above 32 pixels, with the side up to which one reaches: the geometric mean of it and the next.
CLASSES = {"64px": 90, "128px": 181, "256px": math.inf}
SMALLEST = 45  # the side up to which images are in the class `grey` or `colour`
SHAPES = ("grey", "colour", *CLASSES)
FEW_IMAGES, FEW = "few", 5_000  # the section of small sets, and the training images up to which a set is one
LOOKED_AT = 64  # images that are measured


class PackOptions(TypedDict):
    """Keywords of `open_pack` and `peek`."""

    size: Size | None  # of the images; None: the set's own
    channels: int | None  # 1 or 3; None: the set's own
    fit: Fit  # how pictures of another shape are resized
    patch: int | None  # side of the patches of images; None: whole images


def pack_options(data: DataSection) -> PackOptions:
    """The keywords that the section `data` of a recipe asks for."""
    return PackOptions(size=data.size, channels=data.channels, fit=data.fit, patch=patch_of(data.augment))


def size_of(data: DataSection) -> Size | None:
    """The size of a model's images: that of the patches if it is trained on patches."""
    return patch_of(data.augment) or data.size


def peek(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
) -> PackMeta | None:
    """The metadata of a set's pack, from its JSON alone; None without a pack of the current files."""
    data = locate(what).sized(size := size and canonical_size(size))
    pack = find_pack(data, data.form.with_options(size, channels, fit, patch))
    return Pack(pack.folder, pack.meta, patch).meta if pack else None


def open_pack(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
    foreign: bool = False,
    say: Say = silent,
    progress: Report = unreported,
) -> Pack:
    """The pack of a set, which is fetched (up to 200 MB) and packed if necessary, under a lock. A set that
    would be larger than `GZ_PACK_LIMIT` is streamed instead. Several processes may call it at once. Raises
    UsageError (mixed sizes, size out of range, images smaller than the patch) and MissingError.

    size, channels: of the images, 4 … 1024 pixels a side, and 1 or 3; None: the set's own.
    fit: how pictures of another shape are resized.
    patch: side of the patches of images: random ones in training, elsewhere the middle one. Without a size
      the images may have mixed sizes. None: whole images.
    foreign: the user's own set is only scored: without a `test` split of its own, all images are in it.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`data.channels` is 1 (grey) or 3 (RGB), not {channels}")
    size = None if size is None else packable(size)
    if fit == "aspect" and (size is None or patch):
        hint = "`--set data.size=512`, without `patch` in `data.augment`"
        raise UsageError("`data.fit: aspect` is of whole images, in shapes of a `data.size`", hint=hint)
    data = locate(what).sized(size)
    form = data.form.with_options(size, channels, fit, patch)
    form = replace(form, foreign=foreign and isinstance(data, OwnSet))
    with Use(data) as use:
        if pack := find_pack(data, form):
            if form.foreign and pack.meta.notes:  # of pictures that are judged it is said each time
                say(f"`{data.shown}`: {pack.meta.words}")
        else:
            pack, is_new = _pack_now(data, form, say, progress)
            if is_new:
                facts = None if foreign else facts_of(data, size=size, channels=channels, patch=patch)
                for line in (pack.meta.words, *settings_lines(data, facts)):
                    say(f"`{data.shown}`: {line}")
        pack = Pack(pack.folder, pack.meta, patch)
        pack.use = use
        return pack


def _pack_now(data: DataSet, form: Form, say: Say, progress: Report) -> tuple[Pack, bool]:
    """The new pack of a set, and whether this process made it, not a concurrent one."""
    folder, is_new = pack_dir(data, form), False
    waiting = f"another process packs `{data.shown}`: waiting"
    try:
        with lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: say(waiting)):
            if (pack := find_pack(data, form)) is None:
                sweep(folder.parent)
                _make(data, folder, form, say, progress)
                pack, is_new = find_pack(data, form), True
    except OSError as e:
        if e.errno not in DISK:
            raise
        hint = "free some space, or set `GZ_HOME` to a folder on another disk"
        message = f"`{data.shown}` could not be packed into `{folder}`: {e.strerror}"
        raise MissingError(message, hint=hint) from e
    if pack is None:
        hint = "try again when its files are at rest"
        raise MissingError(f"`{data.shown}` changed while it was packed", hint=hint)
    return pack, is_new


def _make(data: DataSet, folder: Path, form: Form, say: Say, progress: Report) -> None:
    """Packs a set into `folder`, atomically."""
    from gzcli.data.packs.build import build

    if isinstance(data, DataSpec) and not data.embedded:
        _fetch_files(data, say)
    made_of, facts = fingerprint(data), None
    if isinstance(data, DataSpec):
        images, name = _read_known(data), data.name
    else:
        from gzcli.data.readers.folder import open_path

        if not data.path.exists():
            hint = f"`gz data remove {data.key}`, then `gz data import PATH --name {data.key}`"
            raise MissingError(f"`{data.path}`, imported as `{data.key}`, is gone", hint=hint)
        images = open_path(data.path, form)
        facts, name = None if form.foreign else measure(images), images.title
    say(f"packing `{name}`: {counted(sum(images.counts.values()), 'image')}")
    with new_dir(folder) as part:
        extra = {"fingerprint": made_of, "rule": RULE, "facts": facts and asdict(facts)}
        build(images, part, form, limit=pack_limit(), progress=progress, extra=extra)


def _fetch_files(spec: DataSpec, say: Say) -> None:
    """Fetches missing files unless they are large, and verifies the checksums of all."""
    megabytes = size_in_words(spec.download_size)
    if not is_fetched(spec):
        from gzcli.data.download.fetch import fetch, has_local_mirror

        if offline() and not has_local_mirror():
            message = f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set"
            raise MissingError(message, hint=ways_to_fetch(spec))
        if spec.download_size > FETCHED_UNASKED:
            raise MissingError(f"`{spec.name}` is not in the cache, and large", hint=ways_to_fetch(spec))
        say(f"downloading `{spec.name}` ({megabytes}, licence: {spec.licence})")
        fetch(spec, say=say)
    if spec.download_size > FETCHED_UNASKED:
        say(f"checking the files of `{spec.name}`, {megabytes}")
    check_files(spec, silent)


def is_here(data: DataSet) -> bool:
    """Whether a set can be used without the network."""
    if packs_of(data):
        return True
    if isinstance(data, OwnSet):
        return data.path.exists()
    return data.embedded or any(map(is_fetched, data.versions))


def ways_to_fetch(spec: DataSpec) -> str:
    """The commands that fetch the files of a known set."""
    if spec.linked:
        ways = f"`gz data download {spec.name} --from DIR`, where DIR has the files of {spec.page}"
        return ways + (f", or `--from {HUB_SCHEME}{spec.hub}` with `HF_TOKEN`" if spec.hub else "")
    size = "" if spec in SPECS.values() else f" --size {spec.size}"
    return f"`gz data download {spec.name}{size}` ({size_in_words(spec.download_size)})"


def _read_known(spec: DataSpec) -> RawImages:
    """The images of a known set. Raises MissingError where its files cannot be read."""
    if spec.embedded:
        from gzcli.data.readers.embedded import MAKERS

        return MAKERS[spec.name](spec)
    import tarfile

    from gzcli.data.readers.publishers import PARSERS

    try:
        return PARSERS[spec.name](spec, raw_dir(spec))
    except GzError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError) as e:
        hint = f"`gz data verify {spec.name}` checks its files"
        raise MissingError(f"the files of `{spec.name}` cannot be read: {e}", hint=hint) from e


# --- the facts that determine a model's settings for a set: shape class, and whether there are few images ---
# Those of known sets are declared; the user's own images are measured once, when they are packed.


@dataclass(frozen=True)
class Facts:
    """The facts of a set that determine its settings."""

    height: int  # of an image, in pixels
    width: int  # of an image, in pixels
    channels: int  # 1 or 3
    n: int  # number of training images
    grey: bool = False  # whether the images are grey and stored as colour
    classes: int | None = None  # number of classes; 0: no labels, None: not known
    extras: tuple[str, ...] = ()  # what comes with each image, of EXTRAS
    name: str = ""  # of the set

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def shape_class(self) -> str:
        """The name of the set's shape class, of SHAPES."""
        side = math.sqrt(self.height * self.width)
        if side <= SMALLEST:
            return "colour" if self.channels == 3 and not self.grey else "grey"
        return next(name for name, most in CLASSES.items() if side <= most)

    @property
    def traits(self) -> tuple[str, ...]:
        """The sections of settings for the set besides that of its shape class."""
        return (FEW_IMAGES,) if self.n <= FEW else ()

    @property
    def words(self) -> str:
        """For people: `1,600 colour images of 64×64, few`."""
        kind = "grey" if self.channels == 1 else "grey (stored as colour)" if self.grey else "colour"
        return ", ".join([f"{self.n:,} {kind} images of {self.width}×{self.height}", *self.traits])


def settings_lines(data: DataSet, facts: Facts | None) -> list[str]:
    """Lines on the facts of a set and the settings chosen by them; [] if they are not known."""
    if facts is None or (isinstance(data, DataSpec) and data.embedded):
        return []
    settings = " ".join((facts.shape_class, *facts.traits))
    lines = [f"{facts.words}; models take their settings for `{settings}`"]
    if facts.grey:
        lines.append("they are trained as they are; `--set data.channels=1` takes a third of the values")
    return lines


def facts_of(
    data: DataSet,
    *,
    size: Size | None = None,
    channels: int | None = None,
    n: int | None = None,
    patch: int | None = None,
) -> Facts | None:
    """The facts of a set, packed or not; None if its files are gone or not readable."""
    if isinstance(data, DataSpec):
        spec = data.sized(size)
        facts = Facts(spec.size, spec.size, spec.channels, spec.n_train)
        facts = replace(facts, classes=spec.n_classes, extras=spec.extras)
    else:
        from gzcli.data.readers.folder import open_path

        metas = [meta for pack in packs_of(data) if (meta := PackMeta.read(pack, data)) and meta.facts]
        now = fingerprint(data) if metas else None
        packed = next((meta for meta in metas if now in (meta.fingerprint, None)), None)
        # the pack counts what could be read
        values = packed and {**(packed.facts or {}), "n": packed.counts["train"]}
        try:
            if not values and (result := measure(open_path(data.path, data.form))):
                values = vars(result)
        except GzError:  # packing says what is wrong with them
            return None
        if not values:
            return None
        facts = Facts(**{key: values[key] for key in Facts.__dataclass_fields__ if key in values})
        facts = replace(facts, extras=tuple(facts.extras))  # a list in JSON
        size, channels = size or data.size, channels or data.channels
    size = patch or size
    height, width = (facts.height, facts.width) if size is None else sides(size)
    many = facts.n if n is None else min(n, facts.n)
    channels = channels or facts.channels
    return replace(facts, height=height, width=width, channels=channels, n=many, name=data.reference)


def measure(images: RawImages) -> Facts | None:
    """The facts of images before packing, measured on a few of them; None if none can be read."""
    import numpy as np

    from gzcli.data.packs.build import rows_of, split_plan

    looked_at = list(_few_of(images))
    if not looked_at:
        return None
    pixels = np.concatenate([image.reshape(image.shape[0], -1) for image in looked_at], 1)  # [C, pixels]
    _, height, width = looked_at[0].shape
    grey = bool((pixels == pixels[:1]).all())
    # encoded pictures without colour are packed as grey, arrays as they are
    channels = images.shape[0] if images.shape else 1 if grey else 3
    n = rows_of(split_plan(images.title, images.counts))["train"]
    grey = channels == 3 and grey
    return Facts(height, width, channels, n, grey, len(images.classes), images.extras)


def _few_of(images: RawImages) -> Iterator[np.ndarray]:
    """The first `LOOKED_AT` images of arrays, or a few encoded pictures: uint8 [C, H, W]."""
    if images.probe is None:
        blocks = (block.data for block in images.blocks() if not isinstance(block.data, bytes))
        yield from islice(chain.from_iterable(blocks), LOOKED_AT)
        return
    from gzcli.data.readers.pictures import Decoding, decode

    for name, data in images.probe():
        with contextlib.suppress(MissingError):  # packing names those that do not decode
            yield decode(data, name, Decoding(None, 3))[0]


# --- the record of a run's data: the user's files may change after a training ---


def record_data(folder: Path, meta: PackMeta) -> None:
    """Records the data of the run in `folder`, unless that was done before."""
    file = Run(folder).environment_file
    env = Run(folder).environment
    if not env.get("data"):
        write_json(file, env | {"data": {key: getattr(meta, key) for key in RECORDED}})


def check_unchanged(folder: Path, meta: PackMeta) -> None:
    """Raises MissingError with the changes of a set since the run in `folder` recorded it."""
    before = Run(folder).environment.get("data") or {}
    if before.get("name") != meta.name or before.get("digest") == meta.digest:
        return
    now = {key: list(value) if isinstance(value := getattr(meta, key), tuple) else value for key in RECORDED}
    try:
        changes = ", ".join(_changes(before, now))
    except (KeyError, TypeError, ValueError):  # a damaged record does not end a training
        return
    hint = "put the images back as they were, or train anew on what is there now, without `--resume`"
    raise MissingError(f"`{meta.title}` is not what `{folder.name}` was trained on: {changes}", hint=hint)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two records, for people."""
    changes = []
    gone = [name for name in before["classes"] if name not in now["classes"]]
    added = [name for name in now["classes"] if name not in before["classes"]]
    for change, names, end in (("no class", gone, " any more"), ("a new class", added, "")):
        if names:
            others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            changes.append(f"{change} {' '.join(f'`{name}`' for name in names[:NAMED])}{others}{end}")
    for split in SPLITS:
        if before["counts"][split] != now["counts"][split]:
            changes.append(f"{now['counts'][split]:,} {split} images instead of {before['counts'][split]:,}")
    if before["shape"] != now["shape"]:
        old, new = (by_sides(row["shape"][::-1]) for row in (before, now))
        changes.append(f"images of {new} instead of {old}")
    if before["extras"] != now["extras"]:
        old, new = (", ".join(row["extras"]) or "nothing" for row in (before, now))
        changes.append(f"with {new} to each instead of {old}")
    return changes or ["other pixels, labels or texts"]
