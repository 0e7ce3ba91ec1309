"""The contestants of a comparison: runs, and images from elsewhere."""

from __future__ import annotations

from gzcli.core.errors import MissingError, UsageError, canonical, matching
from gzcli.data.packs.source import at_hand
from gzcli.data.sets.registry import ENDINGS, DataSet, Form, OwnSet, is_set, locate
from gzcli.launch.from_file import find_run, is_shared
from gzcli.store.paths import recipe_names
from gzcli.store.run_folder import Run
from gzcli.store.runs import all_runs, by_name


def find_contestants(words: list[str], data: str | None) -> tuple[DataSet, list[tuple[Run, str]], list[str]]:
    """The set of real images, the runs with the words that were typed for them, and the references of the
    images."""
    data_set = locate(data) if data else None
    names = [word for word in words if is_run(word)]
    images = [images_at(word) for word in words if word not in names]
    if not words:
        done = [run for run in all_runs() if run.state == "finished"]
        data_set = data_set or locate(data_of(done[0]) if done else "digits")
        done = [run for run in done if canonical(run.data) == canonical(data_set.key)]
        names = list({run.model: None for run in reversed(done)})  # each once, in order of its first run
        if not names:
            name = data_set.reference
            raise MissingError(f"no finished run on `{name}`", hint=f"gz train vae --data {name}")
    runs: list[tuple[Run, str]] = []
    for word in names:
        key, typed = (data_set.key, data_set.reference) if data_set else (None, None)
        runs.append((find_run(word, data=key, typed=typed), word))
        data_set = data_set or locate(data_of(runs[0][0]))
    if data_set is None:
        hint = f"gz bench {words[0]} --data mnist · gz bench {words[0]} --data ./real"
        raise UsageError("comparing images needs real images: pass `--data`", hint=hint)
    return data_set, runs, images


def is_run(word: str) -> bool:
    """Whether a word refers to a run, a model or weights. True for an unknown name, because the search for
    runs gives a hint."""
    if by_name(word) is not None or is_shared(word) or matching(word, recipe_names()):
        return True
    if "/" in word or word.lower().endswith(ENDINGS) or word.endswith(".safetensors"):
        return False
    return bool(all_runs(model=word)) or not is_set(word)


def images_at(word: str) -> str:
    """The images that a word refers to; for a folder of `gz sample`, `samples.npz`, otherwise `images`."""
    from gzcli.data.readers.folder import open_path

    try:
        source = at_hand(locate(word))
        if not isinstance(source, OwnSet):
            return source.reference
        drawn = Run(source.path)
        if drawn.sheet_picture.is_file() and drawn.job_file.is_file():
            parts = [part for part in (drawn.images_file, drawn.images_folder) if part.exists()]
            if not parts:
                hint = "draw them again with `gz sample … --npz`"
                raise UsageError(
                    f"`{word}` contains only a sheet of samples, not the single images", hint=hint
                )
            source = OwnSet(parts[0])
        open_path(source.path, Form(foreign=True))
    except MissingError as e:
        message = f"`{word}` is not a run, a model, or a folder, zip, tar or npz of images: {e.message}"
        raise UsageError(message, hint=e.hint) from e
    return source.reference


def data_of(run: Run) -> str:
    return str(run.serving.tree()["data"]["name"])
