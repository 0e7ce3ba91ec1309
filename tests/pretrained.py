"""`make pretrained`: trains the models that come with gz, measures them and writes `gzcli/pretrained/`.

    python tests/pretrained.py                  every line of the table
    python tests/pretrained.py cfm-digits …     these
    python tests/pretrained.py --list           what there is, and what is done

It goes on where it was stopped: runs lie in GZ_HOME, else in `build/pretrained`, and a line is done when its
file is there. Each file records its own command; a file that is to be made again is removed first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "gzcli" / "pretrained"
MOST, ALL = 400_000, 8_000_000  # bytes of a file, and of all together
N = 500  # samples that `fd` is measured with

NARROW = "--set model.patch=2 --set model.width=48 --set model.layers=3"  # their own sizes exceed MOST
# Name of the file, MODEL-DATA → how `gz train` trains it; `--name` is added.
TABLE = {
    "cvae-glyphs": "cvae --data glyphs --set model.net=conv --set model.hidden=[16,32,64]",
    "vae-glyphs": "vae --data glyphs --set model.net=conv --set model.hidden=[16,32,64]",
    "cfm-glyphs": "cfm --data glyphs --set model.channels=16 --steps 1200",
    "cfm-digits": "cfm --data digits",
    "fm-digits": "fm --data digits",
    "ddpm-digits": "ddpm --data digits",
    "cddpm-digits": "cddpm --data digits",
    "cvae-digits": "cvae --data digits",
    "aae-digits": "aae --data digits",
    "dcgan-digits": "dcgan --data digits",
    "cgan-digits": "cgan --data digits",
    "wgan-digits": "wgan --data digits",
    "rf-digits": f"rf --data digits {NARROW} --steps 2000",
    "dit-digits": f"dit --data digits {NARROW} --steps 2000",
    "zigma-digits": "zigma --data digits --set model.width=56",
    "sgm-digits": "sgm --data digits",
    "glow-digits": "glow --data digits",
    "realnvp-digits": "realnvp --data digits --set model.hidden=28",
    "pixelcnn-digits": "pixelcnn --data digits",
    "vqvae-digits": "vqvae --data digits --set stages.prior.model.width=56 --set stages.prior.model.layers=2",
}


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


def make(name: str) -> Path:
    """Trains, measures and exports a line of the table, as far as that is not done yet."""
    file, data = TARGET / f"{name}.safetensors", name.rpartition("-")[2]
    if file.exists():
        return file
    run = gz("runs", "show", name)
    if run is None or run["state"] != "finished":
        gz("train", *TABLE[name].split(), "--name", name, *(["--resume"] if run else []))
    gz("bench", name, "--data", data, "-n", str(N), "--metrics", "fd")
    TARGET.mkdir(exist_ok=True)
    if gz("runs", "export", name, "--to", "file", "--dtype", "bf16", "--out", str(file)) is None:
        raise SystemExit(f"`{name}` could not be exported")
    if (size := file.stat().st_size) > MOST:
        file.unlink()
        raise SystemExit(f"`{name}` has {size:,} bytes, more than {MOST:,}")
    return file


def main(words: list[str]) -> None:
    if words == ["--list"]:
        for name, how in TABLE.items():
            print(
                "done" if (TARGET / f"{name}.safetensors").exists() else "    ", f"{name:<20} gz train {how}"
            )
        return
    for name in words or TABLE:
        if name not in TABLE:
            raise SystemExit(f"no line of the table is called `{name}`: {', '.join(TABLE)}")
        file = make(name)
        print(f"{name}: {file.stat().st_size:,} bytes", flush=True)
    total = sum(file.stat().st_size for file in TARGET.glob("*.safetensors"))
    print(f"all together {total:,} bytes")
    if total > ALL:
        raise SystemExit(f"more than {ALL:,}")


if __name__ == "__main__":
    main(sys.argv[1:])
