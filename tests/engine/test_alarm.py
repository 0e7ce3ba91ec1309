"""`gz ood --input`, ensembles and seeds on a model whose likelihood can be counted by hand."""

import csv
import json
import math
import re
import shlex
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pixelwise import Pixelwise, fake_run, fitted, nll_of
from refused import refused

from gzcli.cli import ood as ood_verb
from gzcli.cli import out
from gzcli.core.errors import DivergedError, MissingError, UsageError
from gzcli.core.types import DataInfo, ImageNoise
from gzcli.data.packs.batches import quantise
from gzcli.data.packs.open import open_pack
from gzcli.data.sets import benchmarks
from gzcli.data.sets.benchmarks import Benchmark, find_benchmark
from gzcli.data.sets.registry import OwnSet
from gzcli.engine.log import Log
from gzcli.judge import alarm, methods, ood, scores
from gzcli.judge.alarm import heat
from gzcli.judge.images import Pick
from gzcli.judge.local import few, with_defects
from gzcli.judge.scores import map_of
from gzcli.launch import scoring
from gzcli.launch.sampling import digest
from gzcli.metrics.alarms.defects import DEFECT_KINDS
from gzcli.metrics.alarms.local import fit_local
from gzcli.metrics.alarms.methods import METHODS
from gzcli.metrics.detection import detection
from gzcli.metrics.interval import subset
from gzcli.models.autoregressive.pixelcnn import PixelCNN
from gzcli.models.diffusion.ddpm import DDPM
from gzcli.models.gan.cyclegan import CycleGAN
from gzcli.models.gan.implicit import Search
from gzcli.models.gan.wgan import WGAN
from gzcli.models.normalizing_flow.glow import Glow
from gzcli.models.vae.aae import AAE
from gzcli.models.vae.vae import VAE
from gzcli.report import terminal
from gzcli.store.jobs import AlarmJob, OodJob

CPU = torch.device("cpu")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ood, "histograms", lambda *args: None)
    return fake_run(tmp_path, monkeypatch, scores)


@pytest.fixture
def pictures(tmp_path):
    """A folder of 24 digits and six photographs in folders, whatever their names mean, and a broken file."""
    folder = tmp_path / "mine"
    digits, odd = open_pack("digits").images("test"), open_pack("patches", size=16, channels=1).images("test")
    for kind, images in (("train/digit", digits[:24]), ("test/odd", odd[:6])):
        for i, image in enumerate(images):
            path = folder / f"{kind}{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(image[0])).save(path)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def job(folder, **changes):
    settings = {"run": "model", "ins": "digits", "input": str(folder), "fpr": 0.05, "checkpoint": "last"}
    return AlarmJob(**settings | {"full": True} | changes)


def judged(folder, pictures, **changes):
    return alarm.run(job(pictures, **changes), folder, CPU, Log())


def compared(folder, *outs, **changes):
    return ood.run(OodJob("model", "digits", outs or ("digits-ab",), **changes), folder, CPU, Log())


def csv_rows(path, role=None):
    return [row for row in csv.DictReader(path.open()) if role in (None, row.get("role"))]


def told_of(capsys, result):
    """What is printed of the pictures of a result: lines on stdout, and stderr."""
    capsys.readouterr()
    ood_verb.show(result)
    output = capsys.readouterr()
    return output.out.splitlines(), output.err


def test_every_picture_has_a_p_value_by_images_that_no_score_saw(trained, tmp_path, pictures, monkeypatch):
    shown, draw = [], alarm.sheet
    monkeypatch.setattr(alarm, "sheet", lambda blocks: shown.append(blocks) or draw(blocks))
    result = judged(tmp_path, pictures, scores=("nll",))
    assert json.loads((tmp_path / "alarm.json").read_text()) == json.loads(json.dumps(result))
    pack = open_pack("digits")
    both = np.concatenate([pack.images("val"), pack.images("test")])
    order = np.random.default_rng(0).permutation(len(both))
    held_out = nll_of(trained, both[order[len(order) // 4 :]])
    assert result["compared"] == {"split": "val+test", "n": len(held_out), "needed": 19}
    assert len(result["files"]) == 30 and result["fpr"] == 0.05 and result["in"] == "digits"
    for row in result["files"]:
        value = row["scores"]["nll"]
        high, low = 1 + (held_out >= value - 1e-2).sum(), 1 + (held_out <= value + 1e-2).sum()
        assert row["p"] == pytest.approx(min(1, min(2 * high - 1, 2 * low) / (len(held_out) + 1)))
        beyond = value > result["threshold"] or value < result["thresholds_low"]["nll"]
        assert row["flagged"] == (row["p"] <= 0.05) == beyond
    odd = [row for row in result["files"] if row["file"].startswith("test/odd")]
    assert len(odd) == 6 and all(row["flagged"] for row in odd), "folders called train and test are both read"
    p = [row["p"] for row in result["files"]]
    assert p == sorted(p), "the strangest comes first"
    assert result["unreadable"] == ["`broken.png` cannot be decoded: not a readable image"]
    rows = csv_rows(tmp_path / "alarm.csv")
    assert [row["file"] for row in rows] == [row["file"] for row in result["files"]]
    assert [float(row["nll"]) for row in rows] == [row["scores"]["nll"] for row in result["files"]]
    assert result["seeds"] == 1 and all("spread" not in row for row in result["files"]), "it has no noise"
    assert min(Image.open(tmp_path / "alarm.png").size) > 100
    (flagged, rest), n = shown[0], result["flagged"]
    assert flagged[0].name == f"flagged: {n}" and rest[0].name == f"not flagged: {30 - n}, first 16"
    words = [tuple(words) for block in (flagged, rest) for row in block for words in row.under]
    assert words == [(row["file"], f"p {row['p']:.2g}") for row in result["files"][: n + 16]]


def test_how_pictures_were_read_is_in_the_notes(trained, tmp_path, monkeypatch):
    """Whatever a terminal shows: a script and `--quiet` see no other line of it."""
    folder = tmp_path / "deep"
    folder.mkdir()
    for i, image in enumerate(open_pack("digits").images("test")[:12]):
        Image.fromarray(image[0].astype(np.uint16) * 16).save(folder / f"{i}.png")
    for _ in range(2):  # packed now, and found
        result = alarm.run(job(folder, scores=("nll",)), tmp_path, CPU, Log(mode="quiet"))
        (note,) = (note for note in result["notes"] if "nearly black" in note)
        assert note.startswith("`input`: 12 images of 16 bits")
    foreign = ood.run(OodJob("model", "digits", (str(folder),)), tmp_path, CPU, Log(mode="quiet"))
    assert any("nearly black" in note for note in foreign["notes"])


def test_a_method_without_a_model_needs_images_that_the_scores_do_not_use(tmp_path):
    """The scores of a set with few held-out images use all its training images."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "good.npz", images=rng.integers(0, 256, (60, 8, 8), np.uint8))
    pack = open_pack(tmp_path / "good.npz")
    n = pack.meta.counts["train"]
    for used, left in ((n, 0), (n - 11, 11), (n - 12, 12)):
        good = Pick(pack, "train", np.arange(used))
        bad, _ = with_defects(good)
        assert set(methods.without_model(good, bad)) == ({"combined"} if left >= 12 else set())


def test_several_scores_are_one_p_value(trained, tmp_path, pictures):
    result = judged(tmp_path, pictures, scores=("nll", "far"), fpr=0.1)
    alone = [judged(tmp_path, pictures, scores=(name,)) for name in ("nll", "far")]
    p = [{row["file"]: row["p"] for row in each["files"]} for each in alone]
    for row in result["files"]:
        assert row["p"] == pytest.approx(min(1, 2 * min(each[row["file"]] for each in p)))
    assert result["threshold"] is None and list(result["thresholds"]) == ["nll", "far"]
    assert any("Bonferroni" in note and "5 %" in note for note in result["notes"])
    first = judged(tmp_path, pictures)
    (name,) = first["thresholds"]
    table = {key: value for key, value in first["choice"].items() if key != "combined"}
    assert set(table) == {"nll", "typicality", "complexity", "far"} and len(first["choice"]) == 5
    assert table[name] >= max(table.values()) - 0.02, "without a name that which detects most"
    for fpr, n in ((0.001, None), (0.01, 50)):
        with pytest.raises(UsageError, match=r"a false-alarm rate of .* needs") as error:
            judged(tmp_path, pictures, scores=("nll",), fpr=fpr, n=n)
        assert "--fpr" in error.value.hint and ("-n" in error.value.hint) == (n is not None)
        (least,) = re.findall(r"`--fpr ([\d.]+)%` or more", error.value.hint)
        result = judged(tmp_path, pictures, scores=("nll",), fpr=float(least) / 100, n=n)
        every = sum(map(open_pack("digits").meta.counts.get, ("val", "test")))
        assert result["compared"]["n"] == (n or every), "the least rate works"
        for larger in re.findall(r"`-n (\d+)`", error.value.hint):
            judged(tmp_path, pictures, scores=("nll",), fpr=fpr, n=int(larger))


def noisy(rows):
    return {row["file"]: (row["scores"]["noisy"], row["spread"]["noisy"], row["p"]) for row in rows}


@pytest.mark.parametrize("levels", [17, 2])
def test_a_copy_is_judged_alike_wherever_it_stands(trained, tmp_path, monkeypatch, levels):
    """By a score that is mostly noise; a binary model's draw of a picture is that of its copies, too."""
    fake_run(tmp_path, monkeypatch, scores, model=fitted(levels=levels))
    images = np.asarray(open_pack("digits").images("test"))
    np.savez(tmp_path / "copies.npz", images=np.concatenate([images[:3], images[[3] * 40], images[4:9]]))
    result = judged(tmp_path, tmp_path / "copies.npz", scores=("noisy",))
    rows = noisy(result["files"])
    assert result["seeds"] == 4 and rows["3"][1] > 0
    assert len({rows[str(i)] for i in range(3, 43)}) == 1 and len(set(rows.values())) == 9
    monkeypatch.setattr("gzcli.judge.scores.BATCH_SIZE", 14)
    np.savez(tmp_path / "alone.npz", images=images[3:4])
    alone = judged(tmp_path, tmp_path / "alone.npz", scores=("noisy",))
    assert noisy(alone["files"])["0"] == pytest.approx(rows["3"], rel=1e-5)


def test_held_out_images_are_scored_by_the_rule_of_pictures(trained, tmp_path):
    """A copy of a held-out image has its score, so it ties with it; and each seed has other noise."""
    pack = open_pack("digits")
    compared, *_ = alarm.split_held_out(pack)
    np.savez(tmp_path / "val.npz", images=replace(compared, index=np.sort(compared.index)).images())
    draws = []
    for seed in (0, 1):
        result = judged(tmp_path, tmp_path / "val.npz", scores=("noisy",), seed=seed)
        p = np.array([row["p"] for row in result["files"]])
        n = len(p)
        places = [min(n + 1, 2 * k + 1, 2 * (n + 2 - k)) for k in range(1, n + 1)]  # ties of the k-th highest
        assert np.sort(np.rint(p * (n + 1))).tolist() == sorted(places)
        draws.append(noisy(result["files"]))
    assert draws[0] != draws[1]


def test_an_ensemble_has_the_draws_of_its_noisiest_run(trained, tmp_path, monkeypatch):
    """In any order of its runs, one of which has a score without noise."""

    class Steady(Pixelwise):
        def score_noisy(self, x, *, noise):
            return x.mean((1, 2, 3))

    fake_run(tmp_path, monkeypatch, scores, model=Steady(trained.info, table=trained.model.table), name="b")
    np.savez(tmp_path / "mine.npz", images=np.asarray(open_pack("digits").images("test")[:5]))
    results = [
        judged(tmp_path, tmp_path / "mine.npz", run=first, others=(further,), scores=("noisy",))
        for first, further in (("model", "b"), ("b", "model"))
    ]
    assert [result["seeds"] for result in results] == [4, 4]
    first, second = (noisy(result["files"]) for result in results)
    assert first.keys() == second.keys() and all(second[file] == pytest.approx(first[file]) for file in first)


def test_blank_pictures_are_flagged_by_the_lower_tail(trained, tmp_path):
    """Where the held-out images suffice; else a note says for which rate they do. Typicality has one tail."""
    images = np.asarray(open_pack("digits").images("test")[:9])
    np.savez(tmp_path / "mine.npz", images=np.concatenate([images, np.zeros_like(images[:1])]))
    for fpr, flags in ((0.006, True), (0.004, False)):
        result = judged(tmp_path, tmp_path / "mine.npz", scores=("nll",), fpr=fpr)
        (blank,) = [row for row in result["files"] if row["file"] == "9"]
        assert (blank["p"], blank["side"]) == (pytest.approx(2 / 376), "low") and blank["flagged"] == flags
        assert any("use `--fpr 0.6%`" in note for note in result["notes"]) != flags
        assert (result["thresholds_low"]["nll"] is None) != flags
    result = judged(tmp_path, tmp_path / "mine.npz", scores=("typicality",), fpr=0.02)
    assert {row["side"] for row in result["files"]} == {"high"}
    assert result["thresholds_low"] == {"typicality": None}


@pytest.mark.parametrize("members", [(), ("flat",)])
def test_a_model_that_overflows_flags_the_picture(trained, flat, tmp_path, monkeypatch, capsys, members):
    """By one draw that is not finite, alone and in an ensemble. A held-out image must have finite scores."""
    bad = torch.tensor([math.inf, math.nan, -math.inf])  # of a black, a grey and a white picture

    def score_noisy(self, x, *, noise):
        level, plain = x.mean((1, 2, 3)), x.flatten(1).std(1) == 0
        wrong = plain & (noise.rand(len(x)) < 0.7)
        return torch.where(wrong, bad[level.round().long() + 1], level + noise.randn(len(x)))

    monkeypatch.setattr(Pixelwise, "score_noisy", score_noisy)
    images = np.array(open_pack("digits").images("test")[:9])
    images[:3] = np.array([0, 127, 255], np.uint8)[:, None, None, None]
    np.savez(tmp_path / "mine.npz", images=images)
    request = job(tmp_path / "mine.npz", scores=("noisy",), others=members)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = alarm.run(request, tmp_path, CPU, Log())
    text = (tmp_path / "alarm.json").read_text()
    assert json.loads(text)["files"] == result["files"] and "Infinity" not in text and "NaN" not in text
    first, rest = result["files"][:3], result["files"][3:]
    assert {row["file"] for row in first} == {"0", "1", "2"} and all(row["flagged"] for row in first)
    assert {row["p"] for row in first} == {1 / (result["compared"]["n"] + 1)}
    assert {row["scores"]["noisy"] for row in first} == {row["spread"]["noisy"] for row in first} == {None}
    assert all(math.isfinite(row["scores"]["noisy"]) for row in rest)
    assert any("the score of 3 images is not finite" in note for note in result["notes"])
    assert [row["noisy"] for row in csv_rows(tmp_path / "alarm.csv")[:3]] == ["inf"] * 3
    lines, _ = told_of(capsys, result)
    assert ["not finite" in line for line in lines[1:]] == [True] * 3 + [False] * (result["flagged"] - 3)
    monkeypatch.setattr(Pixelwise, "score_noisy", lambda self, x, *, noise: x.mean((1, 2, 3)) / 0)
    refused("`noisy` is not finite", alarm.run, request, tmp_path, CPU, Log(), error=DivergedError)


def test_pictures_and_their_table(trained, tmp_path, pictures, capsys):
    one = judged(tmp_path, pictures / "test/odd00.png", scores=("nll",))
    assert [(row["file"], row["flagged"]) for row in one["files"]] == [("odd00.png", True)]
    np.savez(tmp_path / "some.npz", images=np.asarray(open_pack("digits").images("test")[:3]))
    many = judged(tmp_path, tmp_path / "some.npz", scores=("nll",))
    assert sorted(row["file"] for row in many["files"]) == ["0", "1", "2"]
    refused("can be decoded", judged, tmp_path, pictures / "broken.png", scores=("nll",), error=MissingError)
    long = pictures / "test" / f"{'holiday ' * 9}\n.png"  # which takes one line of the table
    long.write_bytes((pictures / "test/odd00.png").read_bytes())
    result = judged(tmp_path, pictures, scores=("nll", "far"), fpr=0.1)
    lines, said = told_of(capsys, result)
    assert lines[0].split() == ["file", "p", "nll", "far"] and max(map(len, lines)) <= 80
    place = f"gz ood far --input {shlex.quote(result['input'])} --fpr 10%"
    for maps, flag in ((True, "--map"), (False, "--fail")):  # at the same rate
        assert terminal.ending(result, "far", maps)[1][0] == f"{place} {flag}"
    assert len(lines) == 1 + result["flagged"] and any("…" in line and "holiday" in line for line in lines)
    assert f"flagged: {result['flagged']} of 31 images by nll, far, against 375 held-out images" in said
    assert "on average, at most 10 % of images like those of `" in said and "are flagged: 3.1 of 31" in said
    assert "`broken.png` cannot be decoded" in said
    lines, said = told_of(capsys, judged(tmp_path, pictures, scores=("noisy", "nll"), fpr=0.3))
    assert lines[0].split() == ["file", "p", "noisy", "±"] and max(map(len, lines)) <= 80
    assert "means over 4 noise draws" in said and "miss small defects" in said
    many = [result["files"][0] | {"file": f"{i}.png", "flagged": True} for i in range(25)]
    lines, said = told_of(capsys, result | {"files": many})
    assert len(lines) == 21 and "and 5 more" in said


def test_maps_show_the_strangest(trained, tmp_path, pictures, monkeypatch):
    def map_nll(self, x, *, noise):
        k = ((x + 1) * 8).round().long().flatten(1)
        return -self.table.log().expand(len(x), -1, -1).gather(2, k[..., None]).view(len(x), *x.shape[2:])

    monkeypatch.setattr(Pixelwise, "map_nll", map_nll, raising=False)
    monkeypatch.setattr(alarm, "SHEET_IMAGES", 5)
    for png in (False, True):
        result = judged(tmp_path, pictures, scores=("typicality",), fpr=0.15, maps=True, png=png)
        sides = ([row["file"] for row in result["files"] if row["flagged"] == side] for side in (True, False))
        flagged, unflagged = sides
        assert len(flagged) > 5 and len(unflagged) > 5  # the sheet has some of each, with their maps
        mapped = [row["file"] for row in result["files"]] if png else flagged[:5] + unflagged[:5]
        assert result["map"] == "nll" and list(result["outputs"]["maps"]) == mapped
        assert Image.open(next(iter(result["outputs"]["maps"].values()))).size == (16, 16)
    # `local` is the maximum of this map against those of held-out images
    result = judged(tmp_path, pictures, scores=("local",), maps=True)
    settings, pack = result["settings"], open_pack("digits")
    held_out, fitting, _ = alarm.split_held_out(pack)

    def maps(images):
        x = quantise(torch.from_numpy(np.array(images)), 17)
        return map_nll(trained.model, x, noise=None).numpy()

    normal = maps(few(fitting).images())
    local = fit_local(normal, settings["scales"], relate=settings["relative"])
    ordered = replace(held_out, index=np.sort(held_out.index))
    usual = local.tops(maps(ordered.images()))
    by_name = {row["file"]: row for row in result["files"]}
    digit = np.asarray(pack.images("test"))[:24]
    for i, value in enumerate(local.tops(maps(digit))):
        row = by_name[f"train/digit{i:02d}.png"]
        assert row["scores"]["local"] == pytest.approx(value, rel=1e-4)
        p = (1 + (usual >= value - 1e-4 * abs(value)).sum()) / (len(usual) + 1)
        assert row["p"] == pytest.approx(p, abs=1.5 / len(usual))
    assert settings["map"] == "nll" and result["map"] == "local"
    chosen = judged(tmp_path, pictures)["choice"]
    assert "local" in chosen and list(chosen)[-1] == "combined" and min(chosen.values()) >= 0
    monkeypatch.delattr(Pixelwise, "map_nll")
    refused("has no anomaly maps", judged, tmp_path, pictures, maps=True)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_map_of_a_pixel_model_sums_to_its_nll(conditional):
    info = open_pack("digits").info(levels=17)
    model = PixelCNN.of(info, conditional=conditional, hidden=8, head=8, dilations=(1, 2)).eval()
    [torch.nn.init.normal_(p, std=0.3) for p in model.parameters()]
    x = torch.from_numpy(np.array(open_pack("digits").images("test")[:3])).float() / 127.5 - 1
    x = ((x + 1) * 8).round() / 8 - 1
    with torch.no_grad():
        pixels, whole = model.map_nll(x, noise=None), -model.log_prob(x)
        changed = x.clone()
        changed[:, :, 9:] = -1
        again = model.map_nll(changed, noise=None)
    assert pixels.shape == (3, 16, 16)
    torch.testing.assert_close(pixels.sum((1, 2)), whole, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(again[:, :9], pixels[:, :9])  # no pixel knows of those after it


@pytest.mark.parametrize("model", [VAE, AAE, DDPM])
def test_maps_of_reconstructions(model):
    info = open_pack("digits").info(levels=17)
    small = {"channels": 8, "mult": (1,), "attention": (), "timesteps": 20} if model is DDPM else {}
    made = model.of(info, **small).eval()
    x = torch.from_numpy(np.array(open_pack("digits").images("test")[:4])).float() / 127.5 - 1
    noise = ImageNoise(0, list(range(4)), CPU)
    with torch.no_grad():
        maps = made.map_recon(x, noise=noise)
    assert maps.shape == (4, 16, 16) and (maps >= 0).all() and maps.max() > 0
    assert map_of(made, ["elbo"], "m") == map_of(made, ["recon"], "m") == "recon"


def test_maps_of_gans_and_their_colours():
    made = WGAN.of(open_pack("digits").info(levels=17), width=8, latent=4).eval()
    samples = made.generator(ImageNoise(0, range(3), CPU).randn(3, 4)).detach()
    changed = samples.clone()
    changed[0, :, 4:9, 4:9] += 1.5

    def of(x):
        with torch.no_grad():
            noise = ImageNoise(0, range(3), CPU)
            return made.map_inversion(x, noise=noise, search=Search(60, lr=0.2, feature=0.0))

    whole, distances = of(samples), of(changed)
    assert distances.shape == (3, 16, 16) and distances[0, 4:9, 4:9].mean() > 3 * distances[0].mean()
    assert torch.equal(distances[1:], whole[1:]), "an image's map is its own"
    assert map_of(made, ["disc"], "wgan") == "inversion"
    made = CycleGAN.of(DataInfo((1, 16, 16), 256), width=4, blocks=1).eval()
    x = torch.rand(3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        distances, score = made.map_cycle(x, noise=None).mean((1, 2)), made.score_cycle(x, noise=None)
    torch.testing.assert_close(distances, score, atol=1e-5, rtol=1e-4)
    maps = np.zeros((2, 8, 8), np.float32)
    maps[0, 2, 3], maps[1] = 9, 0.1
    seen = heat(maps, usual=5.0).astype(int).sum(1)
    assert seen[0, 2, 3] == seen.max() and seen[1].max() < seen.max() / 4, "an ordinary image stays dark"
    maps[1, 4, 4:6] = np.inf, np.nan
    again = heat(maps, usual=5.0).astype(int).sum(1)
    assert (again[1, 4, 4:6] == seen.max()).all() and (again[1, :4] == seen[1, :4]).all()


@pytest.mark.parametrize("conditional", [False, True])
def test_maps_of_flows_are_high_where_their_latents_are_strange(conditional, monkeypatch):
    """Of two scales, whose places are 2 × 2 and 4 × 4 pixels."""
    info = open_pack("digits").info(levels=17)
    made = Glow.of(info, scales=2, depth=1, hidden=4, conditional=conditional).eval()
    z = [torch.zeros(2, *shape) for shape in made.shapes]
    assert [s[1:] for s in made.shapes] == [(8, 8), (4, 4)]
    z[0][0, 0, 4, 4], z[1][1, 0, 1, 2] = 2.0, 4.0
    monkeypatch.setattr(made, "encode", lambda v: (z, torch.zeros(2)))
    with torch.no_grad():
        maps = made.map_nll(torch.zeros(2, 1, 16, 16), noise=ImageNoise(0, range(2), CPU))
    maps = maps + 0.5  # what is expected of a value
    torch.testing.assert_close(maps.sum((1, 2)), torch.tensor([2.0, 8.0]), atol=1e-3, rtol=0)
    assert maps[0, 8:10, 8:10].min() > maps[0].max() - 1e-5 > 0.1 > 1e-5 > maps[0, :7].max()
    assert maps[1, 5:7, 9:11].min() > maps[1].max() - 1e-5 and map_of(made, ["typicality"], "glow") == "nll"


@pytest.fixture
def flat(trained, tmp_path, monkeypatch):
    """A second run, whose distributions are half as sharp."""
    model = Pixelwise(trained.info, table=(trained.model.table + 1 / 17) / 2)
    return fake_run(tmp_path, monkeypatch, scores, model=model, name="flat")


def test_runs_together_and_seeds(trained, flat, tmp_path, pictures, monkeypatch):
    result = compared(tmp_path, scores=("waic", "nll"), n=40, others=("flat",))
    assert result["runs"] == ["model", "flat"]
    rows, pack = csv_rows(tmp_path / "scores.csv", "in"), open_pack("digits")
    seen = np.stack([nll_of(each, pack.images("test")[subset(355, 40)]) for each in (trained, flat)])
    waic = seen.mean(0) + ((seen - seen.mean(0)) ** 2).mean(0)
    np.testing.assert_allclose([float(row["waic"]) for row in rows], waic, rtol=1e-4)
    held_out = np.stack([nll_of(each, pack.images("val")) for each in (trained, flat)])
    z = (seen - held_out.mean(1, keepdims=True)) / held_out.std(1, keepdims=True)
    np.testing.assert_allclose([float(row["nll"]) for row in rows], z.mean(0), atol=1e-3)
    tables = [{"a": {"s": np.ones(3)}, "held": {"s": np.ones(5)}}] * 2
    assert scores.combined(tables, ["s"], "held")["a"]["s"].tolist() == [0, 0, 0], "scores that do not vary"
    refused("needs several runs", compared, tmp_path, scores=("waic",), n=9)
    result = judged(tmp_path, pictures, scores=("waic",), others=("flat",))
    assert all(row["flagged"] for row in result["files"] if "odd" in row["file"])
    fake_run(tmp_path, monkeypatch, scores, model=fitted(levels=2), name="binary")
    refused("and 2 levels", judged, tmp_path, pictures, scores=("nll",), others=("binary",))
    result = compared(tmp_path, scores=("noisy", "nll"), n=60, seeds=3, seed=5)
    rows = csv_rows(tmp_path / "scores.csv")
    noisy = [f"noisy@{seed}" for seed in (5, 6, 7)]
    assert [key for key in rows[0] if key.startswith("noisy")] == noisy and "png" in rows[0]
    auroc = []
    for key in noisy:
        sides = ([float(row[key]) for row in rows if row["role"] == role] for role in ("in", "out"))
        auroc.append(detection(*sides)["auroc"])
    by_score = {row["score"]: row for row in result["results"]}
    assert by_score["noisy"]["auroc"] == pytest.approx(np.mean(auroc))
    assert by_score["noisy"]["spread"]["auroc"] == pytest.approx(np.std(auroc, ddof=1)) and np.std(auroc) > 0
    assert by_score["nll"]["spread"]["auroc"] == 0
    again = judged(tmp_path, pictures, scores=("noisy",), seeds=2)
    assert again["seeds"] == 2 and all(row["spread"]["noisy"] > 0 for row in again["files"])


@pytest.fixture
def openood(tmp_path, monkeypatch):
    """OpenOOD's `data` folder for a benchmark of the digits: twenty images of each set, in odd order."""
    toy = Benchmark("toy", "digits", ("digits-ab", "svhn"), ("dtd",))
    monkeypatch.setitem(benchmarks.BENCHMARKS, "toy", toy)
    lists = tmp_path / "data" / "benchmark_imglist" / "digits"
    lists.mkdir(parents=True)
    for called, images in (
        ("digits", open_pack("digits").images("test")[:20]),
        ("digits-ab", open_pack("digits-ab").images("test")[:20]),
        ("texture", open_pack("patches").images("test")[:20]),
    ):
        (tmp_path / "data" / "images_classic" / called).mkdir(parents=True)
        lines = []
        for i, image in enumerate(images):
            name = f"{called}/{97 * i % 20:02d}.png"
            picture = np.asarray(image).transpose(1, 2, 0).squeeze()
            Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "data" / "images_classic" / name)
            lines.append(f"{name} {i % 10}")
        (lists / f"test_{called}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def test_the_images_of_openoods_lists_are_scored_in_their_order(trained, tmp_path, openood, capsys):
    outs = [source.key for source in scoring.with_lists(find_benchmark("toy"), openood, out.info)]
    assert outs == ["digits-ab", "dtd"] and "left out: `svhn`" in capsys.readouterr().err
    options = {"benchmark": "toy", "imglists": str(openood), "scores": ("nll", "noisy"), "seeds": 2}
    result = compared(tmp_path, *outs, full=True, **options)
    near = [row for row in result["results"] if row["group"] == "near" and row["score"] == "noisy"]
    assert [row["out"] for row in near] == ["digits-ab", "mean of near"]
    assert near[0]["auroc"] == near[1]["auroc"] and near[0]["spread"] == near[1]["spread"]
    rows = [(row["out"], row["n_in"], row["n_out"]) for row in result["results"] if row["score"] == "nll"]
    assert rows == [(name, 20, 20) for name in ("digits-ab", "mean of near", "dtd", "mean of far")]
    rows = csv_rows(tmp_path / "scores.csv", "in")
    expected = nll_of(trained, open_pack("digits").images("test")[:20])
    np.testing.assert_allclose([float(row["nll@0"]) for row in rows], expected, rtol=1e-5)
    assert any("those of OpenOOD's lists" in note for note in result["notes"])
    next((openood / "images_classic" / "texture").iterdir()).unlink()
    refused("1 of the 20 images", compared, tmp_path, *outs, full=True, **options, error=MissingError)
    (tmp_path / "private.png").write_bytes(
        next((openood / "images_classic" / "digits").iterdir()).read_bytes()
    )
    for name in ("../../private.png", str(tmp_path / "private.png")):
        (openood / "benchmark_imglist" / "digits" / "test_texture.txt").write_text(f"{name} 0\n")
        refused("1 of the 1 images", compared, tmp_path, *outs, full=True, **options, error=MissingError)
    with pytest.raises(MissingError, match="has no `benchmark_imglist`"):
        scoring.with_lists(find_benchmark("toy"), tmp_path, out.info)


def test_all_scores_are_those_of_the_model(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Pixelwise, "score_regret", Pixelwise.score_noisy)
    result = compared(tmp_path, scores=("all",), n=20)
    scores = {row["score"] for row in result["results"] if not row["baseline"]}
    assert scores == {"far", "noisy", "regret", "nll", "typicality", "complexity", "gradnorm", "ensemble"}
    assert all(math.isfinite(row["auroc"]) for row in result["results"])


@pytest.fixture
def good(tmp_path):
    """A folder of 70 pictures of the digit 0 and 1, in one level."""
    pack = open_pack("digits")
    images = np.asarray(pack.images("train"))[np.asarray(pack.labels("train")) < 2][:70]
    for i, image in enumerate(images):
        path = tmp_path / "good" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(path)
    return tmp_path / "good"


def by_method(good, pictures, folder, **changes):
    settings = {"method": "combined", "fpr": 0.02, "maps": True} | changes
    return alarm.run(AlarmJob("", str(good), str(pictures), **settings), folder, CPU, Log())


def test_good_pictures_alone_make_an_alarm(good, tmp_path, pictures):
    result = by_method(good, pictures, tmp_path)
    assert json.loads((tmp_path / "alarm.json").read_text()) == json.loads(json.dumps(result))
    assert result["run"] is None and result["compared"]["n"] == 49 and result["compared"]["folds"] == 20
    assert result["compared"]["bound"] > 2 * 0.02 and len(result["files"]) == 30
    named = by_method(good, pictures, tmp_path / "named", method="pca_local")
    assert not result["choice"] and 0 <= named["choice"]["pca_local"] <= 1
    for each in (result, named):
        assert each["compared"]["n"] == 49
        assert set(each["power"]) == set(DEFECT_KINDS) and 0 <= each["compared"]["drift"] <= 1
        assert any("synthetic defects seen at 2 %: paste " in note for note in each["notes"])
    for each in (result, named):
        odd = [row["flagged"] for row in each["files"] if row["file"].startswith("test/odd")]
        assert len(odd) == 6 and all(odd)
    assert list(result["thresholds"]) == ["combined"] and result["outputs"]["maps"]
    again = by_method(good, pictures, tmp_path)
    assert again["files"] == result["files"], "the second time from the cache"
    # further good pictures calibrate instead, and nothing is fitted to them
    further = tmp_path / "further.npz"
    np.savez(further, images=np.asarray(open_pack("digits").images("test"))[:60])
    result = by_method(good, pictures, tmp_path, method="pca", calibrate=str(further), fpr=0.05)
    assert result["compared"] | {"n": 60, "folds": 1, "bound": 0.05} == result["compared"]
    assert all(row["p"] >= 1 / 61 for row in result["files"])


def test_files_of_any_names(good, tmp_path):
    """Tables contain the bytes of a name. A map shows what can be drawn of it."""
    good = good.rename(tmp_path / "caf\udce9")
    names = {"caf\udce9.png", "new\nline.png", "😀.png", 'a,"b.png'}
    for name in names:
        (tmp_path / "today").mkdir(exist_ok=True)
        (tmp_path / "today" / name).write_bytes((good / "000.png").read_bytes())
    result = by_method(good, tmp_path / "today", tmp_path, method="pca")
    assert {row["file"] for row in result["files"]} == set(result["outputs"]["maps"]) == names
    with (tmp_path / "alarm.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["file"] for row in csv.DictReader(file)} == names
    assert len(digest(tmp_path / "today")) == 64


def test_a_copy_of_an_image_for_fitting_does_not_calibrate(good, tmp_path, pictures):
    """Whatever its name and folder are. It would score too low, so that every new good image is flagged."""
    further = tmp_path / "further"
    further.mkdir()
    for i, path in enumerate(sorted(good.iterdir())):
        (further / f"again{i}.png").write_bytes(path.read_bytes())
    words = {"method": "pca", "calibrate": str(further), "fpr": 0.05}
    with pytest.raises(UsageError, match="needs 19 further good images, but there are only 0: 70 images of"):
        by_method(good, pictures, tmp_path, **words)
    new = np.asarray(open_pack("digits").images("test"))[:40]
    for i, image in enumerate([*new, new[0]]):
        Image.fromarray(image[0]).save(further / f"new{i}.png")
    mixed = by_method(good, pictures, tmp_path, **words)
    (note,) = (note for note in mixed["notes"] if "left out" in note)
    assert note.startswith("71 images of") and mixed["compared"]["n"] == 40
    np.savez(tmp_path / "new.npz", images=new)
    alone = by_method(good, pictures, tmp_path, **words | {"calibrate": str(tmp_path / "new.npz")})
    assert alone["thresholds"] == pytest.approx(mixed["thresholds"]) and "left out" not in str(alone["notes"])
    assert by_method(good, pictures, tmp_path, **words | {"method": "png"})["compared"]["n"] == 110, "no fit"


def test_a_copy_among_the_good_images_is_in_no_other_fold(good, tmp_path, pictures):
    alone = by_method(good, pictures, tmp_path, method="pca")
    for i in range(30):
        (good / f"zz{i}.png").write_bytes((good / f"{i:03d}.png").read_bytes())
    result = by_method(good, pictures, tmp_path, method="pca")
    assert result["compared"] | {"split": ""} == alone["compared"] | {"split": ""}
    assert result["notes"][0] == f"30 images of `{good}` left out, as copies of others"


@pytest.mark.parametrize("further", [False, True])
def test_a_copy_of_a_training_image_is_not_compared_with(trained, tmp_path, pictures, monkeypatch, further):
    """Neither one of `--calibrate` nor a held-out image of the run's own set."""
    pack = open_pack("digits")
    images, copied = np.asarray(pack.images("test")), np.asarray(pack.images("train"))[:50]
    if further:
        words = {"scores": ("nll",), "calibrate": str(tmp_path / "further.npz")}
        np.savez(tmp_path / "further.npz", images=np.concatenate([copied, 255 - images[:60]]))
        result = judged(tmp_path, pictures, **words)
        assert result["compared"]["n"] == 60
        assert any(note.startswith("50 images of") for note in result["notes"])
        np.savez(tmp_path / "further.npz", images=copied)
        refused("but there are only 0: 50 images of", judged, tmp_path, pictures, **words)
        return
    read = type(pack).images
    changed = np.concatenate([copied, images[50:]])
    monkeypatch.setattr(
        type(pack), "images", lambda self, of, **_: changed if of == "test" else read(self, of)
    )
    held_out, fitted, (note,) = alarm.split_held_out(pack)
    assert len(held_out.index) + len(fitted.index) == pack.meta.counts["val"] + 305
    assert note.startswith("50 images of `digits` left out")


def test_an_alarm_of_too_few_good_pictures_says_how_many_it_needs(good, tmp_path, pictures):
    with pytest.raises(UsageError, match="good images, but there are only 70") as error:
        by_method(good, pictures, tmp_path, fpr=0.01)
    line = f"gz ood --in {good} --input {pictures} --fpr 1.5%"
    assert error.value.hint.startswith(
        f"use `--fpr 1.5%` or more, as in `{line}`; or give 99 images, or more"
    )
    assert by_method(good, pictures, tmp_path, fpr=0.015)["compared"]["n"] == 70, "the line works"
    few = by_method(good, pictures, tmp_path, method="pca_local", fpr=0.015)
    assert not few["choice"], "without a choice"
    with pytest.raises(UsageError, match="further good images, but there are only 24"):
        np.savez(tmp_path / "few.npz", images=np.asarray(open_pack("digits").images("test"))[:24])
        by_method(good, pictures, tmp_path, calibrate=str(tmp_path / "few.npz"))


def test_a_method_without_training_tells_sets_apart_beside_baselines(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ood, "histograms", lambda *args: None)
    images = np.asarray(open_pack("digits").images("test"))
    np.savez(tmp_path / "marked.npz", images=np.where(np.arange(16) < 3, 255 - images[:40], images[:40]))
    out = str(tmp_path / "marked.npz")
    result = ood.run(OodJob("", "digits", (out,), method="pca", n=100), tmp_path, CPU, Log())
    rows = {row["score"]: row for row in result["results"]}
    assert list(rows) == ["pca", "png", "mean", "knn_pixels", "pca_local"]
    assert [row["baseline"] for row in rows.values()] == [False] + [True] * 4
    assert rows["pca"]["auroc"] == 1 and (rows["pca"]["n_in"], rows["pca"]["n_out"]) == (100, 40)
    assert all(len(row["ci"]["auroc"]) == 2 for row in rows.values()) and result["run"] is None
    train = METHODS["pca"].fit(np.asarray(open_pack("digits").images("train")))
    scores_of = [float(row["pca"]) for row in csv_rows(tmp_path / "scores.csv", "out")]
    marked = np.asarray(open_pack(OwnSet(tmp_path / "marked.npz"), foreign=True).images("test"))
    np.testing.assert_allclose(scores_of, train.score(marked), rtol=1e-4)
    ood_verb.show(result)
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "pca"
    # a run whose best score is not above the interval of a method is told so
    best = {"out": "x", "score": "nll", "auroc": 0.9, "ci": {"auroc": (0.85, 0.94)}}
    rows = [best, {"out": "x", "score": "pca", "auroc": 0.86}, {"out": "y", "score": "pca", "auroc": 1.0}]
    assert "not clearly better than `pca` without a model (0.860)" in terminal.beaten_by(best, rows)
    assert terminal.beaten_by(best, [best, rows[1] | {"auroc": 0.84}]) == ""
