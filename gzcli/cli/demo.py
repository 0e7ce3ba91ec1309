"""`gz demo`: a page in the browser to play with trained models."""

from __future__ import annotations

import importlib.util
import signal
import time
from typing import Annotated

from gzcli.cli import out
from gzcli.cli.options import a_model_or_run, argument, option
from gzcli.core import signals
from gzcli.core.errors import MissingError, UsageError, install_line
from gzcli.core.hints import Option, advice

_RUNS_HELP = "Models or runs to choose from. Default: all runs and the pretrained models."
_Runs = Annotated[list[str] | None, argument("RUN", _RUNS_HELP, a_model_or_run)]
_PORT_HELP = "Server port. Default: the first free port from 7860."
_Port = Annotated[int | None, option("--port N", _PORT_HELP, min=1, max=65535)]
_SHARE_HELP = "Make the page public through Gradio, at a URL that contains a token."
_Share = Annotated[bool, option("--share", _SHARE_HELP)]
_NoBrowser = Annotated[bool, option("--no-browser", "Do not open the browser.")]


def demo(
    runs: _Runs = None, port: _Port = None, share: _Share = False, no_browser: _NoBrowser = False
) -> None:
    """Try trained models in the browser: draw, interpolate, fill in, judge images.

    Only this machine can reach the page, unless you pass `--share`.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingError("`gz demo` needs the package `gradio`", hint=install_line("gzcli[demo]"))
    from gzcli.launch.from_file import find_run

    named = [find_run(word) for word in runs or ()]
    out.info("starting …")
    from gzcli.demo.page import serve
    from gzcli.demo.studio import choices

    offered = choices(named)
    try:
        page, url = serve(offered, port=port, share=share, browser=not no_browser)
    except OSError as e:
        message = f"port {port} is in use" if port else "no port from 7860 to 7959 is free"
        raise UsageError(message, hint=advice("choose another port with {}", Option("port", "N"))) from e
    out.text(url)
    out.data({"url": url, "runs": [choice.name for choice in offered]})
    out.info("press Ctrl-C to stop the server")
    try:
        wait()
    except KeyboardInterrupt:
        page.close()


def wait() -> None:
    """Waits for Ctrl-C or another termination signal. All of them raise KeyboardInterrupt."""
    heard = signals.hear(signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    finally:
        signals.restore(heard)
