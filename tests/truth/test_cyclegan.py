"""CycleGAN: losses, nets and pool against plain ones, what `sample` starts from, batches of two domains."""

import math

import draws
import numpy as np
import pytest
import torch
from draws import images, noise, train_batches
from helpers import fit, recipe, trainer
from PIL import Image
from refused import refused
from torch import nn
from zoo import CASES

from gzcli.core.types import Batch, BatchNoise, DataInfo, no_progress
from gzcli.data.packs.batches import TrainBatches, to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.engine.checkpoint import extra_of, weights_of
from gzcli.models.gan.cyclegan import MEMORY_IMAGES, CycleGAN, ImagePool, Translator
from gzcli.models.nn.perceptual import gaussian_window, ssim_parts
from gzcli.recipe.resolve import resolve

INFO = DataInfo((1, 16, 16), 17, ("A", "B"))
SMALL = {"width": 4, "halvings": 1, "blocks": 1, "disc_width": 4, "disc_layers": 1}


def batch(a: torch.Tensor, b: torch.Tensor, step: int = 0) -> Batch:
    return draws.batch(a, step, second_domain=b)


def model(info: DataInfo = INFO, **options) -> CycleGAN:
    """A small one with weights large enough for its translators to differ."""
    torch.manual_seed(0)
    net = CycleGAN.of(info, **SMALL | options)
    for p in net.parameters():
        p.data = 0.3 * torch.randn_like(p)
    return net


def test_losses_and_figures_term_by_term():
    net, a, b = model(cycle=7.0, identity=0.3), images(3), images(3, seed=1)
    losses = net.loss(batch(a, b), "generator")
    g, f = net.a_to_b, net.b_to_a
    gan = ((net.disc_b(g(a)) - 1) ** 2).mean() + ((net.disc_a(f(b)) - 1) ** 2).mean()
    cycle = (f(g(a)) - a).abs().mean() + (g(f(b)) - b).abs().mean()
    identity = (g(b) - b).abs().mean() + (f(a) - a).abs().mean()
    for name, value in {"gan": gan, "cycle": cycle, "identity": identity}.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], gan + 7 * cycle + 7 * 0.3 * identity)
    net, a, b = model(pool=0), images(3), images(3, seed=1)
    losses = net.loss(batch(a, b), "discriminator")
    expected = 0
    for disc, real, fake in ((net.disc_a, a, net.b_to_a(b)), (net.disc_b, b, net.a_to_b(a))):
        expected += (((disc(real) - 1) ** 2).mean() + (disc(fake) ** 2).mean()) / 2
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert all(p.grad is None for net in (net.a_to_b, net.b_to_a) for p in net.parameters())
    net, x, y = model(cycle=7.0).eval(), images(4), torch.tensor([0, 1, 1, 0])
    loss = net.loss(Batch(x, y, torch.arange(4), noise(4)))["loss"]
    back = torch.where((y == 0).view(-1, 1, 1, 1), net.b_to_a(net.a_to_b(x)), net.a_to_b(net.b_to_a(x)))
    torch.testing.assert_close(loss, 7 * (back - x).abs().mean())
    net, x, y = model().eval(), images(6), torch.tensor([0, 1, 0, 0, 1, 1])
    with torch.no_grad():
        figures = net.measure(Batch(x[i : i + 4], y[i : i + 4], torch.arange(4), noise(4)) for i in (0, 4))
        cycle = net.loss(Batch(x, y, torch.arange(6), noise(6)))["loss"] / net.cycle
        a, b = x[y == 0], x[y == 1]
        same = torch.cat([net.b_to_a(a) - a, net.a_to_b(b) - b]).abs().mean()
        pairs = torch.cat([a, b]), torch.cat([net.a_to_b(a), net.b_to_a(b)])
        like = ssim_parts(*((t + 1) / 2 for t in pairs), gaussian_window(11, 1.5))[0].mean()
    want = {"cycle_l1": float(cycle) / 2, "identity_l1": float(same) / 2, "ssim": float(like)}
    assert figures == pytest.approx(want, rel=1e-4)


def test_the_pool_is_that_of_the_paper():
    """Against a list, image by image, with the same draws."""
    pool, stored = ImagePool(5), []
    for step in range(40):
        x, draws = torch.arange(3 * step, 3 * step + 3).float().view(3, 1, 1, 1), BatchNoise(0, step, total=3)
        shown = pool(x, draws)
        again = BatchNoise(0, step, total=3)
        old, slot = again.rand(3) < 0.5, again.randint(5, 3)
        expected = []
        for i, value in enumerate(x.flatten().tolist()):
            if len(stored) < 5:
                stored.append(value)
                expected.append(value)
            elif old[i]:
                expected.append(stored[slot[i]])
                stored[slot[i]] = value
            else:
                expected.append(value)
        assert shown.flatten().tolist() == expected
        assert pool.images.flatten().tolist()[: len(stored)] == stored
    assert torch.equal(ImagePool(0)(x, BatchNoise(0, total=3)), x)
    whole, parts, x = ImagePool(3), ImagePool(3), images(8)
    shown = whole(x, BatchNoise(0, total=8))
    split = [parts(x[i : i + 2], BatchNoise(0, total=8, start=i)) for i in range(0, 8, 2)]
    assert torch.equal(shown, torch.cat(split)) and torch.equal(whole.images, parts.images)
    net, losses = model(pool=4), {}  # whose discriminators are shown what the pools give
    for step in range(3):
        a, b = images(4, seed=2 * step), images(4, seed=2 * step + 1)
        losses[step] = net.loss(batch(a, b, step), "discriminator")["loss"]
    assert net.pool_a.count == net.pool_b.count == 4
    fresh = lambda *batches: model(pool=0).loss(batch(*batches), "discriminator")["loss"]  # noqa: E731
    assert losses[2] != fresh(a, b, 2), "older fakes among them"
    torch.testing.assert_close(losses[0], fresh(images(4), images(4, seed=1)))


def test_the_pool_is_no_weight_but_goes_on_after_a_resume():
    one, two = model(pool=4), model(pool=4)
    one.loss(batch(images(3), images(3, seed=1)), "discriminator")
    state = one.state_dict()
    assert not any("pool" in key for key in weights_of(state)) and len(extra_of(state)) == 2
    two.load_state_dict(state)
    assert two.pool_a.count == 3 and torch.equal(two.pool_a.images, one.pool_a.images)
    later = lambda: batch(images(3, seed=2), images(3, seed=3), 1)  # noqa: E731
    assert torch.equal(*(net.loss(later(), "discriminator")["loss"] for net in (one, two)))
    case = next(case for case in CASES if case.model == "cyclegan" and case.options["pool"])
    first = fit(recipe(case, steps=2))
    second = trainer(recipe(case, steps=3, sets=(f"train.init={first.run.path / 'model.safetensors'}",)))
    second.resume()
    assert first.model.pool_a.count == 8 and second.model.pool_a.count == 0
    assert torch.equal(first.model.disc_a.head.weight, second.model.disc_a.head.weight)


def test_the_translator_against_plain_layers_and_the_sizes_of_the_paper():
    net, x = Translator(3, 4, 2, 2), images(2, (3, 16, 16))

    def conv(i: int, o: int, kernel: int) -> list[nn.Module]:
        return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(i, o, kernel, bias=kernel == 7 and o == 3)]

    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    norm = lambda o: [nn.InstanceNorm2d(o), nn.ReLU()]  # noqa: E731
    down = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
    up = down | {"output_padding": 1}
    layers = [*conv(3, 4, 7), *norm(4)]
    layers += [nn.Conv2d(4, 8, **down), *norm(8), nn.Conv2d(8, 16, **down), *norm(16)]
    for _ in range(2):
        layers += [Residual(*conv(16, 16, 3), *norm(16), *conv(16, 16, 3), nn.InstanceNorm2d(16))]
    layers += [nn.ConvTranspose2d(16, 8, **up), *norm(8), nn.ConvTranspose2d(8, 4, **up), *norm(4)]
    plain = nn.Sequential(*layers, *conv(4, 3, 7), nn.Tanh())
    for to, p in zip(plain.parameters(), net.parameters(), strict=True):
        to.data = p.data
    torch.testing.assert_close(net(x), plain(x))
    # 11.38 M and 2.765 M parameters, but for the biases that instance norm undoes
    tree = resolve("cyclegan", data="horse2zebra", flags={"scale": "paper"}).tree()
    options = {k: v for k, v in tree["model"].items() if k != "name"}
    with torch.device("meta"):
        net = CycleGAN.of(DataInfo((3, 256, 256), 256, ("A", "B")), **options)
    undone = 64 + 128 + 256 + 9 * 2 * 256 + 128 + 64
    assert sum(p.numel() for p in net.a_to_b.parameters()) == 11_378_179 - undone
    assert sum(p.numel() for p in net.disc_b.parameters()) == 2_764_737 - (128 + 256 + 512)
    assert tree["train"]["steps"] == 200 * 1334 and (options["cycle"], options["identity"]) == (10, 0.5)


def test_directions_and_scores_of_the_domain_that_suits_better():
    net, x = model().eval(), images(5)
    g, f = net.a_to_b(x), net.b_to_a(x)
    how = {"noise": noise(5), "progress": no_progress}
    torch.testing.assert_close(net.translate(x, **how, direction="AtoB").images, g)
    torch.testing.assert_close(net.translate(x, **how, direction="BtoA").images, f)
    torch.testing.assert_close(net.reconstruct(x, **how, direction="BtoA").images, net.a_to_b(f))
    from_a = (f - x).abs().mean((1, 2, 3)) < (g - x).abs().mean((1, 2, 3))
    assert 0 < from_a.sum() < 5, "a test of both ways"
    torch.testing.assert_close(net.translate(x, **how).images, torch.where(from_a.view(-1, 1, 1, 1), g, f))
    net, x = model().eval(), images(4)
    rated = [-disc(x).mean((1, 2, 3)) for disc in (net.disc_a, net.disc_b)]
    torch.testing.assert_close(net.score_disc(x, noise=noise(4)), torch.minimum(*rated))
    ways = (net.a_to_b, net.b_to_a), (net.b_to_a, net.a_to_b)
    cycles = [(back(to(x)) - x).abs().mean((1, 2, 3)) for to, back in ways]
    torch.testing.assert_close(net.score_cycle(x, noise=noise(4)), torch.minimum(*cycles))


def test_samples_are_translations_of_what_was_trained_on():
    net = model().train()
    steps = [(images(12, seed=2 * step), images(12, seed=2 * step + 1)) for step in range(4)]
    first = batch(*steps[0])
    net.on_start(first)
    assert torch.equal(net.memory[0, 12:24], to_uint8(steps[0][0])), "the first batch, over and over"
    for step, (a, b) in enumerate(steps):
        net.loss(batch(a, b, step), "generator")
        net.on_step(step)
    net.on_start(first)  # after a resume
    for domain in (0, 1):
        assert torch.equal(
            net.memory[domain], to_uint8(torch.cat([pair[domain] for pair in steps]))[:MEMORY_IMAGES]
        )
    net.eval()
    memory = net.memory.float() / 127.5 - 1
    for direction, domain, translator in (("AtoB", 0, net.a_to_b), ("BtoA", 1, net.b_to_a)):
        made = net.sample(6, noise=noise(6), progress=no_progress, direction=direction)
        every = translator(memory[domain])
        assert all((every - x).abs().amax((1, 2, 3)).min() < 1e-4 for x in made)
    made = net.sample(40, noise=noise(40), progress=no_progress)
    every = torch.cat([net.a_to_b(memory[0]), net.b_to_a(memory[1])])
    near = (made[:, None] - every).abs().amax((2, 3, 4))
    assert near.min(1).values.max() < 1e-4
    assert 8 < (near.argmin(1) < MEMORY_IMAGES).sum() < 32, "either way"


@pytest.fixture
def folder(tmp_path):
    """Thirty dark pictures in trainA, twenty bright ones in trainB."""
    content = np.random.default_rng(0).integers(0, 100, (50, 12, 12, 3), dtype=np.uint8)
    for i, image in enumerate(content):
        path = tmp_path / "ab" / f"{'trainA' if i < 30 else 'trainB'}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image + (0 if i < 30 else 150)).save(path)
    return tmp_path / "ab"


def batches(pack, **options) -> TrainBatches:
    how = {"seed": 3, "batch_size": 4, "levels": 256, "device": "cpu", "needs": ("second_domain",)}
    return train_batches(pack, **how | options)


def both(part: Batch) -> torch.Tensor:
    """The images of either domain, side by side."""
    return torch.cat([part.x, part.extra["second_domain"]], 1)


def test_each_domain_has_epochs_of_its_own_and_partners_change(folder):
    pack = open_pack(folder)
    labels, source = pack.labels("train"), batches(pack)
    every = [{bytes(image) for image in pack.images("train")[labels == k]} for k in (0, 1)]
    assert [len(members) for members in every] != [30, 20], "some are held out"
    steps = math.lcm(*map(len, every))
    seen = [source.at(step) for step in range(steps)]
    assert all((part.y == 0).all() and (labels[part.index.numpy()] == 0).all() for part in seen)
    domains = torch.cat([s.x for s in seen]), torch.cat([s.extra["second_domain"] for s in seen])
    for members, x in zip(every, domains, strict=True):
        shown = [bytes(image) for image in to_uint8(x).numpy()]
        epochs = [shown[i : i + len(members)] for i in range(0, len(shown), len(members))]
        assert all(set(epoch) == members for epoch in epochs) and epochs[0] != epochs[1]
    few = batches(pack, n=3)
    shown = torch.cat([both(few.at(step)) for step in range(6)]).chunk(2, 1)
    assert [len(x.unique(dim=0)) for x in shown] == [3, 3], "a subset is of each domain"
    source = batches(open_pack("digits-ab"), levels=17, batch_size=72)  # equally many of each, never paired
    source = batches(open_pack("digits-ab"), levels=17, batch_size=72)
    partners = {}
    for step in range(30):
        part = source.at(step)
        for i, b in zip(part.index.tolist(), part.extra["second_domain"], strict=True):
            partners.setdefault(i, set()).add(bytes(to_uint8(b).numpy()))
    assert np.mean([len(met) > 1 for met in partners.values()]) > 0.9


@pytest.mark.parametrize(("levels", "augment"), [(256, ()), (2, ("hflip", "crop=2"))])
def test_a_batch_is_a_function_of_seed_and_step_whatever_the_processes(folder, levels, augment):
    pack, options = open_pack(folder), {"levels": levels, "augment": augment}
    source = batches(pack, **options)
    forward = [source.at(step) for step in (0, 1, 9, 30)]
    for step, whole in zip((30, 9, 1, 0), forward[::-1], strict=True):
        parts = [batches(pack, rank=rank, world=2, **options).at(step) for rank in (0, 1)]
        assert torch.equal(both(whole), both(batches(pack, **options).at(step)))
        assert torch.equal(both(whole), torch.cat([both(part) for part in parts]))
    assert torch.equal(both(whole.rows(slice(1, 3), whole.noise)), both(whole)[1:3])
    second = batches(pack, seed=4, **options).at(0)
    assert not torch.equal(forward[0].extra["second_domain"], second.extra["second_domain"])


def test_streamed_domains_are_the_packed_ones_and_read_in_one_go(folder, home, monkeypatch):
    monkeypatch.setenv("GZ_WORKERS", "0")
    packed = batches(open_pack(folder), augment=("crop=2",))
    monkeypatch.setenv("GZ_HOME", str(home / "other"))
    monkeypatch.setenv("GZ_PACK_LIMIT", "1")
    lazy = batches(open_pack(folder), augment=("crop=2",))
    lazy.at(0)
    reader = lazy.ahead._open["batches"]
    for step in range(20):
        one, two = packed.at(step), lazy.at(step)
        assert torch.equal(both(one), both(two)) and torch.equal(one.y, two.y)
    lazy.at(20)
    assert lazy.ahead._open["batches"] is reader, "begun again at a step"


def test_sets_without_two_domains(folder):
    for data, said in (("mnist", "`mnist` has 10 classes"), ("cifar100", "`cifar100` has 100 classes")):
        e = refused(said, resolve, "cyclegan", data=data)
        names = "patches, digits-ab, pneumoniamnist, breastmnist, horse2zebra"
        assert e.hint.startswith(f"data sets of two classes: {names}; or use a")
    for path in folder.glob("trainB/*"):
        path.rename(folder / "trainA" / path.name)
    (folder / "trainB").rmdir()
    refused(f"`{folder}` has no training images of two domains", batches, open_pack(folder), hint="trainA")
