"""`python …/gzcli/store/start.py MODULE …` is `python -m MODULE …` without the working folder on `sys.path`.

A user's folder may contain a `random.py`, which Python would import instead of its own with `-m` and `-c`.
`PYTHONSAFEPATH`, which child processes inherit, works from Python 3.11 on only. This file is run as a script
and imports no other module before `sys.path` is cleaned.

accelerate's launcher gets other signal handlers here: its own would leave processes behind, or end them while
they write a checkpoint. The new handlers write the run's stop file, which the processes read. The exit code
is that of the process that failed.
"""

import os  # imported by `site` before this file runs, like `sys`
import sys

LAUNCHER = "accelerate.commands.launch"
ENGINE = "gzcli.engine"
SCRIPT = os.path.abspath(__file__)


def clean_path() -> None:
    """Removes the folder of this script from `sys.path`; Python adds it to the path of a script."""
    folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != folder]


def safe_children() -> None:
    """Keeps the working folder off the `sys.path` of Python child processes."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.version_info < (3, 11):
        from multiprocessing import util

        # the interpreter's flags for spawned processes, the fork server and the resource tracker
        flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]
        if getattr(flags, "__name__", "") != "isolated":

            def isolated() -> list[str]:
                return [*flags(), "-I"]  # this process hands its `sys.path` over to them

            util._args_from_interpreter_flags = isolated  # type: ignore[attr-defined]


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(words: list[str]) -> int:
    """Runs accelerate's launcher with this command line, which ends with the folder of a run. Returns the
    launcher's exit code, 128 + N for signal N."""
    import runpy
    import signal
    import subprocess
    from pathlib import Path
    from typing import Any

    from gzcli.core import signals
    from gzcli.store import files
    from gzcli.store.run_folder import Run

    run = Run(Path(words[-1]))

    def stop(signum: int, frame: object) -> None:
        files.write_atomic(run.stop_file, str(signum))

    trains = not run.job_file.exists()  # a job has no checkpoint to write
    heard, register = signals.hear(stop) if trains else {}, signal.signal

    def register_others(signalnum: int, handler: Any) -> Any:
        return None if signalnum in heard else register(signalnum, handler)

    # torch's launcher would replace the handlers by its own, which kill the processes after 30 seconds
    signal.signal = register_others
    try:
        runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)
    except subprocess.CalledProcessError as e:
        return _code(e.returncode)
    except Exception as e:  # torch's ChildFailedError, recognised by its attribute: its module is heavy
        if not (failures := getattr(e, "failures", None)):
            raise
        # a rank that lost its peer ends with 1, aborts, or is ended by the launcher
        rank, first = min(failures.items(), key=lambda failure: _cause(failure[1].exitcode))
        if first.exitcode < 0:
            run.update(lost={"rank": rank, "pid": first.pid})
        return _code(first.exitcode)
    return 0


def _cause(exitcode: int) -> int:
    """A sorting key for the exit codes of ranks. It is lower for a code that is more likely the cause of the
    failure than a consequence of another rank's end."""
    import signal

    consequences = (-signal.SIGABRT, -signal.SIGTERM)
    if exitcode in consequences:
        return 2 + consequences.index(exitcode)
    return 4 if exitcode >= 0 else 1 if exitcode == -9 else 0


def _code(returncode: int) -> int:
    """The exit code of a process, 128 + N if signal N ended it."""
    return 128 - returncode if returncode < 0 else returncode


def main() -> None:
    """Runs the module that the command line names."""
    clean_path()
    safe_children()
    from gzcli.core import streams

    streams.tolerate()
    sys.argv = sys.argv[1:]
    module, *words = sys.argv
    if module == LAUNCHER:
        sys.exit(launch(words))
    import runpy

    # the engine ends the spinner when it has loaded; other modules, ranks, scripts and quiet verbs show none
    shown = module == ENGINE and os.environ.get("GZ_OUTPUT") == "human"
    if shown and os.environ.get("RANK", "0") == "0":
        streams.start_spinner("loading torch")
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        streams.stop_spinner()


if __name__ == "__main__":
    main()
