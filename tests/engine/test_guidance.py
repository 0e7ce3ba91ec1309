"""`sample.guidance: auto`: the scale is chosen at the end of a training, on validation images alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import fit, recipe
from PIL import Image
from zoo import FIRST

from gzcli.core.sections import TrainSection
from gzcli.data.packs.open import open_pack
from gzcli.engine import guidance
from gzcli.engine.__main__ import results_of
from gzcli.engine.checkpoint import read_weights
from gzcli.engine.guidance import GUIDANCE_SCALES, Figures
from gzcli.engine.log import Log
from gzcli.engine.trained import load_trained
from gzcli.metrics.features import lenet

pytestmark = pytest.mark.usefixtures("undrawn")

CPU = torch.device("cpu")
LABELLED = ("model.conditional=true", "sample.guidance=auto")


def test_the_right_class_counts_beside_the_distance_and_the_recall():
    """Figures of 400 samples of cfm after two CPU-minutes of MNIST. The second judge, by which nothing was
    chosen, puts them in this order of distance: .196, .130, .124."""
    measured = [
        Figures(1.15, 33.8, 0.82, 0.92),
        Figures(1.5, 38.4, 0.77, 0.96),
        Figures(2, 72.4, 0.70, 0.985),
    ]
    assert min(measured, key=lambda one: one.score(0.99)).guidance == 1.5
    plain = [Figures(1, 20, 0.8), Figures(1.3, 18, 0.78), Figures(2, 19, 0.6)]
    assert min(plain, key=lambda one: one.score(0.99)).guidance == 1.3, "without labels"


def test_labels_on_which_a_judge_is_surer_than_of_real_images_are_not_rewarded():
    sharp = [Figures(1.3, 20, 0.8, 0.87), Figures(1.5, 22, 0.8, 0.91)]
    assert min(sharp, key=lambda one: one.score(0.99)).guidance == 1.5
    assert min(sharp, key=lambda one: one.score(0.87)).guidance == 1.3


def test_the_score_of_a_scale_by_hand():
    """Distance times the root of the share of wrong classes plus 1 %, over the recall of at least 1 %."""
    one = Figures(1.3, 20, 0.8, 0.76)
    assert one.score(0.99) == pytest.approx(20 * 0.5 / 0.8), "√(.24 + .01)"
    assert replace(one, agreement=0.9).score(0.84) == pytest.approx(10.307764), "20 √.17 / .8"
    assert replace(one, agreement=1.0).score(1.0) == pytest.approx(20 * 0.1 / 0.8)
    assert replace(one, agreement=None).score(0.99) == pytest.approx(25)
    assert replace(one, recall=0.0).score(0.99) == pytest.approx(1000)


class Judge:
    """Features are the first pixels; the class is the first feature."""

    alive, rotations, accuracy = True, False, 0.99

    def features(self, images):
        return images.reshape(len(images), -1)[:, :4].astype(float)

    def logits_of(self, features):
        return -np.abs(features[:, :1] - np.arange(2) * 100)


@pytest.fixture
def chosen(monkeypatch):
    """The scales that are tried where samples at `best` are those of the set, and worse the further away."""

    def try_scales(best: float) -> tuple[list[Figures], list[dict]]:
        rng, calls = np.random.default_rng(0), []
        real = rng.integers(0, 100, (400, 1, 2, 2)).astype(np.uint8)

        def draw(trained, n, *, labels, options):
            calls.append(options | {"labels": labels})
            return real[:n] + np.uint8(10 * abs(options["guidance"] - best))

        monkeypatch.setattr(guidance.sampler, "draw", draw)
        train = TrainSection(steps=10_000, batch_size=64)
        part = SimpleNamespace(sample={"guidance": "auto", "steps": 10, "sampler": "adams"}, train=train)
        model = SimpleNamespace(conditional=False)
        trained = SimpleNamespace(part=part, model=model, device=CPU)
        return guidance.choose(trained, real, Judge()), calls

    return try_scales


def test_scales_are_tried_until_one_is_worse(chosen):
    tried, calls = chosen(1.3)
    assert [one.guidance for one in tried] == list(GUIDANCE_SCALES[:4])
    assert min(tried, key=lambda one: one.score(1)).guidance == 1.3
    assert all((one["steps"], one["sampler"]) == (6, "adams") for one in calls), "few steps"
    assert [one.guidance for one in chosen(1.0)[0]] == list(GUIDANCE_SCALES[:2])
    assert [one.guidance for one in chosen(9.0)[0]] == list(GUIDANCE_SCALES)


def test_a_short_training_chooses_by_fewer_samples():
    """The choice may take a tenth of its work. 50 samples are the fewest, unless they take twice as much."""
    counts = [guidance.samples_of(TrainSection(steps=n, batch_size=64)) for n in (90, 100, 300, 750, 9000)]
    assert counts == [0, 50, 80, 200, 200]


def test_training_images_make_up_what_validation_lacks():
    def pack(**sizes):
        def images(split):
            assert split != "test", "the test split is left alone"
            return np.full((sizes[split], 1, 2, 2), ("val", "train").index(split), np.uint8)

        return SimpleNamespace(images=images)

    both, of = guidance.reference(pack(val=144, train=1298))
    assert of == "144 validation and 356 training images" and both.sum() == 4 * 356 and len(both) == 500
    both, of = guidance.reference(pack(val=9000, train=1298))
    assert of == "validation images" and len(both) == guidance.MAX_VALIDATION_IMAGES and not both.any()
    both, of = guidance.reference(pack(val=20, train=200))
    assert of == "20 validation and 200 training images" and len(both) == 220


def test_a_judge_that_distinguishes_nothing_chooses_nothing(monkeypatch):
    net = lenet(open_pack("digits"))
    monkeypatch.setattr(guidance, "lenet", lambda *_, **__: replace(net, accuracy=0.11, chance=0.1))
    monkeypatch.setattr(guidance, "choose", lambda *_: pytest.fail("chosen"))
    said = []
    monkeypatch.setattr(Log, "info", lambda self, text, **_: said.append(text))
    run = fit(recipe(FIRST["fm"], steps=2, sets=LABELLED)).run
    assert run.status().get("guidance") is None
    assert "guidance 1 is kept: the training is too short to choose it" in said
    monkeypatch.setattr(guidance, "IMAGE_COST", 0.1)
    run = fit(recipe(FIRST["fm"], steps=2, sets=LABELLED)).run
    assert run.status().get("guidance") is None
    dead = "the judge network `lenet` did not learn its classes (accuracy 11% on test images, 10% by chance)"
    assert f"guidance 1 is kept: {dead}" in said


def test_the_choice_is_kept_with_the_weights_and_shown(monkeypatch):
    figures = [Figures(1.0, 9.0, 0.5, 0.5), Figures(1.3, 5.0, 0.5, 0.7)]
    monkeypatch.setattr(guidance, "choose", lambda *_: figures)
    monkeypatch.setattr(guidance, "IMAGE_COST", 0.1)
    said = []
    monkeypatch.setattr(Log, "info", lambda self, text, **_: said.append(text))
    run = fit(recipe(FIRST["fm"], steps=3, sets=LABELLED)).run
    assert run.tree()["sample"]["guidance"] == "auto", "a longer training chooses again"
    assert read_weights(run.model_file).part.sample["guidance"] == 1.3
    trained = load_trained(run, "cpu")
    assert trained.model.guidance_scale(trained.part.sample["guidance"]) == 1.3
    results = results_of(run)
    assert results["guidance"] == {"guidance": 1.3, "fd": 5.0, "recall": 0.5, "agreement": 0.7}
    assert results["sample_seconds"] > 0
    figures_of_best = "guidance 1.3 (fd 5, recall 0.50, 0.70 of the right class)"
    assert f"{figures_of_best}, chosen from 1, 1.3 by 144 validation and 356 training images" in said
    assert any(text.startswith("1,000 samples take ") for text in said)
    assert Image.open(results["picture"]).size[0] > 0


@pytest.mark.parametrize(
    "sets", [(LABELLED[0], "sample.guidance=1.5"), LABELLED[1:], (*LABELLED, "model.label_dropout=0")]
)
def test_nothing_is_chosen_where_it_is_typed_or_cannot_act(sets, monkeypatch):
    monkeypatch.setattr(guidance, "choose", lambda *_: pytest.fail("chosen"))
    run = fit(recipe(FIRST["fm"], steps=2, sets=sets)).run
    assert run.status().get("guidance") is None
    assert load_trained(run, "cpu").model.guidance_scale("auto") == 1.0
