"""`gz sample` with prompts and input pictures: which of them each image of each rank is made from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gzcli.cli import app
from gzcli.core import jobs
from gzcli.core.jobs import SampleJob
from gzcli.core.ranks import gather, joined
from gzcli.core.sections import DataSection, Part
from gzcli.core.types import Applied, DataInfo
from gzcli.engine import sampler
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained
from gzcli.judge import sample
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.models.catalog import Param
from gzcli.store import runs

OPTIONS = {
    "prompt": Param("prompt", "str | list[str] | None", None, False),
    "negative": Param("negative", "str", "", False),
    "guidance": Param("guidance", "float", 7.5, False),
    "size": Param("size", "int | None", None, False),
    "edges": Param("edges", "bool", False, False),
}
EDIT = {"edit": {"prompt": OPTIONS["prompt"]}}
READS = replace(catalog.card("vae"), sample=OPTIONS, inputs=("control",), do=EDIT)


class Reader(Model):
    """Draws flat images; their brightness is the prompt's length plus the input's brightness plus noise."""

    paper = "none"

    def sample(
        self, n, *, noise, progress, labels=None, control=None, prompt=None, negative="", guidance=1.0,
        size=None, edges=False
    ):  # fmt: skip
        assert prompt is None or (len(prompt) == n and all(isinstance(text, str) for text in prompt))
        self.seen = [*getattr(self, "seen", []), (n, prompt, control, negative, edges)]
        side = size or self.data.shape[1]
        x = torch.zeros(n, 1, side, side) + 0.01 * noise.rand(n, 1, 1, 1)
        if prompt:
            x += torch.tensor([len(text) / 100 for text in prompt])[:, None, None, None]
        return x if control is None else x + control.mean((1, 2, 3), keepdim=True) / 2

    def edit(self, x, *, noise, progress, prompt=None):
        self.seen = [prompt]
        return Applied(x)


@pytest.fixture
def trained(home, monkeypatch):
    """A run of a model that takes prompts, as the engine loads it; the command line takes it for a `vae`."""
    run = runs.create("vae", "digits", alias="reader")
    run.update(state="finished")
    run.recipe_file.write_text("model: {name: vae}\ndata: {name: digits, size: 16, channels: 1}\n")
    (run.path / "model.safetensors").write_bytes(b"x")
    info = DataInfo((1, 16, 16))
    part = Part("vae", sample={"prompt": None, "size": None}, data=DataSection(size=16, channels=1))
    found = Trained(run, Reader(info), info, part, torch.device("cpu"), 1)
    monkeypatch.setattr(sample, "load_trained", lambda *args: found)
    monkeypatch.setattr(catalog, "card", lambda name: READS)
    return found


@pytest.fixture
def gz(trained, capsys, monkeypatch):
    """gz("--prompt", "x") → (exit code, the result or the error of `gz sample reader … --json`); the engine
    runs in this process."""

    def here(folder: Path, job: SampleJob) -> dict:
        jobs.write(folder, job)
        return sample.run(jobs.read(folder), folder, torch.device("cpu"), Log())

    monkeypatch.setattr("gzcli.cli.jobs.do_job", here)

    def call(*words: str) -> tuple[int, dict]:
        code = app.run(["sample", "reader", *words, "--json"])
        value = json.loads(capsys.readouterr().out)
        return code, value.get("error", value)

    return call


def files(path: Path, **brightness: int) -> Path:
    path.mkdir()
    for name, value in brightness.items():
        Image.fromarray(np.full((40, 30), value, np.uint8)).save(path / f"{name}.png")
    return path


# --- prompts ---


def test_prompts_are_cycled_and_are_as_many_as_the_images(gz, trained):
    words = ("--prompt", "a red door", "--prompt", "three")
    code, result = gz(*words, "--negative", "3", "--guidance", "7", "--seed", "1")
    assert (code, result["n"], result["prompts"]) == (0, 2, ["a red door", "three"])
    code, result = gz("--prompt", "a", "--prompt", "bb", "-n", "5")
    assert (code, result["n"], result["prompts"]) == (0, 5, ["a", "bb"]) and len(result["files"]) == 5
    assert trained.model.seen[-1][:2] == (5, ["a", "bb", "a", "bb", "a"])


def test_without_prompts_it_is_as_ever_or_as_the_recipe_says(gz, trained):
    assert gz()[1]["n"] == 64 and trained.model.seen[-1][1] is None and gz()[1]["prompts"] == []
    for own, words, drawn in (
        ("of the recipe", "-n 2", ["of the recipe"] * 2),
        (["x", "y"], "-n 3", ["x", "y", "x"]),
        (["x", "y"], "--prompt mine -n 2", ["mine", "mine"]),
    ):
        trained.part.sample["prompt"] = own
        gz(*words.split())
        assert trained.model.seen[-1][1] == drawn


def test_prompts_of_a_file_come_after_those_of_the_line(gz, trained, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('\ufeff# doors\na red door, "open"\n\n  ein grüner   \n# none\n', encoding="utf-8")
    code, result = gz("--prompts", str(file), "--prompt", "first")
    assert (code, result["n"], result["prompts"]) == (0, 3, ["first", 'a red door, "open"', "ein grüner"])
    assert trained.model.seen[-1][1] == result["prompts"]


def test_wrong_words(gz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn\n")
    files(tmp_path / "maps", a=3)
    for words, message, hint in (
        ("--prompts none.txt", "none.txt", ""),
        ("--prompts empty.txt", "holds no prompts", "one a line"),
        ("--prompts latin.txt", "not UTF-8 text", "one a line"),
        ("--promt x", "no such option `--promt`", "did you mean `--prompt`?"),
        ("--guidance much", "`--guidance` must be a number", ""),
        ("--mask empty.txt", "`--mask` goes with `--do`", "can: edit"),
        ("--input maps -n 2 --sise 8", "no such option `--sise`", "did you mean `--size`?"),
    ):
        code, error = gz(*words.split())
        assert code == 2 and message in error["message"] and hint in (error["hint"] or ""), words


def test_a_model_that_does_not_read_or_takes_no_pictures(gz, monkeypatch, tmp_path):
    silent = replace(READS, sample={}, inputs=(), do={"edit": {}})
    plain = replace(silent, do={}, can=("sample",))
    maps = str(files(tmp_path / "maps", a=3))
    for card, words, message, hint in (
        (plain, ("--prompt", "x"), "`vae` takes no prompts", "--can prompt"),
        (silent, ("--prompt", "x", "--do", "edit"), "`--do edit` takes no prompts", "--label"),
        (silent, ("--input", maps), "`--input` goes with `--do`", "can: edit"),
    ):
        monkeypatch.setattr(catalog, "card", lambda name, card=card: card)
        code, error = gz(*words)
        assert (code, error["message"]) == (2, message) and hint in error["hint"]


def test_an_application_gets_them_too(gz, trained, tmp_path):
    folder = str(files(tmp_path / "p", a=3, b=4, c=5))
    code, _ = gz("--do", "edit", "--input", folder, "--prompt", "x", "--prompt", "y")
    assert code == 0 and trained.model.seen == [["x", "y", "x"]]


# --- pictures ---


def test_pictures_are_given_to_sample(gz, trained, tmp_path):
    folder = files(tmp_path / "maps", a=0, b=255)
    code, result = gz("--input", str(folder), "--edges", "--npz")
    assert (code, result["n"]) == (0, 2) and "from-input" in result["grid"]
    n, prompt, control, _, edges = trained.model.seen[-1]
    assert (n, prompt, edges, control.shape) == (2, None, True, (2, 1, 16, 16))
    assert control[0].unique().tolist() == [-1] and control[1].unique().tolist() == [1]
    # maps above, images below, each six times as large, with names beside and a caption below
    width, height = Image.open(result["grid"]).size
    assert height > 2 * (96 + 3) + 16 and width > 2 * (96 + 3) + 16
    bright = np.load(result["npz"])["samples"].mean((1, 2, 3))
    assert bright[0] < 70 and bright[1] > 185 and len(result["files"]) == 2
    code, result = gz("--input", str(folder), "--prompt", "1", "--prompt", "22", "--prompt", "333")
    assert result["n"] == 3 and trained.model.seen[-1][2][:, 0, 0, 0].tolist() == [-1, 1, -1]
    code, result = gz("--input", str(folder / "b.png"), "-n", "3")
    assert result["n"] == 3 and trained.model.seen[-1][2][:, 0, 0, 0].tolist() == [1, 1, 1]
    assert gz("--input", str(folder), "-n", "1")[1]["n"] == 1


def test_pictures_and_images_of_another_size(gz, trained, tmp_path):
    words = ("--input", str(files(tmp_path / "maps", a=0, b=255, c=9)), "--npz")
    for of_the_recipe, more in ((None, ("--size", "24")), (24, ())):
        trained.part.sample["size"] = of_the_recipe
        code, result = gz(*words, *more)
        assert code == 0 and trained.model.seen[-1][2].shape == (3, 1, 24, 24)
        assert np.load(result["npz"])["samples"].shape == (3, 24, 24, 1)
        assert Image.open(result["files"][0]).size == (24, 24)


# --- shares ---


@pytest.fixture
def ranks(monkeypatch):
    """ranks(world, draw) → what all ranks draw together, each its own share."""

    def all_of(world: int, draw) -> np.ndarray:
        parts = []
        monkeypatch.setattr("gzcli.core.ranks.gather", lambda rows: rows)
        monkeypatch.setattr("gzcli.core.ranks.world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr("gzcli.core.ranks.rank", lambda rank=rank: rank)
            parts.append(draw())
        return joined(parts)

    return all_of


def test_ranks_and_batches_share_prompts_and_pictures(trained, ranks, monkeypatch):
    prompts = ["x" * (3 * i) for i in range(1, 6)]
    control = torch.linspace(-1, 1, 4)[:, None, None, None].expand(-1, 1, 16, 16)
    given, usual = {"prompt": prompts, "control": control}, sampler.BATCH_SIZE
    for size, world in product((None, 24), (2, 3, 7)):

        def draw(size=size) -> np.ndarray:
            return sampler.draw(trained, 6, seed=3, given=given, options={"size": size})

        monkeypatch.setattr(sampler, "BATCH_SIZE", usual)
        whole = ranks(1, draw)
        assert whole.shape == (6, 1, size or 16, size or 16) and trained.model.seen[-1][0] == 6
        # with seven ranks the last has nothing, and does not know the size
        assert (ranks(world, draw) == whole).all(), (size, world)
        monkeypatch.setattr(sampler, "BATCH_SIZE", 8)
        assert (ranks(world, draw) == whole).all(), (size, world)
        assert trained.model.seen[-1][1] == [prompts[i % 5] for i in rows_of_last(world)]


def rows_of_last(world: int) -> range:
    """The images of the last batch of the last rank that has any; batches are of four at most."""
    share = -(-6 // world)
    start = (5 // share) * share
    return range(start, min(start + 4, 6)) if share <= 4 else range(4, 6)


def test_gathering_skips_who_had_nothing(monkeypatch):
    def gathered(parts, rows):
        parts[:] = [rows, np.zeros((0, 1, 16, 16), np.uint8)]

    monkeypatch.setattr("gzcli.core.ranks.world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    assert gather(np.ones((2, 1, 8, 8), np.uint8)).shape == (2, 1, 8, 8)
    assert joined([np.zeros((0, 3, 4, 4), np.uint8)]).shape == (0, 3, 4, 4)


def test_large_images_come_in_smaller_batches(trained):
    for device, shape, size, images in (
        ("cuda", (1, 28, 28), None, 512),
        ("cuda", (3, 64, 64), None, 512),
        ("cuda", (3, 512, 512), None, 8),
        ("cpu", (3, 64, 64), 512, 2),
        ("cpu", (3, 512, 512), 64, 128),
        ("cpu", (3, 1024, 1024), None, 1),
    ):
        asked = replace(trained, info=DataInfo(shape), device=torch.device(device))
        assert sampler.batch_size(asked, {"size": size}) == images, (device, shape, size)


# --- the card ---


def test_the_card_tells_of_prompts_and_pictures(tmp_path, monkeypatch):
    root = tmp_path / "gzcli" / "models"
    (root / "sd").mkdir(parents=True)
    (root / "base.py").write_text((catalog.ROOT / "base.py").read_text())
    (root / "sd" / "lora.py").write_text(
        "from gzcli.models.base import Model\n"
        "class Lora(Model):\n    paper = 'x'\n    needs = ('caption', 'before')\n"
        "    def sample(self, n, *, labels: Tensor | None = None, noise: Noise, progress: Progress,\n"
        "               prompt: str | None = None, before: Tensor | None = None, scale: float = 1.0): ...\n"
    )
    monkeypatch.setattr(catalog, "ROOT", root)
    card = catalog.card("lora")
    assert card.inputs == ("before",) and list(card.sample) == ["prompt", "scale"] and "prompt" in card.can
    assert card.needs == ("caption", "before")
