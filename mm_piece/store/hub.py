"""Repositories of the Hugging Face Hub: made, looked into, committed to. The only seam to it.

Whatever goes wrong on the way is a StoreError of one line that says what would help.
"""

import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import errors

from mm_piece.errors import StoreError, as_path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PLACES = "allowed: user/name on the Hub, a folder (./name, /path/name), file:///path/name"


def prepare(repository: str, private: bool, revision: str | None) -> None:
    """Make a model repository, and a branch in it, unless they are there."""
    api = huggingface_hub.HfApi()
    with _reaching(repository):
        # None leaves it to the account, which may keep everything private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)


def look(repository: str, revision: str | None) -> tuple[str, set[str]]:
    """Return the newest commit of a revision, and the names of the files it has."""
    with _reaching(repository):
        info = huggingface_hub.HfApi().model_info(repository, revision=revision)
    return str(info.sha), {file.rfilename for file in info.siblings or []}


def fetch(repository: str, commit: str, names: Iterable[str], folder: Path) -> None:
    """Download files of a commit, by their exact names, as real files into a folder."""
    if patterns := sorted(names):
        with _reaching(repository):
            huggingface_hub.snapshot_download(
                repository, revision=commit, local_dir=folder, allow_patterns=patterns
            )


def commit(
    repository: str,
    files: Mapping[str, str | bytes],
    message: str,
    *,
    revision: str | None,
    parent: str,
) -> str:
    """Add files, given as content or as a path, in one commit on top of `parent`; return its name.

    Files that are there as they are make no commit: then this is `parent`.
    """
    additions = [huggingface_hub.CommitOperationAdd(*file) for file in files.items()]
    with _reaching(repository):
        done = huggingface_hub.HfApi().create_commit(
            repository,
            additions,
            commit_message=message,
            revision=revision,
            parent_commit=parent,
        )
    return done.oid


@contextmanager
def _reaching(repository: str) -> Iterator[None]:
    """Turn what the Hub's library raises into one line."""
    try:
        yield
    except _FAILURES as error:
        raise StoreError(f"{repository}: {_advice(repository, error)}") from error


def _advice(repository: str, error: BaseException) -> str:
    for fits, advice in _ADVICE:
        if fits(error):
            return advice.format(repository)
    return f"the Hub could not be used: {' '.join(str(error).split())[:300]}"


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _answered(*statuses: int) -> Callable[[BaseException], bool]:
    return lambda error: (
        isinstance(error, errors.HfHubHTTPError) and error.response.status_code in statuses
    )


# The library has changed the package that it speaks HTTP with; the base class tells which it is.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)  # RuntimeError: of its transfers

_ADVICE = (
    (_is(errors.OfflineModeIsEnabled), "the Hub is switched off; unset HF_HUB_OFFLINE"),
    (_is(errors.LocalTokenNotFoundError), "the Hub asks who you are; run `hf auth login`"),
    (_is(errors.RevisionNotFoundError), "the repository has no such revision"),
    (_is(errors.GatedRepoError), "its owner decides who may read it; ask there, `hf auth login`"),
    (
        _is(errors.RepositoryNotFoundError),
        "no such repository on the Hub, or not for this account; `hf auth login` is the way to a "
        "private one, and a folder of that name is written ./{}",
    ),
    (_answered(401, 403), "this account may not do that there; run `hf auth login`"),
    (_answered(409, 412), "somebody else has just changed the repository; do it again"),
)


def folder_of(place: str | Path) -> Path | None:
    """The folder that a place names; None for a repository of the Hub."""
    if not isinstance(place, str):
        return as_path(place, "a place")
    if place.startswith("file://"):
        return _from_url(place)
    if not place or "://" in place:
        raise StoreError(f"{place!r} is no place for a store; {_PLACES}")
    if place[0] in "./~" or place.count("/") != 1 or Path(place).exists():
        return Path(os.path.expanduser(place))  # noqa: PTH111 - Path's own raises for ~stranger
    if not _REPOSITORY.fullmatch(place):
        raise StoreError(f"{place!r} is no repository and no folder that exists; {_PLACES}")
    return None


def _from_url(url: str) -> Path:
    parts = urlsplit(url)
    plain = parts.netloc in ("", "localhost") and not parts.query and not parts.fragment
    if not plain or not parts.path.startswith("/"):
        raise StoreError(f"{url} names no folder of this computer; {_PLACES}")
    return Path(unquote(parts.path))
