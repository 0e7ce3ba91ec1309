"""`gz doctor`: reports what this machine has, what is missing, and how to fix it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from gzcli.cli import out
from gzcli.cli.jobs import bytes_of
from gzcli.core import streams
from gzcli.core.errors import MissingError, install_line, redacted
from gzcli.core.trackers import TRACKERS
from gzcli.store.claims import check_writable
from gzcli.store.files import nearest_place
from gzcli.store.hub import INCEPTION, hub_home
from gzcli.store.paths import cache_dir, recipe_names, recipes_dir, user_dir
from gzcli.version import __version__

_COLOURS = {"ok": "cyan", "note": "yellow", "bad": "red"}
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW")
_OPTIONAL = {  # package → what needs it
    "torch-fidelity": "FID, KID and Inception Score",
    "diffusers": "Stable Diffusion models",
    "peft": "LoRA models",
    "lpips": "perceptual scores",
    "mamba-ssm": "fast state-space scans on a GPU",
}


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: str  # ok, note (gz works without it) or bad (gz cannot work)
    detail: str
    hint: str | None = None


def doctor() -> None:
    """Check this machine: devices, folders, settings, packages."""
    checks = [*software(), *devices(), *folders(), *settings(), *optional()]
    width = max(len(check.name) for check in checks)
    room, indent = out.room(sys.stdout) or 10_000, " " * (len("ok    ") + width + 2)
    for check in checks:
        state = out.style(f"{check.state:<4}", _COLOURS[check.state], sys.stdout)
        first, *more = out.wrapped(check.detail, indent, room)
        more += out.wrapped(check.hint, f"{indent}hint: ", room) if check.hint else []
        out.text("\n".join([f"{state}  {check.name:<{width}}  {first.strip()}", *more]))
    bad = [f"`{check.name}`" for check in checks if check.state == "bad"]
    out.data({"ok": not bad, "checks": [check._asdict() for check in checks]})
    if bad:
        if not out.is_json():
            out.error(MissingError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}"))
        raise SystemExit(MissingError.code)


def software() -> Iterator[Check]:
    """Versions of Python, gz and the packages that every verb needs."""
    yield Check("gz", "ok", __version__)
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "torchvision", "accelerate"):
        number = _version(package)
        missing = Check(package, "bad", "missing", install_line(package))
        yield Check(package, "ok", number) if number else missing


def devices() -> Iterator[Check]:
    """The GPUs that torch can use, and the CPU."""
    from gzcli.core.devices import INSTALL_HINT, titles, tried
    from gzcli.store.rates import speed_title

    try:
        with streams.spinner("loading torch", shown=out.mode() == "human"):
            import torch  # noqa: F401
    except Exception as problem:  # a broken installation may raise anything
        fix = "reinstall torch (see pytorch.org)"
        yield Check("devices", "bad", f"torch cannot be imported: {problem}", fix)
        return
    gpus_here = tried()
    *gpus, cpu = titles(gpus_here)
    yield from (Check(name, "ok", text) for name, text in gpus)
    if gpus_here.lack:
        yield Check("gpu", "bad", gpus_here.lack, INSTALL_HINT.partition(";")[0])
    elif not gpus:
        yield Check("gpu", "note", "none: gz trains on the CPU")
    yield Check(cpu[0], "ok", f"{cpu[1]}, {speed_title()}")


def folders() -> Iterator[Check]:
    """Whether the folders of gz are writable and have free space, and whether the recipes are there."""
    for name, folder in (("cache", cache_dir()), ("runs", user_dir("runs"))):
        try:
            check_writable(folder)
            free = shutil.disk_usage(nearest_place(folder)).free / 1e9
        except OSError:
            fix = "set `GZ_HOME` to a writable folder"
            yield Check(name, "bad", f"{folder} is not writable", fix)
            continue
        if free < 1:
            fix = "set `GZ_HOME` to a folder on a larger disk"
            yield Check(name, "note", f"{folder}, only {free:.1f} GB free", fix)
        else:
            yield Check(name, "ok", f"{folder}, {free:,.0f} GB free")
    kernels = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache_dir("kernels"))
    code = f"{bytes_of(kernels)} of compiled code, which you can remove"
    yield Check(
        "kernels", "ok", f"{kernels}, {code if kernels.is_dir() else 'empty: nothing has been compiled yet'}"
    )
    detail = f"{len(recipe_names())} in {recipes_dir()}"
    missing = Check("recipes", "bad", detail, "reinstall gz")
    yield Check("recipes", "ok", detail) if recipe_names() else missing


def settings() -> Iterator[Check]:
    """The user's `GZ_…` variables without secrets, whether the mirror can be read, and accelerate's
    configuration file."""
    for name in sorted(name for name in os.environ if name.startswith("GZ_")):
        yield Check(name, "ok", "set" if _SECRET.search(name) else redacted(os.environ[name]))
    if mirror := os.environ.get("GZ_MIRROR"):
        problem = unreachable(mirror)
        wrong = Check("mirror", "bad", problem or "", "correct or unset `GZ_MIRROR`")
        yield wrong if problem else Check("mirror", "ok", "reachable")
    config = hub_home() / "accelerate" / "default_config.yaml"
    if config.exists():
        yield Check("accelerate", "ok", f"{config} exists, but gz ignores it and uses its own")


def unreachable(mirror: str) -> str | None:
    """Why a mirror (a folder or base URL) cannot be read; None if it can."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import url2pathname, urlopen

    from gzcli.data.download.http import request

    try:
        parts = urlsplit(mirror)
        if parts.scheme in ("", "file"):
            folder = Path(url2pathname(parts.path) if parts.scheme else mirror).expanduser()
            return None if folder.is_dir() else f"there is no folder {folder}"
        with urlopen(request(mirror, "HEAD"), timeout=3):
            return None
    except HTTPError:  # the server answers; it need not list its folders
        return None
    except (OSError, ValueError, HTTPException) as problem:
        return redacted(f"not reachable: {problem}")


def optional() -> Iterator[Check]:
    """The packages and weights that some models or metrics need."""
    for package, purpose in _OPTIONAL.items():
        number = _version(package)
        yield Check(package, "ok" if number else "note", number or f"missing: {purpose} need it")
    for package in TRACKERS:
        if number := _version(package):
            yield Check(package, "ok", f"{number}, `gz train … --track {package}`")
    file = cache_dir("weights", INCEPTION)
    missing = Check("inception", "note", f"missing: FID, KID and IS need `{file}`")
    yield Check("inception", "ok", str(file)) if file.exists() else missing


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
