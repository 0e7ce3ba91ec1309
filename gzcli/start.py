"""`python …/gzcli/start.py MODULE …` is `python -m MODULE …` without the working folder on `sys.path`.

A user's folder may hold a `random.py`; with `-m` and `-c` Python would run it in place of its own.
`PYTHONSAFEPATH`, which says the same to every process further down, is known from Python 3.11 on only. This
file is run as a script, and names no other module before `sys.path` is in order.

accelerate's launcher, started so, is deaf to what asks it to end: it would leave its processes behind or cut
their checkpoint off. It writes the stop file of the run instead, which they read. It ends with the code of
the process that failed.
"""

import os  # already imported by `site`, like `sys`
import sys

LAUNCHER = "accelerate.commands.launch"
SCRIPT = os.path.abspath(__file__)


def clean_path() -> None:
    """Takes this script's own folder off `sys.path`, where Python has put it."""
    own = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != own]


def safe_children() -> None:
    """Python processes that this one starts, worker processes included, get no working folder on their
    `sys.path`.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.version_info < (3, 11):
        from multiprocessing import util

        flags = (
            util._args_from_interpreter_flags
        )  # of spawned processes, of the fork server and of the resource tracker
        if getattr(flags, "__name__", "") != "isolated":

            def isolated() -> list[str]:
                return [*flags(), "-I"]  # their `sys.path` comes from this process

            util._args_from_interpreter_flags = isolated


def launch(words: list[str]) -> int:
    """Runs accelerate's launcher on `words`, whose last is the folder of a run. Returns its exit code, 128 +
    N for signal N.
    """
    import runpy
    import signal
    import subprocess
    from pathlib import Path

    from gzcli import signals
    from gzcli.store import files

    folder = Path(words[-1])

    def stop(signum: int, frame: object) -> None:
        files.write_atomic(folder / "stop", str(signum))

    trains = not (folder / "job.json").exists()  # a job has nothing to save
    heard, register = signals.hear(stop) if trains else {}, signal.signal
    # torch's launcher would put its own in their place, which end the processes after 30 seconds, saved or
    # not
    signal.signal = lambda signum, handler: None if signum in heard else register(signum, handler)
    try:
        runpy.run_module(LAUNCHER, run_name="__main__", alter_sys=True)
    except subprocess.CalledProcessError as e:
        return _code(e.returncode)
    except Exception as e:  # torch's ChildFailedError, by its form: its module is heavy
        if not (failures := getattr(e, "failures", None)):
            raise
        codes = [failure.exitcode for failure in failures.values()]
        return _code(
            min(codes)
        )  # a signal is negative, and tells more than the 1 of a rank that lost its partner
    return 0


def _code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def main() -> None:
    clean_path()
    safe_children()
    from gzcli import streams

    streams.tolerate()
    sys.argv = sys.argv[1:]
    module, *words = sys.argv
    if module == LAUNCHER:
        sys.exit(launch(words))
    import runpy

    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
