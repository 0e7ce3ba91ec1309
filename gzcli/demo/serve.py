"""The server of `gz demo`: on this machine alone, and without a request to any other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

# read when gradio is imported: no news of versions, no telemetry
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gzcli.demo.choices import Choice
from gzcli.demo.page import CSS, page
from gzcli.demo.studio import Studio

# What the browser may load: from here alone, whatever gradio's own page asks for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob: ws: wss:"
)


class OnlyFromHere:
    """Adds POLICY to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(
    choices: Sequence[Choice], *, port: int | None = None, share: bool = False, browser: bool = False
) -> tuple[gr.Blocks, str]:
    """Starts the server in a thread. Returns the page, whose `close` ends it, and its address.

    choices: what can be chosen; the first is on the page.
    port: None: the first free one from 7860 on.
    share: whether Gradio makes it reachable from elsewhere, by a tunnel.
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
    _, local, public = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=share,
        inbrowser=browser,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
        allowed_paths=[str(studio.folder)],
        app_kwargs={"middleware": [Middleware(OnlyFromHere)], "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(font=system, font_mono=mono),
        css=CSS,
    )
    return blocks, public or local
