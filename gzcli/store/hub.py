"""Runs on the Hugging Face hub: a repository with `model.safetensors`, as `gz runs export` writes it, and its
card. No heavy import at the top.

The hub's own variables hold: `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gzcli.core.errors import MissingError, UsageError
from gzcli.store.weights import offline

PREFIX = "hf://"
FILE = "model.safetensors"  # of a repository
_ADDRESS = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)


def is_address(ref: str) -> bool:
    """Whether the text means a repository of the hub."""
    return ref.startswith(PREFIX)


def name_of(ref: str) -> str:
    """`owner/name` of `hf://owner/name`, of `owner/name` or of `owner/name@revision`. Raises UsageError."""
    return _parsed(ref)["name"]


def fetched(ref: str) -> Path:
    """The file of a repository in the hub's cache, fetched unless it is there.

    Raises UsageError for a malformed address; MissingError where the hub does not give the file.
    """
    from huggingface_hub import hf_hub_download

    parsed = _parsed(ref)
    name, revision = parsed["name"], parsed["revision"]
    with explained(name):
        return Path(
            hf_hub_download(name, FILE, revision=revision, endpoint=endpoint(), local_files_only=offline())
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Puts the files of a folder into a repository of the user, which is made if need be, as one commit.
    Returns its address on the web.

    Raises MissingError without a token, without a network, and where the hub refuses.
    """
    if offline():
        raise MissingError("nothing can be pushed, `GZ_OFFLINE` is set", hint="GZ_OFFLINE=0")
    from huggingface_hub import HfApi, get_token

    if not (token := get_token()):
        raise MissingError(
            "there is no token of the hub", hint="`hf auth login`, or set `HF_TOKEN` to one that may write"
        )
    api = HfApi(endpoint=endpoint(), token=token)
    with explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model trained by gz")
    return f"{api.endpoint}/{name}"


def endpoint() -> str | None:
    """The address of the hub, where it is not the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns the errors of the hub's library into MissingError.

    name: the repository.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as e:
        raise UsageError(f"`{name}` is no name of a repository", hint="it is like `owner/name`") from e
    except errors.LocalEntryNotFoundError as e:
        why = "`GZ_OFFLINE` is set" if offline() else "the hub cannot be reached"
        raise MissingError(
            f"`{name}` is not here, and {why}", hint=f"`hf download {name} {FILE}` where there is a network"
        ) from e
    except errors.GatedRepoError as e:
        raise MissingError(
            f"`{name}` is given to those alone who ask for it", hint="ask on its page, then set `HF_TOKEN`"
        ) from e
    except errors.EntryNotFoundError as e:
        raise MissingError(
            f"`{name}` holds no `{FILE}`", hint="gz reads what `gz runs push` has put there"
        ) from e
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as e:
        raise MissingError(
            f"the hub has no `{name}`, or it is private", hint="look at the spelling, or set `HF_TOKEN`"
        ) from e
    except errors.OfflineModeIsEnabled as e:
        raise MissingError(f"`{name}` is not here, and `HF_HUB_OFFLINE` is set") from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else None
        hint = "the token may not write there: https://huggingface.co/settings/tokens"
        said = str(e.server_message or "") or type(e).__name__
        raise MissingError(
            f"the hub refuses `{name}`: {said} ({status})", hint=hint if status in (401, 403) else "try again"
        ) from e
    except OSError as e:
        raise MissingError(f"the hub cannot be reached ({type(e).__name__})", hint="try again") from e


def _parsed(ref: str) -> dict[str, str]:
    found = _ADDRESS.fullmatch(ref.removeprefix(PREFIX))
    if found is None:
        hint = f"`{PREFIX}owner/name`, or `{PREFIX}owner/name@revision`"
        raise UsageError(f"`{ref}` is no address of a model on the hub", hint=hint)
    return found.groupdict()
