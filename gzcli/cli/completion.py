"""Shell completion: the answer to a TAB, and the scripts in `completions/`, which `python -m
gzcli.cli.completion [DIR]` writes. The scripts are Typer's, but the answer is not. Typer parses the words
before the cursor with pydantic, whose import takes most of the time allowed for a TAB."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from gzcli.cli import model_options, out
from gzcli.cli.options import PROGRAMS, SHELLS, names

# --- the answer ---


def answer(shell: str, build: Callable[[list[str]], Any]) -> int:
    """Prints the completions of the command line as a shell's script expects them; returns the exit code."""
    out.configure(lenient=True)
    try:
        words, incomplete, before = _typed(shell)
        items = candidates(build(words), words, before + incomplete)
        # a help in one line, without control characters
        items = [
            (value[len(before) :], "".join(char if char.isprintable() else " " for char in help))
            for value, help in items
            if value.isprintable()
        ]
    except Exception:  # a damaged run or recipe must not write into the command line that is being typed
        if os.environ.get("GZ_DEBUG"):
            raise
        items = []
    if os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return 0 if items else 1  # with 1, fish completes file names
    if shell == "zsh":
        out.text(_for_zsh(items) if items else "_files")
    elif items and shell == "fish":
        out.text("\n".join(f"{value}\t{help}" if help else value for value, help in items))
    elif items:  # each quoted as one word of bash
        out.text("\n".join(re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", value) for value, _ in items))
    return 0


def candidates(command: Any, words: list[str], incomplete: str) -> list[tuple[str, str]]:
    """(word, help) for everything that completes `incomplete` after these words of a Typer command."""
    context = typer.Context(command, resilient_parsing=True)
    options = {name: p for p in command.params if p.param_type_name == "option" for name in p.opts}
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    waiting = None  # the option whose value comes next
    model_option = ""  # the same for an option of the model, which Typer does not know
    for i, word in enumerate(words):
        if waiting:
            context.params[waiting.name], waiting = word, None
        elif word == "--":
            return []
        elif model_option and not word.startswith("-"):
            model_option = ""
        elif word.startswith("-"):
            option = options.get(word)
            waiting = option if option and not option.is_flag else None
            model_option = word if option is None and "=" not in word and not model_option else ""
        elif hasattr(command, "commands"):
            part = command.commands.get(word)
            return candidates(part, words[i + 1 :], incomplete) if part else []
        elif arguments:
            context.params[arguments[0].name] = word
            if arguments[0].nargs != -1:
                arguments.pop(0)
    before = ""
    if incomplete.startswith("--") and "=" in incomplete:
        name, _, incomplete = incomplete.partition("=")
        waiting, before = options.get(name), f"{name}="
        model_option = name if waiting is None else ""
    verb, typed = str(command.name), context.params
    if model_option:
        values = model_options.complete_value(verb, typed, model_option, incomplete)
        return [(before + value, "") for value in names(incomplete, values)]
    argument = arguments[0] if arguments else None
    source = waiting or (command if incomplete.startswith("-") or hasattr(command, "commands") else argument)
    items = source.shell_complete(context, incomplete) if source else []
    completions = [(before + item.value, item.help or "") for item in items if item.type == "plain"]
    if incomplete.startswith("-") and not waiting:
        helps = model_options.complete_option(verb, typed)
        completions += [(word, helps.get(word.replace("_", "-"), "")) for word in names(incomplete, helps)]
    return completions


def _typed(shell: str) -> tuple[list[str], str, str]:
    """The complete words after the program's name, the word under the cursor, and the part of it that the
    shell treats as a word. Bash splits `--data=m` and `model.depth=4` into three words each."""
    line = os.environ.get("COMP_WORDS" if shell == "bash" else "_TYPER_COMPLETE_ARGS", "")
    try:
        words = shlex.split(line)
    except ValueError:  # a quote is still open
        words = line.split()
    if shell == "bash":
        at = int(os.environ.get("COMP_CWORD", len(words)))
        words, under = words[:at], "".join(words[at : at + 1])
        incomplete = "" if under == "=" else under
        whole = _joined([*words[1:], *(["="] if under == "=" else []), incomplete])
        last = whole.pop()
        return whole, incomplete, last[: len(last) - len(incomplete)]
    incomplete = words.pop() if words and not line.endswith(" ") else ""
    return words[1:], incomplete, ""


def _joined(words: list[str]) -> list[str]:
    """The typed words, rejoined from those of bash, which splits at `=`. An option and its value remain two
    words."""
    whole: list[str] = []
    for i, word in enumerate(words):
        if word == "=":
            if whole and not whole[-1].startswith("-"):
                whole[-1] += "="
        elif i and words[i - 1] == "=" and whole and whole[-1].endswith("="):
            whole[-1] += word
        else:
            whole.append(word)
    return whole


def _for_zsh(items: list[tuple[str, str]]) -> str:
    """The words that the zsh script evaluates. Values and help texts may come from someone else. All ASCII
    characters except letters and digits are therefore escaped as numbers, so that nothing is run as a command
    under any shell option."""

    def as_number(match: re.Match[str]) -> str:
        """A character escaped for `$'…'`. Characters beyond ASCII have no special meaning in a shell."""
        return f"\\x{ord(match[0]):02x}" if match[0].isascii() else match[0]

    lines = []
    for value, help in items:
        head = re.sub(r"[\\:]", r"\\\g<0>", value)
        quoted = re.sub("[^a-zA-Z0-9]", as_number, f"{head}:{help}" if help else head)
        lines.append(f"$'{quoted}'")
    return f"local -a lines; lines=({' '.join(lines)}); _describe '' lines"


# --- the scripts ---


def script(shell: str) -> str:
    """The completion script of one shell, for both names of the program."""
    from typer.completion import get_completion_script

    parts = [
        get_completion_script(prog_name=name, complete_var=f"_{name.upper()}_COMPLETE", shell=shell)
        for name in PROGRAMS
    ]
    if shell == "zsh":
        # at the first TAB, zsh loads the file and runs it as the completer, so it has to answer that TAB too
        bodies = [part.partition("\n")[2].strip() for part in parts]
        first = 'if [[ $funcstack[1] == _gz ]]; then "_${words[1]:t}_completion"; fi'
        parts = [f"#compdef {' '.join(PROGRAMS)}", *bodies, first]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "completions")
    folder.mkdir(parents=True, exist_ok=True)
    for shell, name in SHELLS.items():
        (folder / name).write_text(script(shell), encoding="utf-8")
        out.text(str(folder / name))
