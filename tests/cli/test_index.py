"""The index of runs: a list of many opens few files, sees every change, and needs no index to be right."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from gzcli.cli.app import build
from gzcli.cli.completion import candidates
from gzcli.store import files, index, runs
from gzcli.store.runs import Run

MANY = 40
opened: list[str] | None = None  # files of the store, where they are counted


def hear(event: str, given: tuple) -> None:
    if event == "open" and opened is not None and isinstance(given[0], str) and "/runs/" in given[0]:
        opened.append(given[0])


sys.addaudithook(hear)


@pytest.fixture
def store(home, monkeypatch) -> list[Run]:
    """Finished runs, whose files count as settled at once."""
    monkeypatch.setattr(index, "SETTLED", 0)
    monkeypatch.setattr(index, "_open", {})
    made = []
    for i in range(MANY):
        run = Run(home / "runs" / f"vae-digits-20260101-0000{i % 60:02}-{i:04x}")
        run.checkpoints_folder.mkdir(parents=True)
        status = {"state": "finished", "model": "vae", "data": "digits", "order": i, "step": 4, "steps": 4}
        run.status_file.write_text(json.dumps(status | {"alias": f"own{i}"}))
        run.mark_file.write_text('{"kind": "run"}')
        run.best_file.write_text(f'{{"metric": "bpd", "value": {i}, "step": 4}}')
        run.metrics_file.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n')
        made.append(run)
    return made


@pytest.fixture
def counted(monkeypatch):
    """counted(work) → what `work` returns as in a new process, and how many files of the store it opens."""

    def counted(work) -> tuple:
        global opened
        monkeypatch.setattr(index, "_open", {})
        opened = []
        result = work()
        count, opened = len(opened), None
        return result, count

    return counted


@pytest.fixture
def listed(call, counted):
    """listed() → the rows of `gz runs list --json` by id, and how many files of the store it opens."""

    def listed() -> tuple[dict[str, dict], int]:
        (code, text, _), count = counted(lambda: call("runs", "list", "--json"))
        assert code == 0
        return {row["run"]: row for row in json.loads(text)["runs"]}, count

    return listed


def test_a_list_of_many_opens_few_files(store, listed, call, counted):
    first, all_of_them = listed()
    again, few = listed()
    assert first == again and len(first) == MANY and all_of_them > 3 * MANY and few == 2
    for ref in ("own7", store[7].id):
        (_, text, _), count = counted(lambda ref=ref: call("runs", "path", ref))
        assert text.strip() == str(store[7].path) and count <= 2
    show = build(["runs"])
    names, count = counted(lambda: candidates(show, ["runs", "show"], "own1"))
    assert len(names) == 11 and count <= 1


def test_what_others_change_is_seen(store, listed):
    listed()
    store[3].update(state="interrupted", step=2)  # renamed into place
    path = store[4].status_file
    path.write_text(path.read_text().replace("own4", "new4"))  # in place
    os.utime(path, ns=(0, 0))
    files.write_json(store[5].best_file, {"metric": "bpd", "value": 9, "step": 4})
    with open(store[6].metrics_file, "a") as f:
        f.write('{"step": 3, "loss": 1}\n')
    files.write_atomic(store[7].samples_picture(1), bytes(5000))
    runs.remove(store[8])
    new = runs.create("vae", "digits")
    before, (rows, _) = listed()[0], listed()
    assert before == rows and len(rows) == MANY and store[8].id not in rows
    assert rows[new.id]["state"] == "planned"
    assert (rows[store[3].id]["state"], rows[store[3].id]["step"]) == ("interrupted", 2)
    assert rows[store[4].id]["alias"] == "new4" and rows[store[5].id]["best"]["value"] == 9
    assert rows[store[6].id]["curve"]["values"] == [3, 2, 1] and rows[store[7].id]["bytes"] > 5000
    assert next(iter(rows)) == new.id  # numbered after the newest that is known


def test_an_index_that_is_damaged_or_gone_is_made_again_in_silence(store, listed, call):
    rows, _ = listed()
    for how in (None, b"", b"[]", b"gz 1 00000000\n{}", bytes(9), "cut", "changed"):
        for path in (store[0].path.parent / index.NAME.format(kind) for kind in ("status", "summary")):
            whole = path.read_bytes()
            changed = {"cut": whole[: len(whole) // 2], "changed": whole.replace(b"finished", b"diverged")}
            path.unlink() if how is None else path.write_bytes(changed.get(how, how))
        assert listed()[0] == rows and listed() == (rows, 2), how
    assert call("runs", "list")[2] == ""


def test_a_store_that_may_only_be_read_and_a_file_of_this_moment(store, listed, monkeypatch):
    """A second change within the clock's tick could leave time and size of a file as they are."""

    def refuse(path: Path, content: str) -> None:
        raise PermissionError(13, "no", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", refuse)
        assert listed()[0] == listed()[0]
    monkeypatch.setattr(index, "SETTLED", 3600e9)
    listed()
    assert listed()[1] > MANY
