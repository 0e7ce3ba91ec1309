"""Models on images that are no pictures of 8 bits: each trains, samples and resumes, or is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from helpers import fit, recipe
from refused import refused

import gzcli
from gzcli.api import LoadedRun
from gzcli.core.errors import UsageError
from gzcli.data.library import import_set
from gzcli.data.packs.facts import MAX_FEW_IMAGES, Facts
from gzcli.data.packs.open import facts_of, open_pack
from gzcli.data.packs.pack import PackMeta
from gzcli.data.sets.registry import locate
from gzcli.engine import sampler
from gzcli.engine.trained import load_trained
from gzcli.judge.bench import Judge
from gzcli.judge.images import Pick
from gzcli.metrics import features, networks
from gzcli.models import catalog
from gzcli.store.runs import Run

pytestmark = pytest.mark.usefixtures("undrawn")
RNG = np.random.default_rng(1)
N, SIDE = 60, 16
KINDS = {
    "2 channels": RNG.integers(0, 256, (N, SIDE, SIDE, 2), dtype=np.uint8),
    "4 channels": RNG.integers(0, 256, (N, SIDE, SIDE, 4), dtype=np.uint8),
    "5 channels": RNG.integers(0, 256, (N, SIDE, SIDE, 5), dtype=np.uint8),
    "12 channels": RNG.integers(0, 256, (N, SIDE, SIDE, 12), dtype=np.uint8),
    "uint16": RNG.integers(0, 65536, (N, SIDE, SIDE), dtype=np.uint16),
    "float": RNG.normal(2, 5, (N, SIDE, SIDE, 5)).astype(np.float32),
}
PLAIN = ("train.patience=null",)
REFUSED = "`pixelcnn` models up to 256 grey levels, but `of-"


@pytest.fixture(autouse=True)
def _quick_judge(monkeypatch):
    """The judge of a guidance, which cannot learn what is noise, tries for a few steps."""
    monkeypatch.setattr(features, "LENET", replace(features.LENET, steps=4))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """The name of a set of each kind, with two classes."""
    folder, names = tmp_path_factory.mktemp("values"), {}
    for kind, array in KINDS.items():
        names[kind] = f"of-{kind.replace(' ', '-')}"
        np.savez(folder / f"{names[kind]}.npz", images=array, labels=np.arange(N) % 2)
        import_set(folder / f"{names[kind]}.npz", names[kind])
    return names


def models() -> dict[str, zoo.Case]:
    """A case of each model that is trained by itself."""
    cases = {}
    for case in zoo.CASES:
        if not case.stages and not catalog.card(case.model).stages:
            cases.setdefault(case.model, case)
    return cases


def steps_of(case: zoo.Case, data: str, kind: str) -> str:
    """Trains, samples and resumes a model: "ok", or the words by which it is refused."""
    pack, small = open_pack(data), replace(case, batch=min(case.batch, 16))
    try:
        tree = recipe(small, steps=2, data=data, sets=PLAIN)
    except UsageError as e:  # before anything starts
        assert case.model in e.message.replace("-", "_") and e.hint
        return e.message
    t = fit(tree)
    info = pack.seen(None).info()
    assert t.info.shape == info.shape and t.info.levels == info.levels
    t.run.update(state="finished")
    trained = load_trained(t.run, "cpu")
    options = {"options": dict(case.sample)} if case.sample else {}
    pictures, values = sampler.draw_all(trained, 3, **options)
    array = KINDS[kind]
    assert pictures.shape == (3, *pack.shape) and pictures.dtype == np.uint8
    assert values.shape == (3, *info.shape) and values.dtype == array.dtype and np.isfinite(values).all()
    again = fit(recipe(small, steps=4, data=data, sets=PLAIN), run=t.run)
    assert again.start == 2 and again.done == 4
    return "ok"


def models_and_kinds():
    """Each model is quick with one kind, and each kind with one model."""
    models, kinds = ("vae", "fm", "dcgan"), ("5 channels", "uint16", "float")
    for i, j in itertools.product(range(3), repeat=2):
        yield pytest.param(models[i], kinds[j], marks=() if i == j else pytest.mark.slow)


@pytest.mark.parametrize(("model", "kind"), models_and_kinds())
def test_a_model_trains_samples_and_resumes(model, kind, sets):
    assert steps_of(models()[model], sets[kind], kind) == "ok"


def test_a_model_of_grey_levels_is_refused_before_it_starts(sets):
    for kind in ("uint16", "float"):
        assert steps_of(models()["pixelcnn"], sets[kind], kind).startswith(REFUSED)
    assert "real numbers" in steps_of(models()["realnvp"], sets["float"], "float")
    assert "8-bit images" in steps_of(models()["sd_lora"], sets["5 channels"], "5 channels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", models())
def test_every_model_does(model, kind, sets):
    outcome = steps_of(models()[model], sets[kind], kind)
    assert outcome == "ok" or "models" in outcome or "needs" in outcome


@pytest.fixture(scope="module")
def runs_of(sets) -> dict[str, Run]:
    runs = {}
    for kind in ("uint16", "float"):
        t = fit(recipe(replace(models()["vae"], batch=16), steps=20, data=sets[kind], sets=PLAIN))
        t.run.update(state="finished")
        runs[kind] = t.run
    return runs


def test_bits_a_dimension_where_levels_are_known(runs_of, sets):
    """−log2 p of noise of 16 bits is about 16 a pixel, and real numbers have no bits."""
    run = LoadedRun(load_trained(runs_of["uint16"], torch.device("cpu")))
    images = KINDS["uint16"][:6, None]
    bits = -run.log_prob(images) / np.log(2) / images[0].size
    assert 14 < bits.mean() < 20
    assert (
        "bpd"
        in Judge(open_pack(sets["uint16"]), ["bpd"], _job(), torch.device("cpu"), _log()).metrics[0].name
    )
    real = LoadedRun(load_trained(runs_of["float"], torch.device("cpu")))
    refused("no image likelihood", real.log_prob, KINDS["float"][:2].transpose(0, 3, 1, 2))


def _job():
    from gzcli.store.jobs import BenchJob

    return BenchJob((), "x", checkpoint="last")


def _log():
    from gzcli.engine.log import Log

    return Log(mode="quiet")


def test_a_network_of_photographs_is_refused(sets):
    pack = open_pack(sets["float"], size="16x8")
    message = "`fid` uses a network trained on photographs, but `of-float` has 5 channels"
    refused(message, Judge, pack, ["fid"], _job(), "cpu", _log())


@pytest.mark.parametrize(
    ("name", "judges"), [("emoji", True), ("digits", False), ("uint16", False), ("float", False)]
)
def test_one_rule_says_which_sets_a_published_network_judges(name, judges, sets, monkeypatch):
    """The pack shows three of the five channels of `float`, and a bench refuses that network for them."""
    monkeypatch.setattr(networks, "is_installed", lambda: True)
    data = locate(sets.get(name, name))
    for facts in (open_pack(data).meta, facts_of(data)):
        assert networks.published_judges(facts) == judges
        assert not networks.published_judges(replace(facts, **too_many(facts)))


def too_many(facts: Facts | PackMeta) -> dict[str, object]:
    return (
        {"n": MAX_FEW_IMAGES + 1} if isinstance(facts, Facts) else {"counts": {"train": MAX_FEW_IMAGES + 1}}
    )


def test_other_images_are_read_in_the_scale_of_the_run(runs_of, tmp_path):
    """Half of the numbers are half as large for the model, whatever their own least and largest are."""
    trained = load_trained(runs_of["float"], torch.device("cpu"))
    whole, half = (gzcli.open_data(KINDS["float"] * scale) for scale in (1, 0.5))
    x, y = (trained.values.restored(trained.seen(pack).images("test")) for pack in (whole, half))
    np.testing.assert_allclose(y, x / 2, rtol=1e-4, atol=1e-4)
    refused("was trained on 5 channels", trained.seen, gzcli.open_data(KINDS["12 channels"]))
    refused("has 8-bit images", trained.seen, gzcli.open_data("digits"))
    (batch, *_) = Pick(whole, "test", np.arange(3)).batches(trained, size=3, seed=0)
    assert batch.x.shape == (3, 5, SIDE, SIDE)


def test_images_of_another_kind_than_the_run_are_refused(runs_of, sets):
    """The message names their values, and not that they are cropped."""
    pack = open_pack(sets["float"], size="16x8")
    assert "cropped" in pack.meta.notes[-1]
    refused("`of-float` has 5 channels of real numbers", load_trained(runs_of["uint16"], "cpu").seen, pack)


def test_all_channels_come_back(runs_of, tmp_path):
    run = LoadedRun(load_trained(runs_of["float"], torch.device("cpu")))
    drawn = run.sample(4)
    assert drawn.shape == (4, 3, SIDE, SIDE) and drawn.values.shape == (4, 5, SIDE, SIDE)
    assert np.array_equal(drawn[1:3].values, drawn.values[1:3])
    stored = np.load(drawn.save(tmp_path / "a.npz"))["samples"]
    assert np.array_equal(stored.transpose(0, 3, 1, 2), drawn.values)
    assert run.do("reconstruct", drawn.values).shape == drawn.shape
    refused("images must be values .N, 5, 16, 16.", run.do, "reconstruct", drawn)
