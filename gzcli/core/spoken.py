"""Errors of the Python API: their hints name calls instead of commands."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from gzcli.core.errors import GzError

P = ParamSpec("P")
T = TypeVar("T")

FOREIGN = ("pip ", "hf ", "srun ", "docker ", "accelerate ", "cd ", "ulimit ")  # commands of other programs
# flag → keyword
NAMES = {"label": "labels", "in": "data", "train_missing": "league", "lr": "set", "score": "scores"}
NAMES |= {"map": "maps", "prompt": "prompts", "jobs": "at_once"}
# options of verbs that no call has → why
SHELL_ONLY = {
    "json": "a call returns values",
    "dry_run": "it prints a forecast for a person",
    "yes": "a call asks nothing",
    "wide": "a result has every metric",
    "columns": "a result has every metric",
    "report": "`gz report` reads the folder of a result",
    "submit": "a job script contains a command line",
    "slurm": "a job script contains a command line",
    "open": "a notebook displays images",
    "fail": "a script reads `flagged` and `unreadable`",
}
CALLS = ("train", "sample", "ood", "bench", "league", "which", "sweep")  # verbs with a function
LISTS = {"models": "gzcli.models()", "data": "gzcli.datasets()", "runs": "gzcli.runs()"}
_SET = re.compile(r"""--set '?([\w.]+)=((?:\[[^\]]*\])|"[^"]*"|[^\s`']+)'?(?:,? (?=--set))?""")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?:[ =]([\w./%-]+))?")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")


def spoken(call: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function of the Python API: the text of an error that it raises includes the hint, written
    as Python."""

    @wraps(call)
    def speaking(*words: P.args, **options: P.kwargs) -> T:
        try:
            return call(*words, **options)
        except GzError as e:
            hint = e.hint and in_python(e.hint)
            e.args = (f"{in_python(e.message)}\nhint: {hint}" if hint else in_python(e.message),)
            raise

    return speaking


def in_python(text: str) -> str:
    """A hint with calls and keywords instead of commands and flags: "gz train vae --data mnist" becomes
    `gzcli.train("vae", data="mnist")`, and `--set train.steps=9` becomes `set={"train.steps": 9}`."""
    if "`" not in text:
        return " · ".join(map(_code, text.split(" · "))) if text.startswith(("gz ", "--")) else text
    parts = text.split("`")
    return "`".join(_code(part) if i % 2 else part for i, part in enumerate(parts))


def _code(text: str) -> str:
    """A command or flags as code; any other text unchanged."""
    if text.startswith(FOREIGN):
        return text
    if text.startswith("gz "):
        return _call(text) or text
    return _keywords(text) if text.startswith("--") else text


def _keywords(text: str) -> str:
    if settings := _SET.findall(text):
        keys = ", ".join(f'"{key}": {literal(value)}' for key, value in settings)
        return (f"set={{{keys}}} " + _SET.sub("", text).strip()).strip()
    return _FLAG.sub(lambda match: _keyword(match[1], match[2]), text)


def _keyword(flag: str, value: str | None) -> str:
    name = flag.replace("-", "_")
    name = NAMES.get(name, name)
    return f"{name}={'…' if value is None else value if value.isupper() else literal(value)}"


def _call(command: str) -> str | None:
    """The Python call that is equivalent to a command of gz; None if there is none."""
    try:
        _, verb, *words = shlex.split(command)
    except ValueError:
        return None
    if verb == "list" or words[:1] == ["list"]:
        return LISTS.get("models" if verb == "list" and not words else words[0] if verb == "list" else verb)
    if verb not in CALLS or "…" in words or "--help" in words:
        return None
    names: list[str] = []
    options: dict[str, str] = {}
    settings: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.append(literal(word))
        elif word == "--set" and words:
            key, _, value = words.pop(0).partition("=")
            settings[key] = literal(value)
        else:
            name = word.strip("-").replace("-", "_")
            has_value = words and not words[0].startswith("-")
            options[NAMES.get(name, name)] = literal(words.pop(0)) if has_value else "True"
    if settings:
        options["set"] = "{" + ", ".join(f'"{key}": {value}' for key, value in settings.items()) + "}"
    if verb == "sample":
        model = {key: options.pop(key) for key in ("data",) if key in options}
        opened = ", ".join([*names, *(f"{key}={value}" for key, value in model.items())])
        return f"gzcli.load({opened}).sample({', '.join(f'{k}={v}' for k, v in options.items())})"
    if verb == "ood" and options.keys() & {"input", "export"}:
        verb, names = "alarm", [*(options.pop(name, "None") for name in ("data", "input")), *names]
    return f"gzcli.{verb}({', '.join([*names, *(f'{key}={value}' for key, value in options.items())])})"


def literal(text: str) -> Any:
    """A command-line value as a Python literal: `32`, `True`, `"mnist"`, `["hflip"]`."""
    if text in (constants := {"true": "True", "false": "False", "null": "None"}):
        return constants[text]
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        return text
    if text.startswith("[") and text.endswith("]"):
        return f"[{', '.join(literal(part.strip()) for part in text[1:-1].split(',') if part.strip())}]"
    return text if _NUMBER.fullmatch(text) else json.dumps(text, ensure_ascii=False)
