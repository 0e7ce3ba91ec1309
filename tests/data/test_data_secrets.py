"""Passwords and tokens in addresses: used where they belong, shown nowhere."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace

import pytest
from server import serve

from gzcli.cli.app import run
from gzcli.core.errors import GzError, UsageError, redacted
from gzcli.data.download import http
from gzcli.data.download.fetch import fetch
from gzcli.data.sets.library import import_set
from gzcli.data.sets.names import locate
from gzcli.data.sets.registry import SPECS, DataFile

DATA = b"picture" * 999


@pytest.fixture
def toy(tmp_path, monkeypatch, home):
    monkeypatch.delenv("GZ_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    (tmp_path / "mirror" / "toy").mkdir(parents=True)
    (tmp_path / "mirror" / "toy" / "a.bin").write_bytes(DATA)
    file = DataFile("a.bin", (), len(DATA), md5=hashlib.md5(DATA).hexdigest())
    return replace(SPECS["mnist"], name="toy", files=(file,))


REDACTED = {
    "`https://ann:pa55@host/a.zip` answers 404": "`https://…@host/a.zip` answers 404",
    "https://host/a?token=S3cret&x=1: cut off": "https://host/a?… cut off",
    "see https://host:8080/a/b, or not": "see https://host:8080/a/b, or not",
    "http://ann:pa/55@host/x": "http://…@host/x",  # a password that should have been quoted
    "/here/https:/ann:pa55@host/x.zip": "/here/https:/…@host/x.zip",  # a URL taken for a path
    "https://host/x#access_token=S3cret": "https://host/x#…",
    "`file:///data/a@b?c` and C:/a@b": "`file:///data/a@b?c` and C:/a@b",
}


def test_redacted():
    for text, shown in REDACTED.items():
        assert redacted(text) == GzError(text).message == GzError("", hint=text).hint == shown


def test_user_and_password_are_sent_and_not_shown(toy, tmp_path):
    said: list[str] = []
    with serve(tmp_path / "mirror", "503", "404", "404") as server:
        secret = server.url.replace("://", "://ann:pa%2355@")
        with pytest.raises(GzError) as e:
            fetch(toy, source=f"{secret}?token=S3cret", say=said.append)
        told = " ".join([*said, e.value.message, e.value.hint or ""])
        assert "trying again" in told and "404" in told
        for word in ("ann", "pa%2355", "pa#55", "S3cret"):
            assert word not in told
        assert (fetch(toy, source=f"{secret}?token=S3cret") / "a.bin").read_bytes() == DATA
        asked = {path for path, _ in server.requests}
        assert "/toy/a.bin?token=S3cret" in asked  # the query stays behind the path
    asked = http.request(secret)
    got = asked.get_header("Authorization") or asked.unredirected_hdrs["Authorization"]
    assert base64.b64decode(got.removeprefix("Basic ")) == b"ann:pa#55"
    assert http.request(secret).full_url == server.url  # and not in what an exception would show


def test_a_url_where_a_path_is_wanted(home):
    for make in (locate, lambda url: import_set(url, "mine")):
        with pytest.raises(UsageError, match="is a URL") as e:
            make("https://ann:pa55@host/photos.zip?token=S3cret")
        assert "pa55" not in str(e.value.message) and "S3cret" not in e.value.message and e.value.hint


def test_doctor_and_download_show_no_secrets(home, monkeypatch, capsys):
    monkeypatch.setenv("GZ_MIRROR", "http://ann:pa55@127.0.0.1:9/data?token=S3cret")
    monkeypatch.setenv("GZ_API_TOKEN", "T0ken")
    run(["doctor", "--json"])
    shown = capsys.readouterr().out
    checks = {check["name"]: check for check in json.loads(shown)["checks"]}
    assert checks["GZ_MIRROR"]["detail"] == "http://…@127.0.0.1:9/data?…"
    assert checks["GZ_API_TOKEN"]["detail"] == "set"
    assert "not reachable" in checks["mirror"]["detail"]
    monkeypatch.setattr(http, "BACKOFF", 0.0)
    monkeypatch.delenv("GZ_OFFLINE")
    words = ("--json", "--from", "http://ann:pa55@127.0.0.1:9/x?token=S3cret")
    assert run(["data", "download", "horse2zebra", *words]) == 3
    shown += "".join(capsys.readouterr())
    assert not [word for word in ("pa55", "S3cret", "T0ken") if word in shown]
