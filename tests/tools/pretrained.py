"""`make pretrained`: trains the models that come with gz, measures them and writes `gzcli/pretrained/`.

    python tests/tools/pretrained.py                  every line of the table
    python tests/tools/pretrained.py cfm-glyphs …     these
    python tests/tools/pretrained.py --list           what there is, and what is done
    python tests/tools/pretrained.py --measure …      measures files that are there again

It goes on where it was stopped: runs lie in GZ_HOME, else in `build/pretrained`, and a line is done when its
file is there. Each file records its own command; a file that is to be made again is removed first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "gzcli" / "pretrained"
MORE, CHECKSUMS = TARGET / "more", TARGET / "more.json"
MOST, ALL = 4_000_000, 20_000_000  # bytes of a file, and of all together
N = 1000  # samples that `fd` is measured with
FIGURES = TARGET / "figures.json"

WARM = "train.ema=0.998 optim.warmup=100"
UNET = f"model.channels=16 model.mult=[1,1,3] model.patch=1 train.batch_size=32 {WARM} train.steps=1800"
CONV = "model.net=conv model.hidden=[16,32,64]"
GAN = "model.width=32 train.batch_size=64 train.ema=0.999 optim.lr=5e-4 train.steps=3000"
TRANSFORMER = "model.width=80 model.layers=3 train.batch_size=32 train.steps=2500"
COLOUR = "model.channels=16 model.mult=[1,2,2] model.attention=[8] train.batch_size=32 train.ema=0.999"
EMOJI = "model.clusters=72 train.batch_size=32 train.ema=0.995 optim.lr=6e-3 optim.warmup=50"
PRIOR = "stages.prior.model.width=64 stages.prior.model.layers=3"
# Name of the file, MODEL-DATA → what `--set` changes in the model's recipe. A few minutes on a core each.
TABLE = {
    "cfm-glyphs": f"model.channels=16 model.clusters=0 {WARM} sample.guidance=auto train.steps=2400",
    "cfm-shapes": f"{COLOUR} sample.guidance=2 sample.steps=10 train.steps=5000",
    "cfm-emoji": f"model.channels=24 model.bounded=true {EMOJI} optim.schedule=wsd sample.sampler=adams "
    "sample.guidance=auto train.steps=5000",
    "fm-emoji": f"model.channels=24 model.bounded=true {EMOJI} train.steps=2000",
    "cvae-glyphs": CONV,
    "vae-glyphs": CONV,
    "fm-glyphs": UNET,
    "ddpm-glyphs": UNET,
    "sgm-glyphs": UNET,
    "cddpm-glyphs": f"model.channels=16 model.clusters=0 {WARM} sample.guidance=auto train.steps=2400",
    "rf-glyphs": TRANSFORMER,
    "zigma-glyphs": "model.width=80 model.layers=4 train.batch_size=32 train.steps=4000",
    "aae-glyphs": "train.steps=3000",
    "dcgan-glyphs": GAN,
    "cgan-glyphs": GAN,
    "wgan-glyphs": "train.steps=9000",
    "glow-glyphs": "model.hidden=48 model.depth=6 train.steps=1500",
    "realnvp-glyphs": "model.hidden=32 train.steps=1500",
    "pixelcnn-glyphs": "model.hidden=48 model.head=48 train.steps=1200",
    "vqvae-glyphs": f"{PRIOR} stages.tokenizer.train.steps=1500 stages.prior.train.steps=1500",
}
# One or two of each family are in the wheel, the others in a clone alone.
WHEEL = (
    *("cfm-emoji", "cfm-glyphs", "vae-glyphs", "cvae-glyphs", "wgan-glyphs"),
    *("cddpm-glyphs", "sgm-glyphs", "glow-glyphs", "pixelcnn-glyphs"),
)


def file_of(name: str) -> Path:
    return (TARGET if name in WHEEL else MORE) / f"{name}.safetensors"


def command_of(name: str) -> list[str]:
    """The words of `gz` that train a line of the table."""
    model, data = name.split("-")
    return ["train", model, "--data", data, *(w for pair in TABLE[name].split() for w in ("--set", pair))]


def gz(*words: str) -> dict | None:
    """The JSON that a command prints last; None where it fails with exit code 2 or 3."""
    env = {"GZ_HOME": str(ROOT / "build" / "pretrained"), **os.environ}
    command = [sys.executable, "-m", "gzcli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    if done.returncode in (2, 3):
        return None
    if done.returncode:
        raise SystemExit(f"gz {' '.join(words)} → {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def record(bench: dict) -> None:
    """Writes the rows of a bench of files into `figures.json`, which has a row for each of them."""
    rows = {row["model"]: row for row in (json.loads(FIGURES.read_text()) if FIGURES.exists() else ())}
    for row in bench["rows"]:
        name = row["run"].rpartition("-")[0]  # a file is the run NAME-HASH
        values = {key: row[key]["fd"] for key in ("floor", "excess")}
        values |= {"value": row["metrics"]["fd"], "drawn": row["drawn"], "title": row["title"]}
        rows[name] = {"model": name, "name": "fd", "n": row["n"]} | values
    text = ",\n".join("  " + json.dumps(rows[name]) for name in sorted(rows))
    FIGURES.write_text(f"[\n{text}\n]\n")


def measure(name: str) -> None:
    data = name.rpartition("-")[2]
    record(gz("bench", f"pretrained:{name}", "--data", data, "-n", str(N), "--metrics", "fd,fd_second"))


def make(name: str) -> Path:
    """Trains, measures and exports a line of the table, as far as that is not done yet."""
    file = file_of(name)
    if file.exists():
        return file
    run = gz("runs", "show", name)
    if run is None or run["state"] != "finished":
        gz(*command_of(name), "--name", name, *(["--resume"] if run else []))
    file.parent.mkdir(parents=True, exist_ok=True)
    if gz("runs", "export", name, "--to", "file", "--dtype", "bf16", "--out", str(file)) is None:
        raise SystemExit(f"`{name}` could not be exported")
    if (size := file.stat().st_size) > MOST:
        file.unlink()
        raise SystemExit(f"`{name}` has {size:,} bytes, more than {MOST:,}")
    measure(name)
    return file


def main(words: list[str]) -> None:
    if words == ["--list"]:
        for name in TABLE:
            state = "done" if file_of(name).exists() else "    "
            print(state, f"{name:<16} gz {' '.join(command_of(name))}")
        return
    if words[:1] == ["--measure"]:
        for name in words[1:] or TABLE:
            measure(name)
        return
    for name in words or TABLE:
        if name not in TABLE:
            raise SystemExit(f"no line of the table is called `{name}`: {', '.join(TABLE)}")
        file = make(name)
        print(f"{name}: {file.stat().st_size:,} bytes", flush=True)
    more = {file.stem: sha256(file.read_bytes()).hexdigest() for file in sorted(MORE.glob("*.safetensors"))}
    CHECKSUMS.write_text(json.dumps(more, indent=2) + "\n")
    total = sum(file.stat().st_size for file in TARGET.rglob("*.safetensors"))
    print(f"all together {total:,} bytes")
    if total > ALL:
        raise SystemExit(f"more than {ALL:,}")


if __name__ == "__main__":
    main(sys.argv[1:])
