"""Values of a recipe from the command line: `--set a.b=v`, and flags such as `--steps`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gzcli.core.errors import UsageError
from gzcli.recipe.load import Key, Problem, read_text

# Flags with another name than the last part of their key.
_FLAGS = {
    "data.name": "--data",
    "launch.machines": "--num-machines",
    "launch.main_ip": "--main-process-ip",
    "launch.main_port": "--main-process-port",
}


@dataclass(frozen=True)
class Override:
    """Values from one flag.

    tree: the values.
    origin: the flag as it is shown beside a value: `--set`, `--steps`.
    where: the flag as messages name it.
    """

    tree: dict[str, Any]
    origin: str
    where: str


def parse_set(text: str) -> tuple[Override | None, list[Problem]]:
    """`train.steps=100` as a part of a recipe; the value is YAML 1.2, in which `no` is a word and `1e-4` a
    number."""
    name, equals, value = text.partition("=")
    keys, where = tuple(part.strip() for part in name.split(".")), f"`--set {text}`"
    if not equals or not all(keys):
        return None, [Problem(where, "not of the form `a.b=v`", "such as `--set train.steps=1000`")]
    try:
        document = read_text(value, where)
    except UsageError:
        return None, [Problem(where, f"`{value}` is not YAML", "quote it, such as `--set 'a.b=\"…\"'`")]
    problems = [Problem(where, problem.message, problem.hint) for problem in document.problems]
    return Override(_nested(keys, document.tree), "--set", where), problems


def flags_of(flags: Mapping[str, Any]) -> list[Override]:
    """`{"train.steps": 100}` as parts of a recipe; None stands for a flag that was not given."""
    parts = []
    for key, value in flags.items():
        flag = _FLAGS.get(key) or f"--{key.rpartition('.')[2].replace('_', '-')}"
        if value is not None:
            parts.append(Override(_nested(tuple(key.split(".")), value), flag, f"`{flag}`"))
    return parts


def _nested(keys: Key, value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value
