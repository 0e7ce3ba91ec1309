"""`gz sample --do`: every application of every model by its plain call, and what it refuses."""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from draws import awake, fitted, train_batches
from PIL import Image
from refused import refused
from zoo import CASES, FIRST, Case, definer

from gzcli.api import LoadedRun
from gzcli.cli import app
from gzcli.core.sections import DataSection, Part
from gzcli.core.types import Applied, ImageNoise, no_progress
from gzcli.data.packs.open import open_pack
from gzcli.data.sets.labels import in_turns
from gzcli.engine import sheets
from gzcli.engine.log import Log
from gzcli.engine.sheets import (
    BLOCK_GAP,
    CELL_SIDE,
    HEADING_HEIGHT,
    IMAGE_GAP,
    PAPER_GREY,
    SHEET_MARGIN,
    Row,
    sheet,
)
from gzcli.engine.trained import Trained
from gzcli.judge import sample
from gzcli.judge.sample import HIDDEN_GREY
from gzcli.models import catalog
from gzcli.models.base import flat_defaults
from gzcli.store import jobs, runs
from gzcli.store.jobs import SampleJob

CPU = torch.device("cpu")
FEW = 3  # images, in place of 64: an odd number, as a set of one's own may have
WAYS = {  # rows, columns, images that a row is of
    "interpolate": (FEW // 2, 8, 2),
    "traverse": (8, 8, 1),
    "analogies": (FEW, 10, 1),
}
INPUTS = ("inpaint", "complete", "upscale", "restore")  # with a row of what the model is given

# the first build of each model, and conditional ones of those whose applications ask for labels
LABELLED = [case for case in CASES if case.conditional and case.model in ("glow", "maskgit", "fm", "sgm")]
ONCE = {id(case): case for case in (*FIRST.values(), *LABELLED)}.values()
TRIED = [case for case in ONCE if catalog.card(case.model).do]


def pairs():
    """Each application of each case. Where an earlier case has the method of the same class it is slow.
    `test_the_images_of_a_set_bring_their_labels` has the quick cases with labels."""
    seen = set()
    for case in TRIED:
        for do in catalog.card(case.model).do:
            key = definer(case.model, do), do
            slow = key in seen or do == "restore"  # which tests/truth/test_restore.py tries
            yield pytest.param(case, do, id=f"{case}-{do}", marks=pytest.mark.slow if slow else ())
            seen.add(key)


@dataclass
class Shop:
    """`gz sample` over a model that is not trained, in this process."""

    trained: Trained
    capsys: pytest.CaptureFixture

    def __call__(self, *words: str, code: int = 0) -> dict:
        """The result or, where another exit code is expected, the error."""
        got = app.run(["sample", self.trained.run.id, *words, "--json"])
        stdout, stderr = self.capsys.readouterr()
        assert got == code, stderr + stdout
        return json.loads(stdout).get("error" if code else "", json.loads(stdout))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One home for the module, so that the sets are packed once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GZ_HOME", str(tmp_path_factory.mktemp("applications")))
    yield
    patch.undo()


@pytest.fixture
def shop(capsys, monkeypatch):
    """shop(case): a model of the zoo behind the command line."""

    def open_shop(case: Case, n: int | None = FEW) -> Shop:
        pack = open_pack(case.data)
        run = runs.create(case.model, case.data)
        run.update(state="finished")
        conditional = "true" if case.conditional else "false"
        (run.path / "run.yaml").write_text(f"model: {{name: {case.model}, conditional: {conditional}}}\n")
        (run.path / "model.safetensors").write_bytes(b"x")
        info = pack.info(levels=case.levels, steps=1000)
        part = Part(case.model, sample=case.sample, data=DataSection(case.data))
        model = case.build(info).eval().requires_grad_(False)
        gz = Shop(Trained(run, model, info, part, CPU, 1), capsys)

        def here(folder: Path, job: SampleJob) -> dict:
            few = job.n if n is None or job.do == "traverse" else min(n, job.n or n)
            folder.mkdir(parents=True, exist_ok=True)
            jobs.write(folder, replace(job, n=few))
            return sample.run(jobs.read(folder), folder, CPU, Log())

        monkeypatch.setattr("gzcli.cli.jobs.do_job", here)
        monkeypatch.setattr("gzcli.engine.sheets.SMOOTH_FILTER", "NEAREST")  # so that pixels can be compared
        monkeypatch.setattr(sample, "load_trained", lambda *args: gz.trained)
        return gz

    return open_shop


def cell(grid: np.ndarray, row: int, column: int, *, columns: int, marks: bool) -> np.ndarray:
    """The small image [16, 16] at a place of a sheet, counted from its right edge: names on the left vary."""
    step = CELL_SIDE + IMAGE_GAP
    top = SHEET_MARGIN + (HEADING_HEIGHT if marks else 0) + row * step
    left = grid.shape[1] - SHEET_MARGIN + IMAGE_GAP - (columns - column) * step
    return grid[top : top + CELL_SIDE : CELL_SIDE // 16, left : left + CELL_SIDE : CELL_SIDE // 16]


@pytest.mark.parametrize(("case", "do"), pairs())
def test_the_plain_call_of_every_application(shop, case, do):
    """No options, the set's test images: the outputs alone are written, the sheet shows what each is of."""
    if do == "restore":
        pytest.importorskip("deepinv")
    gz, test = shop(case), open_pack(case.data).images("test")
    flows = ("glow", "flow", "realnvp", "flowpp", "tarflow")
    by_class = do == "analogies" or (do in ("classify", "translate") and case.model != "cyclegan")
    by_class = by_class or case.model in flows
    if do in ("edit", "classify", "translate", "analogies") and by_class and not case.conditional:
        assert "conditional=true" in gz("--do", do, code=2)["hint"]
        assert do in catalog.card(case.model).unlabelled_lack
        assert not (gz.trained.run.path / "sampled").exists()
        return
    assert do not in catalog.card(case.model).unlabelled_lack or case.conditional
    result = gz("--do", do, "--npz")
    saved, grid = np.load(result["npz"]), np.asarray(Image.open(result["grid"]))
    outputs = [np.asarray(Image.open(path)) for path in result["files"]]
    assert (saved["samples"][..., 0] == outputs).all() and saved.files[0] == "samples"
    if do in WAYS:
        rows, columns, ends = WAYS[do]
        assert (len(result["rows"]), result["columns"], result["n"]) == (rows, columns, rows * columns)
        place = {"columns": columns + ends, "marks": True}
        assert (cell(grid, 0, 0, **place) == test[0]).all()
        assert all(
            (cell(grid, rows - 1, 1 + j, **place) == outputs[-columns + j]).all() for j in range(columns)
        )
        if ends == 2:
            assert (cell(grid, 0, columns + 1, **place) == test[1]).all()
        return
    assert (result["n"], result["columns"], len(result["rows"])) == (FEW, None, 1)
    assert saved["labels"].shape == (FEW,) and saved["labels"].max() < len(gz.trained.info.classes)
    between = do in INPUTS or (do in ("reconstruct", "edit") and hasattr(gz.trained.model, "round_trip"))
    binary = case.levels == 2
    marked = bool(
        (grid[SHEET_MARGIN + HEADING_HEIGHT - 2] == PAPER_GREY).all()
    )  # no image there: below headings
    high = (
        grid.shape[0] - 2 * SHEET_MARGIN + IMAGE_GAP - HEADING_HEIGHT * marked
    )  # with a caption of a line or two
    assert high // (CELL_SIDE + IMAGE_GAP) == 2 + between
    for i in range(FEW):
        at = lambda row, i=i: cell(grid, row, i, columns=FEW, marks=marked)  # noqa: E731
        assert binary or (at(0) == test[i]).all()
        assert (at(1 + between) == outputs[i]).all()
        if do in ("inpaint", "complete"):  # what was hidden is grey, the rest is as it was
            hidden = at(1) == HIDDEN_GREY
            assert 0.2 < hidden.mean() < 0.6 and (at(1)[~hidden] == at(0)[~hidden]).all()
            assert (outputs[i][~hidden] == at(0)[~hidden]).all()


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_numbers_that_cannot_be(shop, case):
    """No steps, frames, dims … or fewer: a usage error that names the option."""
    legal, gz = {"keep", "rows"}, shop(case)  # 0 is all groups, no rows
    card = catalog.card(case.model)
    lacking = () if case.settings.get("conditional") else card.unlabelled_lack  # refused before its options
    for do, params in card.do.items():
        whole = [name for name, param in params.items() if param.annotation in ("int", "int | None")]
        counts = [] if do in lacking else whole
        for i, name in enumerate(counts):
            value = -1 if i % 2 or name in legal else 0
            typed = "--" + name.replace("_", "-")
            assert f"`{typed}`" in gz("--do", do, f"--{name}={value}", code=2)["message"], (do, name, value)


def test_what_is_refused_says_what_there_is(shop):
    gz = shop(CASES[0])
    assert app.run(["sample", gz.trained.run.id, "--do", "reconstruct", "-n", "0"]) == 2
    gz.capsys.readouterr()
    assert "pairs" in gz("--do", "interpolate", "-n", "1", code=2)["message"]
    error = gz("--do", "reconstuct", code=2)
    assert "reconstuct" in error["message"] and error["hint"] == "did you mean `reconstruct`?"
    error = gz("--do", "inpaint", code=2)
    assert error["message"] == "`vae` does not inpaint"
    assert "reconstruct, interpolate, traverse" in error["hint"] and "--can inpaint" in error["hint"]
    assert "takes no mask" in gz("--do", "reconstruct", "--mask", __file__, code=2)["message"]
    for do in ("interpolate", "traverse"):  # whose frames were steps
        result, again = (gz("--do", do, "-n", "2", option, "3") for option in ("--frames", "--steps"))
        assert result["columns"] == again["columns"] == 3
    few = np.zeros((2, *gz.trained.info.shape), np.uint8)
    assert len(LoadedRun(gz.trained).do("interpolate", few, steps=5)) == 5


# one of each way in which labels enter; the applications of cfm are those of cddpm
WAYS_IN = ("cvae", "cddpm", "cfm", "cgan", "pixelcnn", "tarflow", "hvae", "aae")


@pytest.mark.parametrize(
    "case",
    [pytest.param(FIRST[x], id=x, marks=pytest.mark.slow if x == "cfm" else ()) for x in WAYS_IN],
)
def test_the_images_of_a_set_bring_their_labels(shop, case):
    """An application that keeps the class of an image takes it from the set, unless one is named."""
    gz, pack = shop(replace(case, options={**case.options, "conditional": True})), open_pack(case.data)
    model = awake(gz.trained.model.requires_grad_(False))
    run, card = LoadedRun(gz.trained), catalog.card(case.model)
    images, labels = pack.images("test")[:FEW], pack.labels("test")[:FEW]
    wrong = (labels + 1) % 10
    tasks = [do for do in card.labelled if "y" not in signature(getattr(model, do)).parameters]
    tasks = [do for do in tasks if do != "restore" or find_spec("deepinv")]  # an extra
    assert tasks
    for do in tasks:
        few = {name: 4 for name in ("steps", "search") if name in card.do[do]}

        def drawn(*words: str, do=do, few=few) -> np.ndarray:
            words = ("--do", do, "--npz", *words, *(f"--{name}={value}" for name, value in few.items()))
            return np.load(gz(*words)["npz"])["samples"].transpose(0, 3, 1, 2)

        of_set, named, unlike = drawn(), *(drawn("--label", ",".join(map(str, y))) for y in (labels, wrong))
        sees_labels = (case.model, do) != ("aae", "analogies")  # whose encoder sees none
        assert (of_set == named).all() and (of_set != unlike).any() == sees_labels, do
        assert (run.do(do, images, y=labels, **few) == of_set).all(), do
        assert (run.do(do, images, y=labels, labels=wrong, **few) == unlike).all(), do


def test_labels_that_an_application_does_not_take_are_refused(shop):
    images, glow = np.zeros((2, 1, 16, 16), np.uint8), next(x for x in LABELLED if x.model == "glow")
    for case, words in ((glow, "takes no labels"), (FIRST["vae"], "not trained with labels")):
        refused(words, LoadedRun(shop(case).trained).do, "interpolate", images, labels=[0])


def test_a_cvae_that_knows_the_class_reconstructs_better():
    """Most of what a code of one number does not tell of a digit is its class."""
    pack = open_pack("digits")
    info = pack.info(steps=400)
    torch.manual_seed(0)
    model = catalog.load("cvae").of(info, net="mlp", hidden=(128,), latent=1, pixels="logistic")
    fitted(model, train_batches(pack, seed=0, batch_size=64, levels=info.levels).at, 400, 3e-3)
    run = LoadedRun(Trained(runs.create("cvae", "digits"), model.eval(), info, Part("cvae"), CPU, 400))
    images, labels = pack.images("test")[:200], pack.labels("test")[:200]

    def error(**how) -> float:
        return float(np.square(run.do("reconstruct", images, **how) - images.astype(float)).mean())

    assert error(y=labels) < 0.7 * error()


CODED = [case for case in TRIED if catalog.card(case.model).family in ("vae", "gan", "normalizing_flow")]
CODED = [case for case in CODED if "interpolate" in catalog.card(case.model).do]


@pytest.mark.parametrize("case", CODED, ids=str)
def test_interpolations_start_and_end_at_the_reconstructions(case):
    model = case.fresh().eval()
    x = torch.from_numpy(open_pack(case.data).images("test")[:5].copy()) / 127.5 - 1

    def images(do: str, x: torch.Tensor, **few) -> torch.Tensor:
        noise, method = ImageNoise(0, range(len(x))), getattr(model, do)
        few = {key: value for key, value in few.items() if key in flat_defaults(method)}
        return method(x, noise=noise, progress=no_progress, **few).images

    way = images("interpolate", x, frames=4, search=5).unflatten(0, (2, 4))
    ends = images("reconstruct", x[:4], steps=5)
    for end, expected in ((way[:, 0], ends[0::2]), (way[:, -1], ends[1::2])):
        assert ((end - expected).abs() > 1e-4).float().mean() < 0.02  # a level of a flow may round across
    refused("pairs", images, "interpolate", x[:1])


def test_an_analogy_of_the_own_class_is_the_reconstruction():
    """And one of another class is the image of the same code by that label."""
    model = awake(FIRST["cvae"].fresh()).eval()
    pack = open_pack("digits")
    x, y = (torch.from_numpy(part("test")[:5].copy()) for part in (pack.images, pack.labels))
    x = x / 127.5 - 1
    noise = ImageNoise(0, range(5))
    applied = model.analogies(x, labels=y, noise=noise, progress=no_progress, codes=5)
    rows = applied.images.unflatten(0, (5, 10))
    same = model.reconstruct(x, labels=y, noise=noise, progress=no_progress).images
    assert torch.allclose(rows[range(5), y], same, atol=1e-6)
    assert torch.allclose(rows[:, 3], model.image(model.code(x, y), torch.full_like(y, 3)), atol=1e-6)
    assert (rows[:, 3] - rows[:, 4]).abs().max() > 1e-3 and applied.labels.tolist() == [*range(10)] * 5


def test_many_images_are_said_to_be_on_one_sheet(shop, capsys):
    run = shop(CASES[0], n=None).trained.run.id
    assert app.run(["sample", run, "-n", "300"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "300 images" in stderr and "--png" in stderr and "--npz" in stderr and len(stdout.split()) == 1
    assert app.run(["sample", run, "-n", "300", "--npz", "--animate"]) == 0
    stdout, stderr = capsys.readouterr()
    assert [Path(path).name for path in stdout.split()] == ["grid.png", "samples.npz", "animation.gif"]
    assert "on one sheet" not in stderr and all(Path(path).is_file() for path in stdout.split())


def test_samples_have_their_labels_and_a_column_a_class(shop):
    gz = shop(FIRST["cvae"], n=None)
    result = gz("-n", "25", "--npz")
    saved, grid = np.load(result["npz"]), np.asarray(Image.open(result["grid"]))
    assert saved.files == ["samples", "labels"] and saved["labels"].tolist() == [i % 10 for i in range(25)]
    # with a line of caption
    assert grid.shape == (
        2 * SHEET_MARGIN + 2 * HEADING_HEIGHT + 3 * (CELL_SIDE + IMAGE_GAP) - IMAGE_GAP,
        2 * SHEET_MARGIN + 10 * (CELL_SIDE + IMAGE_GAP) - IMAGE_GAP,
    )
    assert (cell(grid, 1, 3, columns=10, marks=True) == saved["samples"][13, ..., 0]).all()
    result = gz("-n", "9", "--label", "3,7", "--npz")
    assert np.load(result["npz"])["labels"].tolist() == [3, 7] * 4 + [3]


def test_sheets_and_their_columns():
    classes = tuple("abcdefghij")
    for labels, n, wide, expected in (
        (None, 64, 8, (8, ())),
        (torch.arange(64) % 10, 64, 8, (10, list(classes))),
        (torch.full((64,), 2), 64, 8, (8, ["c"] * 8)),
        (torch.tensor([0, 2] * 32), 64, 8, (8, ["a", "c"] * 4)),
        (torch.tensor([3, 1, 4, 1, 5, 9]), 6, 4, (4, ())),  # as they come
        (torch.tensor([3, 1, 4, 1]), 4, 10, (4, ["d", "b", "e", "b"])),
        (torch.arange(10), 10, 4, (10, list(classes))),
    ):
        assert sheets.by_class(labels, n, wide, classes) == expected
    assert sheets.by_class(torch.tensor([3, 1, 4, 1, 5, 9, 2, 6] * 2), 16, 4, classes)[0] == 8
    names = tuple(map(str, range(64)))  # each of another class
    assert sheets.by_class(torch.arange(64), 64, 8, names) == (8, ())
    assert sheets.by_class(torch.tensor([[1, 0, 1], [0, 0, 0]]), 2, 10, classes[:3])[1] == ["a + c", "none"]
    image = np.full((3, 16, 16), 200, np.uint8)
    plain = sheet([[Row("", [image] * 3)]])
    named = sheet([[Row("source", [image] * 3, ["a", "b"])], [Row("result", [image])]])
    assert plain.shape == (CELL_SIDE + 2 * SHEET_MARGIN, 3 * CELL_SIDE + 2 * IMAGE_GAP + 2 * SHEET_MARGIN, 3)
    assert (
        plain[SHEET_MARGIN : SHEET_MARGIN + CELL_SIDE, SHEET_MARGIN : SHEET_MARGIN + CELL_SIDE] == 200
    ).all()
    assert named.shape[0] == plain.shape[0] + CELL_SIDE + IMAGE_GAP + BLOCK_GAP + HEADING_HEIGHT
    assert (named[:, : SHEET_MARGIN + 30] < 128).any() and (named[:21] < 128).any()  # letters
    big = sheet([[Row("", [np.zeros((1, 256, 256), np.uint8)])]])
    assert big.shape == (256 + 2 * SHEET_MARGIN, 256 + 2 * SHEET_MARGIN, 1)
    assert sheets.fit_text("ankle boot", 300) == "ankle boot" and sheets.fit_text("ankle boot", 40).endswith(
        "…"
    )
    half = np.repeat(np.array([0, 255], np.uint8), 8)[None, :, None].repeat(16, 2)
    smooth, exact = (
        sheet([[Row("", [half], exact=e)]])[SHEET_MARGIN:-SHEET_MARGIN, SHEET_MARGIN] for e in (False, True)
    )
    assert set(exact.ravel()) == {0, 255} and len(set(smooth.ravel())) > 4, "a mask is enlarged exactly"
    images = np.zeros((4, 1, 16, 16), np.uint8)
    plain, captioned = (
        sheets.of_samples(images, None, (), caption) for caption in ("", "vae · digits · step 700")
    )
    long = sheets.of_samples(images, None, (), " · ".join(["as many words as this"] * 3))
    assert (
        captioned.shape[0] == plain.shape[0] + HEADING_HEIGHT
        and long.shape[0] == plain.shape[0] + 3 * HEADING_HEIGHT
    )
    assert (captioned[: len(plain)] == plain).all() and (captioned[len(plain) :] < 200).any()
    images = np.zeros((72, 1, 16, 16), np.uint8)
    classes = [str(i) for i in range(36)]
    whole, short = (sheets.of_samples(images[:n], torch.arange(n) % 36, classes, "") for n in (72, 40))
    high, wide = (
        3 * (HEADING_HEIGHT + 2 * (CELL_SIDE + IMAGE_GAP)) - IMAGE_GAP + 2 * BLOCK_GAP,
        12 * (CELL_SIDE + IMAGE_GAP) - IMAGE_GAP,
    )
    assert whole.shape[:2] == (high + 2 * SHEET_MARGIN, wide + 2 * SHEET_MARGIN)
    assert short.shape[0] == whole.shape[0] - 2 * (CELL_SIDE + IMAGE_GAP)
    assert [in_turns(64, k) for k in (0, 8, 10, 36, 100)] == [64, 64, 60, 72, 64]


def test_cyclegan_takes_each_image_to_the_other_domain(shop):
    """By the set's own labels, whatever its untrained translators would make of it."""
    case = FIRST["cyclegan"]
    gz, labels = shop(case, n=6), open_pack(case.data).labels("test")
    assert 0 < labels[:6].sum() < 6, "a test of both domains"
    saved = np.load(gz("--do", "translate", "--npz")["npz"])
    assert (saved["labels"] == 1 - labels[:6]).all()
    net = gz.trained.model
    x = torch.from_numpy(open_pack(case.data).images("test")[:6]) / 127.5 - 1
    both = torch.where(torch.from_numpy(labels[:6] == 0)[:, None, None, None], net.a_to_b(x), net.b_to_a(x))
    assert np.abs((saved["samples"][..., 0] / 127.5 - 1) - both[:, 0].numpy()).max() < 0.02
    assert gz("--do", "translate", "--direction", "AtoB")["n"] == (labels[:6] == 0).sum()
    net.memory.copy_(torch.arange(64).view(2, 32, 1, 1, 1) * 3)  # what samples are made from is above them
    result = gz("-n", "5")
    grid = np.asarray(Image.open(result["grid"]))
    shown = [cell(grid, 0, i, columns=5, marks=False) for i in range(5)]
    pick = ImageNoise(0, range(5)).randint(64, 5)
    assert [int(image[0, 0]) for image in shown] == (3 * pick).tolist()
    assert (cell(grid, 1, 4, columns=5, marks=False) == np.asarray(Image.open(result["files"][4]))).all()


def test_results_and_their_noise():
    x, two = torch.zeros(6, 1, 4, 4), {"rows": ("a", "b"), "columns": 3}
    assert Applied(x, **two, of=((0, 1), (2, 3))).columns == 3
    for wrong in ({"rows": ("a", "b")}, {"rows": ("a",), "columns": 3, "of": ((0,),)}, {"of": ((0,),)}):
        refused("rows", Applied, x, **wrong, error=ValueError)
    whole, twin = ImageNoise(3, range(5)), ImageNoise(3, range(5))
    assert torch.equal(whole.randn(5, 4), twin.randn(5, 4))
    assert torch.equal(whole.randn(5, 4)[:2], twin.first(2).randn(2, 4))  # they go on from where they are
