"""The Typer application: all verbs by name, and the place where an exception becomes a message and a code."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from gzcli.cli import completion, model_options, out
from gzcli.cli.options import Json
from gzcli.core import streams
from gzcli.core.errors import GzError, Interrupted, UsageError, system_error
from gzcli.version import __version__

_EXAMPLES = "gz train vae\n\ngz ood ddpm --in mnist --out fashionmnist"
_MODELS, _STORE = "Models", "Recipes, runs, data"

# Verb → its help panel. The module of the same name in this package holds `app`, a group of commands, or a
# function of the verb's name.
VERBS = {
    "train": _MODELS,
    "sample": _MODELS,
    "ood": _MODELS,
    "bench": _MODELS,
    "report": _MODELS,
    "show": _MODELS,
    "demo": _MODELS,
    "list": _STORE,
    "model": _MODELS,
    "recipe": _STORE,
    "runs": _STORE,
    "data": _STORE,
    "doctor": _STORE,
}


def build(words: list[str]) -> typer.Typer:
    """The application for a command line. It holds only the verb that the line begins with, which starts
    faster, and no verb where the version is asked for; else all."""
    app = typer.Typer(
        name="gz",
        help="Train, sample, score and compare image generative models.",
        epilog=_EXAMPLES,
        callback=root,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    first = next((word for word in words if not word.startswith("-")), None)
    named = [first] if first in VERBS else VERBS
    for verb in [] if first is None and {"--version", "-V"} & set(words) else named:
        module = import_module(f"gzcli.cli.{verb}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb, rich_help_panel=VERBS[verb])
        else:
            function = getattr(module, f"{verb}_", None) or getattr(module, verb)
            settings = getattr(module, "SETTINGS", None)
            app.command(verb, rich_help_panel=VERBS[verb], context_settings=settings)(function)
    return app


def _version(ctx: typer.Context, value: bool) -> None:
    if value:
        out.configure(json="--json" in (ctx.obj or ()) or None)  # it may follow `--version`
        out.text(f"gz {__version__}")
        out.data({"version": __version__})
        raise typer.Exit()


def _llm(ctx: typer.Context, value: bool) -> None:
    if value:
        from gzcli.docs.manual import manual

        out.configure(json="--json" in (ctx.obj or ()) or None)
        text = manual(build([]))
        out.text(text)
        out.data({"manual": text})
        raise typer.Exit()


def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    llm: Annotated[
        bool, typer.Option("--llm", callback=_llm, is_eager=True, help="Print the whole manual as one text.")
    ] = False,
    json: Json = False,
) -> None:
    if ctx.invoked_subcommand is None:
        out.text(ctx.get_help())
        out.data({"version": __version__, "verbs": list(VERBS)})


def run(argv: list[str]) -> int:
    """Runs one command line and returns its exit code; never raises."""
    streams.hold_open()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show becomes `?`
            stream.reconfigure(errors="replace")
    out.configure(json=False, quiet=False, lenient=False, lost=False)
    program = Path(sys.argv[0]).name
    program = program if program in ("gz", "gzcli") else "gz"
    what, _, shell = os.environ.get(f"_{program.upper()}_COMPLETE", "").partition("_")
    if what == "complete" and shell in completion.FILES:
        return completion.answer(shell, build)
    try:
        if zero := next((word for word in argv if "\0" in word), None):
            raise UsageError(f"`{zero}` holds a zero byte, which no name and no path can")
        code = build(argv)(args=argv, prog_name=program, standalone_mode=False, obj=argv)
        if code == 130:  # Typer's answer to Ctrl-C
            raise KeyboardInterrupt
        if {"--help", "-h"} & set(argv) and not code:
            model_options.show_help(argv)
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # Typer and rich say 1 where `head` has read enough
            return out.UNREAD
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        return out.UNREAD
    except BaseException as problem:
        return _fail(problem, argv)


def _fail(problem: BaseException, argv: list[str]) -> int:
    """Reports an exception; returns the exit code."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    if "--json" in words:  # Typer may have stopped before it parsed the option
        out.configure(json=True)
    if os.environ.get("GZ_DEBUG"):
        out.trace(problem)
    error = as_error(problem)
    out.error(error)
    return error.code


def as_error(problem: BaseException) -> GzError:
    """The error that is shown to the user for an exception."""
    if isinstance(problem, GzError):
        return problem
    if isinstance(problem, (KeyboardInterrupt, typer.Abort)):
        return Interrupted("interrupted", signum=2)
    if hasattr(problem, "format_message"):  # Typer's own: an unknown option, a missing argument
        return _usage(problem)
    if error := system_error(problem):
        return error
    text = " ".join(str(problem).split())
    return GzError(
        f"{type(problem).__name__}: {text}" if text else type(problem).__name__,
        hint="this is a bug in gz: set `GZ_DEBUG=1` to see where, and report it",
    )


_PHRASES = {  # Typer's words → those of the messages about recipes, as `must be 1 or more`
    r"Input should be ": "must be ",
    r"must be a valid integer.*": "must be an integer",
    r"must be a valid number.*": "must be a number",
    r"must be greater than or equal to (\S+)": r"must be \1 or more",
    r"must be less than or equal to (\S+)": r"must be \1 or less",
    r"^No such option: (\S+)": r"no such option `\1`",
}


def _usage(problem: Any) -> UsageError:
    """Typer's message in gz's style: no capital, no full stop, backticks, the suggestion as the hint."""
    near = getattr(problem, "possibilities", None)
    message = problem.message if near else problem.format_message()
    message, _, suggestion = message.partition(" Did you mean ")
    message = re.sub(r"'([^']*)'", r"`\1`", message).rstrip(". ")
    for pattern, ours in _PHRASES.items():
        message = re.sub(pattern, ours, message)
    context = getattr(problem, "ctx", None)
    if near or suggestion:
        options = " or ".join(f"`{option}`" for option in near or re.findall(r"'([^']*)'", suggestion))
        hint = f"did you mean {options}?"
    else:
        hint = f"`{context.command_path if context else 'gz'} --help` shows what it takes"
    return UsageError(message[:1].lower() + message[1:], hint=hint)
