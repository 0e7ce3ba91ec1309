"""`gz league`, without an engine: a training is a run with a status, a judgement figures."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from refused import refused
from uncached import uncached_samples
from zoo import CASES, DDPM, FM

import gzcli
from gzcli.cli.league import LEAGUE_KEYS
from gzcli.core import devices
from gzcli.core.errors import DivergedError, GzError, Interrupted, UsageError
from gzcli.core.sections import LaunchSection, Part
from gzcli.core.types import ImageNoise
from gzcli.data.packs.facts import ONE_CHANNEL
from gzcli.data.packs.open import open_pack
from gzcli.engine.sampler import count_calls, counted
from gzcli.engine.trained import Trained
from gzcli.judge import contestants
from gzcli.judge.contestants import varied
from gzcli.launch import cost, forecast, jobs, launcher
from gzcli.launch import plan as planning
from gzcli.launch.plan import is_of_training, write_run
from gzcli.league import __main__ as child
from gzcli.league import league, loop, training
from gzcli.league.loop import draw_curves
from gzcli.metrics import standings
from gzcli.recipe.yaml import dump
from gzcli.report import cited
from gzcli.store import files, runs, start
from gzcli.store.code import DRAWING, JUDGING, PACKAGE, code_hash
from gzcli.store.run_folder import commit_in
from gzcli.store.runs import Run
from gzcli.testing import Case

FD = dict(zip(product(("vae", "fm", "wgan"), (0, 1)), (90.0, 80.0, 20.0, 24.0, 50.0, 40.0), strict=True))
WORDS = ("league", "--data", "digits", "--budget", "0.2m", "--cpu")


@pytest.fixture
def trained(monkeypatch):
    """The trainings that were started, (model, seed, resumed) in order. `trained.fails` maps some of them to
    an error, for one time, and `trained.seconds` some to their seconds."""

    class Log(list):
        fails: dict = {}
        seconds: dict = {}

    log = Log()

    def train(start, recipe, **how):
        model, seed = recipe.parts[-1].model, recipe.seed
        log.append((model, seed, start.run is not None))
        run = start.run or runs.create(start.request.recipe.card.name, start.request.recipe.key)
        write_run(run, recipe, start.plan)
        files.write_atomic(run.path / "metrics.jsonl", "")
        if error := log.fails.pop((model, seed), None):
            state = "diverged" if isinstance(error, DivergedError) else "interrupted"
            run.update(state=state, error={"message": error.message})
            raise error
        for part in run.stages or [run]:
            part.update(state="finished", step=100, params=1000, peak_memory=10**8, work=6.0)
        seconds = log.seconds.get((model, seed), 12.0)
        run.update(state="finished", seconds=seconds, work=seconds)
        return run

    monkeypatch.setattr(planning.Start, "train", train)
    monkeypatch.setattr(loop, "train_judges", lambda parts, say, by: list(parts))
    return log


@pytest.fixture
def judged(monkeypatch):
    """The jobs that judged a run."""
    log = []

    def do_job(folder, job):
        run = Run(Path(job.runs[0]))
        log.append(job)
        figure = FD[run.model, int(run.tree()["seed"])]
        facts = {"intervals": {"fd": [figure - 1, figure + 1]}, "calls": 20, "sample": {"steps": 10}}
        facts |= {
            "title": run.title,
            "floor": {"fd": 10.0},
            "excess": {"fd": [figure - 10, figure - 12, figure - 8]},
            "n": job.n,
        }
        rows = [
            {"model": run.model, "metrics": {"fd": figure + i, "samples_per_s": 50.0}, **facts}
            for i in range(len(job.variants))
        ]
        result = {"data": "digits", "rows": rows, "floor": {"fd": 10.0}, "directions": {"fd": "down"}}
        result |= {"notes": [], "provenance": {"shape": [1, 16, 16]}}
        files.write_json(folder / "result.json", result)
        return result

    monkeypatch.setattr("gzcli.launch.jobs.do_job", do_job)
    return log


def table(home, name):
    (path,) = (home / "bench").glob(f"league-*/results/{name}.csv")
    return list(csv.DictReader(path.open()))


def test_every_model_is_a_row_and_the_best_is_first(call, home, trained, judged, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(planning, "code_state", lambda: {"commit": "abc", "dirty": False})
    code, shown, said = call(*WORDS, "--models", "vae,fm,wgan", "--seeds", "2", "-n", "100")
    assert code == 0 and trained == [(m, s, False) for s in (0, 1) for m in ("vae", "fm", "wgan")]
    first = [line.split()[:2] for line in shown.splitlines()[1:4]]
    assert first == [["1–3", "fm"], ["1–3", "wgan"], ["1–3", "vae"]], "Student's interval of two seeds"
    assert " 22 " in shown and "12 ± 25" in shown, "± is of intervals alone"
    assert all(len(line) <= 80 or "/" in line for line in (shown + said).splitlines())
    assert "6 to train, 0 already trained" in said and "rank correlation between seeds: mean 1.000" in said
    rows = table(home, "league")
    figures = [(row["model"], row["seed"], float(row["fd"])) for row in rows]
    assert figures == [(m, str(s), FD[m, s]) for m, s, _ in trained]
    wanted = {"params": "1000", "train_seconds": "12.0", "sample_seconds": "0.02", "fd_low": "89.0"}
    wanted |= {"fd_floor": "10.0", "peak_memory": "100000000"}
    assert {key: rows[0][key] for key in wanted} == wanted
    (path,) = (home / "bench").glob("league-*/league.json")
    facts = json.loads(path.read_text())["rows"][0]
    assert facts["machine"] == devices.cpu_name() and facts["sample"] == {"steps": 10} and "commit" in facts
    assert (facts["judge_commit"], facts["judge_code"]) == ("abc", code_hash(*JUDGING))
    assert {row["judge_commit"] for row in rows} == {"abc"}
    assert facts["command"].startswith("gz train vae --seed 0 --data digits --set ")
    assert [row["model"] for row in table(home, "equal_calls")] == ["fm", "fm"]  # it alone has steps
    (best, *_) = table(home, "summary")
    assert (best["model"], best["place"], float(best["fd_excess"])) == ("fm", "1–3", pytest.approx(12))
    # the budget of a run without stages is its own, and figures of likelihood are found once
    assert [job.variants for job in judged[:2]] == [({},), ({}, {"calls": 20, "quick": True})]


def test_a_judge_is_trained_before_the_first_training_and_in_nobodys_time(
    call, home, trained, judged, monkeypatch
):
    """Guidance and `best` need it: the first model would train it, and have no place for lack of time."""
    trained_on = []
    monkeypatch.setattr("gzcli.metrics.features.lenet", lambda pack, say: trained_on.append(pack.folder.name))
    monkeypatch.setattr(
        loop, "train_judges", lambda *how: trained.append(("judge",)) or training.train_judges(*how)
    )
    words = (*WORDS, "--models", "vae,fm")
    assert call(*words)[0] == 0
    assert [row[0] for row in trained] == ["judge", "vae", "fm"] and len(trained_on) == 1  # of one pack
    assert call(*words)[0] == 0 and len(trained_on) == 1, "nothing is left to train"


def test_rows_without_a_place_are_last_and_in_order():
    """With the sampler and origin of their seeds."""
    rows = [
        {
            "model": model,
            "title": model,
            "seed": seed,
            "metrics": {"fd": fd},
            "excess": {"fd": [fd, fd - 1, fd + 1]},
        }
        | {"train_seconds": seconds, "sample": {"sampler": "heun", "guidance": 2.0}, "commit": commit}
        for model, seed, fd, seconds, commit in (
            ("a", 0, 9.0, 90, "x"),
            ("b", 0, 5.0, 90, "x"),
            ("c", 0, 30.0, 80, "x"),  # the mean over seeds counts
            ("c", 1, 32.0, 60, "y"),
        )
    ]
    result = standings.summary(rows, "fd", 60.0)
    assert [(row["model"], row["place"], row["late"]) for row in result] == [
        ("c", "1", False),
        ("b", None, True),
        ("a", None, True),
    ]
    details = [result[0][key] for key in ("sampler", "guidance", "commit", "machine")]
    assert details == ["heun", "2.0", "x; y", ""]


def test_an_interval_without_ends_is_unknown():
    row = {"metrics": {"fd": 2.0}, "intervals": {"fd": [None, None]}}
    assert standings.estimate(row, "fd")[:2] == standings.excess_of(row, "fd")[:2] == (2.0, 0.0)


def test_two_recipes_of_a_model_have_distinct_titles():
    """Both are named among the first models."""
    rows = [
        {"model": model, "title": "vae", "seed": 0, "metrics": {"fd": fd}, "excess": {"fd": [fd, 0, 2 * fd]}}
        for model, fd in (("vae", 1.0), ("vae-wide", 1.5))
    ]
    summary = standings.summary(rows, "fd")
    assert [row["title"] for row in summary] == ["vae", "vae (vae-wide)"]
    assert standings.first_of({row["title"]: row["place"] for row in summary}) == ["vae", "vae (vae-wide)"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_has_no_rank_and_moves_none(value):
    """As a metric alone, as an excess, as an end of its interval, or of one seed of two."""
    values = {"a": 12.0, "b": 14.0, "c": 19.0, "d": 14.5}
    rows = [
        {"model": name, "name": name, "seed": seed, "metrics": {"fd": fd, "fd_second": fd}}
        | {"excess": {"fd": [fd - 10, fd - 12, fd - 8], "fd_second": [fd, fd - 1, fd + 1]}}
        for seed in (0, 1)
        for name, fd in values.items()
    ]
    without = standings.summary(rows, "fd")
    by_bench = standings.two_judges(rows[:4], None, {"fd": "down"})
    assert [row["place"] for row in without] == ["1–2", "1–3", "2–3", "4"]
    for excess in (None, [value] * 3, [2.0, value, 4.0], [2.0, 0.0, value]):
        bad = {"model": "bad", "name": "bad", "seed": 0, "metrics": {"fd": value, "fd_second": value}}
        bad |= {"excess": {"fd": excess, "fd_second": excess}} if excess else {"floor": {"fd": 10.0}}
        good = {**rows[0], "model": "bad", "name": "bad", "seed": 1}
        for at, more in product((0, 3, 8), ([bad], [bad, good], [good, bad])):
            *first, last = standings.summary([*rows[:at], *more, *rows[at:]], "fd")
            assert first == without and last["model"] == "bad"
            assert last["place"] is None and not {"fd", "fd_second"} & last["excess"].keys()
        assert standings.two_judges([bad, *rows[:4]], None, {"fd": "down"}) == by_bench
        table = cited.table({"rows": [bad, *rows[:4]], "places": by_bench["places"]}, ("fd",))
        *first, last = table.columns[1].cells
        alone = cited.table({"rows": rows[:4], "places": by_bench["places"]}, ("fd",))
        assert first == alone.columns[1].cells and (last.text, last.small, last.best) == ("–", "", False)


def test_the_second_judge_compares_models_that_have_a_place():
    """The first model was trained for too long. Its ranks, and those that it would shift, are not printed."""
    rows = [
        {"model": model, "seed": 0, "metrics": figures, "train_seconds": seconds}
        | {"excess": {name: [value, value - 0.1, value + 0.1] for name, value in figures.items()}}
        for model, seconds, figures in (
            ("late", 90, {"fd": 1.0, "fd_second": 9.0}),
            ("a", 60, {"fd": 2.0, "fd_second": 2.0}),
            ("b", 60, {"fd": 4.0, "fd_second": 4.0}),
            ("c", 60, {"fd": 6.0, "fd_second": 3.0}),
        )
    ]
    second = standings.second_of(standings.summary(rows, "fd", 60.0), "fd")
    assert second["apart"] == [["b", "2", "3"], ["c", "3", "2"]] and second["spearman"] == 0.5


def test_a_title_has_the_guidance_of_each_seed():
    """Each training may choose its own on validation images."""
    assert standings.title_of(["fm, guided 2", "fm, guided 1.3", "fm, guided 2"]) == "fm, guided 2; 1.3"
    assert standings.title_of(["vae", "vae"]) == "vae" and standings.title_of([]) == ""
    assert standings.title_of(["fm", "fm, guided 2"]) == "fm; fm, guided 2"


def test_a_dry_run_counts_what_is_left_and_trains_nothing(call, home, trained, judged, monkeypatch):
    words = (*WORDS, "--models", "vae,fm,wgan", "-n", "5000")
    code, shown, _ = call(*words, "--dry-run")
    assert code == 0 and "3 models: vae fm wgan\n0.2m each: 3 to train, 0 already trained\n" in shown
    words_of_time = r"about 36 seconds of training, about \d+ seconds of sampling and about 105 seconds of "
    words_of_time += "evaluation total:"
    assert re.search(words_of_time, " ".join(shown.split())) and "total: about 4 minutes\n" in shown
    assert not trained and not judged and not (home / "bench").exists()
    rows = json.loads(call(*words, "--dry-run", "--json")[1])["rows"]
    assert [row["train_seconds"] for row in rows] == [12.0] * 3
    vae, fm, _ = rows  # as the shipped leagues have them: an image of fm takes longer
    assert (vae["n"], fm["n"], vae["calls"]) == (5000, 2000, 1)
    assert vae["sample_seconds"] < 12 < fm["sample_seconds"] and fm["calls"] > 4
    assert (vae["judge_seconds"], fm["judge_seconds"]) == pytest.approx((40.24, 24.04))
    monkeypatch.setattr(start, "cores", lambda: 2)
    parallel = json.loads(call(*words, "--jobs", "3", "--dry-run", "--json")[1])
    alone = json.loads(call(*words, "--dry-run", "--json")[1])
    assert (parallel["parallel"], alone["parallel"]) == (2, 1)
    assert parallel["seconds"] == pytest.approx(alone["seconds"] / 2), "two cores for three trainings"
    assert "with 2 trainings in parallel\n" in call(*words, "--jobs", "3", "--dry-run")[1]
    of_one = call(*WORDS, "--models", "vae", "--jobs", "3", "--dry-run")[1]
    assert "total: " in of_one and "in parallel" not in of_one
    call(*words)
    rows = json.loads(call(*words, "--dry-run", "--json")[1])["rows"]
    assert {row[name] for row in rows for name in LEAGUE_KEYS.values()} == {0.0} and len(trained) == 3
    shown = call(*words, "--dry-run")[1]
    assert "0 to train, 3 already trained\nnothing to do\n" in shown


def test_a_plan_times_the_images_of_each_model_once(call, home, trained, judged, monkeypatch):
    """Those of three seeds are one, and what is known is not measured again."""
    jobs = []

    def measure(job, say):
        jobs.append(job)
        values = {"sample_seconds": 0.01, "calls": 1, "log_prob_seconds": 0.002, "classes": 10, "error": None}
        return [{**values, "timed": False} for _ in job.parts]

    monkeypatch.setenv("GZ_TRIAL", "1")
    monkeypatch.setattr(forecast, "measured", measure)
    cost.note("judged", 0, 0.001)
    words = (*WORDS, "--models", "vae,wgan", "--seeds", "2", "-n", "500", "--dry-run", "--json")
    rows = json.loads(call(*words)[1])["rows"]
    assert [len(job.parts) for job in jobs] == [2] and len(rows) == 4
    assert {row["draws"] for row in jobs[0].parts} == {("samples", "exact", "bound")}
    # 11 times the likelihood of each of the 355 test images, features of 500 samples, and intervals
    seconds = 11 * 355 * 0.002 + (500 + 600) * 0.001 + cost.START_UP
    expected = {"sample_seconds": 5.0, "judge_seconds": seconds}
    assert [{name: row[name] for name in expected} for row in rows] == [pytest.approx(expected)] * 4
    assert json.loads(call(*words)[1])["rows"] == rows and len(jobs) == 1
    # metrics without a likelihood have no time of one
    jobs.clear()
    call(*words, "--metrics", "fd")
    assert {row["draws"] for row in jobs[0].parts} == {("samples",)}


def test_a_row_has_the_commit_of_gz_s_own_clone(monkeypatch, tmp_path):
    """Not that of the folder that gz was called in."""
    root = Path(gzcli.__file__).parents[1]
    here = planning.git_state(root) if (root / ".git").exists() else None
    monkeypatch.chdir(tmp_path)
    assert planning.git_state(Path.cwd()) is None and planning.code_state() == here
    assert commit_in({"git": {"commit": "abc", "dirty": False}, "code": None}) is None
    assert commit_in({"code": {"commit": "abc", "dirty": False}}) == "abc"
    assert commit_in({"code": {"commit": "abc", "dirty": True}}) == "abc with changes"


def test_a_bench_says_what_judging_takes_here(home):
    """The seconds of an image by the slowest row, without those of samples and of likelihoods."""
    assert cost.evaluation(500, 0).seconds() == 1100 * cost.EVALUATED_SECONDS
    rows = [
        {"n": 1000, "seconds": 30.0, "metrics": {"samples_per_s": 100.0}},
        {"n": 1000, "seconds": 15.0, "metrics": {"samples_per_s": 100.0}},
        {"n": 1000, "seconds": 90.0, "metrics": {"samples_per_s": 100.0}, "likelihood": {}},
        {"n": 1000, "seconds": 90.0, "metrics": {}},
    ]
    cost.note_evaluation({"rows": rows[2:]}, 0)
    assert cost.evaluation(500, 0).seconds() == 1100 * cost.EVALUATED_SECONDS
    cost.note_evaluation({"rows": rows}, 0)
    assert cost.evaluation(1000, 0).seconds() == pytest.approx(20.0)
    # measured: 13.1 s for 60 images, 24.9 s for 600
    cost.note_evaluation({"rows": [{"n": 60, "seconds": 13.1, "metrics": {"samples_per_s": 500.0}}]}, 0)
    assert cost.evaluation(600, 0).seconds() == pytest.approx(24.9, rel=0.1)


def test_a_likelihood_takes_what_its_budget_allows():
    def seconds(n, budget):
        return forecast.likelihood_cost(0.1, 10, n, budget).seconds()

    assert seconds(400, 600.0) == pytest.approx(11 * 400 * 0.1)
    assert seconds(400, 300.0) == pytest.approx(400 * 0.1), "not every class in turn"
    assert seconds(10_000, 300.0) == pytest.approx(3000 * 0.1)
    assert forecast.likelihood_cost(None, 0, 400, 300.0).seconds() == 0


def test_the_end_of_a_short_training_has_seconds(call, home, trained, judged):
    said = call(*WORDS, "--models", "vae")[2]
    assert re.search(r"vae: training until \d\d:\d\d:\d\d or later", said)


def test_a_league_from_python_is_that_of_the_command(call, home, trained, judged, capsys):
    """`gzcli.league` is a function, though its code is in a package of the name."""
    trained.fails = {("wgan", 0): DivergedError("the loss is not finite")}
    result = gzcli.league(["vae", "fm", "wgan"], data="digits", budget="0.2m", n=100, cpu=True, quiet=True)
    assert capsys.readouterr() == ("", "") and (result.data, result.metric) == ("digits", "fd")
    rows = [(row.model, row.place, row.metrics.get("fd"), row.failed) for row in result.rows]
    assert rows == [("fm", "1", 20.0, 0), ("vae", "2", 90.0, 0), ("wgan", None, None, 1)]
    assert [one.error for one in result.trainings] == [None, None, "the loss is not finite"]
    assert result.floor["fd"] == 10.0 and result.folder.is_dir() and result.left_out == {}
    n = len(trained)
    call(*WORDS, "--models", "vae,fm", "-n", "100")
    assert len(trained) == n and len(judged) == 2, "the same runs and judgements"
    with pytest.raises(UsageError, match="is not a time"):
        gzcli.league(data="digits", budget="8")


def test_what_is_there_is_used_again(call, home, trained, judged):
    """By the same command, by another judge, and by a league of more models; not at another budget."""
    call(*WORDS, "--models", "vae,fm", "--calls", "0")
    assert call(*WORDS, "--models", "vae,fm", "--calls", "0")[0] == 0
    assert (len(trained), len(judged)) == (2, 2)
    _, shown, _ = call(*WORDS, "--models", "vae,fm,wgan", "--calls", "0", "--json")
    assert (trained[2:], len(judged)) == ([("wgan", 0, False)], 3)
    result = json.loads(shown)
    assert {row["model"] for row in result["rows"]} == {"vae", "fm", "wgan"} and result["metric"] == "fd"
    call(*WORDS, "--models", "vae", "--calls", "0", "-n", "77")
    assert (len(trained), len(judged), judged[-1].n) == (3, 4, 77)
    call(*(word.replace("0.2m", "0.3m") for word in WORDS), "--models", "vae", "--calls", "0")
    assert trained[3:] == [("vae", 0, False)]


def test_it_goes_on_where_it_was_stopped(call, home, trained, judged):
    trained.fails = {("fm", 0): Interrupted("stopped at step 5", signum=2)}
    words = (*WORDS, "--models", "vae,fm,wgan", "--calls", "0")
    code, _, said = call(*words)
    assert code == 130 and "run the same command to resume" in said
    assert [row["model"] for row in table(home, "league")] == ["vae"]  # what is known is written
    assert call(*words)[0] == 0
    assert trained == [("vae", 0, False), ("fm", 0, False), ("fm", 0, True), ("wgan", 0, False)]
    assert call(*words)[0] == 0 and len(trained) == 4  # what was resumed is known, too


def test_a_signal_that_comes_in_a_judgement_ends_the_league_whatever_became_of_it(
    call, home, trained, judged, monkeypatch
):
    """Of a judgement that was done by then its row is written; one that the signal broke is no failure."""
    do_job = jobs.do_job
    words = (*WORDS, "--models", "vae,fm", "--calls", "0")
    for broken in (True, False):

        def interrupted(folder, job, broken=broken):
            os.kill(os.getpid(), signal.SIGTERM)
            if broken:
                raise GzError("RuntimeError: a worker is killed by signal: Terminated")
            return do_job(folder, job)

        monkeypatch.setattr(jobs, "do_job", interrupted)
        code, _, said = call(*words)
        assert code == 143 and "stopped by SIGTERM" in said and "run the same command to resume" in said
        assert trained == [("vae", 0, False)] and "failed" not in said
        assert not list((home / "bench").glob("*/league.json"))
    assert [row["model"] for row in table(home, "league")] == ["vae"]
    monkeypatch.setattr(jobs, "do_job", do_job)
    assert call(*words)[0] == 0 and len(trained) == 2


def test_a_model_that_fails_is_a_row_with_its_error(call, home, trained, judged):
    trained.fails = {("fm", 0): DivergedError("the loss is not finite")}
    words = (*WORDS, "--models", "vae,fm,wgan", "--calls", "0")
    code, _, said = call(*words)
    assert code == 0 and "failed: fm, seed 0: the loss is not finite" in said
    assert "best by fd: wgan, 1 of 3 trainings failed" in " ".join(said.split())
    errors = {row["model"]: row["error"] for row in table(home, "league")}
    assert errors == {"vae": "", "fm": "the loss is not finite", "wgan": ""}
    assert [row["place"] for row in table(home, "summary")] == ["1", "2", ""]
    call(*words)
    assert len(trained) == 3  # it would diverge again


def test_a_league_of_failures_alone_has_the_code_of_the_first(call, home, trained, judged):
    trained.fails = {(model, 0): DivergedError("the loss is not finite") for model in ("vae", "fm")}
    code, _, said = call(*WORDS, "--models", "vae,fm", "--calls", "0")
    assert code == 5 and "all 2 trainings failed: the loss is not finite" in said and "next:" not in said
    assert len(list((home / "bench").glob("*/league.json"))) == 1


def test_a_judgement_that_is_damaged_is_made_again(call, home, trained, judged):
    words = (*WORDS, "--models", "vae", "--calls", "0", "--json")
    _, shown, _ = call(*words)
    (path,) = home.glob("runs/*/bench/*/result.json")
    whole = path.read_text()
    for i, text in enumerate(
        ("", whole[:99], "[]", "{}", whole.replace('"rows"', '"r"'), '{"rows": [3]}'), 2
    ):
        path.write_text(text)
        for result_file in set(home.glob("runs/*/bench/*/result.json")) - {path}:
            result_file.unlink()
        assert call(*words)[:2] == (0, shown) and len(judged) == i, text


def test_a_training_that_was_killed_before_its_first_checkpoint_is_resumed(call, home, trained, judged):
    """It leaves no run behind, at whichever moment it was."""
    words = (*WORDS, "--models", "vae", "--calls", "0")
    call(*words)
    (run,) = runs.all_runs()
    for file in (run.metrics_file, run.path / "bench"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    run.update(state="running")  # and nobody holds it
    assert run.state == "killed" and not run.has_begun
    assert call(*words)[0] == 0 and trained[1:] == [("vae", 0, True)] and runs.all_runs() == [run]
    run.recipe_file.unlink()  # killed before that was written, after `env.json`
    run.update(state="planned", process_began=1.0)
    assert call(*words)[0] == 0 and trained[2:] == [("vae", 0, False)]
    assert len(runs.all_runs()) == 1 and not run.path.exists()


@pytest.mark.slow
def test_trainings_side_by_side_go_on_after_a_kill(home, tmp_path):
    """Real ones: the league is killed as one of them trains; the same command goes on with it at once."""
    words = [*WORDS, "--models", "vae,wgan", "--jobs", "2", "--calls", "0", "--metrics", "swd", "-n", "100"]
    words = [sys.executable, start.SCRIPT, "gzcli", *("4s" if word == "0.2m" else word for word in words)]
    child = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    while not (begun := [run.id for run in runs.all_runs() if run.status().get("stepping")]):
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    done = subprocess.run([*words, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and child.wait() == -signal.SIGKILL, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["model"] for row in rows] == ["vae", "wgan"] and all(row["metrics"]["swd"] for row in rows)
    assert {*begun} <= {row["run"] for row in rows} and len(runs.all_runs()) == 2


def test_what_became_of_a_process_is_its_row(call, home, trained, judged, monkeypatch, tmp_path):
    """One has judged, one says an error, one is killed; what was judged before needs none."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(launcher.start, "SCRIPT", str(tmp_path / "child.py"))
    words = (*WORDS, "--calls", "0", "--jobs", "2", "--json", "--models")
    assert call(*words, "vae", "--entry", "vae:0")[0] == 0 and trained == [("vae", 0, False)]
    code, shown, said = call(*words, "dcgan,wgan,fm,vae")
    assert code == 0 and trained[1:] == [("fm", 0, False)], said  # it is not there where a child said so
    rows = {row["model"]: row["metrics"].get("fd") or row["error"] for row in json.loads(shown)["rows"]}
    killed = "the process was killed (SIGKILL), most likely because memory ran out"
    assert rows == {"vae": 90, "fm": 20, "wgan": killed, "dcgan": "no room"}
    assert f"/4 wgan: failed: {killed}" in said and "1/4 vae: " in said
    assert [*dict.fromkeys(re.findall(r"^(.)/4 ", said, re.MULTILINE))] == [*"1234"]
    monkeypatch.setenv("GZ_WAITS", "1")
    code, _, said = call(*words[:-2], "--models", "wgan,dcgan")
    assert code == 143 and "wgan: at step 7" in said and "run the same command to resume" in said


CHILD = """import json, os, signal, sys, time
from pathlib import Path
module, folder = sys.argv[1], Path(sys.argv[2])
(model,) = json.loads((folder / "job.json").read_text())["models"]
assert module == "gzcli.league"
def end(text, code=3):
    error = {"kind": "missing", "message": text, "hint": None}
    status = {"state": "failed", "error": error} if text else {"state": "finished"}
    (folder / "status.json").write_text(json.dumps({"code": code, **status}))
    sys.exit(code)
if "GZ_WAITS" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: end("at step 7"))
    if model == "wgan":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if model == "wgan":
    os.kill(os.getpid(), signal.SIGKILL)
end("no room" if model == "dcgan" else "", 3 * (model == "dcgan"))
"""


def test_a_process_of_an_entry_reads_its_terms_from_its_folder(home, trained, judged, tmp_path, monkeypatch):
    """And writes how it ended, whatever the command line was."""
    monkeypatch.setattr(child, "end_with_parent", lambda: None)
    monkeypatch.setattr("gzcli.launch.plan.with_data", lambda recipe, dataset, run=None, **how: recipe)
    job = league.BenchJob((), "digits", n=77, launch=LaunchSection(cpu=True, threads=1))
    terms = league.Terms("digits", 12.0, None, (0, 1), job, 0).of("fm:1")
    terms.write(tmp_path)
    assert league.Terms.read(tmp_path) == terms
    assert child.main(tmp_path) == 0 and trained == [("fm", 1, False)] and judged[0].n == 77
    assert files.read_object(tmp_path / "status.json")["state"] == "finished"
    trained.fails = {("fm", 1): DivergedError("the loss is not finite")}
    runs.remove(runs.all_runs()[0])
    terms.write(tmp_path)
    assert child.main(tmp_path) == 5
    with pytest.raises(DivergedError, match="the loss is not finite"):
        launcher.outcome(Run(tmp_path), 5, [])


JUDGES = ("metrics/pretrained", "metrics/networks", "core/philox", "engine/trained", "data/packs/batches")
DRAWERS = ("core/philox", "models/vae/vae", "models/nn/unet", "engine/trained")
PROGRAM = 'N = {1, 2}\n\n\ndef f():\n    """One."""\n    return [N, 1.0]'
CHANGES = {  # of the program → whether it stays the same
    ("N = {1, 2}", "# of draws\nN  =  {1, 2}"): True,
    ("One.", "Two."): True,
    ("{1, 2}", "{1, 3}"): False,
    ("f()", "f(x)"): False,
    ("[N, 1.0]", "[N, 1]"): False,
    ("[N, 1.0]", "[N, 1.0"): False,
}


def test_results_are_of_other_code_where_code_changes_and_not_where_a_comment_does(tmp_path):
    def hash_of(text: str) -> str:
        files.write_atomic(tmp_path / "models" / "maf.py", text)
        return code_hash(*DRAWING, beside=tmp_path / "models")

    for change, same in CHANGES.items():
        assert (hash_of(PROGRAM.replace(*change)) == hash_of(PROGRAM)) == same, change


@pytest.mark.parametrize("name", [*JUDGES, *DRAWERS])
def test_a_change_of_any_file_of_a_room_is_a_change_of_its_code(name, tmp_path):
    room = name.partition("/")[0]
    assert room in (*(JUDGING if name in JUDGES else ()), *(DRAWING if name in DRAWERS else ()))
    shutil.copytree(PACKAGE / room, tmp_path / room, ignore=lambda _, names: {"__pycache__"} & {*names})
    file, before = tmp_path / f"{name}.py", code_hash(beside=tmp_path / room)
    text = file.read_text()
    file.write_text(f"{text}\n# a comment\n")
    assert code_hash(beside=tmp_path / room) == before
    file.write_text(f"{text}\nN_IMAGES = 1\n")
    assert code_hash(beside=tmp_path / room) != before


def test_a_result_of_other_code_is_made_again_and_that_is_said(call, home, trained, judged):
    words = (*WORDS, "--models", "vae,wgan", "--calls", "0")
    assert "evaluated again" not in call(*words)[2]
    of_vae = runs.all_runs(model="vae")[0]
    (folder,) = (of_vae.path / "bench").iterdir()
    files.write_json(folder / "job.json", asdict(judged[0]))  # as an engine leaves it
    folder.rename(folder.with_name(f"{'0' * 12}-{folder.name.partition('-')[2]}"))  # the hash of other code
    said = call(*words)[2]
    assert "vae: evaluated again, because gz's code or the weights have changed" in said
    assert "wgan: evaluated again" not in said and len(trained) == 2 and len(judged) == 3
    assert "evaluated again" not in call(*words)[2] and len(judged) == 3


def test_a_long_league_and_long_trainings_are_told(call, home, trained, judged):
    said = call(*(word.replace("0.2m", "2d") for word in WORDS), "--models", "vae")[2]
    assert "more than a day" in said and "--yes" in said and len(trained) == 1
    assert "more than a day" not in call(*WORDS, "--models", "vae", "--yes")[2]
    words = (word.replace("0.2m", "5s") for word in WORDS)  # the run says 12 seconds
    said = " ".join(call(*words, "--models", "vae")[2].split())
    assert "no rank for vae: trainings took up to 12s on average instead of 5s, for validation" in said
    assert "no rank" not in call(*WORDS, "--models", "vae")[2]
    trained.seconds = {("wgan", 0): 5.0, ("wgan", 1): 7.0}
    words = (word.replace("0.2m", "5s") for word in WORDS)
    assert "no rank" not in call(*words, "--models", "wgan", "--seeds", "2")[2], "the mean is in time"


def test_an_older_spelling_and_python_ask_for_the_same_league(call, home, trained, judged):
    options = ("--data", "digits", "--budget", "0.2m", "--cpu", "--seeds", "2", "-n", "60", "--json")
    dry = call("bench", "--train-missing", "vae", "wgan", *options, "--dry-run")
    assert dry[0] == 0 and dry == call("league", "--models", "vae,wgan", *options, "--dry-run")
    results = [
        json.loads(call(*words, *options)[1])
        for words in (("league", "vae"), ("bench", "--train-missing", "--models", "vae"))
    ]
    assert results[0]["folder"] == results[1]["folder"] and len(trained) == 2
    how = {"data": "digits", "budget": "0.2m", "seeds": 2, "n": 60, "cpu": True, "quiet": True}
    assert str(gzcli.league(["vae"], **how).folder) == results[0]["folder"] and len(trained) == 2


def test_a_wrong_league_is_refused(call, monkeypatch):
    data = ["--train-missing", "--data", "digits"]
    for words, message in (
        (["--train-missing", "--budget", "8m"], "needs `--data`"),
        (data, "needs `--budget`"),
        *(([*data, "--budget", b], "--budget 8m") for b in ("8", "x", "0m", "1s", "-3m")),
        (["--budget", "8m"], "`--budget` needs `--train-missing`"),
        (["--models", "vae,glow"], "`gz bench vae glow` compares trained models"),
        (["--models", "vae"], "to train the models first, add `--train-missing --budget 8m --data NAME`"),
        (["--models", "all", *data[1:]], "`gz bench --data digits` compares trained models"),
        (["--train-missing", *WORDS[1:], "--models", "sd-lora"], "captions"),
        (["--train-missing", *WORDS[1:], "--models", "vaee"], "`vaee`"),
        (["--train-missing", *WORDS[1:], "--models", "vae", "--curve", "depth"], "no curve"),
        ([*data, "--budget", "4s", "--models", "vqvae"], "one of the 2 stages"),
        ([*data, "--models", "vqvae", "--budget", "8s"], "one of the 2 stages of `vqvae` gets less than 3 s"),
    ):
        if "8s" in words:  # whose shares are not alike
            monkeypatch.setattr(league, "shares_of", lambda recipe, plan, say: [0.25, 0.75])
        code, _, said = call("bench", *words)
        assert code == 2 and message in " ".join(said.split()), words


def test_an_unknown_column_is_refused_before_any_work(call, home, trained, judged):
    """Metrics of a model count if that model takes part."""
    for words, name in (("vae", "nonsense"), ("wgan", "recon"), ("vqvae", "iwae100")):
        words = (*WORDS, "--models", words, "--dry-run")
        code, _, said = call(*words, "--columns", f"fd,{name},seconds")
        assert code == 2 and f"no column `{name}`" in said and "packing" not in said, words
    code, _, said = call(*WORDS, "--columns", "reccon", "--submit", "slurm")
    assert code == 2 and "did you mean `recon`?" in said
    assert call(*WORDS, "--models", "vae", "--metrics", "swd", "--columns", "fd")[0] == 2
    assert not trained
    accepted = "recall,recall_rot,fd_rot,kid_lite,nats,iwae100,train_mfu,lpips_diversity|y,seconds"
    metrics = "fd,prc_lenet,kid_lite,own,speed,lpips"
    words = (*WORDS, "--models", "vae", "--metrics", metrics, "--columns", accepted)
    code, shown, _ = call(*words)
    assert code == 0 and len(trained) == 1 and "iwae100" in shown and "–" in shown
    code, _, said = call("bench", "vae", "--columns", "fd,reccon", "--data", "digits", "--dry-run")
    assert code == 2 and "did you mean `recon`?" in said


def test_a_metric_with_too_few_images_is_refused_before_a_training(home, tmp_path):
    np.savez(few := tmp_path / "few.npz", images=np.zeros((60, 16, 16), np.uint8))
    job = league.BenchJob((), str(few), ("prc_lenet",), split="val")
    terms = league.Terms(str(few), 60.0, ("vae",), (0,), job, 0)
    least = f"`prc_lenet` needs at least 12 validation images, but `{few}` has 6"
    refused(least, loop.League.of, terms, "1m", hint="give at least 120 images")


def test_a_league_prints_a_note_on_its_data_once(home, tmp_path):
    np.savez(grey := tmp_path / "grey.npz", images=np.zeros((40, 16, 16, 3), np.uint8))
    terms = league.Terms(str(grey), 60.0, ("vae", "fm"), (0,), league.BenchJob((), str(grey)), 0)
    lines: list[str] = []
    league.entries_of(terms, say=lines.append)
    assert lines.count(ONE_CHANNEL) == 1


def test_all_models_that_draw_by_themselves_take_part(call):
    terms = league.Terms("digits", 60.0, None, (3,), league.BenchJob((), "digits"), 0)
    entries, left_out = league.entries_of(terms)
    assert set(left_out) == {"controlnet", "cyclegan", "instructpix2pix", "sd-lora"}
    assert len(entries) + len(left_out) == len(league.recipe_names())
    minutes = {entry.model: [part.train.minutes for part in entry.recipe.parts] for entry in entries}
    assert minutes["vae"] == [1.0] and minutes["vqgan"] == [0.5, 0.5]
    assert all(entry.recipe.seed == 3 for entry in entries)


def test_the_curve_of_time_takes_checkpoints_of_an_eighth_to_all(home):
    run = runs.create("vae", "digits")
    files.write_atomic(run.path / "run.yaml", "model: {name: vae}\n")
    run.update(state="finished", step=800, seconds=80.0)
    for step in (10, 90, 160, 240, 400, 800):
        files.write_atomic(run.path / "checkpoints" / f"{step:08d}" / "ema.safetensors", "")
    assert league.kept_steps(run) == [(90, 9.0), (240, 24.0), (400, 40.0), (800, 80.0)]


def row(model, seed, fd, floor=10.0, name="fd", **facts):
    metrics = {} if fd is None else {name: fd}
    return {"model": model, "seed": seed, "metrics": metrics, "floor": {name: floor}, **facts}


def test_the_agreement_of_seeds_is_that_of_scipy():
    values = np.random.default_rng(0).integers(11, 18, (3, 9)).astype(float)  # with ties
    rows = [row(f"m{i}", seed, fd) for seed, line in enumerate(values) for i, fd in enumerate(line)]
    pairs = [scipy.stats.spearmanr(values[a], values[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    rho = standings.agreement(rows, "fd")
    assert rho["mean"] == pytest.approx(np.mean(pairs)) and rho["min"] == pytest.approx(min(pairs))
    (first, *_) = [line for line in standings.summary(rows, "fd") if line["model"] == "m3"]
    assert first["metrics"]["fd"] == pytest.approx(values[:, 3].mean())
    assert first["deviations"]["fd"] == pytest.approx(values[:, 3].std(ddof=1))


def test_other_grey_levels_compare_by_their_own_floor_and_other_sizes_do_not():
    rows = [row("a", 0, 30.0, shape=[1, 28, 28]), row("c", 0, 1.0, shape=[1, 64, 64])]
    rows.insert(1, row("b", 0, 28.0, floor=4.0, name="fd@32", shape=[1, 28, 28]))
    rows.append(row("d", 0, 1.0, name="fd@32", shape=[1, 64, 64]))
    rows = standings.of_one_size(rows)
    assert standings.of_seed(rows, 0, "fd") == {"a": 20, "b": 24}
    assert rows[2]["metrics"] == {"fd/64×64": 1.0} and rows[3]["metrics"] == {"fd@32/64×64": 1.0}
    assert [line["place"] for line in standings.summary(rows, "fd")] == ["1", "2", None, None]


def test_curves_are_means_over_seeds_and_drawn(tmp_path):
    rows = [row("a", s, 10.0 * n + s, steps=n) for s in (0, 2) for n in (5, 1)] + [row("b", 0, None, steps=1)]
    (points,) = standings.curve(rows, "fd", "steps").values()
    # Student's t of two seeds that differ by 2, whose mean has a deviation of 1, is 12.7062
    assert np.allclose(points, [(1, 11, 12.7062), (5, 51, 12.7062)])
    points = {"a": [(1, 9.0, 1.0), (50, 2.0, 0.0)]}
    draw_curves(tmp_path / "c.png", points, x="steps", y="fd", floor=1.0, title="")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    blue = (np.abs(pixels.astype(int) - (31, 119, 180)).sum(-1) < 40).nonzero()  # the first colour of tab10
    assert len(blue[0]) > 300 and np.ptp(blue[1]) > pixels.shape[1] / 2


def trained_of(case):
    info = open_pack("digits").info()
    net = case.build(info).eval().requires_grad_(False)
    return Trained(Run(Path(case.model)), net, info, Part(case.model), torch.device("cpu"), 1)


def entry(model, **options):
    return trained_of(Case(model, options))


def test_network_calls_are_counted():
    """Guidance doubles them; pixel models count as without their cache."""
    count, fm, ddpm, wgan = count_calls, entry("fm", **FM), entry("ddpm", **DDPM), entry("wgan")
    calls = [count(fm, {"sampler": s, "steps": 3}) for s in ("euler", "midpoint", "rk4")]
    assert calls == [3, 6, 12]
    assert count(ddpm, {"sampler": "heun", "steps": 4}) == 7 and count(wgan) == 1
    assert count(entry("fm", **FM | {"clusters": 3}), {"steps": 3}) == 12, "guided by itself"
    # at four of its six times there is as much noise as image, or more
    assert count(entry("cfm", **FM), {"steps": 3, "guidance": 2, "interval": (0.5, 1.0)}) == 10
    assert [contestants.steps_for(model, 20) for model in (fm, ddpm, wgan)] == [10, 20, None]
    assert varied(fm, {"calls": 9}).part.sample == {"steps": 4} and fm.part.sample == {}
    for name, few in (("transformer", {}), ("maskgit", {"steps": 4})):
        plain = next(case for case in CASES if case.model == name and not case.conditional)
        passes = count(trained_of(plain), few)
        assert passes == (4 if few else trained_of(plain).model.length)
        guided = trained_of(replace(plain, options=plain.options | {"clusters": 3, "label_dropout": 0.1}))
        assert count(guided, few) == 2 * passes and count(guided, few | {"guidance": 1.0}) == passes
    pixelcnn = entry("pixelcnn", hidden=4, head=4, dilations=(1,))
    with torch.inference_mode(), counted(None) as counter:
        uncached_samples(pixelcnn.model, 1, ImageNoise(0, range(1)))
    assert count(pixelcnn) == counter[pixelcnn.model] == 256


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own record is read")
def test_the_peak_of_memory_is_the_systems():
    held = np.ones(20_000_000)
    lines = Path("/proc/self/status").read_text().splitlines()
    (most,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert devices.peak_memory(torch.device("cpu")) == pytest.approx(1024 * most, rel=0.02) and len(held)


def test_a_league_knows_its_training(home):
    """Minutes may become steps and keys may come; a longer training, or a key that is gone, is another."""
    request = planning.ask("vae", "digits", (), {"train.minutes": 1.0, "seed": 4})
    plan, run = league.Plan(threads=1), runs.create("vae", "digits")
    write_run(run, request.recipe, plan)
    recipe = planning.ask("vae", "digits", (), {"train.minutes": 1.0, "seed": 4, "train.keep": 9}).recipe
    impatient = planning.ask("vae", "digits", ("train.patience=3",), {"train.minutes": 1.0, "seed": 4}).recipe
    assert is_of_training(run, recipe, plan)
    assert not is_of_training(run, impatient, plan)
    assert not is_of_training(run, recipe, replace(plan, threads=2))
    parts = tuple(replace(p, train=replace(p.train, minutes=None, steps=70)) for p in request.recipe.parts)
    in_steps = replace(request.recipe, parts=parts)
    files.write_atomic(run.recipe_file, dump(in_steps.tree()))
    write_run(run, in_steps, plan)  # a resume
    assert is_of_training(run, recipe, plan)
    env = files.read_object(run.environment_file)
    files.write_json(run.environment_file, {key: value for key, value in env.items() if key != "training"})
    assert not is_of_training(run, recipe, plan)
    del env["training"]["recipe"]["train"]["patience"], env["training"]["recipe"]["model"]["conditional"]
    files.write_json(run.environment_file, env)
    assert is_of_training(run, recipe, plan) and not is_of_training(run, impatient, plan)
    env["training"]["recipe"]["train"]["haste"] = 3
    files.write_json(run.environment_file, env)
    assert not is_of_training(run, recipe, plan)
    write_run(run, request.recipe.lengthened({"": 900}), plan)
    assert not is_of_training(run, recipe, plan)
