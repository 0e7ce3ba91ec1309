"""The manual: pages of models, what was measured, commands on pages, tutorials, the schema for editors."""

from __future__ import annotations

import html
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT
from PIL import Image
from rich.cells import cell_len
from test_startup import HEAVY, modules, within

from gzcli.cli import app
from gzcli.core import measured
from gzcli.core.errors import canonical
from gzcli.core.units import duration
from gzcli.docs.page import (
    ORDER,
    TUTORIALS,
    as_markdown,
    as_text,
    league_facts,
    league_seeds,
    league_simplest,
    objective,
    page_of,
    rendered,
    texts,
)
from gzcli.docs.text import DOCS_FOLDER as DOCS
from gzcli.docs.text import written
from gzcli.launch import plan
from gzcli.metrics import standings
from gzcli.models.catalog import OUTSIDE, cards
from gzcli.recipe.files import recipes
from gzcli.recipe.resolve import resolve
from gzcli.recipe.yaml import dump, load
from gzcli.store import model_files, pretrained, runs
from gzcli.store.paths import about_of, recipe_names, recipes_dir, spelling
from gzcli.store.runs import Run

described = cache(page_of)  # of what comes with gz; tests that change what is measured call `page_of`
ZOO = [spelling(name) for name, card in cards().items() if card.family != OUTSIDE]
TEXTS = {"README": (ROOT / "README.md").read_text(), **texts()}


def test_a_page_tells_all_of_a_model_in_eighty_columns():
    assert {path.stem for path in (DOCS / "models").glob("*.md")} == set(ZOO)
    assert {path.stem for path in (DOCS / "pages").glob("*.md")} == set(ORDER)
    models = cards()
    for name in ZOO:
        page, words = described(name), written(name)
        assert words and words.limits and words.code, name
        lines = as_text(as_markdown(page), 80).splitlines()
        assert max(map(cell_len, lines)) <= 80, max(lines, key=cell_len)
        text = "\n".join(lines)
        assert page.name == name and name in lines[0]
        assert words.equation.splitlines()[0].split("   ")[0] in text, name
        for option in models[name.replace("-", "_")].params:
            assert f" {option}=" in text, name


def test_show_of_a_stage_of_a_model_from_outside_and_of_none(call, monkeypatch):
    monkeypatch.setattr(model_files, "_typed", {})
    code, stdout, _ = call("show", "MaskGIT", "--options")
    assert code == 0 and "gz train vqgan" in stdout and "stages.prior.model.KEY" in stdout
    code, stdout, stderr = call("show", "MaskGIT")
    assert code == 0 and "model.KEY" not in stdout and "`gz show MaskGIT --options`" in stderr
    assert call("show", "ddmp")[:2] == (2, "")
    assert call("model", "new", "maf")[0] == 0
    code, stdout, _ = call("show", "./maf.py", "--options")
    assert code == 0 and stdout.startswith("maf\n") and "hidden=" in stdout
    value = json.loads(call("show", "ddpm", "--json")[1])
    assert value["schema"] == 1 and value["words"]["title"] == "Denoising diffusion"


def league_run(model: str, stages: list[str]) -> runs.Run:
    """A run with its curve and its pictures, in stages where they have names."""
    run = runs.create(model, "mnist")
    tree = {"model": {"name": model}, "scale": "tiny"}
    (run.path / "run.yaml").write_text(dump({"stages": dict.fromkeys(stages, tree)} if stages[0] else tree))
    for stage in stages:
        part = run.path / "stages" / stage if stage else run.path
        (part / "checkpoints").mkdir(parents=True)
        if stage:
            (part / "run.yaml").write_text(dump(tree))
        Run(part).update(state="finished", step=400, seconds=80.0)
        (part / "checkpoints" / "best.json").write_text('{"metric": "bpd", "value": 1, "step": 400}')
        lines = [{"step": s, "val_bpd": 2.0 - s / 400, "loss": 1.0} for s in (100, 200, 400)]
        (part / "samples").mkdir()
        Image.new("L", (900, 450)).save(part / "samples" / "00000400.png")
        (part / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def league_of(folder: Path, row: dict, **changed) -> Path:
    """The folder of a league of one row, as `gz bench --train-missing` leaves it."""
    facts = {"seed": 0, "error": None, "train_seconds": 480, "sample_seconds": 0.01, "params": 1000}
    facts |= {"floor": {"fd": 30.0}, "excess": {"fd": [row["metrics"].get("fd", 30) - 30, 8.0, 88.0]}}
    judge = {"features": "ab", "features_accuracy": 0.99, "versions": {"torch": "2.13"}}
    result = {"budget": 480, "metric": "fd", "floor": {"fd": 30.0}, "left_out": {}, "provenance": judge}
    folder.mkdir()
    (folder / "command.sh").write_text(f"cd /somewhere\ngz bench --train-missing --models {row['model']}\n")
    (folder / "league.json").write_text(json.dumps({"rows": [facts | row], **result} | changed))
    return folder


@pytest.fixture
def reference(tmp_path, monkeypatch, home):
    """A league of two runs, one of them in stages, as `gz bench --train-missing` leaves it; the folder that
    `tests/tools/measure.py` has made of it is the one that is read."""
    import measure

    stages = {"vae": [""], "vqvae": ["tokenizer", "prior"]}
    folders = [
        league_of(
            tmp_path / model, {"model": model, "run": league_run(model, names).id, "metrics": {"fd": fd}}
        )
        for (model, names), fd in zip(stages.items(), (75.0, 90.0), strict=True)
    ]
    measure.league(*folders, root=tmp_path / "measured")
    monkeypatch.setattr(measured, "MEASURED_FOLDER", tmp_path / "measured")
    (tmp_path / "measured" / "costs.csv").write_text(
        "model,data,scale,params,steps,seconds,machine,seconds_on_h100\n"
        "vae,mnist,small,1379152,100000,5400,a CPU,81\n"
    )
    measured.read_curve.cache_clear()
    yield tmp_path / "measured" / "mnist" / "tiny"
    measured.read_curve.cache_clear()


def test_a_league_becomes_files_that_pages_and_trainings_read(reference, monkeypatch):
    import measure

    curve = measured.ReferenceRun("vae", "mnist", "tiny").curve
    assert curve.metric == "bpd" and curve.points == ((100, 20.0, 1.75), (200, 40.0, 1.5), (400, 80.0, 1.0))
    assert [curve.at(step) for step in (50, 100, 150, 400, 401)] == [None, 1.75, 1.625, 1.0, None]
    later = measured.ReferenceRun("vqvae", "mnist", "tiny", "prior").curve
    assert [seconds for _, seconds, _ in later.points] == [100.0, 120.0, 160.0], "after the first stage's"
    run = measured.ReferenceRun("vae", "mnist", "tiny")
    stood = "the reference run, of 400 steps, had bpd 1.25 at this step"
    assert run.stood_at(300, "bpd") == stood
    assert run.stood_at(500, "bpd") == "the reference run ended at step 400 with bpd 1"
    assert run.stood_at(300, "fd") is run.stood_at(50, "bpd") is None
    with Image.open(measured.picture("vqvae", "mnist", "tiny")) as picture:
        assert picture.size == (420, 210)
    measure.small(DOCS / "static" / "assets" / "cfm-emoji.png", reference / "colour.png")
    with Image.open(reference / "colour.png") as picture:
        assert picture.width == 270 and len(picture.getcolors()) <= 32
    assert measured.order("fd_rot@32") == measured.order("fd") < measured.order("fd_lite")
    text = as_text(as_markdown(page_of("vae")), 100)
    assert re.search(r"mnist +small +1.38M +100,000 +90 minutes +81 seconds", text) and "CPU: a CPU." in text
    assert "8m00s of training" in text
    assert "REFERENCE CURVE, MNIST AT SCALE TINY" in text
    rows = [{"model": "vae", "title": "vae, guided 2"}]
    monkeypatch.setattr(measured, "shipped_league", lambda data, scale: rows)
    captions = [caption for _, caption in page_of("vae").pictures + page_of("cfm").pictures]
    assert captions[0] == "Samples of vae, guided 2 from a league, mnist at scale tiny"
    assert "Samples of gz sample pretrained:cfm-glyphs, guided 1.15" in captions


def test_the_simplest_model_is_compared_by_a_metric_that_its_judges_share(monkeypatch):
    monkeypatch.setattr(measured, "about", lambda *place: {"metric": "fd_rot"})
    simplest = {"name": "PCA", "model": "", "kid_lite_excess": "2"}
    monkeypatch.setattr(measured, "peers", lambda data: [simplest])
    rows = [{"kid_lite_excess": text} for text in ("1", "3", "")]
    monkeypatch.setattr(measured, "standings", lambda *place: rows)
    compared = {"name": "PCA", "metric": "kid_lite", "models": 2, "better": 1}
    assert league_simplest("faces", "tiny") == compared


def test_figures_stand_beside_those_of_papers_and_peers(reference, tmp_path, monkeypatch):
    """Likelihoods of several kinds are several columns."""
    head = "place,late,model,title,seeds,n,train_seconds,train_steps,sample_seconds,params,sampler,calls,"
    head += "temperature,"
    head += "fd,fd_sd,fd_excess,fd_excess_half,bpd,nats|y,nats,swd\n"
    rows = '1–2,False,fm,"fm +9 clusters, guided 2",2,2000,480,70,.01,1000,adams,20.0,,75,,45,8,1.5,,,9\n'
    rows += "1–2,False,glow,glow,1,10000,480,80,,1000,,1.0,1.0,80,2,50.2,8,1.2,,,9\n"
    rows += ",True,cvae,cvae,1,10000,610,90,,9,,1.0,0.7,,,,,,87,,\n"
    rows += ",False,vqvae,vqvae,1,10000,480,90,,9,,1.0,,,,,,,,1.8,\n"  # nats of a code, by earlier code
    (reference / "summary.csv").write_text(head + rows)
    head = "name,version,model,seconds,train_steps,fd,fd_excess,fd_excess_half\n"
    peers = head + "normflows,1.7,glow,480,62,90,60,9\n" + '"PCA, scikit-learn",1.6,,7,12,70,40,9\n'
    (reference.parent / "peers.csv").write_text(peers)
    detections = "model,in,out,score,auroc,auroc_low,auroc_high,n_in,n_out,paper_auroc\n" + (
        "glow,fashionmnist,mnist,nll,.1,.08,.12,500,500,\n"
        "glow,fashionmnist,mnist,complexity,.9,.88,.92,500,500,.998\nbaseline,fashionmnist,mnist,png,.95,,,500,500,\n"
    )
    row = {"model": "glow", "title": "glow", "n": 2000, "params": 9, "metrics": {"fd": 85.0}}
    row["sample"] = {"temperature": 0.7}
    added = json.dumps({"rows": [row | {"excess": {"fd": [55.0, 47.0, 63.0]}}]})
    (tmp_path / "rows" / "mnist").mkdir(parents=True)
    (tmp_path / "rows" / "mnist" / "deep.json").write_text(added)
    monkeypatch.setattr(measured, "ADDED_ROWS", tmp_path / "rows")
    (foreign := reference.parents[1] / "fashionmnist").mkdir()
    (foreign / "ood.csv").write_text(detections)
    text = as_markdown(page_of("glow"), site=True)
    assert (
        "\n| gz | mnist, tiny | fd 80 (+50.2 ± 8), bpd (bound, unguided) 1.2 | rank 1–2 in [the league]"
        in text
    )
    assert "10m10s of training, samples at temperature 0.7 |" in as_markdown(page_of("cvae"), site=True)
    paper = "| paper | cifar10 | bpd ≤ 2.91, NVAE with flows | [arXiv:2007.03898]("
    assert paper in as_markdown(page_of("hvae"), site=True)
    assert (
        "\n| normflows 1.7 | mnist | fd 90 (+60 ± 9) | trained for 8m00s, 62 steps, with its own settings |"
        in text
    )
    assert "\n| gz, +9 clusters, guided 2 | mnist, tiny | fd 75 (" in as_markdown(page_of("fm"), site=True)
    simplest = "\n| PCA, scikit-learn 1.6 | mnist | fd 70 (+40 ± 9) | trained for 7s, 12 steps |"
    assert simplest in text and simplest not in as_markdown(page_of("dit"), site=True)
    cell = "0.900 by complexity (0.880–0.920; papers .998), 0.100 by nll (0.080–0.120); 500 and 500 images"
    assert f"\n| gz | mnist with a model of fashionmnist | AUROC {cell} | [the league]" in text
    league = rendered("league", leagues=[league_facts("mnist", "tiny")], detections=measured.detections())
    lines = [re.sub(r"\(models/\w+.md\)", "", line) for line in league.splitlines()]
    assert lines[-2:] == [f"| [glow] | {cell} |", "| baseline | 0.950 by png; 500 and 500 images |"]
    head = r"|  | model | fd | bpd (ode, unguided) | bpd (bound, unguided) | nats\|y (bound, unguided) |"
    assert f"{head} samples | training | steps | parameters | sampler | calls | ms/image |" in lines
    seeds = "* `fm`: 2 seeds; the other models: 1 seed, so their ± covers only the choice of images."
    assert seeds in lines and "trained on a machine that was not recorded." in league
    assert "PCA, scikit-learn is the simplest model of the table: " in league
    assert "Of 2 models, 0 have a lower excess of fd." in league
    assert any(line.startswith("| – | PCA, scikit-learn 1.6 | 70 (+40 ± 9) | – |") for line in lines)
    row = "| 75 (+45 ± 8) | 1.5 | – | – | 2,000 | 480 s | 70 | 1.00K | adams | 20 | 10 |"
    assert f"| 1–2 | [fm +9 clusters, guided 2] {row}" in lines
    row = "| – | [cvae] † | – | – | – | 87 | 10,000 | 610 s | 90 | 9 | temperature 0.7 | 1 | – |"
    assert row in lines, "too late for a place"
    assert "| – | [vqvae] | – | – | – | – | 10,000 | 480 s | 90 | 9 | – | 1 | – |" in lines
    row = "| – | [glow], added as `deep` | 85 (+55 ± 8) | – | – | – | 2,000 | – | – | 9 |"
    row += " temperature 0.7 | – | – |"
    assert row in lines and "Rows that others added have no rank." in league
    row = "| – | normflows 1.7, as [glow] | 90 (+60 ± 9) | – | – | – | – | 480 s | 62 | – | – | – | – |"
    assert row in lines


def test_the_page_of_leagues_explains_the_columns_of_its_rows_and_how_to_cite_them():
    facts = [league_facts(*place) for place in measured.places()]
    page = rendered("league", leagues=facts, detections={})
    rows = "".join(re.findall(r"(?m)^\| `.*?\|", page))
    columns = {"data", "scale", "machine", "commit", "budget", "fd", "fd_sd", "fd_excess", "fd_excess_half"}
    for place in measured.places():
        names = list(measured.standings(*place)[0])
        columns.update(names[: min(i for i, name in enumerate(names) if f"{name}_sd" in names)])
    assert set(re.findall(r"`(\w+)`", rows)) == columns
    assert columns <= {*measured.results().partition("\n")[0].split(",")}
    for place in measured.places():
        about = measured.about(*place)
        assert f"\n* Recorded: {about['date']}; gz {about['version']}; " in page


def test_a_league_says_what_its_intervals_cover(monkeypatch):
    def sentence(**seeds):
        rows = [{"model": name, "seeds": n} for name, n in seeds.items()]
        monkeypatch.setattr(measured, "standings", lambda data, scale: rows)
        return league_seeds("mnist", "tiny")

    assert sentence(vae="3", fm="3") == (
        "3 seeds for each model: ± is half of a 95 % interval over trainings."
    )
    assert sentence(vae="2", fm="3") == "`vae`: 2 seeds; `fm`: 3 seeds."
    assert sentence(vae="", fm="") == "1 seed for each model: ± covers only the choice of images."


def test_leagues_of_one_set_and_scale_are_joined(reference, tmp_path, monkeypatch):
    """By model and seed, where budget, metric, judge and machine are the same."""
    import measure

    about = measured.about("mnist", "tiny")
    assert about["commands"] == ["gz bench --train-missing --models vae,vqvae"]
    assert about["judges"] == {"first": {"hash": "ab", "accuracy": 0.99}} and about["torch"] == "2.13"
    assert about["seeds"] == [0] and about["budget"] == 480 and about["cores"] > 0 and "commit" in about
    assert [row["model"] for row in measured.standings("mnist", "tiny")] == ["vae", "vqvae"]
    assert league_facts("mnist", "tiny")[3:5] == (
        "1 seed for each model: ± covers only the choice of images.",
        "",
    )
    (shorter := reference.parents[1] / "digits" / "tiny").mkdir(parents=True)
    (shorter / "about.json").write_text('{"budget": 60}')
    assert list(measured.places()) == [("mnist", "tiny"), ("digits", "tiny")]
    curves = {path.name for path in reference.glob("curves/*")}
    assert curves == {"vae.csv", "vqvae.tokenizer.csv", "vqvae.prior.csv"}
    vae = {"model": "vae", "run": measured.rows_of(reference / "league.csv")[0]["run"]}
    assert about["commit"] is None, "it is that of the rows' code, not of this clone"
    again = league_of(tmp_path / "again", vae | {"metrics": {"fd": 60.0}, "seed": 1, "commit": "0" * 40})
    measure.league(again, root=tmp_path / "measured", commit="1" * 40)
    assert measured.about("mnist", "tiny")["commit"] == "0" * 40
    about = measured.about("mnist", "tiny") | {"tuned": {"vae": 1, "vqvae": None, "fm": 2}}
    (reference / "about.json").write_text(json.dumps(about))
    tuned = "`vae` (1 trial; its row has seeds 0, 1), `vqvae` (several trials; its row has seed 0)"
    assert f"seed 0: {tuned}. Values of seed 0 favour these recipes" in league_facts("mnist", "tiny")[4]
    (best, *_) = measured.standings("mnist", "tiny")
    assert best["commit"] == "0" * 40
    assert [(r["model"], r["seeds"]) for r in measured.standings("mnist", "tiny")] == [
        ("vae", "2"),
        ("vqvae", "1"),
    ]
    league = league_of(tmp_path / "other", vae | {"metrics": {"fd": 60.0}}, budget=60)
    with pytest.raises(SystemExit, match="several terms"):
        measure.league(tmp_path / "vae", league, root=tmp_path / "measured")
    with pytest.raises(SystemExit, match="other budget; remove it"):
        measure.league(league, root=tmp_path / "measured")
    monkeypatch.setattr(measure.devices, "cpu_name", lambda: "a faster CPU")
    with pytest.raises(SystemExit, match="other machine"):
        measure.league(tmp_path / "vae", root=tmp_path / "measured")
    assert len(measured.standings("mnist", "tiny")) == 2


def test_a_validation_is_told_beside_the_reference(monkeypatch, reference, capfd):
    from helpers import recipe, trainer
    from zoo import CASES

    (reference.parent.parent / "digits" / "tiny" / "curves").mkdir(parents=True)
    tree = recipe(next(case for case in CASES if case.model == "vae"), steps=2)
    tree["train"] |= {"eval_every": 1, "best": "bpd"}
    name = reference.parent.parent / "digits" / tree["scale"] / "curves" / "vae.csv"
    name.write_text("metric,step,seconds,value\nbpd,1,1,9\nbpd,3,3,7\n")
    line = "the reference run, of 3 steps, had bpd 8 at this step"
    for shipped in (True, False):
        t = trainer(tree)
        runs.note_recipe(t.run, {"": 2}, None, shipped)
        t.fit()
        stderr = capfd.readouterr().err
        assert (line in stderr) == shipped
        assert stderr.count("the reference run") == shipped, "one line, at the end of the training"


def test_the_reference_is_told_of_runs_of_its_own_loss(home, tmp_path):
    """Also of a run that repeats one; of one that was noted by an earlier gz nothing is known."""
    mine, changed = tmp_path / "mine.yaml", tmp_path / "changed.yaml"
    mine.write_text("extends: ddpm\ntrain: {steps: 90}\n")
    changed.write_text("extends: ddpm\ntrain: {steps: 90}\nmodel: {clusters: 0}\n")

    def started(what: object, *sets: str) -> runs.Run:
        request = plan.ask(str(what), "mnist", sets, {} if runs.by_name(str(what)) else {"scale": "tiny"})
        run = runs.create(request.recipe.card.name, "mnist")
        (run.path / "run.yaml").write_text(dump(request.recipe.tree()))
        plan.note_whole(run, request, request.recipe)
        return run

    for verdict, what, *sets in (
        (True, "ddpm", "train.steps=90", "train.batch_size=8", "optim.lr=1e-3"),
        (False, "ddpm", "model.prediction=eps"),
        (False, "ddpm", "data.size=20"),
        (True, "vqvae", "stages.prior.train.steps=90"),
        (False, "vqvae", "stages.prior.model.width=32"),
        (True, mine),
        (False, changed),
    ):
        run = started(what, *sets)
        assert runs.has_shipped_loss(run) == runs.has_shipped_loss(started(run.path)) == verdict, (what, sets)
        assert not runs.has_shipped_loss(started(run.path, "data.levels=4"))
        run.update(recipe={"steps": 90, "size": None})
        assert not runs.has_shipped_loss(run) and not runs.has_shipped_loss(started(run.path))


def commands_of(text: str) -> list[str]:
    """The commands of gz in the code blocks of a page, without comments."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", "").splitlines())
    commands = (re.sub(r"^GZ_\w+=\S+ ", "", re.split(r"\s+#", line)[0].strip()) for line in lines)
    return [line for line in commands if line.startswith("gz ")]


@cache
def commands_told() -> list[tuple[str, str]]:
    """(place, command) of the pages, of the heads of recipes, and of what a page says a model can do."""
    on_pages = [(name, command) for name, text in TEXTS.items() for command in commands_of(text)]
    heads = [(f"recipe {name}", line) for name in recipe_names() for line, _ in described(name).commands]
    can = [(f"page {name}", line) for name in ZOO for line, _ in described(name).can]
    return [*dict.fromkeys([*on_pages, *heads, *can])]


all_verbs = cache(app.build)


def refused(line: str) -> str | None:
    """Why gz does not take a line, whose verbs and options are parsed as typed; None: it does. Nothing is
    done."""
    command, rest = all_verbs(), shlex.split(line.split(" > ")[0])[1:]
    try:
        while hasattr(command, "commands") and not rest[0].startswith("-"):
            command, rest = command.commands[rest[0]], rest[1:]
        loose = command.context_settings.get("ignore_unknown_options")
        command.make_context("gz", list(rest), resilient_parsing=bool(loose))
    except (KeyError, Exception) as problem:
        if type(problem).__name__ != "Exit":
            return f"{line}: {problem!r}"
    return None


def test_every_command_that_is_told_is_one_that_gz_takes_in_every_shell():
    """In zsh a bracket or a star without quotes is a pattern of file names, and an error where none fits."""
    for where, line in commands_told():
        assert refused(line) is None, where
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        assert not re.search(r"[][*?(){}]", bare), f"{where}: {line}"


def test_each_question_has_an_answer_and_a_page():
    title, *rest = re.split(r"^\*\*(.+?\?)\*\*", TEXTS["questions"], flags=re.MULTILINE)
    answers = dict(zip(rest[::2], (" ".join(text.split()) for text in rest[1::2]), strict=True))
    assert title.strip() == "# Twenty questions" and len(answers) == 20
    assert [q for q, text in answers.items() if not re.search(r"\[[^]]+\]\([a-z/-]+\.md\)$", text)] == []
    commands = [line for text in answers.values() for line in re.findall(r"`(gz [^`]+)`", text)]
    whole = [line for line in commands if line != "gz train"]
    assert len(whole) > 10 and not [why for line in whole if (why := refused(line))]


def test_screens_of_the_terminal_are_shown_and_ask_nobody():
    """`make screens` makes them; the first line of each is the command that it shows."""
    pages = "\n".join([*TEXTS.values(), (DOCS / "static" / "index.md").read_text()])
    files = sorted((DOCS / "static" / "assets").glob("screen-*.svg"))
    names = "list train error compare check bench league"
    assert {path.stem[7:] for path in files} == set(names.split())
    for path in files:
        text = path.read_text()
        assert f"assets/{path.name})" in pages and len(text) < 60_000
        outside = re.findall(r"(?:https?:)?//[^\s\"<]+|@import|url\((?!#)", text)
        assert outside == ["http://www.w3.org/2000/svg"]
        words = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>([^<]*)</text>', text)
        first = "".join(html.unescape(word) for y, word in words if y == words[0][0]).replace("\xa0", " ")
        assert first.startswith("$ gz ") and refused(first[2:]) is None, first


def test_the_readme_names_every_model_in_its_family():
    """As `make readme` writes it: a line is a family, the folder that `gz list` and the site show."""
    written = runpy.run_path(str(ROOT / ".ci" / "readme.py"))["written"]
    assert written(TEXTS["README"]) == TEXTS["README"]
    models = TEXTS["README"].partition("\n## Models\n")[2].partition("\n## ")[0]
    lines = [set(re.findall(r"`([a-z0-9-]+)`", line)) for line in models.splitlines() if line.startswith("*")]
    assert {cards()[canonical(name)].family for name in lines[0]} == {"autoregressive"}
    assert sorted(name for line in lines for name in line) == sorted(recipe_names())
    files = [ROOT / name for name in ("CITATION.cff", "pyproject.toml", ".github/CONTRIBUTING.md")]
    pages = [*TEXTS.values(), *(path.read_text() for path in (*files, DOCS / "static" / "index.md"))]
    counts = re.compile(r"(?<!of )\b([34]\d)(?= (?:\w+ ){0,2}models\b)")
    numbers = [number for text in pages for number in counts.findall(text)]
    assert f"gz has {len(recipe_names())} models" in TEXTS["README"]
    assert set(numbers) == {str(len(recipe_names()))}
    cited = yaml.safe_load(files[0].read_text())
    assert cited["cff-version"] == "1.2.0" and cited["title"].startswith("gz: ") and cited["authors"]
    pytest.importorskip("mkdocs")
    from gzcli.docs.site import models_index

    index = models_index({name: described(name) for name in ("vae", "vqvae", "transformer")})
    assert "\n2 models, and 1 without a recipe." in index
    for name, recipe in {"vae": "vae", "vqvae": "vqvae", "transformer": "vqgan"}.items():
        drawn = (place for place in measured.places() if measured.picture(recipe, *place).is_file())
        assert f"(samples/{'-'.join((*next(drawn), recipe))}.png)]({name}.md)" in index


def test_links_between_pages_lead_somewhere():
    made = ("models/index.md", "commands.md", "league.md", "parity.md", "pretrained.md")
    static = DOCS / "static"
    sources = {name: (text, [DOCS / "pages"]) for name, text in texts().items()}
    sources["index"] = ((static / "index.md").read_text(), [static, DOCS / "pages"])
    sources["README"] = (TEXTS["README"], [ROOT])
    for name, (text, places) in sources.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            there = any((place / link).exists() for place in places)
            assert there or (link in made and name != "README"), f"{name}: {link}"


def test_a_league_is_small_in_git():
    for place in measured.places():
        folder = measured.MEASURED_FOLDER.joinpath(*place)
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 1.5e6, place


def test_rows_that_different_code_judged_are_not_joined(reference, tmp_path, capsys):
    """Rows of earlier versions do not know their judges' code, so they are named."""
    import measure

    run, before = measured.rows_of(reference / "league.csv")[0]["run"], (reference / "rows.json").read_text()
    rows = [
        {"model": "vae", "run": run, "metrics": {"fd": 60.0}, "seed": seed}
        | {"judge_code": code, "judge_commit": f"commit-{seed}"}
        for seed, code in ((1, "a"), (2, "a"), (3, "b"))
    ]
    new, alike, other = (league_of(tmp_path / f"new-{row['seed']}", row) for row in rows)
    with pytest.raises(SystemExit, match="a of commit commit-1, b of commit commit-3; run every"):
        measure.league(new, other, root=tmp_path / "measured")
    assert (reference / "rows.json").read_text() == before
    measure.league(new, alike, root=tmp_path / "measured")
    assert "it is not known which code judged vae, vqvae\n" in capsys.readouterr().err
    commits = [row["judge_commit"] for row in measured.shipped_league("mnist", "tiny")]
    assert commits == ["", "", "commit-1", "commit-2"]
    with pytest.raises(SystemExit, match="judged by different code"):
        measure.league(other, root=tmp_path / "measured")


def test_the_tables_of_a_league_are_those_of_its_rows():
    """Each row also names its code, its machine and the options of its sampler."""
    for place in measured.places():
        folder, about = measured.MEASURED_FOLDER.joinpath(*place), measured.about(*place)
        rows = json.loads((folder / "rows.json").read_text())
        joined = standings.of_one_size(rows)
        assert (folder / "league.csv").read_text() == standings.table_of(joined)
        summary = standings.summary(joined, about["metric"], about["budget"])
        assert (folder / "summary.csv").read_text() == standings.summary_table(summary)
        for row in rows:
            assert {"commit", "machine", "sample", "n", "train_seconds", "train_steps"} <= row.keys()
            guidance = row["sample"].get("guidance") or 1.0
            assert row["title"].endswith(f", guided {guidance:g}") == (guidance != 1), row["title"]
        assert {row["machine"] for row in rows} == {about["machine"]}
        assert about["seeds"] == sorted({row["seed"] for row in rows})
        assert set(about["commit"].split("; ")) == {row["commit"] for row in rows}


def test_the_league_of_the_readme_is_the_measured_one():
    standings = measured.standings("mnist", "tiny")
    rows = {row["model"]: row for row in standings}
    lines = re.findall(r"(?m)^\| [\d–]+ \| `.*$", TEXTS["README"])
    assert len(lines) == 5 and f"Five of {len(standings)} models" in TEXTS["README"]
    for line in lines:
        rank, model, _, excess, training, per_image = line.strip("| ").split(" | ")
        row = rows[model.strip("`")]
        value, half = map(float, excess.replace(",", "").split(" ± "))
        assert value == pytest.approx(float(row["fd_excess"]), rel=0.005), line
        assert half == pytest.approx(float(row["fd_excess_half"]), rel=0.05) and rank == row["place"], line
        assert training == duration(float(row["train_seconds"]))
        assert per_image == f"{1000 * float(row['sample_seconds']):.2g} ms"


def test_figures_on_pages_are_the_measured_ones():
    """By how much an even draw lowers the floor of a league, what `eqm` detects, and the order of faces."""
    league = measured.rows_of(measured.MEASURED_FOLDER / "glyphs" / "tiny" / "league.csv")
    floors = {(row["drawn"], float(row["fd_floor"])) for row in league}
    (random,) = (floor for drawn, floor in floors if drawn == "random")
    lower = [round(100 * (1 - floor / random)) for drawn, floor in floors if drawn != "random"]
    assert {row["n"] for row in league} == {"2000"}
    assert f"by {min(lower)} to {max(lower)} % for\n2,000 images of `glyphs`" in TEXTS["bench"]
    emoji = next(model for model in pretrained.every() if model.name == "cfm-emoji")
    size, minutes = round(emoji.file.stat().st_size / 1e6), round(emoji.card["work"] / 60)
    assert f"a model of {size} MB that comes with gz. It was trained for {minutes} min" in TEXTS["README"]
    rows = measured.rows_of(measured.MEASURED_FOLDER / "fashionmnist" / "ood.csv")
    areas = {row["score"]: row["auroc"] for row in rows if (row["model"], row["out"]) == ("eqm", "mnist")}
    ours = [f"{float(areas[score]):.2f}".removeprefix("0") for score in ("gradient", "energy")]
    assert f"AUROC for MNIST is {' and '.join(ours)}." in (DOCS / "models" / "eqm.md").read_text()
    faces, simplest = measured.standings("faces250", "tiny"), measured.peers("faces250")[0]
    by = {key: {row["model"]: float(row[f"{key}_excess"]) for row in faces} for key in ("kid_lite", "fd_rot")}
    assert sorted(by["kid_lite"], key=by["kid_lite"].__getitem__)[:2] == ["eqm", "fm"]
    assert "`fm` is second by `kid_lite`, after `eqm`" in TEXTS["bench"]
    better = [value for value in by["kid_lite"].values() if value < float(simplest["kid_lite_excess"])]
    assert len(better) == 7 and "one Gaussian of 62 principal components is eighth" in TEXTS["bench"]
    assert (
        by["fd_rot"]["dcgan"] < by["fd_rot"]["eqm"] and f"`faces250` of {len(faces)} models" in TEXTS["bench"]
    )


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_an_installation_shows_what_it_fetches(tmp_path):
    """By what pip and the program write: `make -n` shows the lines."""
    for target in ("demo", "test"):
        words = ["make", "-n", target, f"VENV={tmp_path / 'new'}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.index("0.4 GB are fetched") < done.stdout.index(" -m pip install")
        assert not re.search(r" -m pip .*(--quiet|-q\b)", done.stdout)


def scripts(text: str) -> list[str]:
    """The lines of a page's `sh` blocks, without their comments, which a test runs."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" +# .*", "", line) for block in blocks for line in block.splitlines()]


def with_pictures(folder: Path) -> Path:
    """The folders of pictures that pages take for the reader's."""
    rng = np.random.default_rng(0)
    ours = ("photos", (40, 48, 3), 48), ("scans", (16, 16), 3), ("good", (16, 16), 70), ("today", (16, 16), 3)
    for name, size, count in ours:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            low, high = (100, 140) if name in ("good", "today") else (0, 256)
            Image.fromarray(rng.integers(low, high, size, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["README", *TUTORIALS])
def test_what_a_page_does_without_training(name, call, tmp_path, monkeypatch):
    """The lines of a page that start no engine."""
    monkeypatch.chdir(with_pictures(tmp_path / "pictures"))
    light = re.compile(r"gz (list|show|runs list|data (?!download)|train .*--dry-run)\b")
    for line in commands_of(TEXTS[name]):
        if light.match(line):
            code, _, stderr = call(*shlex.split(line)[1:])
            assert code == 0, f"{line}\n{stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README", *TUTORIALS])
def test_what_a_page_says_can_be_done(name, tmp_path, home):
    """Every line, with a few steps where it trains."""
    follow(scripts(TEXTS[name]), tmp_path)


@pytest.mark.launch
def test_what_the_readme_says_of_a_model_of_one_s_own(tmp_path, home):
    """In processes of their own: that of the training knows the model from the run alone."""
    lines = re.findall(r"run `(gz model new .*)`, then `(gz train \..*)`", TEXTS["README"])
    follow([*lines[0]], tmp_path)


OWN = """gz model new maf
gz model check ./maf.py
gz train ./maf.py --data digits --name first
gz train first --resume --steps 24
gz sample first -n 4 --out drawn
gz bench first --data digits -n 60
gz train first --data glyphs
gz train ../flat.py --data digits --cpu --processes 2 --name second
gz train ../flat.py --data digits --set train.init=second
gz ood second --in digits --out glyphs -n 100 --score nll,local
gz bench --train-missing --models ./maf.py,../flat.py --data digits --budget 2s -n 60 --jobs 2
gz sweep ../flat.py --data digits --set optim.lr=1e-3,1e-4 --budget 10s"""
FLAT = "from gzcli.models.vae.vae import VAE\n\n\nclass Flat(VAE):\n    paper = 'ours'\n"


@pytest.mark.slow
@pytest.mark.launch
def test_every_verb_takes_a_model_of_one_s_own(tmp_path, home):
    (tmp_path / "flat.py").write_text(FLAT)
    follow(OWN.splitlines(), tmp_path)
    script = "import gzcli\nrun = gzcli.train('./flat.py', data='digits', steps=2)\nrun.sample(2)\n"
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_workflow_of_the_alarm_stops_on_a_foreign_picture(tmp_path, home):
    """The step of the page, by bash, and the exported script's in its place."""
    folder = with_pictures(tmp_path / "here")
    step = next(iter(yaml.safe_load(re.findall(r"```yaml\n(.*?)```", TEXTS["ood-alarm"], re.DOTALL)[0])))
    (tmp_path / "bin").mkdir()
    gz = tmp_path / "bin" / "gz"
    gz.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gzcli "$@"\n')
    gz.chmod(0o755)
    path = f"{gz.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}

    def ends(line: str) -> int:
        words = ["bash", "-e", "-o", "pipefail", "-c", line]
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, timeout=300).returncode

    assert ends(step["run"]) == 0
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "today" / "blank.png")
    squares = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((4, 4))) * 255
    Image.fromarray(squares.astype(np.uint8)).save(folder / "today" / "squares.png")
    assert ends(step["run"]) == 6
    pytest.importorskip("onnxruntime")
    assert ends("gz ood --in ./good --export ./alarm") == 0
    assert ends(f'"{sys.executable}" alarm/judge.py ./today --fpr 2%') == 6


@pytest.mark.slow
def test_what_the_readme_does_on_real_data(tmp_path, home, shared_data, monkeypatch):
    """From a clean home, by the lines in their order, with the smallest networks and few images."""
    monkeypatch.setenv("GZ_MIRROR", f"file://{shared_data}/mirror")
    section = TEXTS["README"].partition("## On real data\n")[2].partition("\nThe next lines do not depend")[0]
    lines = commands_of(section)
    assert len(lines) == 6
    few = {"train": " --scale tiny", "ood": " -n 30"}
    follow([line.replace("-n 500", "-n 50") + few.get(line.split()[1], "") for line in lines], tmp_path)


def follow(lines: list[str], tmp_path: Path) -> None:
    """Does what lines say, with a few steps where they train."""
    folder = with_pictures(tmp_path / "here")
    for line in lines:
        words = re.sub(r" --minutes \S+", "", line)
        shortest = "10s" if words.startswith("gz sweep ") else "3s"  # of two trials, or of one training
        words = re.sub(r"--budget \S+", f"--budget {shortest}", words)
        quick = ["--steps", "20"] if words.startswith("gz train ") and "--steps" not in words else []
        command = [sys.executable, "-m", "gzcli", *shlex.split(words)[1:], *quick]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_a_line_on_a_recipe_is_found_without_yaml():
    for name, path in recipes().items():
        assert about_of(name) == load(path)["about"], name
    assert about_of("transformer") == "", "it is only a stage"


def test_the_manual_as_text(call):
    """An overview of at most 8,000 tokens, of four characters each, and every topic that it names."""
    assert modules("--llm") & HEAVY == set()
    within(["-c", "import typer"], "--llm", times=8)
    code, overview, _ = call("--llm")
    assert code == 0 and overview.startswith("# gz\n\ngz trains, samples") and len(overview) < 4 * 8000
    assert all(f"\n- `{name}`: " in overview for name in (*ORDER, *recipe_names()))
    code, stdout, _ = call("--llm", "bench", "league", "vae")
    assert code == 0 and texts()["bench"].splitlines()[0] in stdout and "static/assets" not in stdout
    assert "## `gz bench`" in stdout and "## `gz league`" in stdout and "\n# vae\n" in stdout
    code, _, stderr = call("--llm", "bnch")
    assert code == 2 and "did you mean `bench`" in stderr


def test_a_page_in_a_terminal_is_short():
    for name in ZOO:
        words = as_text(as_markdown(described(name), full=False), 80).split()
        assert len(words) <= 600, f"{name}: {len(words)} words"


def test_no_page_shows_its_own_marks():
    """To the site's Markdown a fence that is not closed is text, as is a list without a line before it."""
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("mkdocs")
    from gzcli.docs.site import mkdocs_settings

    extensions = mkdocs_settings(DOCS, DOCS, [])["markdown_extensions"]
    more = [path for place in ("models", "static") for path in (DOCS / place).glob("*.md")]
    for name, text in {**TEXTS, **{path.name: path.read_text() for path in more}}.items():
        page = re.sub(r"<pre>.*?</pre>", "", markdown.markdown(text, extensions=extensions), flags=re.DOTALL)
        assert not re.search(r"```|^(<p>)?([*-] |\||#+ )|\*\*", page, re.MULTILINE), name


def test_the_site_shows_comments_above_lines_that_are_too_long():
    pytest.importorskip("mkdocs")
    from gzcli.docs.site import stacked

    short = "```sh\ngz list   # all models\n```\n"
    wide = f"```\ngz list   # all models\ngz sample cfm   # {'x' * 80}\n```\n"
    yaml_block = f"```yaml\nsteps: 3   # {'x' * 80}\n```\n"
    above = f"```\n# all models\ngz list\n\n# {'x' * 80}\ngz sample cfm\n```\n"
    assert stacked(short + wide + yaml_block) == short + above + yaml_block
    inside = f"```python\nclass A:\n    x = 1  # {'y' * 80}\n```\n"
    assert stacked(inside) == f"```python\nclass A:\n    # {'y' * 80}\n    x = 1\n```\n"


@pytest.mark.slow
def test_the_site_asks_nobody(tmp_path):
    pytest.importorskip("mkdocs")
    from gzcli.docs.site import build

    page = build(tmp_path / "site", "# Commands\n")
    htmls = list((tmp_path / "site").rglob("*.html"))
    assert page.exists() and len(htmls) > len(ZOO)
    for path in htmls:
        text = path.read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\">]+", text)
        assert not [tag for tag in loaded if "canonical" not in tag], path
        assert "```" not in text, path
    assert "<math" in (tmp_path / "site" / "models" / "fm.html").read_text()
    ready = (tmp_path / "site" / "pretrained.html").read_text()
    for name in pretrained.pretrained_names():
        assert f"pretrained:{name}" in ready and (tmp_path / "site" / "pretrained" / f"{name}.png").exists()
    assert "__index" in (tmp_path / "site" / "search" / "search_index.js").read_text()[:20]
    rows = measured.rows_of(tmp_path / "site" / "results.csv")
    assert len(rows) == sum(len(measured.standings(*place)) for place in measured.places())


WRONG = [
    {"extends": "glow", "model": {"dpth": 3}},
    {"model": {"name": "glow", "beta": 3}},
    {"model": {"name": "vae", "latent": "many"}},
    {"extends": "glow", "train": {"stepz": 3}},
    {"extends": "glow", "sample": {"steps": 3}},
    {"extends": "glow", "optim": {"betas": [0.9, 2]}},
    {"extends": "glow", "for": {"small": {"grey": {"model": {"dpth": 1}}}}},
    {"for": {"mnist": {"train": {"steps": 0}}}},
    {"extends": "vqvae", "stages": {"prior": {"model": {"wdth": 3}}}},
    {"modle": {}},
]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_schema_takes_recipes_and_no_wrong_key(every, call):
    """Those of one model a family, or all."""
    jsonschema = pytest.importorskip("jsonschema")
    from gzcli.recipe.yaml import load

    code, stdout, _ = call("recipe", "schema")
    assert code == 0
    jsonschema.Draft7Validator.check_schema(json.loads(stdout))
    check = jsonschema.Draft7Validator(json.loads(stdout))
    paths = {cards()[canonical(path.stem)].family: path for path in recipes_dir().glob("*.yaml")}.values()
    for path in recipes_dir().glob("*.yaml") if every else paths:
        assert [error.message for error in check.iter_errors(load(path))] == [], path
    assert [tree for tree in WRONG if check.is_valid(tree)] == []
    assert check.is_valid({"model": {"name": "a_model_of_mine", "anything": 1}, "sample": {"any": 2}})


def test_a_page_names_the_loss_of_its_recipe_and_what_is_not_the_papers():
    ddpm, sgm, vae = map(page_of, ("ddpm", "sgm", "vae"))
    assert ddpm.objective == "E ‖f(α x₀ + σ ε, t) − (α ε − σ x₀)/√(α² + σ²)‖²"
    assert {"prediction v (eps)", "schedule cosine (linear)", "bounded true (false)"} <= set(ddpm.differs)
    assert described("soflow").objective == "", "a loss of its own"
    assert "weighting even (score)" in sgm.differs and vae.objective == ""
    assert any(row.startswith("image_weight") and row.endswith("(0)") for row in described("aae").differs)
    assert {"spectral true (false)", "objective hinge (nonsaturating)"} <= set(described("dcgan").differs)
    options = resolve("fm", flags={"model.prediction": "x0", "model.loss_type": "l1"}).parts[0].options
    assert objective(options) == "E ‖(f(α x₀ + σ ε, t) − x₀) / max(σ, .05)‖₁"
    assert objective(dict(options, min_snr=5.0)) == "E min(α²/σ², 5) / 1 · ‖f(α x₀ + σ ε, t) − x₀‖₁"
    page = page_of("fm", ["model.prediction=eps", "model.process=vp"])
    assert page.objective == "E ‖f(α x₀ + σ ε, t) − ε‖²"
    assert {"prediction eps (velocity)", "process vp (straight)"} <= set(page.differs)
    scale = "σ/√(α² + σ²)"  # by which the networks of sgm and edm see images of unit variance
    for name in ("sgm", "edm"):
        loss = page_of(name, ["model.prediction=x0"]).objective
        assert loss == f"E ‖(f(α x₀ + σ ε, t) − x₀) / max({scale}, .05)‖²"
    assert page_of("edm").objective == "", "that of its preconditioning, which the page names"
