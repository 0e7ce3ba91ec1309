"""Distances of pictures in folders against clean-fid's own, by our networks on small random weights."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gzcli.data.packs.open import open_pack
from gzcli.engine.log import Log
from gzcli.judge import bench
from gzcli.metrics import pretrained
from gzcli.metrics.features import lenet
from gzcli.store.jobs import BenchJob

CPU = torch.device("cpu")
fid = pytest.importorskip("cleanfid.fid", reason="pip install clean-fid")


def write(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return str(folder)


def ours(folder, data, tmp_path, metric, split="test") -> float:
    job = BenchJob((), data, images=(folder,), metrics=(metric,), n=1000, split=split)
    return bench.run(job, tmp_path, CPU, Log())["rows"][0]["metrics"][metric]


def test_digits_in_folders(tmp_path):
    """`fd` by clean-fid with the set's LeNet in place of Inception; a set against itself is 0."""
    pack = open_pack("digits")
    a, b = (np.asarray(pack.images(split)[:n, 0]) for split, n in (("val", 100), ("test", 355)))
    one, two = write(tmp_path / "one", a), write(tmp_path / "two", b)
    net = lenet(pack)
    how = {"num_workers": 0, "device": CPU, "verbose": False}

    def features(x):  # as clean-fid has pictures: three channels, 0 … 255
        return net.net.features(x[:, :1] / 255)

    def theirs(a: str, b: str) -> float:
        return fid.compute_fid(a, b, mode="legacy_tensorflow", custom_feat_extractor=features, **how)

    distance = ours(one, "digits", tmp_path, "fd")
    assert distance == pytest.approx(theirs(one, two), rel=1e-5) and distance > 1
    assert ours(two, "digits", tmp_path, "fd") == pytest.approx(0, abs=1e-3)
    assert theirs(two, two) == pytest.approx(0, abs=1e-3)


def test_clip_of_colour_pictures(tmp_path, monkeypatch):
    """`fd_clip` is clean-fid's `clip_vit_b_32`, its preparation of the pictures included."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 56}
    small = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, projection_dim=12, **sizes))
    torch.save(small.state_dict(), tmp_path / "clip.bin")
    monkeypatch.setattr(pretrained, "weights", lambda name, **options: tmp_path / "clip.bin")
    network, _ = pretrained.transformer(pretrained.CLIP, pretrained.clip_of)
    encoder = SimpleNamespace(eval=lambda: None, encode_image=lambda x: network(x).image_embeds)
    monkeypatch.setitem(sys.modules, "clip", SimpleNamespace(load=lambda name, device: (encoder, None)))
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)
    big = [np.array(Image.fromarray(x).resize((24, 24), Image.BICUBIC)) for x in base]
    one, two = write(tmp_path / "one", big), write(tmp_path / "two", [x // 2 + 60 for x in big])
    theirs = fid.compute_fid(one, two, model_name="clip_vit_b_32", num_workers=0, device=CPU, verbose=False)
    assert ours(one, two, tmp_path, "fd_clip", "all") == pytest.approx(theirs, rel=1e-4) and theirs > 0
    assert ours(one, one, tmp_path, "fd_clip", "all") == pytest.approx(0, abs=1e-4 * theirs)
