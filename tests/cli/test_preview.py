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
    """terminal(TERM="xterm-kitty") makes stdout and stderr one that shows colour."""

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


def of_sixel(text: str, shape: tuple[int, int]) -> np.ndarray:
    """The colours [H, W, 3] in per cent."""
    palette = {int(i): list(map(int, rgb)) for i, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    body = re.sub(r"#\d+;2;\d+;\d+;\d+", "", text.removeprefix("\033Pq").removesuffix("\033\\"))
    body = re.sub(r"!(\d+)(.)", lambda match: int(match[1]) * match[2], body)
    image = np.zeros((*shape, 3), int)
    for n, band in enumerate(body.split("-")[:-1]):
        for colour, letters in re.findall(r"#(\d+)([^#$]+)\$", band):
            for x, letter in enumerate(letters):
                for row in range(6):
                    if (ord(letter) - 63) >> row & 1:
                        image[6 * n + row, x] = palette[int(colour)]
    return image


def test_each_protocol_sends_the_picture(picture):
    pixels = pixels_of(picture.read_bytes())
    image = Image.fromarray(pixels)
    parts = re.findall(r"\033_G(?:a=T,f=100,)?m=([01]);([^\033]*)\033", preview.kitty(image))
    assert [m for m, _ in parts][-1] == "0" and all(len(part) <= preview.CHUNK for _, part in parts)
    assert (pixels_of(base64.b64decode("".join(part for _, part in parts))) == pixels).all()
    content = re.fullmatch(r"\033]1337;File=inline=1;size=\d+:(.*)\a", preview.iterm(image))[1]
    assert (pixels_of(base64.b64decode(content)) == pixels).all()
    assert np.abs(of_sixel(preview.sixel(image), (22, 30)) * 2.55 - pixels).max() < 2
    cells = re.findall(r"38;2;(\d+);(\d+);(\d+)m\033\[48;2;(\d+);(\d+);(\d+)m▀", preview.blocks(image))
    shown = np.array(cells, int).reshape(11, 30, 2, 3).transpose(0, 2, 1, 3).reshape(22, 30, 3)
    assert (shown == pixels).all()
    assert preview.fitted(Image.new("RGB", (2000, 100)), 640, 480).size == (640, 32)


def test_a_path_is_data_and_the_picture_is_beside_it(picture, terminal, capsys):
    for env, mark in (
        ({"TERM": "xterm-kitty"}, "\033_Ga=T"),
        ({"TERM": "foot"}, "\033Pq"),
        ({"COLORTERM": "truecolor", "TERM": "xterm-kitty", "TMUX": "1"}, "▀"),
    ):
        terminal(**env)
        out.picture(picture)
        shown, said = capsys.readouterr()
        assert shown == f"{picture}\n" and mark in said
    for env in ({"TERM_PROGRAM": "vscode"}, {"VTE_VERSION": "7601"}, {"WT_SESSION": "1"}):
        terminal(TERM="xterm", **env)
        out.picture(picture)
        shown, said = capsys.readouterr()
        assert shown.startswith("\033]8;;file:///") and "a%20folder" in shown and said == ""
        assert re.sub(r"\033]8;;.*?\033\\", "", shown) == "a folder/grid.png\n"
    plain = {"TERM": "xterm", "VTE_VERSION": "7601", "TMUX": "1"}, {"TERM": "xterm", "VTE_VERSION": "4600"}
    for env in ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, {"TERM": "xterm"}, *plain):
        terminal(**env)
        out.picture(picture)
        assert capsys.readouterr() == (f"{picture}\n", "")
    terminal(TERM="xterm-kitty")
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
