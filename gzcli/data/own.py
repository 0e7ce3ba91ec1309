"""Reads the user's own images at a path by the reader of their kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.forms import Form
from gzcli.data.readers.archives import Members, open_members
from gzcli.data.readers.dataset_folder import dataset_folder, is_dataset_folder
from gzcli.data.readers.folder import pictures
from gzcli.data.readers.kinds import Wanted, is_picture
from gzcli.data.readers.npz import npz
from gzcli.data.readers.raw_images import RawImages, Span
from gzcli.data.readers.walk import is_regular, read_regular


def open_path(path: Path, form: Form | None = None) -> RawImages:
    """The images at a path: folder, zip, tar, npz or dataset folder.

    path: the path.
    form: what the folders of pictures mean, and whether the images are only scored; None: the defaults.

    Raises UsageError or MissingError for what is not a set.
    """
    form = form or Form()
    if path.suffix.lower() == ".npz" and is_regular(path):
        images = npz(path)
    elif is_dataset_folder(path):
        images = dataset_folder(path)
    else:
        return _pictures(path, form)
    if form.layout and not form.foreign:
        raise UsageError(f"`{path}` has no folders of pictures", hint="leave `--layout` out")
    return images


def _pictures(path: Path, form: Form) -> RawImages:
    """Encoded pictures in a folder or an archive; `notes` count files of other kinds."""
    wanted = Wanted()
    alone = form.foreign and is_picture(path.name) and path.is_file()
    members: Members = Alone(path) if alone else open_members(path, wanted)
    archives = [kind for kind in (".tar", ".zip", ".npz") if kind in wanted.others]
    if archives and not any(map(is_picture, members.names)):
        hint = "give one of them; what lies in several, unpack into one folder"
        raise MissingError(f"`{path}` holds archives ({' '.join(archives)}) and no images", hint=hint)
    images = pictures(str(path), members, form)
    return replace(images, notes=[*images.notes, *wanted.notes])


class Alone:
    """A single picture that is scored, as the only member of a folder."""

    def __init__(self, path: Path):
        self.path = path
        self.names, self.notes = [path.name], list[str]()

    def read(self, some: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
        for name in self.names if some is None else some:
            yield name, read_regular(self.path)

    def spans(self) -> dict[str, Span]:
        path = self.path.absolute()
        return {self.path.name: Span(str(path), 0, path.stat().st_size, False)}
