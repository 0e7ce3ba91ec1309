"""`gz demo`: what the page does, in this process; that its code gives what is shown; and the server."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import urllib.error
import urllib.request
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import CASES

from gzcli.api import LoadedRun
from gzcli.cli import app, demo
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.sections import DataSection, Part
from gzcli.data.packs.open import open_pack
from gzcli.demo.guard import COOKIE, LARGEST_BODY, POLICY, Guard
from gzcli.demo.studio import (
    MAX_STATES_SHOWN,
    PAINT,
    Request,
    Studio,
    choices,
    drawing,
    enlarged,
    opening,
    painted_example,
    sheet,
    watched,
)
from gzcli.engine.trained import Trained
from gzcli.launch.from_file import find_run
from gzcli.store import pretrained, runs


@pytest.fixture
def studio(home, monkeypatch):
    """studio("cfm"): a studio with an untrained model of the zoo, and the name of its run."""

    def open_studio(model: str) -> tuple[Studio, str]:
        case = next(case for case in CASES if case.model == model)
        pack = open_pack(case.data)
        run = runs.create(case.model, case.data)
        run.update(state="finished", step=7)
        (run.path / "run.yaml").write_text(f"model: {{name: {case.model}}}\n")
        (run.path / "model.safetensors").write_bytes(b"x")
        info = pack.info(levels=case.levels, steps=1000)
        part = Part(case.model, sample=case.sample, data=DataSection(case.data))
        model_ = case.build(info).eval().requires_grad_(False)
        loaded_run = LoadedRun(Trained(run, model_, info, part, torch.device("cpu"), 7))
        monkeypatch.setattr("gzcli.api.load", lambda *args, **kwargs: loaded_run)
        return Studio(), run.id

    return open_studio


def made_by(lines: str) -> dict:
    """The variables that Python lines leave behind."""
    variables: dict = {}
    exec(lines, variables)
    return variables


def test_samples_become_and_the_code_makes_the_same(studio):
    show, name = studio("cfm")
    choice, *ready = choices()
    assert {one.name for one in ready} == {f"pretrained:{model}" for model in pretrained.pretrained_names()}
    assert ready[0].name.startswith("pretrained:") and "comes with gz" in ready[0].title
    assert choice.name == name and "cfm on digits, 7 steps" in choice.title
    _, can = show.open(name)
    assert dict(can.numbers) == {"steps": 3, "guidance": 2.0} and can.sampler == "midpoint" in can.samplers
    assert can.classes == tuple("0123456789") and can.inpaints and can.way and can.maps
    *states, (last, made) = show.draw(Request(name, 4, 5, "7", {"steps": 2, "guidance": 2.0}))
    assert len(states) >= 2 and all(result is None for _, result in states)
    # what the recipe says is left out
    assert made.shell == f"gz sample {name} -n 4 --seed 5 --label 7 --steps 2"
    assert (sheet(made_by(made.python)["images"]) == last).all()
    # the page opens on a good picture, not on the newest run, which may have trained for three steps
    assert opening([choice, *ready]) == "pretrained:cfm-emoji"
    assert opening(choices([find_run(name)])) == name, "what is named is shown"


def test_the_way_between_two_seeds(studio):
    show, name = studio("vae")
    ends = Request(name, 1, 0), Request(name, 1, 1)
    *_, (last, made) = show.interpolate(*ends, 3)
    assert (sheet(made_by(made.python)["images"], 3) == last).all()
    assert made.shell.splitlines()[-1] == f"gz sample {name} --do interpolate --input ends --frames 3"


def test_what_is_painted_over_is_filled_in(studio, monkeypatch):
    show, name = studio("fm")
    canvas = show.canvas(Request(name, 1, 3))
    assert canvas.shape == (480, 480, 3)
    painted = np.zeros((480, 480), bool)
    with pytest.raises(UsageError, match="nothing is painted over"):
        list(show.inpaint(Request(name), canvas, painted))
    painted[:240] = True
    *_, (last, made) = show.inpaint(Request(name, 1, 2), canvas, painted)
    monkeypatch.chdir(show.folder)
    remade = made_by(made.python)
    assert (sheet(remade["images"]) == last).all()
    assert not remade["mask"][:7].any() and remade["mask"][9:].all()
    small = show.open(name)[0].sample(1, seed=3)
    assert (remade["image"] == small).all(), "the enlarged sample becomes what it was"


def test_a_picture_is_judged_as_by_the_verb(studio, monkeypatch):
    """The verb's own function is called, with the picture as it was dropped."""
    show, name = studio("fm")
    jobs = []

    def run(job, folder, device, log):
        jobs.append(job)
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(folder / "map.png")
        return {"outputs": {"maps": {"picture.png": str(folder / "map.png")}}}

    monkeypatch.setattr("gzcli.judge.alarm.run", run)
    result, shown, made = show.judge(name, np.full((40, 40, 3), 200, np.uint8), 150)
    assert (jobs[0].n, jobs[0].maps, jobs[0].ins) == (150, True, "digits") and result["outputs"]
    assert shown.shape[2] == 3 and shown.shape[1] > 2 * shown.shape[0] * 0.8
    assert made.shell == f"gz ood {name} --input picture.png -n 150 --map"


@pytest.mark.parametrize("here", [True, False])
def test_a_picture_of_the_set_and_a_foreign_one_are_offered_in_their_own_pixels(studio, monkeypatch, here):
    show, name = studio("fm")
    monkeypatch.setattr("gzcli.demo.studio.is_packed", lambda *_: here)
    (familiar, own_words), (foreign, words) = show.to_judge(show.open(name)[0])
    assert familiar.shape == foreign.shape == (16, 16, 1) and familiar.dtype == np.uint8
    assert (own_words, words) == ("one of digits" if here else "a sample", "one of patches")
    held_out = open_pack("digits").images("test")[0].transpose(1, 2, 0)
    assert np.array_equal(familiar, held_out) == here


def test_the_example_to_fill_in_covers_the_middle_third():
    image = np.full((30, 40, 3), 7, np.uint8)
    layer, composite = painted_example(image)
    painted = layer[..., 3] > 0
    assert painted[10:20].all() and painted.sum() == 400 and (image == 7).all()
    assert (composite[painted] == PAINT).all() and (composite[~painted] == 7).all()


def test_the_verdict_of_a_picture_without_a_finite_score():
    pytest.importorskip("gradio")
    from gzcli.demo.page import _verdict

    row = {"flagged": True, "p": 0.01, "scores": {"nll": None}, "spread": {"nll": None}}
    result = {"files": [row], "compared": {"n": 99}, "seeds": 4, "in": "digits", "fpr": 0.01}
    text = _verdict(result | {"threshold": 5.0, "thresholds_low": {"nll": None}})
    assert "**not resemble**" in text and "`nll` is not finite" in text and "±" not in text


def test_states_are_thinned_out_and_errors_come_through():
    def work(progress):
        for i in range(1000):
            progress(i + 1, 1000, torch.zeros(1, 1, 2, 2))
        return np.ones((1, 1, 2, 2), np.uint8)

    states = list(watched(work, lambda x: x.numpy().astype(np.uint8)))
    assert 10 < len(states) <= MAX_STATES_SHOWN + 2 and states[-1].all() and not states[0].any()

    def fails(progress):
        raise MissingError("gone")

    with pytest.raises(MissingError, match="gone"):
        list(watched(fails, lambda x: x.numpy()))
    assert enlarged(np.zeros((16, 16, 1), np.uint8), 480).shape == (480, 480, 1)


def test_what_is_shown_has_a_file_of_its_own():
    """The browser may still be reading the picture of an equal drawing; all files go with the demo."""
    show, picture = Studio(), np.full((4, 4, 1), 7, np.uint8)
    paths = [Path(show.file(picture)) for _ in range(2)]
    assert len(set(paths)) == 2 and all(path.parent == show.shown for path in paths)
    assert all((np.asarray(Image.open(path)) == 7).all() for path in paths)
    folder = show.folder
    del show
    gc.collect()
    assert not folder.exists()


def test_a_signal_ends_the_demo_as_ctrl_c_does(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("gzcli.cli.demo.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        demo.wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_are_quoted_in_the_code():
    words = {"seed": 0, "labels": [3], "prompt": "a red door", "no_clip": 1}
    made = drawing(Request("./my run", 2, 0, "x, y"), words)
    line = """gz sample './my run' -n 2 --seed 0 --label '"x, y"' --prompt 'a red door' --no-clip 1"""
    assert made.shell == line and "labels=[3], prompt='a red door'" in made.python


def test_without_gradio_or_with_a_model_that_comes_with_gz(call, home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code_, _, stderr = call("demo")
    assert code_ == 3 and "gradio" in stderr and "pip install 'gzcli[demo]'" in stderr
    name = f"pretrained:{next(iter(pretrained.pretrained_names()))}"
    assert [choice.name for choice in choices([find_run(name)])] == [name]


PAGE = {"host": "127.0.0.1:7860"}
SAME_ORIGIN = {**PAGE, "sec-fetch-site": "same-origin"}
LINK = {**PAGE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def answered(headers=SAME_ORIGIN, *, path="/", query="", method="GET", kind="http", chunks=(b"",), **guarded):
    """The status that a guard answers a request with, and its headers; the app behind it answers 200."""
    sent, parts = {}, list(chunks)

    async def app(scope, receive, send):
        while scope["type"] == "http" and (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message):
        sent[message["type"]] = message

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "method": method, "query_string": query.encode(), "headers": pairs}
    asyncio.run(Guard(app, **{"addresses": set(), "token": None, **guarded})(scope, receive, send))
    assert ("websocket.close" in sent) != ("http.response.start" in sent)
    start = sent.get("http.response.start", {"status": 403, "headers": []})
    return start["status"], dict(start["headers"])


def status(*args, **more) -> int:
    return answered(*args, **more)[0]


FOREIGN = (
    {},
    {"host": "evil.example:7860"},  # a name that was made to resolve to 127.0.0.1
    {"host": "127.0.0.1.evil.example:7860"},
    {"host": "[::1"},
    PAGE | {"origin": "http://evil.example"},
    PAGE | {"origin": "http://127.0.0.1:8888"},  # another server of this machine
    PAGE | {"origin": "http://localhost:7860"},
    PAGE | {"origin": "http://127.0.0.1:7860.evil.example"},
    PAGE | {"origin": "null"},
    PAGE | {"sec-fetch-site": "cross-site"},  # an image, a stream of events
    PAGE | {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    LINK | {"sec-fetch-dest": "iframe"},
)


def test_what_comes_from_another_page_is_refused():
    paths = ("/", "/gradio_api/queue/data", "/gradio_api/startup-events")
    for path, kind, headers in product(paths, ("http", "websocket"), FOREIGN):
        assert status(headers, path=path, kind=kind) == 403, (path, kind, headers)
    # a form is refused, a link to the page is not
    assert status(LINK | {"origin": "http://evil.example"}, method="POST") == 403
    assert status(LINK, method="POST") == 403 and status(LINK, path="/gradio_api/file=x") == 403
    assert status(LINK) == 200


def test_its_own_page_is_answered():
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "localhost:9000"):
        same_origin = {"sec-fetch-site": "same-origin", "origin": f"http://{host}"}
        for headers, method in product(({}, {"sec-fetch-site": "none"}, same_origin), ("GET", "POST")):
            assert status({"host": host} | headers, method=method) == 200, (host, headers, method)


def test_a_body_that_is_too_large_is_not_read():
    for length in (str(LARGEST_BODY + 1), "9" * 5000, "x"):
        assert status(SAME_ORIGIN | {"content-length": length}, method="POST") == 413
    assert status(SAME_ORIGIN | {"content-length": str(LARGEST_BODY)}, method="POST") == 200
    chunks = [bytes(LARGEST_BODY // 2)] * 2
    assert status(method="POST", chunks=chunks) == 200
    assert status(method="POST", chunks=[*chunks, bytes(2), bytes(2)]) == 413


def test_beyond_this_machine_every_request_has_the_token():
    public = {"addresses": {"https://abc.gradio.live"}, "token": "s3cret"}
    page = {"host": "abc.gradio.live", "origin": "https://abc.gradio.live"}
    for headers in (page, SAME_ORIGIN):
        assert status(headers, **public) == status(headers, **public, query="token=wrong&token=") == 401
        assert status(headers | {"cookie": f"{COOKIE}=wrong; a=s3cret"}, **public) == 401
        assert status(headers | {"cookie": f"a=b; {COOKIE}=s3cret"}, **public) == 200
        assert status(headers, **public, query="a=b&token=s3cret") == 200
    assert status(SAME_ORIGIN, **public, path="/gradio_api/startup-events") == 200, "gradio asks itself"
    assert status(LINK | {"host": "abc.gradio.live"}, **public, query="token=s3cret") == 200
    for headers in (page | {"host": "abd.gradio.live"}, page | {"origin": "https://abd.gradio.live"}):
        assert status(headers, **public, query="token=s3cret") == 403

    _, head = answered(page, **public, query="token=s3cret")
    assert head[b"set-cookie"] == b"gz-demo=s3cret; Path=/; HttpOnly; SameSite=Strict; Secure"
    assert head[b"content-security-policy"] == POLICY.encode() and "frame-ancestors 'none'" in POLICY
    _, head = answered(page, **public, query="token=wrong")
    assert b"set-cookie" not in head and head[b"content-security-policy"] == POLICY.encode()


@pytest.mark.slow  # gradio takes its seconds to import
def test_the_page_is_served_from_here_alone(studio, capsys, monkeypatch):
    pytest.importorskip("gradio")
    _, name = studio("fm")
    seen = {}

    def code_of(address: str, body: bytes | None = None, **headers: str) -> int:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(seen["url"] + address, body, headers)
            ) as answer:
                return answer.status
        except urllib.error.HTTPError as e:
            return e.code

    addresses = ("", "config", "gradio_api/queue/data?session_hash=x")
    foreign = ({"Host": "evil.example"}, {"Origin": "http://127.0.0.1:1"}, {"Sec-Fetch-Site": "cross-site"})

    def ended() -> None:
        url = seen["url"] = capsys.readouterr().out.strip()
        answer = urllib.request.urlopen(url)
        seen["policy"], seen["html"] = answer.headers["content-security-policy"], answer.read().decode()
        seen["foreign"] = [code_of(address, **headers) for address in addresses for headers in foreign]
        seen["upload"] = code_of("gradio_api/upload", b"x", Origin="http://evil.example")
        seen["large"] = code_of("gradio_api/upload", b"x", **{"Content-Length": str(LARGEST_BODY + 1)})
        seen["files"] = [code_of(f"gradio_api/file={path}") for path in (__file__, runs.find(name).path)]
        raise KeyboardInterrupt

    monkeypatch.setattr("gzcli.cli.demo.wait", ended)
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)  # as on a busy machine
    assert app.run(["demo", "--no-browser", "-q"]) == 0
    assert seen["url"].startswith("http://127.0.0.1:") and seen["policy"] == POLICY
    assert "# gz demo" in seen["html"] and '"value":"pretrained:cfm-emoji"' in seen["html"].replace(" ", "")
    assert "gradio" in sys.modules and seen["foreign"] == [403] * 9
    assert (seen["upload"], seen["large"], seen["files"]) == (403, 413, [403, 403])


@pytest.mark.slow
def test_what_is_shared_has_a_token_and_loads_nothing_from_elsewhere(monkeypatch):
    pytest.importorskip("gradio")
    from gzcli.demo.page import serve

    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **_: "http://abc.gradio.live")
    page, url = serve(choices(), share=True)
    try:
        assert url.startswith("https://abc.gradio.live?token=") and len(url) > 60
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(page.local_url)
        address, host = page.local_url + url[url.index("?") :], {"Host": "abc.gradio.live"}
        shown = urllib.request.Request(address, headers=host)
        html = urllib.request.urlopen(shown).read().decode()
        assert "amazonaws.com" not in html and "./assets/index" in html
    finally:
        page.close()
