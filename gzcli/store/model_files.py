"""Model files from outside the package: in the folders of `GZ_MODELS`, in installed packages, on the command
line, and as copies in runs. A model has the name of its file. This module imports none of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import traceback
from collections.abc import Container
from functools import cache
from pathlib import Path

from gzcli.core.errors import DamagedError, MissingError, UsageError, canonical, matching
from gzcli.core.hints import advice, gz
from gzcli.store.files import lock, read_json, write_atomic, write_json
from gzcli.store.paths import user_dir
from gzcli.store.run_folder import Run

GROUP = "gzcli.models"  # group of entry points: `maf = "my_package.maf"` gives the module of a model
TRUSTED = "trusted_models.json"  # file in the user's folder, with the sha256 of model files
_PAPER = re.compile(r"^[ \t]+paper\b[^=\n]*=", re.MULTILINE)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_typed: dict[str, Path] = {}  # model's name → file from the command line
_programs: dict[Path, bytes] = {}  # contents as they were when their trust was set or tested


def is_file(what: str) -> bool:
    return what.endswith(".py")


def add(file: str | Path) -> str:
    """Registers the model of a file in this process, with precedence over all others of its name. Returns the
    name. Raises MissingError if there is no such file, UsageError if its name is not a valid model name."""
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise MissingError(
            f"there is no model file `{file}`", hint=advice("create it with {}", gz("model new", path.stem))
        )
    if not can_be_named(path.stem):
        hint = "name it with lower-case letters, digits and `_`, such as `maf.py`"
        raise UsageError(f"`{path.name}` is not a valid name for a model file", hint=hint)
    _typed[path.stem] = path
    return path.stem


def can_be_named(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def typed(name: str) -> Path | None:
    """The file from the command line that defines the model of this name; None if there is none."""
    return _typed.get(canonical(name))


def model_files() -> dict[str, Path]:
    """The outside model files by model name. The command line has precedence over `GZ_MODELS`, and
    `GZ_MODELS` over installed packages."""
    return {**_installed(), **_of_folders(os.environ.get("GZ_MODELS", "")), **_typed}


def find(name: str) -> Path | None:
    """The file of the outside model with this name (`-` and `_` are equivalent); None if there is none."""
    models = model_files()
    stem = matching(name, reversed(models))  # if several match, the last one counts
    return models[stem] if stem else None


def names_paper(text: str) -> bool:
    """Whether a class in this source text may declare a paper, as models do."""
    return bool(_PAPER.search(text))


def keep(run: Path, file: Path) -> dict[str, str]:
    """Copies a model's file into the run. Returns {name, file, sha256} for its `env.json`."""
    target = Run(run).programs_folder / file.name
    if file.resolve() != target.resolve():
        write_atomic(target, program(file))
    return {"name": file.stem, "file": str(file), "sha256": trust(target)}


def add_copies(run: Path) -> None:
    """Registers the run's copies of model files. Raises UsageError for one that is not trusted."""
    for path in sorted(Run(run).programs_folder.glob("*.py")):
        if path.is_file():
            add(_trusted(path))


def copy_of(run: Path, name: str) -> Path | None:
    """The run's copy of a model's file; None for a model of gz. Raises UsageError for an untrusted one."""
    path = Run(run).programs_folder / f"{canonical(name)}.py"
    return _trusted(path) if path.is_file() else None


def program(file: Path) -> bytes:
    """The content of a model's file at the time when its trust was checked."""
    content = _programs.get(file.absolute())
    return file.read_bytes() if content is None else content


def line_in(problem: BaseException, files: Container[Path]) -> tuple[Path, int] | None:
    """The innermost line of the traceback in one of these files, and its file; None if there is none."""
    frames = traceback.extract_tb(problem.__traceback__)
    lines = [(Path(x.filename), x.lineno) for x in frames if x.lineno and Path(x.filename) in files]
    return lines[-1] if lines else None


def place_of(problem: BaseException) -> str | None:
    """The innermost line of an outside model in the traceback, such as `maf.py:51`; None if there is none."""
    line = line_in(problem, _programs)
    return f"{line[0].name}:{line[1]}" if line else None


def trust(file: Path) -> str:
    """Records that the user trusts this file, having named it or trained with it. Returns its sha256."""
    digest = _read(file)
    with lock(user_dir(".trusted.lock")):
        trusted = _trusted_sums()
        if digest not in trusted:
            # because it decides what code is run
            write_json(user_dir(TRUSTED), [*trusted, digest], mode=0o600)
    return digest


def _trusted_sums() -> list[str]:
    """The sha256 of the files that the user trusts. Raises DamagedError."""
    path, hint = user_dir(TRUSTED), "remove it, then trust each file again by `gz model check FILE`"
    sums = read_json(path, hint) or []
    if isinstance(sums, list):
        return sums
    raise DamagedError(f"`{path}` is damaged: it is not a list", hint=hint)


def _read(file: Path) -> str:
    """Returns the sha256 of a file, and keeps its content for `program`."""
    content = _programs[file.absolute()] = file.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _trusted(file: Path) -> Path:
    """The file, if it is trusted. Raises UsageError for an untrusted file that came with a run from
    elsewhere."""
    if _read(file) not in _trusted_sums():
        message = f"this run includes a model file, `{file}`, which gz does not run until you trust it"
        hint = advice("read it, then trust it by running {}", gz("model check", file))
        raise UsageError(message, hint=hint)
    return file


@cache
def _of_folders(folders: str) -> dict[str, Path]:
    """The models in the folders of `GZ_MODELS`. Raises MissingError for a missing folder."""
    paths: list[Path] = []
    for entry in filter(None, folders.split(os.pathsep)):
        folder = Path(entry).expanduser()
        if not folder.is_dir():
            raise MissingError(f"`GZ_MODELS` contains `{entry}`, which is not a folder")
        paths += [path.absolute() for path in sorted(folder.glob("*.py")) if path.is_file()]
    return {path.stem: path for path in paths if names_paper(path.read_text("utf-8", "replace"))}


@cache
def _installed() -> dict[str, Path]:
    """The models of installed packages, found by entry points; missing files are skipped."""
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    models: dict[str, Path] = {}
    for point in entry_points(group=GROUP):
        module = point.value.partition(":")[0]
        place = str(point.dist.locate_file(module.replace(".", "/") + ".py")) if point.dist else ""
        if not Path(place).is_file():  # an editable installation
            with contextlib.suppress(ImportError):
                place = ((spec := find_spec(module)) and spec.origin) or ""
        if (path := Path(place)).is_file():
            models[path.stem] = path
    return models
