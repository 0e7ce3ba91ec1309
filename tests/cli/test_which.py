"""`gz which`: the shortlist of the shipped leagues, the rounds of a race, and what it prints."""

import io
import json
import math
import zipfile
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

import gzcli
from gzcli.core.errors import MissingError, UsageError
from gzcli.data.packs.facts import Facts
from gzcli.league import which
from gzcli.league.league import Terms
from gzcli.league.which import Outcome, Race, able, calls, cover, excesses, order, shortlist
from gzcli.models import catalog
from gzcli.store import start
from gzcli.store.jobs import BenchJob

TABLE = {
    "mnist fd": {"a": 1.0, "b": 1.05, "c": 9.0, "d": 5.0},
    "glyphs fd": {"a": 50.0, "b": 60.0, "c": 10.0, "d": 10.5},
    "glyphs fd_second": {"b": 3.0, "c": 1.0, "d": 1.2},
}


def test_the_cover_is_the_smallest_set_within_the_regret():
    assert set(cover(TABLE, "abcd")) == {"a", "c"}
    assert cover(TABLE, "d") == ("d",)
    assert cover(TABLE, "bd") == ("b", "d")
    assert cover({}, "ab") == ("a", "b")  # no league knows any
    assert set(cover(TABLE, "abcd", "b")) == {"b", "c"}  # among equally small groups, one with the member
    assert set(cover(TABLE, "abcd", "d")) == {"a", "c", "d"}


def test_further_families_make_up_a_race_of_four():
    table = {"fd": {"cvae": 1.0, "vae": 2.0, "dcgan": 3.0, "cgan": 4.0, "glow": 5.0, "cfm": 6.0}}
    assert shortlist(table, [*table["fd"]], "cfm") == ("cvae", "cfm", "dcgan", "glow")
    # without another family, the one with the least regrets
    assert shortlist(table, ["dcgan", "cgan", "cvae", "vae"], "cfm") == ("cvae", "dcgan", "vae", "cgan")
    assert shortlist(table, ["glow", "cfm"], "cfm") == ("glow", "cfm")


@pytest.mark.parametrize("needs", [[], ["labels"], ["likelihood"], ["one-call"], ["ood"]])
def test_a_race_by_the_shipped_leagues_has_rounds(needs):
    models = able(needs)
    for usual, fitting in (("cfm", models), ("fm", [name for name in models if not labelled(name)])):
        chosen = shortlist(excesses(), fitting, usual)
        assert len(Race(chosen, terms(), 120.0).rounds) > 1
        assert len({catalog.card(name).family for name in chosen}) > 1


def labelled(name: str) -> bool:
    return name in {"cfm", "cvae", "cgan", "cddpm"}


def test_excesses_are_those_of_models_trained_in_time_and_at_least_half_their_interval(monkeypatch):
    rows = [
        {"model": "a", "fd_excess": "5", "fd_excess_half": "2", "late": "False"},
        {"model": "b", "fd_excess": "-1", "fd_excess_half": "3", "fd_second_excess": ""},
        {"model": "c", "fd_excess": "1", "fd_excess_half": "1", "late": "True"},
    ]
    monkeypatch.setattr(which.measured, "places", lambda: [("mnist", "tiny")])
    monkeypatch.setattr(which.measured, "standings", lambda data, scale: rows)
    assert excesses() == {"mnist tiny fd": {"a": 5.0, "b": 3.0}}
    rows[0] |= {"kid_lite_excess": ".2", "kid_lite_excess_half": ".3"}
    assert excesses() == {"mnist tiny kid_lite": {"a": 0.3}, "mnist tiny fd": {"b": 3.0}}


def test_no_smaller_set_of_the_shipped_leagues_would_do():
    table, models = excesses(), able([])
    chosen = cover(table, models)

    def regret(names) -> float:
        best = [(min(row.values()), [row.get(name, math.inf) for name in names]) for row in table.values()]
        return max(min(values) / least for least, values in best)

    assert regret(chosen) <= which.REGRET < 2
    assert all(regret(names) > which.REGRET for names in combinations(models, len(chosen) - 1))


def test_needs_leave_models_out():
    one_call = able(["one-call"])
    assert {"cgan", "cvae"} <= {*one_call} < {*able([])} and all(calls()[name] == 1 for name in one_call)
    assert {"glow", "pixelcnn"} <= {*able(["likelihood"])} and "cgan" not in able(["likelihood"])


def terms(*models: str, budget: float = 120.0) -> Terms:
    return Terms("digits", budget, models or None, (0,), BenchJob((), "digits", split="val"), 0)


@pytest.mark.parametrize("n", range(1, 10))
def test_rounds_spend_the_budget_on_halves_until_two_are_left(n):
    rounds = Race(tuple(map(str, range(n))), terms(), 120.0).rounds
    assert sum(size * seconds for size, seconds in rounds) == pytest.approx(120)
    assert rounds[0][0] == n and rounds[-1][0] == min(n, 2)
    for (size, seconds), (fewer, longer) in pairwise(rounds):
        assert fewer == math.ceil(size / 2) and longer == 2 * seconds


def summary(values: dict[str, tuple[float, float] | None]) -> dict:
    """A round's league by the excess of each model for both judges; None: it failed."""
    rows = []
    for name, pair in values.items():
        ends = {} if pair is None else {"fd": [pair[0]] * 3, "fd_second": [pair[1]] * 3}
        metrics = {key: value[0] for key, value in ends.items()}
        rows.append({"model": name, "metrics": metrics, "excess": ends, "place": "1", "run": f"run-{name}"})
    judges = ["fd", "fd_second"]
    return {"metric": "fd", "summary": rows, "rows": rows, "notes": [], "judges": judges}


def test_both_judges_count_and_a_failed_model_is_last():
    result = summary({"failed": None, "a": (10.0, 10.0), "b": (1.0, 200.0), "c": (20.0, 1.0)})
    assert order(result) == ["c", "a", "b", "failed"]


def test_every_judge_of_a_round_ranks_its_models():
    result = summary({"a": (9.0, 9.0), "b": (1.0, 1.0), "failed": None})
    for row, value in zip(result["summary"], (0.2, 0.9, None), strict=True):
        row["excess"] |= {"kid_lite": [value, value - 0.1, value + 0.1]} if value else {}
        row["metrics"] |= {"kid_lite": value} if value else {}
    result["judges"] = which.judges_of(result)
    assert result["judges"] == ["fd", "fd_second", "kid_lite"] and order(result) == ["b", "a", "failed"]
    alone = result | {
        "metric": "kid_lite",
        "summary": [{**row, "excess": {"kid_lite": [1.0] * 3}} for row in result["summary"]],
    }
    assert which.judges_of(alone) == ["kid_lite"], "one column"
    assert which.judges_of(summary({"a": (9.0, 9.0)})) == ["fd", "fd_second"]


def test_a_published_judge_decides_where_those_of_the_set_do_not():
    result = summary({"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 1.0)})
    result["judges"] = ["fd", "fd_second", "kid_lite"]
    for row, value in zip(result["summary"], (0.9, 0.2, 0.5), strict=True):
        row["metrics"]["kid_lite"], row["excess"]["kid_lite"] = value, [value, value - 0.1, value + 0.1]
    assert order(result) == ["b", "c", "a"]
    outcome = Outcome(Race(("a", "b", "c"), terms(), 120.0), (result,), ("b", "c", "a"), None)
    assert outcome.ties == [] and outcome.favourite == "b"
    for row in result["summary"]:
        row["excess"]["kid_lite"] = [row["excess"]["kid_lite"][0], -9.0, 9.0]
    assert {*outcome.ties} == {*"abc"}


def test_a_first_round_that_drops_by_chance_is_named():
    """c is as good as b by both judges, d is worse by one, and e failed."""
    pairs = {"a": (1.0, 1.0), "b": (3.0, 3.0), "c": (3.1, 3.1), "d": (3.0, 9.0), "e": None}
    first, last = summary(pairs), summary({"a": (1.0, 1.0), "b": (2.0, 2.0)})
    for row in first["summary"]:
        row["excess"] = {key: [v[0], v[0] - 0.2, v[0] + 0.2] for key, v in row["excess"].items()}
    outcome = Outcome(Race(tuple(pairs), terms(), 120.0), (first, last), tuple(pairs), None)
    assert outcome.dropped_alike == ["c"]
    assert replace(outcome, rounds=(first,)).dropped_alike == []


@pytest.fixture
def leagues(monkeypatch):
    """The leagues of a race, (models, seconds, job) in turn; a model is as bad as its letter is late."""
    rounds = []

    def run_league(league, **how):
        models = league.terms.models
        rounds.append((models, league.terms.budget, league.terms.job))
        return summary({name: (float(ord(name)), float(ord(name))) for name in models})

    class Named:
        def __init__(self, terms):
            self.terms, self.entries = terms, ()

        @classmethod
        def of(cls, terms, budget, **how):
            return cls(terms)

    monkeypatch.setattr(which, "League", Named)
    monkeypatch.setattr(which, "run_league", run_league)
    return rounds


def test_the_better_half_goes_to_the_next_round(leagues):
    outcome = which.run(Race(("d", "a", "c", "b", "e"), terms(), 120.0))
    assert [set(models) for models, *_ in leagues] == [{*"abcde"}, {*"abc"}, {*"ab"}]
    assert outcome.order == tuple("abcde") and outcome.agreement == 1
    assert leagues[1][1] == 2 * leagues[0][1]
    three = which.run(Race(("c", "a", "b"), terms(), 120.0))
    assert three.order == tuple("abc") and len(three.rounds) == 2
    assert three.agreement is None


def test_python_asks_for_the_race_of_the_command(call, monkeypatch):
    races = []
    monkeypatch.setattr("gzcli.league.which.run", lambda race, **how: races.append(race))
    monkeypatch.setattr("gzcli.cli.which.show_race", lambda outcome: None)
    words = ("which", "--data", "digits", "--budget", "20s", "--need", "likelihood", "--models", "vae,cvae")
    assert call(*words, "--seed", "3", "--cpu")[0] == 0
    monkeypatch.setattr("gzcli.league.call.run_race", which.run)
    how = {"need": ["likelihood"], "models": ["vae", "cvae"], "seed": 3, "cpu": True, "quiet": True}
    gzcli.which("digits", "20s", **how)
    assert races[0] == races[1] and races[0].terms.seeds == (3,) and races[0].models == ("vae", "cvae")
    with pytest.raises(UsageError, match="no need is called `speed`"):
        gzcli.which("digits", "20s", need=["speed"])


def test_judging_is_in_proportion_to_the_training(leagues):
    """Samples, and the time after which fewer are drawn."""
    which.run(Race(tuple("abcde"), terms(), 190.0))
    assert [job.n for *_, job in leagues] == [250, 500, 1000]
    assert [job.patience for *_, job in leagues] == pytest.approx([1, 2, 4])
    assert {job.few for *_, job in leagues} == {which.MIN_SLOW_SAMPLES}


def test_the_judges_are_terms_of_the_race():
    assert which.race_of(terms("vae", "cvae"), ()).terms.job.metrics == ("fd", "fd_second")


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_too_few_images_for_the_judges_are_refused_with_the_number_that_suffices(call, tmp_path, dry):
    from PIL import Image

    def race(n: int, *splits: str, dry=dry) -> tuple[int, str]:
        folder = tmp_path / f"{n}{''.join(splits)}"
        for split in splits or ("",):
            (folder / split).mkdir(parents=True)
            for i in range(n if split in ("", "train") else 3):
                Image.new("L", (28, 28), i).save(folder / split / f"{i}.png")
        budget = ("--budget", "6s", "--models", "vae,dcgan")
        code, _, stderr = call("which", "--data", str(folder), *budget, *dry)
        return code, stderr.replace(str(folder), "PATH")

    code, stderr = race(39)
    message = "`fd`, `fd_second` need at least 4 validation images, but `PATH` has 3"
    assert code == 2 and message in stderr and "hint: give at least 40 images\n" in stderr
    assert race(40, dry=["--dry-run"])[0] == 0
    code, stderr = race(39, "train", "test")
    assert code == 2 and message in stderr and "give at least 40 images in its split `train`" in stderr
    code, stderr = race(50, "train", "val")
    assert code == 2 and message in stderr and "give at least 4 images in its split `val`" in stderr


def test_few_colour_images_are_judged_by_the_published_network_alone(monkeypatch):
    few, many = (Facts(64, 64, 3, n) for n in (1440, 50_000))
    for there, metrics in (
        (True, [("kid_lite",), (*which.LEAGUE_JUDGES, "kid_lite")]),
        (False, [which.LEAGUE_JUDGES] * 2),
    ):
        monkeypatch.setattr(which.networks, "is_installed", lambda there=there: there)
        assert [which.metrics_of(facts) for facts in (few, many)] == metrics


def test_judges_at_chance_compare_nobody(leagues, monkeypatch):
    dead = {"metric": None, "notes": ["the judge stands at chance"], "summary": [], "rows": []}
    monkeypatch.setattr(which, "run_league", lambda league, **how: dead)
    with pytest.raises(MissingError) as e:
        which.run(Race(("a", "b"), terms(), 120.0))
    assert e.value.hint == dead["notes"][0]


def test_a_dry_run_tells_the_rounds(call, monkeypatch):
    words = ("which", "--data", "digits", "--budget", "3m", "--cpu", "--dry-run")
    code, stdout, _ = call(*words, "--json")
    plan = json.loads(stdout)
    assert code == 0 and "cfm" in plan["models"]  # what gz suggests takes part
    assert sum(row["models"] * row["seconds"] for row in plan["rounds"]) == pytest.approx(180)
    code, stdout, stderr = call(*words, "--quiet")
    assert code == 0 and "rounds: " in stdout and "total: up to " in stdout and not stderr
    assert "training: about 3 minutes; sampling and evaluation: up to " in stdout
    monkeypatch.setattr(start, "cores", lambda: 2)
    parallel = json.loads(call(*words, "--jobs", "2", "--json")[1])
    in_pairs = sum(-(-row["models"] // 2) * row["seconds"] for row in plan["rounds"])
    assert parallel["seconds"] == pytest.approx(plan["evaluation"] + in_pairs)
    assert parallel["seconds"] < plan["seconds"]
    turns = sum(row["models"] for row in plan["rounds"])
    seconds = (plan["evaluation"] - 0.1 * 180) / turns
    assert 10 < seconds < 20, "each model's turn; the judges come with gz"
    code, _, stderr = call("which", "--data", "digits", "--budget", "5s", "--models", "vae,cvae", "--dry-run")
    assert code == 2 and "gives each of 2 models" in stderr and "hint: use `--budget 6s` or more" in stderr
    assert call("which", "--data", "digits", "--budget", "6s", "--models", "vae,cvae", "--dry-run")[0] == 0
    code, _, stderr = call("which", "--data", "digits", "--cpu")
    assert code == 2 and "hint: gz which --data digits --budget 20m" in stderr
    help = call("which", "--help")[1]
    assert "Required." in help and "--jobs" in help and "--submit" not in help
    words = ("which", "--data", "digits", "--budget", "8s", "--dry-run", "--models")
    assert "1 model: vae\n" in call(*words, "vae,vae")[1] and "2 models: " in call(*words, "vae,cvae,vae")[1]
    assert call("which", "--data", "digits", "--budget", "3m", "--need", "speed")[0] == 2
    assert call("which", "--data", "digits", "--budget", "3m", "--models", "vaee")[0] == 2


def test_a_set_without_labels_has_a_race_of_models_without(call, tmp_path, monkeypatch):
    from PIL import Image

    folder = tmp_path / "flat"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    evaluation = {}
    for there in (True, False):  # few colour images need no judge but the published one
        monkeypatch.setattr(which.networks, "is_installed", lambda there=there: there)
        code, stdout, _ = call("which", "--data", str(folder), "--budget", "30m", "--dry-run", "--json")
        evaluation[there] = json.loads(stdout)["evaluation"]
    models = json.loads(stdout)["models"]
    assert evaluation[False] - evaluation[True] == pytest.approx(2 * which.networks.TRAINING)
    assert code == 0 and "fm" in models and not {"cfm", "cvae", "cgan", "cddpm"} & {*models}


def test_needs_that_cannot_be_met_are_refused(call, tmp_path):
    from PIL import Image

    for i in range(20):
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    code, _, stderr = call("which", "--data", str(tmp_path), "--budget", "30m", "--need", "labels")
    assert code == 2 and "has no labels" in stderr
    race = ("which", "--data", "digits", "--budget", "30m", "--need", "one-call", "--dry-run")
    code, _, stderr = call(*race, "--models", "cgan,cfm")
    assert code == 2 and "`cfm` does not meet" in stderr
    assert call(*race, "--models", "cgan,cvae")[0] == 0


def test_a_plan_reads_an_archive_once(call, tmp_path, monkeypatch):
    from PIL import Image

    from gzcli.data.packs import open as packs

    with zipfile.ZipFile(tmp_path / "few.zip", "w") as archive:
        for i in range(40):
            image = io.BytesIO()
            Image.new("L", (28, 28), i).save(image, "PNG")
            archive.writestr(f"{i % 2}/{i}.png", image.getvalue())
    reads, read = [], packs.read

    def counted(*args):
        reads.append(args)
        return read(*args)

    monkeypatch.setattr(packs, "read", counted)
    assert call("which", "--data", str(tmp_path / "few.zip"), "--budget", "30m", "--dry-run")[0] == 0
    assert len(reads) == 1


def test_what_cannot_be_trained_is_refused_before_the_race():
    with pytest.raises(UsageError):
        which.race_of(terms("cyclegan"), ())
