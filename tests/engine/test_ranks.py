"""Verbs in several processes, which are threads here: each does its share, the result is that of one."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pixelwise import Pixelwise, fake_run, fitted

import gzcli.core.ranks as of_one
from gzcli.core.errors import DivergedError, GzError, MissingError
from gzcli.data.packs.open import open_pack
from gzcli.engine.__main__ import record_status
from gzcli.engine.log import Log
from gzcli.judge import alarm, bench, ood, scores
from gzcli.metrics.features import lenet
from gzcli.models.nn import shared_batch_norm
from gzcli.store import files
from gzcli.store.jobs import AlarmJob, BenchJob, OodJob
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run


class Ranks:
    """Two ranks of torch.distributed as threads of this process."""

    def __init__(self, monkeypatch, world=2):
        self.local, self.slots = threading.local(), [None] * world
        self.barrier = threading.Barrier(world, timeout=600)
        self.calls, self.world = 0, world
        dist = torch.distributed
        monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(self.local, "rank"))
        monkeypatch.setattr(dist, "get_rank", lambda: self.local.rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        monkeypatch.setattr(dist, "all_gather_object", self.gather)
        monkeypatch.setattr(dist, "all_gather", self.gather_tensors)
        monkeypatch.setattr(dist, "all_reduce", self.add)

    def gather(self, parts, value):
        self.slots[self.local.rank] = value
        self.barrier.wait()
        parts[:] = self.slots
        self.calls += self.local.rank == 0
        self.barrier.wait()

    def gather_tensors(self, parts, value):
        values = [None] * self.world
        self.gather(values, value)
        [part.copy_(source) for part, source in zip(parts, values, strict=True)]

    def add(self, value):
        values = [None] * self.world
        self.gather(values, value.clone())
        value.copy_(sum(values))

    def __call__(self, work):
        """What `work(rank)` returns on each rank, or the GzError that it raises there. Raises the first of
        other errors, not what waits for its rank in vain."""
        results, errors, alone = [None] * self.world, [], []

        def one(rank):
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except GzError as e:
                results[rank] = e
            except threading.BrokenBarrierError as e:
                alone.append(e)
            except Exception as e:
                errors.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        [t.start() for t in threads], [t.join() for t in threads]
        for error in (*errors, *alone):
            raise error
        return results


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(ood, "histograms", lambda *args: None)  # which take longer to draw than the scores
    return Ranks(monkeypatch)


@pytest.fixture
def folders(tmp_path):
    """Of one process, and of the two ranks."""
    made = [tmp_path / name for name in ("one", "rank0", "rank1")]
    [folder.mkdir() for folder in made]
    return made


CPU = torch.device("cpu")
OOD = OodJob(run="model", ins="digits", outs=("digits-ab",), n=200, checkpoint="last")
OOD = replace(OOD, scores=("nll", "typicality", "far", "noisy"))
BENCH = BenchJob(runs=("model",), data="digits", n=60, checkpoint="last")


def test_two_ranks_score_what_one_scores(ranks, tmp_path, folders, monkeypatch):
    """Half the images each, rank 0 alone writes, and `scores.csv` is the same to the bit."""
    fake_run(tmp_path, monkeypatch, scores)
    scored, real = [], Pixelwise.score_noisy
    counted = lambda self, x, *, noise: scored.append(len(x)) or real(self, x, noise=noise)  # noqa: E731
    monkeypatch.setattr(Pixelwise, "score_noisy", counted)
    one = ood.run(OOD, folders[0], CPU, Log())
    alone, scored[:] = sum(scored), []
    first, second = ranks(lambda rank: ood.run(OOD, folders[1 + rank], CPU, Log(rank=rank)))
    assert second == {} and not list(folders[2].iterdir())
    assert first["processes"] == 2 and first["results"] == one["results"]
    assert (folders[1] / "scores.csv").read_bytes() == (folders[0] / "scores.csv").read_bytes()
    assert sum(scored) == alone, "each image is scored once"


def test_two_ranks_raise_the_alarms_of_one(ranks, tmp_path, folders, monkeypatch):
    """By two runs with two seeds, whose pictures are an array of foreign images."""
    for name in ("model", "other"):
        fake_run(tmp_path, monkeypatch, scores, name=name)
    np.savez(tmp_path / "mine.npz", images=np.asarray(open_pack("digits-ab").images("test")[:70]))
    how = {"scores": ("nll", "far", "noisy"), "others": ("other",), "seeds": 2, "full": True}
    job = AlarmJob("model", "digits", str(tmp_path / "mine.npz"), fpr=0.1, checkpoint="last", **how)
    one = alarm.run(job, folders[0], CPU, Log())
    first, second = ranks(lambda rank: alarm.run(job, folders[1 + rank], CPU, Log(rank=rank)))
    assert second == {} and not list(folders[2].iterdir())
    assert first["processes"] == 2 and first["files"] == one["files"]
    assert (folders[1] / "alarm.csv").read_bytes() == (folders[0] / "alarm.csv").read_bytes()


def test_an_error_on_one_rank_is_told_on_all(ranks, tmp_path, monkeypatch):
    """The last batch of the 200 images, which rank 1 alone has, is of 8."""
    fake_run(tmp_path, monkeypatch, scores)
    monkeypatch.setattr(Pixelwise, "score_noisy", lambda self, x, *, noise: x.mean((1, 2, 3)) / (len(x) != 8))
    job = replace(OOD, scores=("noisy",))
    errors = ranks(lambda rank: ood.run(job, tmp_path, CPU, Log(rank=rank)))
    assert all(isinstance(e, DivergedError) for e in errors), errors
    assert all("`noisy` is not finite for 8 of 8 images" in e.message for e in errors)


def test_the_first_error_of_a_rank_is_raised_not_that_others_wait_for_it(ranks):
    def work(rank: int) -> None:
        assert rank == 1, "the cause"
        ranks.barrier.wait()

    with pytest.raises(AssertionError, match="the cause"):
        ranks(work)


def test_more_ranks_than_batches_share_smaller_ones(tmp_path, monkeypatch):
    fake_run(tmp_path, monkeypatch, scores)
    monkeypatch.setattr(ood, "histograms", lambda *args: None)
    job = replace(OOD, n=11)
    one = ood.run(job, tmp_path, CPU, Log())
    many = Ranks(monkeypatch, 4)
    first, *rest = many(lambda rank: ood.run(job, tmp_path, CPU, Log(rank=rank)))
    assert rest == [{}] * 3
    for a, b in zip(one["results"], first["results"], strict=True):
        assert (a["score"], a["n_out"]) == (b["score"], b["n_out"])
        assert a["auroc"] == pytest.approx(b["auroc"], abs=1e-9)


def test_two_ranks_compare_as_one_does(ranks, tmp_path, folders, monkeypatch):
    """Each computes the features of a share of the images: of the samples, of the real ones, of the floor."""
    fake_run(tmp_path, monkeypatch, bench, model=fitted(conditional=True))
    net, seen = lenet(open_pack("digits")), []

    def features(self, images):
        seen.append((of_one.rank(), len(images)))
        return net.features(images)

    counting = type("Counting", (type(net),), {"features": features})
    monkeypatch.setattr(bench, "lenet", lambda *a, **k: counting(**vars(replace(net, batch=20))))
    cache = cache_dir("features", "real")
    shutil.rmtree(cache, ignore_errors=True)
    one = bench.run(BENCH, folders[0], CPU, Log())
    alone, seen[:] = sum(n for _, n in seen), []
    shutil.rmtree(cache)
    first, second = ranks(lambda rank: bench.run(BENCH, folders[1 + rank], CPU, Log(rank=rank)))
    assert second == {} and not list(folders[2].iterdir())
    assert first["provenance"]["processes"] == 2
    shares = [sum(n for rank, n in seen if rank == which) for which in (0, 1)]
    assert sum(shares) == alone and min(shares) > 0.4 * alone, "no image is seen twice"
    a, b = (result["rows"][0]["metrics"] for result in (one, first))
    assert a.keys() == b.keys() and {"bpd", "bpd|y", "fd"} <= a.keys()
    for key in a.keys() - {"samples_per_s"}:
        assert a[key] == pytest.approx(b[key], rel=1e-9), key
    drawn = [np.load(next((folder / "samples").glob("*.npz")))["samples"] for folder in folders[:2]]
    assert np.array_equal(*drawn)


def test_what_a_rank_records(tmp_path):
    """A rank whose partner has gone must not write its broken connection over the partner's error."""
    run = Run(tmp_path)
    for rank, error in ((0, MissingError("no weights")), (1, RuntimeError("Connection closed by peer"))):
        with pytest.raises(type(error)), record_status(run, Log(tmp_path, rank=rank)):
            raise error
    assert run.status()["error"]["message"] == "no weights" and run.status()["code"] == 3
    hour = time.time() - 3600
    for saved_at, ended, earlier in ((None, None, 5.0), (hour + 60, None, 65.0), (hour, hour + 60, 65.0)):
        before = {"saved_at": saved_at, "ended": ended, "pid": os.getpid(), "work_from": -99.0}
        run.update(state="running", started=hour, seconds=5.0, work=3.0, **before)
        with files.lock(run.lock), record_status(run, Log(tmp_path)):
            assert run.state == "running"
        assert earlier <= run.seconds < earlier + 10 and 3.0 <= run.work < 13


def test_a_killed_start_counts_until_its_last_checkpoint(tmp_path):
    run = Run(tmp_path)
    if (pid := os.fork()) == 0:
        with record_status(run, Log(tmp_path)):
            while time.process_time() < 0.2:
                pass
            run.save_step(3)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (run.state, run.status()["step"]) == ("killed", 3)
    seconds, work = run.seconds, run.work
    assert min(seconds, work) > 0.1
    with record_status(run, Log(tmp_path)):
        run.save_step(4)
    assert seconds < run.seconds < seconds + 5 and work < run.work < work + 5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_two_ranks_is_that_of_one(ranks, momentum):
    """Its outputs, running statistics, gradients, and the gradients of a penalty on a gradient."""
    plain = [torch.nn.BatchNorm2d(3, momentum=momentum).double() for _ in range(3)]
    for norm in plain:
        torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(0))
        norm.bias.data.fill_(0.3)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.7
    for norm in plain[1:]:
        shared_batch_norm.share_batch_norm(norm)
        assert type(norm) is shared_batch_norm.SharedBatchNorm

    def all_of(norm, x):
        x = x.clone().requires_grad_()
        y = norm(norm(x))
        (slope,) = torch.autograd.grad(y.tanh().square().sum(), x, create_graph=True)
        loss = (y.sigmoid().flatten(1).sum(1) + slope.square().flatten(1).sum(1)).mean()
        loss.backward()
        statistics = [b.double() for b in norm.buffers()]
        return y.detach(), x.grad, norm.weight.grad, norm.bias.grad, statistics

    y, dx, dw, db, statistics = all_of(plain[0], x)
    halves = ranks(lambda rank: all_of(plain[1 + rank], x[3 * rank : 3 * rank + 3]))
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(torch.cat([each[0] for each in halves]), y)
    close(torch.cat([each[1] for each in halves]) / 2, dx)  # each rank's loss is the mean over its half
    close((halves[0][2] + halves[1][2]) / 2, dw)
    close((halves[0][3] + halves[1][3]) / 2, db)
    for _, _, _, _, moments in halves:
        close(moments, statistics)
    norm = plain[1].eval()  # and in eval mode no rank waits for another
    close(norm(x), plain[0].eval()(x))
