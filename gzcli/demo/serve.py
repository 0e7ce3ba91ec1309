"""The server of `gz demo`: on this machine alone, and without a request to any other."""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import os
import secrets
import sys
import webbrowser
from collections.abc import Sequence
from typing import Any

# Read when gradio is imported. What is set for other pages of gradio is left out: folders that they may
# serve, origins that they trust. No news of versions, no telemetry.
for _name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[_name]
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

import gradio as gr
from starlette.middleware import Middleware

from gzcli.demo.choices import Choice
from gzcli.demo.guard import LARGEST_FILE, Guard
from gzcli.demo.page import CSS, page
from gzcli.demo.studio import Studio


def serve(
    choices: Sequence[Choice], *, port: int | None = None, share: bool = False, browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Starts the server in a thread. Returns the page, whose `close` ends it, and its address.

    choices: what can be chosen.
    port: None: the first free one from 7860 on.
    share: whether Gradio makes it reachable from elsewhere, by a tunnel. The address then holds a token,
      without which nothing is answered.
    browser: whether it is opened in the browser.

    Raises OSError where the port is taken.
    """
    studio = Studio()
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / "gradio")  # pictures that are dropped go with it too
    gr.set_static_paths(studio.shown)  # served as they are, without a copy
    system: Any = ["system-ui", "sans-serif"]  # names of fonts of the machine: none is fetched
    mono: Any = ["ui-monospace", "monospace"]
    blocks = page(studio, choices)
    blocks.queue(default_concurrency_limit=1)
    token, addresses = secrets.token_urlsafe(32) if share else None, set[str]()
    guard = Middleware(Guard, addresses=addresses, token=token)
    with contextlib.redirect_stdout(sys.stderr):  # what gradio says of its tunnel is no data
        _, local, public = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
            footer_links=[],
            allowed_paths=[str(studio.folder)],
            max_file_size=LARGEST_FILE,
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
            theme=gr.themes.Default(font=system, font_mono=mono),
            css=CSS,
        )
    blocks.share = False  # else the page takes its scripts from a server of Gradio's
    if public:
        addresses.add(public.rstrip("/"))
    url = (public or local) + (f"?token={token}" if token else "")
    if browser:
        webbrowser.open(url)
    return blocks, url
