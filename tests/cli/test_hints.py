"""Hints are values: each one that the sources contain is a command of gz, and a call of Python that binds."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT

import gzcli
from gzcli.cli import app
from gzcli.core import hints
from gzcli.core.hints import Command, Option, advice, gz, setting

OF_MODELS = {"--size"}  # options of a verb that come from its model
DYNAMIC = "NAME"  # stands for a value that is known when the error is raised


def value_of(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return DYNAMIC


def commands_in_sources() -> Iterator[tuple[str, Command]]:
    """Each command of a hint, with its file and line."""
    for path in sorted((ROOT / "gzcli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "gz":
                verb, *names = map(value_of, node.args)
                options = {word.arg: value_of(word.value) for word in node.keywords if word.arg}
                options |= {"set": {"train.steps": 9}} if "set" in options else {}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", gz(str(verb), *names, **options)


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, part in getattr(command, "commands", {}).items():
        yield from verbs(part, (*path, name))
    yield " ".join(path), command


def test_each_command_has_its_verb_and_options():
    parsers = dict(verbs(app.build()))
    seen = list(commands_in_sources())
    assert len(seen) > 40
    for place, command in seen:
        parser = parsers.get(command.verb)
        assert parser is not None, f"{place}: there is no verb `{command.verb}`"
        options = OF_MODELS.union(option for param in parser.params for option in param.opts)
        for option in command.options:
            assert option.shell.split()[0] in options, f"{place}: `gz {command.verb}` lacks {option.shell}"
        arguments = [param for param in parser.params if param.param_type_name == "argument"]
        many = any(param.nargs == -1 for param in arguments) or parser.context_settings.get(
            "allow_extra_args"
        )
        assert many or len(command.names) <= len(arguments), f"{place}: too many names"


def bound(call: str) -> None:
    """Raises TypeError unless each call in a text of Python binds to the function that it names."""
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call), call
    names, options = [DYNAMIC] * len(node.args), {word.arg: DYNAMIC for word in node.keywords}
    function = ast.unparse(node.func)
    inspect.signature(getattr(gzcli, function.removeprefix("gzcli."))).bind(*names, **options)


def test_each_command_is_a_call_that_binds():
    for place, command in commands_in_sources():
        if command.python != command.shell:
            try:
                bound(command.python)
            except (TypeError, AttributeError) as error:
                pytest.fail(f"{place}: {command.python}: {error}")


@pytest.mark.parametrize(
    ("part", "shell", "python"),
    [
        (
            gz("train", "vae", data="my set", set={"train.steps": 9}, resume=True, name=None, n=0),
            "gz train vae --data 'my set' --set train.steps=9 --resume -n 0",
            'gzcli.train("vae", data="my set", set={"train.steps": 9}, resume=True, n=0)',
        ),
        (
            gz("sample", "vae", data="digits", n=4),
            "gz sample vae --data digits -n 4",
            'gzcli.sample("vae", data="digits", n=4)',
        ),
        (gz("list", "models", can="ood"), "gz list models --can ood", "gzcli.models()"),
        (gz("data list"), "gz data list", "gzcli.datasets()"),
        (gz("data download", "mnist"), "gz data download mnist", "gz data download mnist"),
        (
            gz("train", "fm", data="NAME|PATH"),
            "gz train fm --data NAME|PATH",
            'gzcli.train("fm", data="NAME|PATH")',
        ),
        (
            setting("model.conditional", True),
            "--set model.conditional=true",
            'set={"model.conditional": True}',
        ),
        (Option("fpr", "1%"), "--fpr 1%", 'fpr="1%"'),
    ],
)
def test_both_forms(part, shell, python):
    hint = advice(part)
    assert (hint, hint.python) == (shell, python)
    text = advice("try {}; {}", part, advice("or not"))
    assert (text, text.python) == (f"try `{shell}`; or not", f"try `{python}`; or not")


def test_an_error_of_another_process_has_both_forms():
    error = gzcli.core.errors.MissingError("no run", hint=gz("train", "vae", data="digits"))
    record = error.record
    again = hints.Hint(record["hint"], record["python"])
    assert (again, again.python) == ("gz train vae --data digits", 'gzcli.train("vae", data="digits")')
