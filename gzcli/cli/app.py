"""The Typer application: all verbs by name, and the conversion of exceptions into messages and exit codes."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from gzcli.cli import out
from gzcli.cli.options import PROGRAMS, SHELLS, Json, meant, option, switch
from gzcli.core import streams
from gzcli.core.errors import (
    GzError,
    Interrupted,
    MissingError,
    UsageError,
    choose,
    did_you_mean,
    system_error,
)
from gzcli.version import __version__

_EXAMPLES = "gz train vae\n\ngz ood ddpm --in mnist --out fashionmnist"
_MODELS, _STORE = "Models", "Recipes, runs, data"

SHARED_MODULES = {"show": "list"}  # verbs in the module of another one
# Verb → its help panel, and its line there. The module of the same name in this package, or that of `WITH`,
# holds `app`, a group of commands, or a function of the verb's name.
VERBS = {
    "train": (_MODELS, "Train a model."),
    "sample": (_MODELS, "Draw images from a trained model, or apply it to images (`--do`)."),
    "ood": (
        _MODELS,
        "Score data sets or single images for out-of-distribution detection.",
    ),
    "bench": (_MODELS, "Compare models, or images from elsewhere, with real images."),
    "league": (_MODELS, "Train models for equal times on a data set, and rank them."),
    "sweep": (_MODELS, "Tune a model's settings within a time budget, by validation."),
    "which": (_MODELS, "Find the model that suits a data set, by racing models on it."),
    "report": (
        _MODELS,
        "Write the results of `gz bench` or `gz ood` as HTML, Markdown and LaTeX.",
    ),
    "show": (_MODELS, "Explain a model: its idea, equation, commands and limits."),
    "demo": (_MODELS, "Try trained models in the browser: draw, interpolate, fill in, judge images."),
    "list": (_STORE, "List models, data sets, recipes or runs."),
    "doctor": (_STORE, "Check this machine: devices, folders, settings, packages."),
    "model": (_MODELS, "Create a model file, and check it."),
    "recipe": (_STORE, "Show, copy and check recipes, and print their schema for editors."),
    "runs": (_STORE, "List, show, compare, share, export and remove runs."),
    "data": (_STORE, "Download, import and check data sets."),
}

# Other programs' words: of a verb as the first word, and of options anywhere.
FOREIGN_VERBS = {"generate": "sample", "fit": "train", "evaluate": "bench"}
VERB_LINES = dict.fromkeys(("resume", "continue"), "gz train {} --resume")  # words for which gz has an option
DELETING_COMMANDS = ("remove", "prune")  # commands that delete files
FOREIGN_OPTIONS = {"--task": "--do", "--max-steps": "--steps"}


def build(words: list[str] | None = None) -> Any:
    """The Typer application for a command line. It contains only the verb with which the line begins, or one
    line of help for every verb; without a line, all verbs in full."""
    app = typer.Typer(
        name="gz",
        help="Train, sample, score and compare image generative models.",
        epilog=_EXAMPLES,
        callback=root,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    first = next((word for word in words or () if not word.startswith("-")), None)
    whole = list(VERBS) if words is None else [verb for verb in VERBS if verb == first]
    for verb in whole or VERBS:
        panel, line = VERBS[verb]
        if not whole:
            app.command(verb, help=line, rich_help_panel=panel)(lambda: None)
            continue
        module = import_module(f"gzcli.cli.{SHARED_MODULES.get(verb, verb)}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb, help=line, rich_help_panel=panel)
        else:
            function = getattr(module, f"{verb}_", None) or getattr(module, verb)
            settings = getattr(module, "SETTINGS", None)
            app.command(verb, rich_help_panel=panel, context_settings=settings)(function)
    command = typer.main.get_command(app)
    carrier = typer.Typer(add_completion=False)
    carrier.command()(switch)
    switches = typer.main.get_command(carrier).params
    for param in switches:
        param.expose_value = False
    _add(switches, command)
    return command


def _add(switches: list[Any], command: Any, parent: typer.Context | None = None) -> None:
    """Adds the options that set a switch of `out` to the commands of a group; the verbs do not receive them.
    Removes the type of flags, `<bool>`, from the help. Joins the lines of each paragraph, because Typer wraps
    them at the width of the terminal."""
    context = typer.Context(command, parent=parent, **command.context_settings)
    for param in command.get_params(context):
        if getattr(param, "is_flag", False):
            param.metavar = ""
    for part in getattr(command, "commands", {}).values():
        part.params += switches
        paragraphs = inspect.cleandoc(part.help or "").split("\n\n")
        part.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
        _add(switches, part, context)


def _print(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> None:
    """Prints the output of an option such as `--version`, which ends the program."""
    if not value:
        return
    out.configure(json="--json" in (ctx.obj or ()) or None)  # it may follow the option
    if param.name == "version":
        out.text(f"gz {__version__}")
        out.data({"version": __version__})
    else:
        from gzcli.docs.page import overview, topics

        words = [word for word in ctx.obj or () if not word.startswith("-")]
        texts = topics(build()) if words else {}
        text = "\n\n".join(texts[choose("topic", word, texts)]() for word in words) if words else overview()
        out.text(text)
        out.data({"manual": text})
    raise typer.Exit()


Version = Annotated[bool, option("--version -V", "Print the version.", callback=_print, is_eager=True)]
_LLM = "Print an overview for language models, or the page on TOPIC."
Llm = Annotated[bool, option("--llm", _LLM, callback=_print, is_eager=True)]


def root(ctx: typer.Context, version: Version = False, llm: Llm = False, json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        out.text(ctx.get_help())
        out.data({"version": __version__, "verbs": list(VERBS)})


def in_own_words(argv: list[str]) -> list[str]:
    """A command line with gz's own names instead of synonyms for verbs and options, up to `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = []
    for word in argv[:end]:
        name, equals, value = word.partition("=")
        words.append(FOREIGN_OPTIONS.get(name, name) + equals + value)
    first = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
    if first is not None:
        words[first] = FOREIGN_VERBS.get(words[first], words[first])
    return [*words, *argv[end:]]


def run(argv: list[str]) -> int:
    """Runs one command line and returns its exit code; never raises."""
    streams.hold_open()
    argv = in_own_words(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show becomes `?`
            stream.reconfigure(errors="replace")
    out.configure(json=False, quiet=False, lenient=False, lost=False)
    program = Path(sys.argv[0]).name
    program = program if program in PROGRAMS else "gz"
    what, _, shell = os.environ.get(f"_{program.upper()}_COMPLETE", "").partition("_")
    if what == "complete" and shell in SHELLS:
        from gzcli.cli.completion import answer

        return answer(shell, build)
    try:
        if zero := next((word for word in argv if "\0" in word), None):
            raise UsageError(f"`{zero}` contains a null byte, which names and paths cannot contain")
        code = build(argv)(args=argv, prog_name=program, standalone_mode=False, obj=argv)
        if code == 130:  # Typer's answer to Ctrl-C
            raise KeyboardInterrupt
        if {"--help", "-h"} & set(argv) and not code:
            from gzcli.cli.model_options import show_help

            show_help(argv)
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        # Typer and rich exit with 1 when `head` has read enough
        if isinstance(stop.__context__, BrokenPipeError):
            return out.BROKEN_PIPE_CODE
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        return out.BROKEN_PIPE_CODE
    except BaseException as problem:
        words = argv[: argv.index("--")] if "--" in argv else argv
        out.configure(json="--json" in words or None)  # Typer may have stopped before it parsed the option
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
    words = [type(problem).__name__, " ".join(str(problem).split())]
    hint = "this is a bug in gz: set `GZ_DEBUG=1` for a traceback, and report it"
    return GzError(": ".join(filter(None, words)), hint=hint)


def meant_command(word: str, context: Any) -> str | None:
    """A hint at the command that an unknown word means: the line that does it, or a similar word."""
    group, words = context.command, context.obj or []
    if word in VERB_LINES and group.name != "data":
        names = [each for each in words[words.index(word) + 1 :] if not each.startswith("-")]
        return VERB_LINES[word].format(shlex.quote((names or ["RUN"])[0]))
    return did_you_mean(word, group.commands, risky=DELETING_COMMANDS)


_PHRASES = {  # Typer's words → those of the messages about recipes, such as `must be 1 or more`
    r"'([^']*)'": r"`\1`",
    r"Input should be ": "must be ",
    r"Value error, ": "",
    r"must be a valid integer.*": "must be an integer",
    r"must be a valid number.*": "must be a number",
    r"must be greater than or equal to (\S+)": r"must be \1 or more",
    r"must be less than or equal to (\S+)": r"must be \1 or less",
    r"^No such option: (\S+)": r"no such option `\1`",
    r"(?i)^invalid value for (.*): (?:path|file|directory) (.* does not exist)": r"\1: \2",
    r"^Got unexpected extra argument\S* \((\S+).*\)": r"unexpected argument `\1`",
}


def _usage(problem: Any) -> GzError:
    """Typer's message in the style of gz: lower case, no full stop, backticks, and the suggestion as the
    hint."""
    context, option = getattr(problem, "ctx", None), getattr(problem, "option_name", None)
    text = problem.message if option else problem.format_message()
    message = text.partition(" Did you mean ")[0].rstrip(". ")
    for pattern, ours in _PHRASES.items():
        message = re.sub(pattern, ours, message)
    hint = meant(option, context.command) if option and context else None
    if context and (unknown := re.match(r"No such command '([^']*)'", text)):
        hint = meant_command(unknown[1], context)
    hint = hint or f"`{context.command_path if context else 'gz'} --help` shows its arguments and options"
    kind = MissingError if message.endswith("does not exist") else UsageError
    return kind(message[:1].lower() + message[1:], hint=hint)
