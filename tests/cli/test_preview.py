"""Pictures in the terminal, read back from what each protocol sends; elsewhere a path."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from gzcli.cli import out
from gzcli.report import preview


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 8, (22, 30, 1)) * np.array([30, 12, 5])
    path = tmp_path / "a folder" / "grid.png"
    path.parent.mkdir()
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def terminal(monkeypatch):
    """terminal(COLORTERM="truecolor") makes stdout and stderr one that shows colour."""

    def pretend(**env: str) -> None:
        names = ("NO_COLOR", "CI", "TMUX", "COLORTERM", "TERM", "TERM_PROGRAM", "VTE_VERSION", "WT_SESSION")
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(out, "colourful", lambda stream: not env.get("NO_COLOR"))
        out.configure(json=False, quiet=False)

    return pretend


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_each_protocol_sends_the_picture(picture):
    pixels = pixels_of(picture.read_bytes())
    image = Image.fromarray(pixels)
    content = re.fullmatch(r"\033]1337;File=inline=1;size=\d+:(.*)\a", preview.iterm(image))[1]
    assert (pixels_of(base64.b64decode(content)) == pixels).all()
    cells = re.findall(r"38;2;(\d+);(\d+);(\d+)m\033\[48;2;(\d+);(\d+);(\d+)m▀", preview.blocks(image))
    shown = np.array(cells, int).reshape(11, 30, 2, 3).transpose(0, 2, 1, 3).reshape(22, 30, 3)
    assert (shown == pixels).all()
    assert preview.shrunk(Image.new("RGB", (2000, 100)), 640, 480).size == (640, 32)


def test_a_path_is_data_and_the_picture_is_beside_it(picture, terminal, capsys):
    for env, mark in (
        ({"TERM_PROGRAM": "iTerm.app"}, "\033]1337"),
        ({"COLORTERM": "truecolor", "TERM_PROGRAM": "iTerm.app", "TMUX": "1"}, "▀"),
    ):
        terminal(**env)
        out.picture(picture)
        shown, said = capsys.readouterr()
        assert re.sub(r"\033]8;;.*?\033\\", "", shown) == "a folder/grid.png\n" and mark in said
    for env in ({"TERM_PROGRAM": "vscode"}, {"VTE_VERSION": "7601"}, {"WT_SESSION": "1"}):
        terminal(TERM="xterm", **env)
        out.picture(picture)
        shown, said = capsys.readouterr()
        assert shown.startswith("\033]8;;file:///") and "a%20folder" in shown and said == ""
        assert re.sub(r"\033]8;;.*?\033\\", "", shown) == "a folder/grid.png\n"
    plain = {"TERM": "xterm", "VTE_VERSION": "7601", "TMUX": "1"}, {"TERM": "xterm", "VTE_VERSION": "4600"}
    for env in ({"TERM_PROGRAM": "iTerm.app", "NO_COLOR": "1"}, {"TERM": "xterm"}, *plain):
        terminal(**env)
        out.picture(picture)
        assert capsys.readouterr() == (f"{picture}\n", "")
    terminal(COLORTERM="truecolor")
    picture.write_bytes(b"no picture")
    out.picture(picture)
    assert capsys.readouterr() == (f"{picture}\n", "")


def test_a_viewer_is_opened_where_it_is_asked_for(picture, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("typer.launch", calls.append)
    out.picture(picture)
    assert calls == []
    out.picture(picture, opened=True)
    assert calls == [str(picture)] and not sys.stdout.isatty()
