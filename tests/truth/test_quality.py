"""The figures of `gz bench` against torch-fidelity called directly; the LeNet that they stand on."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from refused import refused
from safetensors.torch import save
from sklearn.metrics import balanced_accuracy_score
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from gzcli.core.errors import MissingError
from gzcli.data.packs.open import open_pack
from gzcli.judge.bench import read_statistics
from gzcli.judge.real import RealImages
from gzcli.metrics import classifier, features, networks
from gzcli.metrics import second as second_judge
from gzcli.metrics.classifier import NetFeatures
from gzcli.metrics.features import LENET, LeNet, lenet, moved_images
from gzcli.metrics.metric import column_of, metrics
from gzcli.metrics.pretrained import INCEPTION, inception
from gzcli.metrics.quality.classes import legible, total_variation
from gzcli.metrics.quality.fd import frechet_distance
from gzcli.metrics.quality.neighbours import prdc
from gzcli.metrics.second import SECOND_TRAINING, ResNet, erased, second
from gzcli.store import files
from gzcli.store.paths import cache_dir


@pytest.fixture(scope="module")
def digits():
    return open_pack("digits")


@pytest.fixture(scope="module")
def net(digits):
    return lenet(digits)


def test_frechet_against_torch_fidelity_and_known_gaussians_and_total_variation():
    rng = np.random.default_rng(0)
    f1, f2 = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64)), rng.normal(1, 2, size=(300, 64))
    stats = [fid_features_to_statistics(torch.from_numpy(f)) for f in (f1, f2)]
    direct = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(f1, f2) == pytest.approx(direct, rel=1e-9)
    x = np.random.default_rng(1).normal(size=1000)
    x = (x - x.mean()) / x.std(ddof=1)
    assert frechet_distance((3 + 2 * x)[:, None], (1 + 5 * x)[:, None]) == pytest.approx(4 + 9, abs=1e-9)
    rng = np.random.default_rng(2)
    f = rng.normal(size=(20, 64))  # fewer images than features
    assert frechet_distance(f, f) == pytest.approx(0, abs=1e-5)
    constant = np.ones((20, 64))
    assert frechet_distance(constant, constant + 1) == pytest.approx(64)
    rotated = f @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    assert frechet_distance(f, f[::-1]) == pytest.approx(0, abs=1e-5) and frechet_distance(f, rotated) > 1
    five = np.ones((5, 3))
    for wrong, right in ((five[:1], five), (five, np.ones((5, 4))), (five * np.nan, five)):
        refused("", frechet_distance, wrong, right)
    assert total_variation(np.array([0, 0, 1, 1]), np.array([0, 1]), 2) == 0
    assert total_variation(np.zeros(5, int), np.ones(7, int), 2) == 1
    assert total_variation(np.array([0, 0, 0, 1]), np.array([0, 1]), 2) == pytest.approx(0.25)


def test_lenet_knows_digits_or_rotations_and_comes_back_from_its_cache(digits, net):
    assert net.accuracy > 0.9 and not net.rotations
    assert net.accuracy == pytest.approx((net.predict(digits.images("test")) == digits.labels("test")).mean())
    again = lenet(digits, say=lambda text: pytest.fail(f"trained again: {text}"))
    assert again.hash == net.hash
    images = digits.images("test")[:7]
    assert np.array_equal(again.features(images), net.features(images))
    assert net.features(images).shape == (7, 64) and net.features(images).dtype == np.float64
    assert net.features(images).min() < 0  # before the ReLU
    images = digits.images("test")[:9]
    one_by_one = np.concatenate([net.features(images[i : i + 1]) for i in range(9)])
    assert np.allclose(net.features(images), one_by_one, atol=1e-4)
    logits = net.logits_of(net.features(images))
    direct = net.net(torch.from_numpy(images).float() / 255).detach().numpy()
    assert logits.dtype == np.float64 and np.allclose(logits, direct, atol=1e-4)


def test_a_metric_by_rotations_is_the_column_of_its_judge():
    columns = {name: column_of(f"{name}_rot").name for name in ("fd", "kid", "recall")}
    assert columns == {"fd": "fd_rot", "kid": "kid_lenet", "recall": "recall_lenet"}


@pytest.mark.slow
def test_a_judge_of_no_labels_or_of_labels_that_are_noise_tells_rotations(monkeypatch):
    """Nothing can be told of noise: of four rotations a quarter is right by chance."""
    for module, name in ((features, "LENET"), (second_judge, "SECOND")):
        monkeypatch.setattr(module, name, replace(getattr(module, name), steps=150, batch=32))
    bare = Striped((3, 8, 8))
    for judge in (lenet, second):
        net = judge(bare)
        assert net.rotations and net.accuracy > 0.95 and net.chance == 0.25 and net.alive
        assert (net.predict(np.rot90(bare.images("test"), 3, (2, 3)).copy()) == 3).mean() > 0.95
    said: list[str] = []
    labelled = replace(bare, classes=("a", "b"))
    net = lenet(labelled, say=said.append)
    assert net.rotations and net.alive and "did not learn its classes" in said[-1]
    again = lenet(labelled, say=pytest.fail)
    assert (again.hash, again.accuracy, again.chance) == (net.hash, net.accuracy, net.chance)
    net = lenet(replace(labelled, noise=True))
    assert net.rotations and not net.alive and net.accuracy < 0.3


def test_attributes_are_judged_by_a_balanced_accuracy(digits):
    """Against scikit-learn; an attribute of which all images are alike does not count."""
    rng = np.random.default_rng(0)
    labels = (rng.random((355, 3)) < (0.1, 0.5, 0)).astype(np.int64)
    logits = np.where(rng.random((355, 3)) < 0.3, 1, -1) * rng.random((355, 3))
    pack = SimpleNamespace(images=digits.images, labels=lambda split: labels)
    net = SimpleNamespace(rotations=False, features=lambda images: images, logits_of=lambda images: logits)
    expected = [balanced_accuracy_score(labels[:, i], logits[:, i] > 0) for i in range(2)]
    assert classifier._skill(net, pack) == (pytest.approx(np.mean(expected), abs=1e-12), 0.5)


def test_augmentation_moves_and_erases_but_keeps_what_is_shown():
    """A square stays a square of about its area and place; the erased square is the only other change."""
    torch.manual_seed(0)
    image = torch.zeros(200, 1, 24, 36)
    image[:, :, 8:16, 12:24] = 1
    x = moved_images(image)
    area, place = x.sum((1, 2, 3)) / 96, (x * torch.arange(36)).sum((1, 2, 3)) / x.sum((1, 2, 3)) - 17.5
    assert 0.8 < area.min() < 0.9 < 1.1 < area.max() < 1.25
    assert 2 < place.abs().max() < 0.08 * 36 + 0.6 and abs(place.mean()) < 0.5
    x = erased(image)
    shifted = sum(
        ((x == image.roll((i, j), (2, 3))).all((1, 2, 3))) for i in (-2, -1, 0, 1, 2) for j in range(-3, 4)
    )
    assert 70 < int(shifted.sum()) < 130, "half are only shifted"


class Coloured:
    """400 and 99 digits of a light colour on a dark one, in noise, as a pack."""

    def __init__(self):
        self.digits = open_pack("digits")
        facts = {"shape": (3, 16, 16), "digest": "coloured", "name": "coloured", "multilabel": False}
        self.meta = SimpleNamespace(classes=self.digits.meta.classes, **facts)

    def images(self, split):
        share, rng = self.digits.images(split)[: self.count(split)] / 255, np.random.default_rng(len(split))
        back, front = (rng.integers(low, low + 100, (len(share), 3, 1, 1)) for low in (0, 156))
        noise = rng.normal(0, 12, (len(share), 3, 16, 16))
        return (back * (1 - share) + front * share + noise).clip(0, 255).astype(np.uint8)

    def labels(self, split):
        return self.digits.labels(split)[: self.count(split)]

    def count(self, split):
        return 400 if split == "train" else 99


@pytest.mark.slow
def test_shuffled_pixels_of_a_small_colour_set_are_not_precise():
    """A dead judge, of an accuracy of .19, gave .86. After 300 steps in place of 1,500 it may be a tenth."""
    pack = Coloured()
    net, train, test = lenet(pack), pack.images("train"), pack.images("test")
    assert net.alive and not net.rotations and net.accuracy > 0.8
    shuffled = np.random.default_rng(0).permuted(test.reshape(99, 3, 256), axis=2).reshape(test.shape)
    precision, reference = (
        prdc(net.features(x), net.features(test))["precision"] for x in (shuffled, train[:99])
    )
    assert precision < 0.1 < 0.25 < reference


def test_legible_images_are_as_sure_as_most_real_ones():
    """Two classes at the logits (z, −z): the larger probability grows with |z|."""
    rng = np.random.default_rng(0)
    sides = [np.stack([z, -z], 1) for z in (rng.normal(size=4000), np.array([0.0, 0.01, 5, -5, 40, -800]))]
    net = SimpleNamespace(alive=True, rotations=False, logits_of=lambda features: features)
    real, fake = (SimpleNamespace(features=lambda net, z=z: z, knows=lambda net: True) for z in sides)
    meta = SimpleNamespace(multilabel=False)
    judge = SimpleNamespace(
        lenet=net, pack=SimpleNamespace(meta=meta), real=SimpleNamespace(of=lambda split: real)
    )
    figure = legible(judge, fake)["legible"]
    assert figure.value == 4 / 6 and 0 < figure.low < 4 / 6 < figure.high < 1
    assert legible(judge, real)["legible"].value == 0.95
    for dead in ({"alive": False}, {"rotations": True}):
        judge.lenet = SimpleNamespace(**vars(net) | dead)
        assert legible(judge, fake) == {}
    sides = itertools.product((8, 9, 16, 28, 32, 48, 64), (1, 3), (LeNet, ResNet))
    for size, channels, network in sides:
        net, x = network(channels, size, 5), torch.zeros(2, channels, size, size)
        assert net(x).shape == (2, 5) and net.features(x).shape == (2, 64)
        assert sum(p.numel() for p in net.parameters()) < 500_000, size
        refused("7×7", network, channels, 7, 5)


def judges(path: Path) -> dict[str, bytes]:
    """The file of a judge in other states than it was written in."""
    whole, (state, texts) = path.read_bytes(), files.read_tensors(path)
    first = next(iter(state))
    facts = json.loads(texts["judge"])
    return {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "text": b"no judge\n" * 99,
        "other keys": save({f"x.{name}": value for name, value in state.items()}, texts),
        "a tensor less": save({name: value for name, value in state.items() if name != first}, texts),
        "other shapes": save(state | {first: state[first][:3].contiguous()}, texts),
        "other numbers": save(state | {first: state[first].half()}, texts),
        "not a number": save(state | {first: state[first] * float("nan")}, texts),
        "no metadata": save(state),
        "of other images": save(state, {"judge": json.dumps(facts | {"channels": 3})}),
        "of other classes": save(state, {"judge": json.dumps(facts | {"outputs": -1})}),
        "a list": save(state, {"judge": "[]"}),
    }


def test_a_damaged_judge_is_made_again_with_a_line(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "LENET", replace(LENET, steps=2))
    monkeypatch.setattr(networks, "SHIPPED", tmp_path / "judges")
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    made = lenet(digits).hash
    (path,) = tmp_path.glob("features/lenet-*.safetensors")
    whole = path.read_bytes()
    for how, content in judges(path).items():
        path.write_bytes(content)
        said: list[str] = []
        assert lenet(digits, say=said.append).hash == made, how
        assert f"`{path}` is damaged" in said[0] and "recreates it" in said[0], (how, said)
        assert path.read_bytes() == whole
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / path.name).write_bytes(path.read_bytes())
    path.unlink()
    assert lenet(digits, say=pytest.fail).hash == made, "one that comes with gz"


def test_features_of_real_images_are_kept_by_content_and_made_again_where_damaged(
    digits, net, tmp_path, monkeypatch
):
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    said: list[str] = []
    few = replace(RealImages(digits, say=said.append).reference(None), images=digits.images("test")[:8])
    first = replace(few, _features={}).features(net)
    (path,) = cache_dir("features", "real").iterdir()
    assert digits.meta.digest in path.name and net.hash[:16] in path.name
    whole = path.read_bytes()
    for damaged in (b"", b"text\n" * 99, bytes(4096), whole[:-9]):
        path.write_bytes(damaged)
        again = replace(few, _features={}).features(net)
        assert np.allclose(again, first) and path.read_bytes() == whole
        assert "is damaged" in said.pop() and not said
    computed = NetFeatures.features

    def of_one(self: NetFeatures, images: np.ndarray) -> np.ndarray:
        """The number of features is that of one image."""
        return computed(self, images) if len(images) == 1 else pytest.fail("computed again")

    monkeypatch.setattr(NetFeatures, "features", of_one)
    assert np.array_equal(replace(few, _features={}).features(net), first)


def test_files_without_statistics_or_weights_are_told(net, tmp_path, monkeypatch):
    path = tmp_path / "own.npz"
    arrays = ({"mu": np.zeros(64)}, {"mu": np.full(64, np.nan), "sigma": np.eye(64)})
    arrays += ({"mu": np.zeros(64), "sigma": np.eye(64), "n": np.zeros(3)},)
    arrays += ({"mu": np.array(["x"] * 64), "sigma": np.eye(64)},)
    for wrong in (b"", b"text\n" * 99, b"PK\x03\x04" + bytes(99), *arrays):
        if isinstance(wrong, bytes):
            path.write_bytes(wrong)
        else:
            np.savez(path, **wrong)
        refused("the statistics cannot be read", read_statistics, path, metrics()["fd"], net)
    monkeypatch.setenv("GZ_HOME", str(tmp_path))
    error = refused("", inception, error=MissingError)
    assert INCEPTION in error.message and str(cache_dir("weights") / INCEPTION) in error.hint
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    refused("not a weights file", inception, tmp_path / "bad.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    refused("does not contain", inception, tmp_path / "other.pth")


def test_training_is_a_function_of_the_data_alone(digits, tmp_path, monkeypatch):
    """The global generator, the number of threads and the caller's random state neither matter nor change."""
    monkeypatch.setattr(features, "LENET", replace(LENET, steps=6))
    monkeypatch.setattr(second_judge, "SECOND_TRAINING", replace(SECOND_TRAINING, steps=6))
    states = []
    for threads, seed in ((1, 1), (2, 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        monkeypatch.setenv("GZ_HOME", str(tmp_path / str(seed)))
        torch.set_num_threads(threads)
        try:
            states.append([lenet(digits).hash, second(digits).hash])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert torch.equal(before, torch.get_rng_state())
    assert states[0] == states[1] and states[0][0] != states[0][1]


@dataclass
class Striped:
    """A set of any shape whose images have a top, dark above and light below, without labels or with those
    that say nothing; or all of it is noise."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    noise: bool = False

    @property
    def meta(self):
        facts = {"classes": self.classes, "digest": repr(self), "name": "striped", "multilabel": False}
        return SimpleNamespace(shape=self.shape, **facts)

    def images(self, split):
        c, h, w = self.shape
        ramp, rng = np.linspace(0, 160, h)[None, None, :, None], np.random.default_rng(len(split))
        return (ramp * (not self.noise) + rng.integers(0, 90, (600, c, h, w))).astype(np.uint8)

    def labels(self, split):
        return np.random.default_rng(len(split)).integers(0, 2, 600) if self.classes else None


def test_figures_behave(digits, net):
    """On the same images, on others of the set, on half of the classes, and on noise."""
    # writers follow one another in this set
    spread = np.linspace(0, len(digits.images("train")) - 1, 300).astype(int)
    real, train = digits.images("test")[:300], digits.images("train")[spread]
    features = net.features(real)

    def measure(fake):
        figures = {}
        for metric in ("fd", "kid_lenet", "prc_lenet"):
            figures |= metrics()[metric].compare(net.features(fake), features, True)
        assert all(v.low <= v.value <= v.high for v in figures.values()), figures
        return {name: v.value for name, v in figures.items()}

    same, floor = measure(real), measure(train)
    half = measure(np.array(train)[np.asarray(digits.labels("train"))[spread] < 5])
    noise = measure(np.random.default_rng(3).integers(0, 256, real.shape, dtype=np.uint8))
    assert same["precision_lenet"] == same["recall_lenet"] == same["coverage_lenet"] == 1
    for name in ("fd", "kid_lenet"):
        assert same[name] < floor[name] < half[name] < noise[name]
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert floor["precision_lenet"] > 0.7 and floor["recall_lenet"] > 0.7
    assert half["precision_lenet"] > 0.7 and half["recall_lenet"] < floor["recall_lenet"] - 0.2
    assert noise["precision_lenet"] < 0.5 * floor["precision_lenet"]


@pytest.fixture
def random_inception(tmp_path, monkeypatch):
    """A file of random weights in the layout of torch-fidelity's Inception."""
    module = "torch_fidelity.feature_extractor_inceptionv3"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        state = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.slow
def test_inception_metrics_equal_torch_fidelity_on_grey_images_repeated(digits, random_inception):
    net = inception(random_inception)
    assert len(net.hash) == 64
    fake, real = digits.images("train")[:12], digits.images("test")[:8]
    of_fake, of_real = net.features(fake), net.features(real)
    made = {name: metrics()[name].compare(of_fake, of_real, True) for name in ("fid", "kid", "is")}

    class Grey(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return torch.from_numpy(np.repeat(self.images[i], 3, 0))

    options = dict.fromkeys(("fid", "kid", "isc", "save_cpu_ram"), True)
    options |= dict.fromkeys(("cuda", "cache", "verbose"), False)
    options |= {"kid_subset_size": 4, "feature_extractor_weights_path": str(random_inception)}
    direct = calculate_metrics(input1=Grey(fake), input2=Grey(real), **options)
    keys = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    for name, key in (keys | {"is": "inception_score_mean"}).items():
        assert made[name][name].value == pytest.approx(direct[key], rel=1e-4, abs=1e-9), name
