"""What several tests of the command line share."""

from __future__ import annotations

import sys

import pytest

from gzcli.cli import app


@pytest.fixture
def gz(monkeypatch, capsys):
    """gz("train", "vae") → (exit code, stdout, stderr) of a line that is typed so, in this process"""

    def typed(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gz", *words])
        code = app.run(list(words))
        return (code, *capsys.readouterr())

    return typed
