"""Hints as values: what to do next, which the shell and Python write differently."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# verb → the function of Python that does the same
PYTHON_CALLS = {
    verb: f"gzcli.{verb}" for verb in ("train", "sample", "ood", "bench", "which", "league", "sweep")
}
LIST_CALLS = {
    **dict.fromkeys(("list", "list models"), "gzcli.models()"),
    **dict.fromkeys(("data list", "list data"), "gzcli.datasets()"),
    **dict.fromkeys(("runs list", "list runs"), "gzcli.runs()"),
}
# flag → keyword, if they differ
KEYWORDS = {"in": "data", "jobs": "at_once", "label": "labels"}
KEYWORDS |= {"map": "maps", "prompt": "prompts", "score": "scores"}
# options of verbs that no call has → why
SHELL_ONLY = {
    "json": "a call returns values",
    "dry_run": "it prints a forecast for a person",
    "report": "`gz report` reads the folder of a result",
    "submit": "a job script contains a command line",
    "slurm": "a job script contains a command line",
    "yes": "a call asks nothing",
    "wide": "a result has every metric",
    "columns": "a result has every metric",
    "open": "a notebook displays images",
    "fail": "a script reads `flagged` and `unreadable`",
    **dict.fromkeys(
        ("num_machines", "machine_rank", "main_process_ip"), "each machine has a command of its own"
    ),
}
PLACEHOLDER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ|…[],")  # the letters of words such as `NAME|PATH`


@dataclass(frozen=True)
class Option:
    """An option of a command, `--fpr 1%` or `fpr="1%"`. True: a flag without a value. `set` has a mapping of
    keys of a recipe: `--set data.size=64` or `set={"data.size": 64}`."""

    name: str
    value: Any = True

    @property
    def shell(self) -> str:
        name = self.name.rstrip("_").replace("_", "-")
        flag = f"-{name}" if len(name) == 1 else f"--{name}"
        if name == "set":
            return " ".join(f"{flag} {word(f'{key}={plain(value)}')}" for key, value in self.value.items())
        return flag if self.value is True else f"{flag} {word(self.value)}"

    @property
    def keyword(self) -> str:
        name = self.name.rstrip("_").replace("-", "_")
        return KEYWORDS.get(name, name)

    @property
    def python(self) -> str:
        return f"{self.keyword}={literal(self.value)}"


@dataclass(frozen=True)
class Command:
    """A command of gz: a verb such as `data download`, arguments and options."""

    verb: str
    names: tuple[Any, ...]
    options: tuple[Option, ...]

    @property
    def shell(self) -> str:
        return " ".join(["gz", self.verb, *map(word, self.names), *(option.shell for option in self.options)])

    @property
    def python(self) -> str:
        """The equivalent call; the command itself if Python has none."""
        if any(option.name in SHELL_ONLY for option in self.options):
            return self.shell
        if listed := LIST_CALLS.get(" ".join([self.verb, *map(str, self.names)])):
            return listed
        if self.verb == "ood" and any(option.name in ("input", "export") for option in self.options):
            return self._alarm()
        call = PYTHON_CALLS.get(self.verb)
        return f"{call}({self._words(*self.names, *self.options)})" if call else self.shell

    def _alarm(self) -> str:
        """Python has a function of its own for single images."""
        images = {option.name: option.value for option in self.options if option.name in ("in_", "input")}
        rest = [option for option in self.options if option.name not in images]
        return f"gzcli.alarm({self._words(images.get('in_'), images.get('input'), *self.names, *rest)})"

    @staticmethod
    def _words(*words: Any) -> str:
        return ", ".join(each.python if isinstance(each, Option) else literal(each) for each in words)


class Hint(str):
    """What to do next, as the shell writes it. `python` is the same for Python."""

    python: str

    def __new__(cls, shell: str, python: str | None = None) -> Hint:
        hint = super().__new__(cls, shell)
        hint.python = shell if python is None else python
        return hint

    def mapped(self, change: Callable[[str], str]) -> Hint:
        """The hint with each of its texts changed."""
        return Hint(change(self), change(self.python))


HintPart = Command | Option | Hint


def gz(verb: str, *names: Any, **options: Any) -> Command:
    """The command `gz VERB NAMES --OPTIONS`. Options that are None, False or empty are absent."""
    absent = {key for key, value in options.items() if value is None or value is False or value == {}}
    return Command(verb, names, tuple(Option(*pair) for pair in options.items() if pair[0] not in absent))


def setting(key: str, value: Any) -> Option:
    """The option `--set` of a key of a recipe."""
    return Option("set", {key: value})


def advice(template: str | HintPart, *parts: HintPart) -> Hint:
    """The hint of a command or an option alone, or of a text whose `{}` are replaced by such parts."""
    if isinstance(template, Hint):
        return template
    if not isinstance(template, str):
        return Hint(template.shell, template.python)
    if not parts:
        return Hint(template)
    shell = (part if isinstance(part, Hint) else f"`{part.shell}`" for part in parts)
    python = (part.python if isinstance(part, Hint) else f"`{part.python}`" for part in parts)
    return Hint(template.format(*shell), template.format(*python))


def word(value: Any) -> str:
    """A value as one word of a shell; placeholders such as `NAME|PATH` are not quoted."""
    text = plain(value)
    return text if PLACEHOLDER.issuperset(text) else shlex.quote(text)


def plain(value: Any) -> str:
    """A value as an option or a recipe spells it: `true`, `null`, `1,2`."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(plain, value))
    return str(value) if not isinstance(value, bool) and value is not None else json.dumps(value)


def literal(value: Any) -> str:
    """A value as Python spells it: `True`, `"mnist"`, `["hflip"]`, `{"data.size": 64}`."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(key)}: {literal(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    plain_type = isinstance(value, (bool, int, float)) or value is None
    return repr(value) if plain_type else json.dumps(str(value), ensure_ascii=False)
