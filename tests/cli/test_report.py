"""Reports: what the page, the Markdown and the LaTeX tables say, that nothing in a name gets out of its place
in them, and where they are written."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import tracemalloc
import zipfile
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from gzcli.cli.bench import ended
from gzcli.cli.comparison import cite
from gzcli.core import streams
from gzcli.core.errors import GzError
from gzcli.launch import launcher
from gzcli.metrics import standings
from gzcli.report import bench as of_bench
from gzcli.report import cited
from gzcli.report import ood as of_ood
from gzcli.report import write as escapes
from gzcli.report.document import Chart, Dots, Measured, Picture, Series
from gzcli.report.results import read
from gzcli.report.write import svg
from gzcli.store import files, runs

EVIL = "</pre><script>alert(1)</script> & 100% _x_ | #$ {\\end{verbatim}} ~^ `tick"
FORMS = ("report.html", "report.md", "report.tex")


def bench_json(**changes) -> dict:
    """A result of `gz bench`, of a run, a folder of images and a contestant that failed."""
    floor = {"fd": 10.0, "recall_lenet": 0.9}
    rows = [
        {
            "name": "vae",
            "model": "vae",
            "run": "vae-digits-1",
            "params": 1_230_000,
            "seconds": 4.5,
            "step": 60,
        }
        | {
            "metrics": {"fd": 40.0, "recall_lenet": 0.25, "samples_per_s": 90.5},
            "intervals": {"fd": [38.0, 43.0]},
        }
        | {"excess": {"fd": [30.0, 27.0, 33.0]}},
        {"name": EVIL, "run": None, "metrics": {"fd": 25.0, "recall_lenet": 0.125}},
        {"name": "dcgan", "error": "diverged at `step 5`", "metrics": {}},
    ]
    made = {"data": "digits", "rows": rows, "floor": floor, "floor_intervals": {"fd": [9.0, 11.0]}}
    made |= {"directions": {"fd": "down", "recall_lenet": "up"}, "notes": [f"mind `fd` of {EVIL}"]}
    made |= {"metric": "fd", "places": {"vae": "2", EVIL: "1"}, "second": None}
    made |= {"provenance": {"n_fake": 200, "shape": [1, 16, 16], "versions": {"torch": EVIL}}}
    return made | changes


@pytest.fixture
def bench(tmp_path):
    """The folder of a `gz bench` with its samples and a picture."""
    folder = tmp_path / "bench"
    files.write_json(folder / "bench.json", bench_json())
    job = {"verb": "bench", "runs": ["vae-digits-1"], "data": "digits", "n": 200}
    files.write_json(folder / "job.json", job)
    (folder / "samples").mkdir()
    np.savez(folder / "samples" / "vae-digits-1-0.npz", samples=np.full((5, 16, 16, 1), 200, np.uint8))
    (folder / "neighbours.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def ood(tmp_path):
    """The folder of a `gz ood` with scores of two sets, of which one is called as no set should be."""
    rng, folder = np.random.default_rng(0), tmp_path / "ood"
    scores = {"digits": rng.normal(0, 1, 700).round(2), EVIL: rng.normal(1.2, 2, 500).round(2)}
    lines = ["set,role,index,file,nll"]
    for name, values in reversed(scores.items()):
        role, quoted = "in" if name == "digits" else "out", '"' + name.replace('"', '""') + '"'
        lines += [f"{quoted},{role},{i},,{value}" for i, value in enumerate(values)]
    folder.mkdir()
    (folder / "scores.csv").write_text("\n".join(lines) + "\n")
    row = {"out": EVIL, "score": "nll", "baseline": False, "auroc": 0.75, "fpr95": 0.5}
    row |= {"ci": {"auroc": [0.7, 0.8]}}
    made = {"run": "vae-digits-1", "in": "digits", "results": [row], "names": {}, "notes": []}
    files.write_json(folder / "ood.json", made)
    return folder, scores


class Page(HTMLParser):
    """What a browser would load or run, and the texts of the cells of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.cells, self.within = [], [], [], [], []
        self.policy, self.inline = "", {"script": "", "style": ""}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.within.append(tag)
        values, loads = dict(attrs), ("src", "href", "srcset", "action", "data")
        self.addresses += [values[key] for key in loads if values.get(key)]
        self.handlers += [key for key in values if key.startswith("on") or key == "style"]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data):
        if self.within and self.within[-1] in self.inline:
            self.inline[self.within[-1]] += data
        elif {"td", "th"} & set(self.within):
            self.cells[-1] += data


def written(call, folder: Path, *words: str) -> dict[str, str]:
    code, stdout, stderr = call("report", str(folder), "--out", str(folder.parent / "out"), *words)
    assert code == 0, stdout + stderr
    assert "done: " in stderr and f"next: python -m webbrowser {folder.parent}/out/report.html" in stderr
    return {name: (folder.parent / "out" / name).read_text() for name in FORMS}


def best_of(page: str, section: str) -> list[str]:
    """The bold figures of a section of a page."""
    after = page.partition(f">{section}</h2>")[2].partition("</section>")[0]
    return re.findall(r'<td class="num best"[^>]*><span>([^<]*)', after)


def items_of(folder: Path, verb=of_bench) -> list:
    return [item for section in verb.document(read(folder)).sections for item in section.items]


def league_json() -> dict:
    """A league of two seeds: `b` is not told apart from `a`, and `c` is; `b` has fewer samples."""
    values = {"a": (10.0, 12.0), "b": (13.0, 14.0), "c": (40.0, 41.0)}
    rows = [
        {"model": name, "title": f"{name}, guided 1.3", "seed": seed, "n": 50 if name == "b" else 200}
        | {"metrics": {"fd": fd, "bpd": fd / 10}, "excess": {"fd": [fd - 2 * (name == "b"), fd - 3, fd + 3]}}
        | {"intervals": {"fd": [fd - 1, fd + 1]}, "train_seconds": 60.4, "train_steps": 100, "params": 1e5}
        for name, pair in values.items()
        for seed, fd in enumerate(pair)
    ]
    summary = [{"model": name, "title": f"{name}, guided 1.3", "place": "1"} for name in values]
    return {"data": "digits", "rows": rows, "summary": summary, "metric": "fd", "directions": {"fd": "down"}}


def test_the_table_to_cite_has_one_kind_of_error_and_ties_are_bold(call, tmp_path):
    folder = tmp_path / "league"
    files.write_json(folder / "league.json", league_json())
    table = cited.table(league_json(), ("fd", "seconds"))
    assert [cell.text for cell in table.columns[0].cells] == [f"{name}, guided 1.3" for name in "abc"]
    figures = table.columns[1].cells
    # Student's t of two seeds that differ by 2, whose mean has a deviation of 1, is 12.706
    assert [cell.small for cell in figures] == ["± 13", "± 6.4", "± 6.4"]
    assert [cell.best for cell in figures] == [True, True, False]
    assert [cell.text for cell in cited.table(league_json(), ("params",)).columns[1].cells] == ["100K"] * 3
    rotated = json.loads(json.dumps(league_json()).replace('"fd"', '"fd_rot"'))
    assert cited.table(rotated).columns[1].name == "fd_rot", "the metric that ranks it"
    late = league_json()
    late["summary"][0]["late"] = True
    table = cited.table(late, ("fd",))
    assert table.columns[0].cells[0].text == "a, guided 1.3 †" and "†" not in cited.caption(["a"])
    assert [cell.best for cell in table.columns[1].cells] == [False, True, False] and "†: " in table.caption
    tex = written(call, folder, "--columns", "fd,bpd,seconds")["report.tex"]
    assert tex.count("tabular}") == 2 and "booktabs" in tex, "one table"
    assert r"a, guided 1.3 & {}\textbf{11} {\scriptsize $\pm$ 13} & " in tex
    named = ("fd", "recall", "bpd", "nats", "seconds")  # recall without its judge; no model has nats
    judge = json.loads(
        json.dumps(league_json()).replace('"bpd"', '"recall_lenet"').replace('"fd"', '"fd_rot"')
    )
    table = cited.table(judge, named)
    assert [one.name for one in table.columns[1:]] == ["fd_rot", "recall_lenet", "bpd", "nats", "seconds"]
    for row in judge["rows"]:
        row["sample"] = {"guidance": 1.3}
    assert cited.table(judge, ("nats", "fd")).columns[1].name == "nats, unguided"
    assert table.columns[2].cells[0].text == "1.1" and table.columns[3].cells[0].text == "–"
    code, _, stderr = call("report", str(folder), "--columns", "fdd")
    assert code == 2 and "no column `fdd`" in stderr and "`fd`" in stderr


def test_a_report_with_columns_reads_its_results_once(call, tmp_path, monkeypatch):
    files.write_json(tmp_path / "league" / "league.json", league_json())
    paths, read_object = [], files.read_object

    def counted(path, *hint):
        paths.append(path.name)
        return read_object(path, *hint)

    monkeypatch.setattr(files, "read_object", counted)
    written(call, tmp_path / "league", "--columns", "fd")
    assert paths.count("league.json") == 1


def test_the_table_of_a_league_has_the_errors_and_ties_of_the_table_to_cite():
    made = league_json()
    for row in made["rows"]:
        if row["model"] == "c":  # with fewer grey levels
            row["metrics"] = {"fd@32": row["metrics"]["fd"]}
    for entry in made["summary"]:
        entry |= {"metrics": {"fd@32" if entry["model"] == "c" else "fd": 1.0}, "deviations": {"fd": 1.0}}
    made["summary"].append({"model": "failed", "failed": 2})
    wide = of_bench.standings(made)
    columns = {column.name: list(column.cells) for column in wide.columns}
    figures = cited.table(made, ("fd",)).columns[1].cells
    assert columns["fd"][:3] == figures and [cell.text for cell in columns["fd"][3:]] == ["–"]
    assert {"fd@32", "fd@32, excess"}.isdisjoint(columns) and figures[2].small == "± 6.4"
    assert wide.caption.count("±") == 1 and cited.caption(["c"]) in wide.caption


def test_a_value_is_bold_if_and_only_if_its_rank_starts_at_1(capsys):
    """The lowest `fd` has a wide interval, which contains every other value. Two others differ."""
    ends = {"a": (10, 6), "b": (11, 0.3), "c@32": (13, 0.3)}
    rows = [
        {"name": name[0], "metrics": {name.replace(name[0], "fd"): fd, "samples_per_s": fd}}
        | {"excess": {name.replace(name[0], "fd"): [fd, fd - half, fd + half]}}
        for name, (fd, half) in ends.items()
    ]
    way = {"fd": "down", "fd@32": "down"}
    result = {"rows": rows, "directions": way, **standings.two_judges(rows, None, way)}
    assert result["places"] == {"a": "1–3", "b": "1–2", "c": "2–3"}
    assert standings.first_of(result["places"]) == ["a", "b"]
    columns = cited.table(result, ("fd", "samples_per_s")).columns
    assert [[cell.best for cell in column.cells] for column in columns[1:]] == [
        [True, True, False],
        [False, False, True],  # without a floor, and more is better
    ]
    every = of_bench.Figures(result, rows).table("Figures").columns
    bold = {column.name: [cell.best for cell in column.cells] for column in every}
    assert bold["fd"] == [True, True, False] and bold["fd@32"] == [False] * 3
    cite(result, "fd")
    shown, said = capsys.readouterr()
    assert [line.split()[1] for line in shown.splitlines()] == ["fd", "10*", "11*", "13"]
    assert "*: no model is significantly better." in " ".join(said.split()) and "Bold" not in said


def test_the_table_to_cite_has_the_larger_side_of_an_interval_at_a_bound():
    """Wilson's interval of 100 of 100 is .963–1, and that of 98 of 100 contains a true value of .94."""
    shares = {"a": (1.0, [0.963, 1.0]), "b": (0.98, [0.93, 0.9945])}
    rows = [
        {"name": name, "metrics": {"recall": share}, "intervals": {"recall": ends}}
        for name, (share, ends) in shares.items()
    ]
    cells = cited.table({"rows": rows}, ("recall",)).columns[1].cells
    assert [cell.small for cell in cells] == ["± 0.037", "± 0.05"]


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own(call, bench, ood):
    for folder in (bench, ood[0]):
        page = Page(written(call, folder)["report.html"])
        assert page.addresses and all(at.startswith(("data:", "#")) for at in page.addresses)
        assert page.tags.count("script") == page.tags.count("style") == 1 and not page.handlers
        assert "url(" not in page.inline["style"] and "import" not in page.inline["style"]
        for what, text in page.inline.items():  # a browser refuses what the policy does not name
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{what}-src 'sha256-{digest}'" in page.policy
        assert "default-src 'none'" in page.policy and "unsafe" not in page.policy


def test_names_stand_as_they_are_in_every_form(call, bench, ood):
    cells = []
    for folder in (bench, ood[0]):
        texts = written(call, folder)
        page = Page(texts["report.html"])
        cells += [cell.replace("`", "") for cell in page.cells]
        whole = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", texts["report.html"], flags=re.DOTALL)
        assert "<script" not in whole.replace(page.inline["script"], "")
        # Markdown: outside of blocks of code no tag is the name's, and rows of a table have equal cells
        prose = re.sub(r"^(`{3,})\n.*?\n\1$", "", texts["report.md"], flags=re.MULTILINE | re.DOTALL)
        assert set(re.findall(r"<[^>\n]*>", prose)) <= {"<details>", "<summary>", "</summary>", "</details>"}
        for table in re.findall(r"(?:^\|.*\n)+", prose, flags=re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        tables = re.sub(r"^%.*", "", texts["report.tex"], flags=re.MULTILINE)
        assert not re.search(r"(?<!\\)[#~^]|(?<!\\)%|(?<=[a-z ])_(?=x)", tables)
        bare = re.sub(r"\\[{}]", "", tables)
        assert bare.count("{") == bare.count("}") and "\\end{verbatim" not in tables
        assert bare.count("\\begin{") == bare.count("\\begin{tabular}") == bare.count("\\end{") > 0
        assert re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", bare, flags=re.DOTALL).isspace()
    assert any(EVIL.replace("`", "") in cell for cell in cells)


def test_latex_reads_every_character():
    text = "".join(map(chr, range(33, 127))) + "".join(escapes._SIGNS) + "é–…−½²"
    assert escapes.latex('"日α😀') == "''U+65E5U+03B1U+1F600" and escapes.latex("é  ü") == "é ü"
    assert not re.search(r"(?<!\\)[#%&_]", escapes.latex(text)) and "textquotedbl" not in escapes.latex(text)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles_with_booktabs_alone(call, bench, ood, tmp_path):
    tables = [written(call, folder)["report.tex"] for folder in (bench, ood[0])]
    names = escapes.latex("".join(map(chr, range(33, 384))) + "".join(escapes._SIGNS) + "日😀…")
    body = "\n".join([*tables, names])
    (tmp_path / "paper.tex").write_text(
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, encoding="latin-1")
    assert process.returncode == 0, [line for line in process.stdout.splitlines() if line.startswith("!")]


def test_names_of_no_letters_are_written_out(call, bench, ood):
    before = {path: path.read_text() for path in (bench / "bench.json", ood[0] / "ood.json")}
    table = (ood[0] / "scores.csv").read_text()
    for name in ("a\0b", "a\udc80b", "a\u202eb\x1b[8m"):  # a zero byte, half a letter, turned and hidden
        shown = streams.printable(name)
        scores = table.replace(EVIL.replace('"', '""'), name.replace("\0", ""))
        (ood[0] / "scores.csv").write_bytes(scores.encode("utf-8", "surrogateescape"))
        for file, text in before.items():
            made = json.loads(text.replace(json.dumps(EVIL)[1:-1], json.dumps(name)[1:-1]))
            if file.name == "bench.json":
                made["rows"][1] |= {"run": name, "path": f"/{name}"}
            files.write_json(file, made | {"run": name})
            files.write_json(file.parent / "job.json", {"verb": "bench", "runs": [name], "data": name})
            for text in written(call, file.parent).values():
                assert not set(text) & set("\0\u202e\x1b\udc80")
                assert shown in text or escapes.latex(shown) in text or escapes.markdown(shown) in text


def test_figures_come_with_floor_interval_and_direction(call, bench):
    assert of_bench.row_labels([{"name": name} for name in "abaa"]) == ["a", "b", "a (2)", "a (3)"]
    rows = [{"model": "fm", "title": "fm, guided 2", "seed": 0}, {"model": "vae", "seed": 1}]
    assert of_bench.row_labels(rows) == ["fm, guided 2, seed 0", "vae, seed 1"]
    texts = written(call, bench)
    page = Page(texts["report.html"])
    cells = [cell.strip() for cell in page.cells]
    assert {"fd↓", "recall_lenet↑", "40[38, 43]", "25", "10[9, 11]", "0.25", "1.23M", "90.5", "30± 3"} <= set(
        cells
    )
    best = best_of(texts["report.html"], "Figures")
    assert best == ["0.25", "25"]  # the least distance, the highest recall
    assert "**25**" in texts["report.md"] and "\\textbf{25}" in texts["report.tex"]
    assert "Best by \\`fd\\`: " in texts["report.md"], "the name in this sentence is escaped as a whole"
    assert "diverged at" in texts["report.html"]
    assert "gz bench vae-digits-1 --data digits -n 200" in texts["report.md"]
    names = {path.name for path in (bench.parent / "out" / "figures").iterdir()}
    assert {"fd.svg", "samples-vae.png", "neighbours.png"} <= names
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", texts["report.md"])
    assert set(shown) == {f"figures/{name}" for name in names}


def test_scores_whose_intervals_tell_no_difference_are_bold():
    """As in a bench: `a` has the highest AUROC, `b` may be as good, and `c` is worse than `b`."""
    rows = []
    for name, value, half in (("a", 0.9, 0.2), ("b", 0.88, 0.01), ("c", 0.8, 0.01)):
        values = {"auroc": value, "fpr95": 1 - value, "aupr_in": None, "aupr_out": value}
        ends = {key: [values[key] - half, values[key] + half] for key in ("auroc", "fpr95")}
        rows.append({"out": "x", "score": name, "ci": ends} | values)
    (table,) = of_ood.detection_tables(rows, {})
    bold = {column.name: [cell.best for cell in column.cells] for column in table.columns}
    assert bold["AUROC"] == bold["FPR95"] == [True, True, False]
    assert bold["AUPR in"] == [False] * 3 and bold["AUPR out"] == [True, False, False]  # without intervals
    assert [cell.value for cell in table.columns[1].cells] == [0.9, 0.88, 0.8]


def test_curves_are_those_of_the_scores(ood):
    folder, scores = ood
    charts = {item.name: item for item in items_of(folder, of_ood) if isinstance(item, Chart)}
    (roc,) = [item for item in charts.values() if item.name.startswith("roc")]
    ((fpr, tpr),) = [np.array(line.points).T for line in roc.series]
    inside, outside = scores.values()
    auroc = roc_auc_score(np.repeat([0, 1], [700, 500]), np.concatenate([inside, outside]))
    assert trapezoid(tpr, fpr) == pytest.approx(auroc, abs=2e-3) and auroc < 0.95
    first, second = charts["scores-nll"].series
    assert first.name == "digits (in)"
    for line, values in ((first, inside), (second, outside)):
        x, share = np.array(line.points).T
        edges = np.unique(x)
        assert share[1:-1:2].sum() == pytest.approx(1)
        assert share[1:-1:2][:10].sum() == pytest.approx(np.mean(values < edges[10]))


def test_what_results_lack_is_left_out(call, tmp_path):
    rows = [{"model": "x"}, {"model": "x", "metrics": {"fd": None, "bpd": float("nan")}}]
    flagged = [{"file": "a.png", "p": 0.01, "flagged": True, "scores": {"nll": 2.5}}, {"file": EVIL}]
    (tmp_path / "old").mkdir()
    for result in (
        {"rows": []},
        {"rows": rows, "floor": {"fd": 1.0}},
        {"results": []},
        {"results": [{"out": "a", "score": "s", "auroc": None}], "files": {"scores": "gone"}},
        {"files": flagged, "fpr": 0.01},
    ):
        (tmp_path / "old" / "result.json").write_text(json.dumps(result))
        page = written(call, tmp_path / "old")["report.html"]
    assert "1 of 2 images are flagged at a false-positive rate of 1 %" in page
    assert [cell.strip() for cell in Page(page).cells][4:8] == ["a.png", "yes", "0.01", "2.5"]


def test_what_a_folder_from_elsewhere_names_outside_of_it_is_not_read(call, bench, tmp_path):
    """Links, absolute paths, `..`, and a run of the working folder; one of the store is found by its id."""
    secret = tmp_path / "secret"
    secret.mkdir()
    for name in ("run.yaml", "env.json", "a.png", "command.sh", "scores.csv", "metrics.jsonl"):
        (secret / name).write_text('{"packages": {"SECRET": "SECRET"}}\nSECRET')
    files.write_json(secret / "status.json", {"model": "vae", "state": "finished"})
    np.savez(secret / "vae.npz", samples=np.full((5, 16, 16, 1), 77, np.uint8))
    run = runs.create("vae", "digits")
    run.update(state="finished", step=60)
    run.recipe_file.write_text("model: {name: vae}  # of the store\n")
    inner = bench / "runs" / "whole"
    files.write_json(inner / "status.json", {"model": "vae", "state": "finished"})
    (inner / "run.yaml").write_text("model: {name: vae}  # below\n")
    linked = bench / "runs" / "linked"
    shutil.copytree(secret, linked, ignore=shutil.ignore_patterns("*.yaml", "*.npz"))
    (linked / "run.yaml").symlink_to(secret / "run.yaml")
    (bench / "runs" / "folder").symlink_to(secret)
    (bench / "a.png").symlink_to(secret / "a.png")
    (bench / "command.sh").symlink_to(secret / "command.sh")
    (bench / "samples" / "b.npz").symlink_to(secret / "vae.npz")
    (bench / "report" / "figures").parent.mkdir()
    (bench / "report" / "figures").symlink_to(secret)
    places = [
        str(secret),
        "../secret",
        "runs/linked",
        "runs/folder",
        "runs/whole",
        run.id,
        f"/x/{run.id}",
        "secret",
    ]
    rows = [
        {"name": f"m{i}", "run": place, "path": place, "metrics": {"fd": 1.0}}
        for i, place in enumerate(places)
    ]
    for i, place in enumerate((secret / "vae.npz", "../secret/vae.npz", "samples/b.npz", "/dev/zero")):
        rows.append({"name": f"n{i}", "metrics": {}, "samples": str(place)})
    files.write_json(bench / "bench.json", bench_json(rows=rows))
    files.write_json(bench / "job.json", {"verb": "bench", "runs": places})
    os.chdir(tmp_path)
    for words in ((), ("--out", str(tmp_path / "out"))):
        assert call("report", str(bench), *words)[0] == (2 if not words else 0)
    text = "".join((tmp_path / "out" / name).read_text() for name in FORMS)
    assert "SECRET" not in text and "# below" in text and "# of the store" in text
    made = read(bench)
    assert set(made.runs) == {"runs/whole", run.id, f"/x/{run.id}"}
    assert all(made.samples(row, 9) is None for row in rows)
    assert sorted(path.name for path in secret.iterdir()) == sorted(
        [
            "run.yaml",
            "env.json",
            "a.png",
            "command.sh",
            "scores.csv",
            "metrics.jsonl",
            "status.json",
            "vae.npz",
        ]
    )


def test_a_small_archive_that_unpacks_to_much_is_not_unpacked(call, bench, monkeypatch):
    monkeypatch.setattr("gzcli.report.write.svg", lambda drawing: b"")  # which take a second
    path = bench / "samples" / "vae-digits-1-0.npz"
    header = {"descr": "|u1", "fortran_order": False}
    for shape in ((400_000, 128, 128, 1), (2, 30_000, 30_000, 1), (10**12, 16, 16, 1), (2, 2**40, 2**40, 3)):
        content = io.BytesIO()
        np.lib.format.write_array_header_1_0(content, header | {"shape": shape})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("samples.npy", content.getvalue() + bytes(1_000_000))
        tracemalloc.start()
        code, _, stderr = call("report", str(bench), "--out", str(bench.parent / "out"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60e6 and code == (0 if math.prod(shape[1:]) <= 128 * 128 else 3), (shape, stderr)
        assert code == 0 or (str(path) in stderr and "remove it, and the report" in stderr)


def test_a_damaged_result_is_named(call, bench, ood, tmp_path):
    """Every key in turn has a value of another type; 21,000 rows are refused at once."""
    whole = bench_json(curves={"steps": [], "time": []}, summary=[], equal_calls=[], floors=[])
    wrong = (5, "x", [], [5], {}, {"a": 5}, True, [["a"]])
    row, of_ood = whole["rows"][0], json.loads((ood[0] / "ood.json").read_text())
    made = [(bench / "bench.json", whole | {key: value}) for key, value in product(whole, wrong)]
    made += [(bench / "bench.json", whole | {"rows": [row | {k: v}]}) for k, v in product(row, wrong)]
    options = (*wrong, {"guidance": "x"})
    made += [(bench / "bench.json", whole | {"rows": [row | {"sample": v}]}) for v in options]
    made += [(ood[0] / "ood.json", of_ood | {key: value}) for key, value in product(of_ood, wrong)]
    for file, result in made:
        files.write_json(file, result)
        try:
            escapes.document_of(read(file.parent))
        except GzError as error:
            assert error.code in (2, 3) and str(file.parent) in error.message and error.hint, result
    for rows, code, words in (
        (5, 3, "is damaged, or was not written by gz: `rows` is not a table"),
        ([row] * 21_000, 2, "21,000 rows"),
    ):
        files.write_json(bench / "bench.json", whole | {"rows": rows})
        got, _, stderr = call("report", str(bench), "--out", str(tmp_path / "out"))
        assert got == code and words in stderr and str(bench / "bench.json") in stderr
    for text in ('{"rows": [', "[]"):
        (bench / "bench.json").write_text(text)
        code, _, stderr = call("report", str(bench))
        assert code == 3 and "is damaged" in stderr and "hint: repeat the command that wrote it" in stderr


def test_a_league_has_standings_and_curves(call, home):
    """It names the samples of its judgements, which lie in the store too."""
    league, path = home / "bench" / "league", home / "runs" / "fm-1.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, samples=np.full((5, 16, 16, 1), 90, np.uint8))
    rows = [
        {"model": "fm", "seed": seed, "metrics": {"fd": 20.0 + seed}, "calls": calls, "setting": "steps"}
        for seed in (0, 1)
        for calls in (5, 2)
    ]
    summary = {"model": "fm", "seeds": 2, "place": "1", "excess": {"fd": [10.5, 9.0, 12.0]}}
    summary |= {"metrics": {"fd": 20.5}, "deviations": {"fd": 0.5}}
    made = {"metric": "fd", "summary": [summary], "spearman": {"mean": 0.95, "min": 0.9}}
    made |= {"directions": {"fd": "down"}, "rows": [rows[2], rows[0] | {"samples": str(path)}]}
    made |= {"second": {"metric": "fd_second", "spearman": 0.75, "apart": [["fm", "1", "3–4"]]}}
    made |= {"curves": {"steps": rows, "time": []}, "equal_calls": [rows[0] | {"setting": "20 calls"}]}
    files.write_json(league / "league.json", made)
    (league / "command.sh").write_text("cd /\ngz bench --train-missing --budget 8m\n")
    texts = written(call, league)
    cells = {cell.strip() for cell in Page(texts["report.html"]).cells}
    assert {"fm", "fm, seed 0", "fm, seed 1", "20.5± 6.4", "10.5± 1.5", "fd↓", "rank"} <= cells
    for text in (
        "First by `fd`: fm.",
        "`fd` and `fd_second` have a rank correlation of 0.75. Ranks that differ: fm (1 and 3–4).",
        "correlation of 0.95 on average and of at least 0.9",
        "gz bench --train-missing --budget 8m",
    ):
        assert text in texts["report.md"]
    assert "% To cite" in texts["report.tex"] and "At 20 calls" in texts["report.md"]
    items = items_of(league)
    (chart,) = [item for item in items if isinstance(item, Chart)]
    lines = {line.name: line.points for line in chart.series}
    assert lines == {f"fm, seed {s}": [(2.0, 20.0 + s), (5.0, 20.0 + s)] for s in (0, 1)}
    assert not [item for item in items if isinstance(item, Picture)], "the first seed kept none"
    titled = made["rows"][1] | {"title": "fm, guided 2"}  # other seeds may have another guidance
    files.write_json(league / "league.json", made | {"rows": [titled, made["rows"][0]]})
    (picture,) = [item for item in items_of(league) if isinstance(item, Picture)]
    assert picture.title == "1. fm, guided 2" and len(picture.png) > 100


def test_only_contestants_of_as_many_images_are_compared(call, tmp_path, capsys):
    """By dots. Bold cells compare excesses, so that each row has the floor of its own number; `d` is not told
    apart from `a`. A likelihood is of no images that are drawn."""
    values = {"a": (500, 20.0, 1.5), "b": (500, 25.0, 1.25), "c": (500, 30.0, 2.0), "d": (100, 52.0, 1.0)}
    rows = [
        {"model": name, "name": name, "n": n, "metrics": {"fd": fd, "bpd": bpd}}
        | {"floor": {"fd": 40.0 if n == 100 else 10.0}, "intervals": {"fd": [fd - 2, fd + 2]}}
        for name, (n, fd, bpd) in values.items()
    ]
    floors = [{"n": n, "images": n, "metrics": {"fd": fd}} for n, fd in ((500, 10.0), (100, 40.0))]
    made = bench_json(rows=rows, floor={"fd": 10.0}, floors=floors, directions={"fd": "down", "bpd": "down"})
    made["places"] = {"a": "1–2", "b": "3", "c": "4", "d": "1–2"}
    files.write_json(tmp_path / "bench" / "bench.json", made)
    texts = written(call, tmp_path / "bench")
    best = best_of(texts["report.html"], "Figures")
    assert sorted(best) == ["1", "20", "52"] and "Bold: no model is significantly" in texts["report.md"]
    assert "Tied for best by `fd`: a, d." in texts["report.md"]
    (dots,) = [item for item in items_of(tmp_path / "bench") if isinstance(item, Dots)]
    assert (dots.name, dots.title, dots.floor) == ("fd-500", "fd, 500 images", 10.0)
    assert [(one.name, one.best) for one in dots.rows] == [("a", True), ("b", False), ("c", False)]
    ended(made, tmp_path / "bench", "1s")
    assert "best by fd: a and d" in capsys.readouterr().err


def test_a_drawing_shows_names_as_they_are_and_is_the_same_each_time():
    names = ["_hidden", "$x$ & <b>", "模型"]
    chart = Chart("c", "losses", "step", "loss", [Series(name, [(0.0, 1.0), (2e4, 3.0)]) for name in names])
    bare = Chart("c", "nothing", "step", "loss", [])
    ticks = [(0.0, "low"), (1e4, "high")]
    marked = Chart("c", "scores", "nll", "share", chart.series[:1], ticks, filled=True)
    rows = [Measured("_a$b$", 2.0, 1.5, 2.5, best=True), Measured("b", 3.0)]
    dots = Dots("d", "fd", rows, floor=1.0, direction="down")
    for drawing, texts in (
        (chart, {*names, "step", "loss", "20k"}),
        (bare, {"step"}),
        (marked, {"_hidden", "low", "high"}),
        (dots, {"_a$b$", "b", "lower is better · dashed: floor"}),
    ):
        made = svg(drawing)
        elements = ElementTree.fromstring(made).iter()
        assert texts <= {element.text for element in elements if element.tag.endswith("}text")}
    assert made == svg(dots)


def test_a_report_replaces_a_report_and_nothing_else(call, bench, tmp_path):
    code, stdout, _ = call("report", str(bench / "bench.json"), "--json")
    assert code == 0 and json.loads(stdout)["html"] == str(bench / "report" / "report.html")
    stale = bench / "report" / "figures" / "old.png"
    stale.touch()
    assert call("report", str(bench))[:2] == (0, f"{bench / 'report' / 'report.html'}\n")
    assert not stale.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    code, _, stderr = call("report", str(bench), "--out", str(tmp_path / "mine"))
    assert code == 2 and "is not empty" in stderr and len(list((tmp_path / "mine").iterdir())) == 1
    code, _, stderr = call("report", str(tmp_path / "mine"))
    assert code == 2 and "contains no results of `gz bench` or `gz ood`" in stderr
    assert call("report", str(tmp_path / "gone"))[0] == 3
    (bench / "bench.json").write_text("{")
    assert call("report", str(bench))[0] == 3


def test_bench_writes_the_report_that_it_is_asked_for(call, monkeypatch, tmp_path):
    run = runs.create("vae", "digits", alias="mine")
    run.update(state="finished", step=60)
    (run.path / "run.yaml").write_text(f"model: {{name: vae}}  # {EVIL}\n")
    (run.path / "model.safetensors").touch()
    jobs = []

    def work(folder, plan, **options):
        jobs.append(folder)
        result = bench_json()
        result["rows"] = [result["rows"][0] | {"run": run.id, "n": 200}]
        files.write_json(folder / "result.json", result)

    monkeypatch.setattr(launcher, "run", work)
    monkeypatch.setattr("gzcli.cli.bench.table", lambda *_, **__: None)
    words = ("bench", "mine", "--data", "digits", "--json", "--report", str(tmp_path / "page"))
    code, stdout, stderr = call(*words)
    assert code == 0, stdout + stderr
    assert json.loads(stdout)["report"]["html"] == str(tmp_path / "page" / "report.html")
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"Recipe of {run.id}" in page and f"gz bench {run.id} --data digits -n 2000" in page
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    code, _, stderr = call(*words[:-1], str(tmp_path / "full"))
    assert code == 2 and len(jobs) == 1  # refused before the work
    code, stdout, stderr = call(*words[:-1], str(tmp_path / "full" / "notes.txt" / "page"))
    assert (code, len(jobs)) == (3, 1) and "a file has the name of a folder" in stdout + stderr
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    code, stdout, stderr = call(*words[:-1], str(tmp_path / "new"))
    assert (code, len(jobs)) == (3, 1) and "permission denied" in stdout + stderr
    assert call(*words)[0] == 0 and len(jobs) == 2, "`page` itself is writable"
