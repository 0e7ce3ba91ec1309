"""Files from elsewhere: weights that the user puts into the cache, repositories of the Hugging Face hub, and
the page of a run there. The hub's environment variables apply: `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError
from gzcli.core.hints import advice, setting
from gzcli.store import files, layout
from gzcli.store.paths import cache_dir
from gzcli.store.run_folder import Run

PREFIX = "hf://"
HUB_SCHEME = "hf://datasets/"  # prefix of the id of a data set on the hub
FILE = Run.model_file.name  # of a repository
# torch-fidelity's port of the TensorFlow network of 2015-12-05
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
VGG = "vgg16-397923af.pth"  # torchvision's
DINOV2 = "dinov2_vitl14_pretrain.pth"  # its authors'
CLIP = "clip-vit-base-patch32.bin"  # OpenAI's `pytorch_model.bin` on the hub
TINY_BASES = (
    "tiny",
    "tiny-xl",
    "tiny-sd3",
    "tiny-flux",
)  # values of `model.base` whose weights gz makes itself
# Our name of a set → its id on the hub.
HUB_SETS = {
    "mnist": "ylecun/mnist",
    "fashionmnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "imagenet": "ILSVRC/imagenet-1k",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}
TASK = "unconditional-image-generation"  # the task's name on the hub
_ADDRESS = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def weights(name: str, *, path: str | Path | None = None, use: str, source: str, otherwise: str = "") -> Path:
    """The path of a weights file: the user's, or the file with this name in the cache. Raises MissingError
    that states the file's purpose, its publisher and where to put it."""
    place = cache_dir("weights", name)
    file = Path(path).expanduser() if path else place
    if not file.is_file():
        message = f"{use} need the weights `{name}`, but `{file}` does not exist"
        raise MissingError(message, hint=f"save the file from {source} as `{place}`{otherwise}")
    return file


def repository(name: str, *, key: str, files: Sequence[str]) -> Path:
    """The folder of a model repository: `name` itself, or a folder with the files that match `files`,
    downloaded from the hub if they are missing. Raises MissingError that names the recipe's `key` and the
    download."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if not (is_id(name) and _ADDRESS.fullmatch(name)):
        hint = "use a folder, or a hub id such as `owner/name`"
        raise MissingError(f"`{key}`: the folder `{name}` does not exist", hint=hint)
    gated = "(a gated model needs `HF_TOKEN`)"
    hint = advice(f"run `hf download {name}` online {gated}, or use {{}}", setting(key, "FOLDER"))
    return _snapshot(name, f"`{key}`: the weights of `{name}` are", hint, files, "model")


def data_repository(name: str, files: Sequence[str] = ("*.parquet",)) -> Path:
    """The folder with the parquet files, or other files, of a data set on the hub; missing files are
    downloaded. Raises MissingError."""
    hint = f"run `hf download {name} --repo-type dataset` online; "
    hint += "for a gated data set, first accept its terms on its page and set `HF_TOKEN`"
    return _snapshot(name, f"the data set `{name}` from the hub is", hint, files, "dataset")


def snapshot_of(name: str, kind: str) -> Path:
    """The folder of a repository in the hub's cache, which may be missing: its branch `main`, otherwise its
    newest snapshot. `kind`: "models" or "datasets"."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    with suppress(OSError, UnicodeDecodeError):
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1] if snapshots else folder / "snapshots" / "main"


def _snapshot(name: str, subject: str, hint: str, files: Sequence[str], kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    options: dict[str, Any] = {"allow_patterns": list(files), "local_files_only": offline()}
    options |= {"endpoint": endpoint()}
    try:
        return Path(snapshot_download(name, repo_type=kind, **options))
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        why = "`GZ_OFFLINE` is set" if offline() else f"the download failed ({type(e).__name__})"
        raise MissingError(f"{subject} not available: {why}", hint=hint) from e


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`, rather than of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def is_local(name: str) -> bool:
    """Whether a model repository is a folder or in the hub's cache. The hub's library is not imported."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()
    snapshots = cache.glob(f"models--{name.replace('/', '--')}/snapshots/*")
    return Path(name).expanduser().is_dir() or any(snapshots)


def hub_home() -> Path:
    """The folder of Hugging Face's libraries: `HF_HOME`, otherwise a folder below `XDG_CACHE_HOME`, otherwise
    one below `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def offline() -> bool:
    """Whether the user forbids the network."""
    return os.environ.get("GZ_OFFLINE", "") not in ("", "0")


def is_address(ref: str) -> bool:
    return ref.startswith(PREFIX)


def repository_name(ref: str) -> str:
    """`owner/name` of `hf://owner/name`, of `owner/name` or of `owner/name@revision`. Raises UsageError."""
    return _parsed(ref)["name"]


def fetched(ref: str) -> Path:
    """The file of a repository that gz pushed, or the folder of one in the layout of diffusers, in the hub's
    cache. Raises MissingError if it cannot be fetched, UsageError for an invalid address."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    parsed = _parsed(ref)
    options: dict[str, Any] = {"endpoint": endpoint(), "local_files_only": offline()}
    options["revision"] = parsed["revision"]
    with explained(parsed["name"]):
        try:
            return Path(hf_hub_download(parsed["name"], FILE, **options))
        except EntryNotFoundError as absent:
            patterns = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*.fp16.*"]}
            try:
                folder = Path(snapshot_download(parsed["name"], **{**patterns, **options}))
            except (HfHubHTTPError, EntryNotFoundError, OSError):
                raise absent from None
            if not is_published(folder):
                raise
            return folder


def is_published(folder: Path) -> bool:
    """Whether a folder contains a network or a pipeline in the layout of diffusers, which may be damaged."""
    names = (layout.CONFIG, layout.INDEX)
    beside = (layout.SCHEDULER, f"scheduler/{layout.SCHEDULER}")
    return any("_class_name" in files.whole_object(folder / name) for name in names) or (
        any((folder / name).exists() for name in beside)
    )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads the files of a folder to a repository of the user, as one commit. Returns the repository's web
    address. Raises MissingError if there is no token or no network, or if the hub refuses."""
    if offline():
        raise MissingError("cannot push while `GZ_OFFLINE` is set", hint="unset `GZ_OFFLINE`")
    from huggingface_hub import HfApi, get_token

    if not (token := get_token()):
        hint = "run `hf auth login`, or set `HF_TOKEN` to a token with write access"
        raise MissingError("there is no hub token", hint=hint)
    api = HfApi(endpoint=endpoint(), token=token)
    with explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model trained by gz")
    return f"{api.endpoint}/{name}"


def endpoint() -> str | None:
    """The hub's address from `HF_ENDPOINT`; None for the default one."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns errors of the hub's library within the block into MissingError."""
    from huggingface_hub import errors

    absent = "`GZ_OFFLINE` is set" if offline() else "the hub cannot be reached"
    get = f"run `hf download {name}` online"
    gated = f"`{name}` is gated", "request access on its page, then set `HF_TOKEN`"
    none_such = f"the hub has no `{name}`, or it is private", "check the spelling, or set `HF_TOKEN`"
    # the first match counts, because the error of a gated repository is a subclass of "not found"
    texts: dict[type[Exception], tuple[str, str | None]] = {
        errors.LocalEntryNotFoundError: (f"`{name}` is not on this machine, and {absent}", get),
        errors.GatedRepoError: gated,
        errors.EntryNotFoundError: (
            f"`{name}` contains neither a `{FILE}` from gz nor a network from diffusers",
            "use a repository from `gz runs push`, or a U-Net or DiT from diffusers",
        ),
        errors.RepositoryNotFoundError: none_such,
        errors.RevisionNotFoundError: none_such,
        errors.OfflineModeIsEnabled: (f"`{name}` is not on this machine, and `HF_HUB_OFFLINE` is set", None),
    }
    try:
        yield
    except errors.HFValidationError as e:
        raise UsageError(f"`{name}` is not a repository name", hint="use a name such as `owner/name`") from e
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as e:
        text = next((text for kind, text in texts.items() if isinstance(e, kind)), None)
        if text is None and isinstance(e, errors.HfHubHTTPError):
            status = e.response.status_code if e.response is not None else None
            reason = str(e.server_message or "") or type(e).__name__
            rights = "use a token with write access: https://huggingface.co/settings/tokens"
            refused = f"the hub refused `{name}`: {reason} ({status})"
            text = refused, rights if status in (401, 403) else "try again"
        message, hint = text or (f"the hub cannot be reached ({type(e).__name__})", "try again")
        raise MissingError(message, hint=hint) from e


def _parsed(ref: str) -> dict[str, str]:
    parts = _ADDRESS.fullmatch(ref.removeprefix(PREFIX))
    if parts is None:
        hint = f"use `{PREFIX}owner/name`, or `{PREFIX}owner/name@revision`"
        raise UsageError(f"`{ref}` is not a valid hub address", hint=hint)
    return parts.groupdict()


def readme(card: Mapping[str, Any], name: str, licence: str, meanings: Mapping[str, str]) -> str:
    """The text of a repository's README.md, from the card that `export.card_of` returns."""
    import yaml
    from jinja2 import Environment, StrictUndefined

    data, env = card["data"], Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.globals |= {"commas": "{:,}".format, "digits": "{:.4g}".format}
    text = Path(__file__).with_name("hub.md.j2").read_text(encoding="utf-8")
    arxiv = [f"arxiv:{number}" for number in re.findall(r"\d{4}\.\d{4,5}", card["paper"])]
    data_set, names = HUB_SETS.get(data["name"]) or data["name"], [row["name"] for row in card["figures"]]
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "gzcli",
        "pipeline_tag": TASK,
        "tags": ["gz", "image-generation", card["model"], data["name"], *arxiv],
        "datasets": [data_set],
        "metrics": list(dict.fromkeys(names)) or ["none-measured"],
    }
    if names:
        results = [
            {
                "task": {"type": TASK, "name": "image generation"},
                "dataset": {"type": data_set, "name": row["on"]},
                "metrics": [{"type": row["name"], "name": row["name"], "value": row["value"]}],
            }
            for row in card["figures"]
        ]
        header["model-index"] = [{"name": name.partition("/")[2], "results": results}]
    words = {"card": card, "data": data, "name": name, "licence": licence, "meanings": meanings}
    head = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n{env.from_string(text).render(**words)}\n"
