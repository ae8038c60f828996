"""The only seam to the Hugging Face Hub: create, inspect and download repositories, commit to them.

Every failure on the way is a StoreError of one line with advice.
"""

import os.path
import re
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import errors

from mm_piece.errors import StoreError, as_path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ALLOWED_LOCATIONS = (
    "allowed: user/name on the Hub, a folder (./name, /path/name), file:///path/name"
)


def create_repository(
    repository: str,
    private: bool,
    revision: str | None,
) -> None:
    """Create a model repository, and a branch in it, unless they exist."""
    api = huggingface_hub.HfApi()
    with _translating_hub_errors(repository):
        # None leaves it to the account, which may keep everything private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)


def inspect_revision(
    repository: str,
    revision: str | None,
) -> tuple[str, set[str]]:
    """Return the newest commit of a revision, and the names of its files."""
    with _translating_hub_errors(repository):
        info = huggingface_hub.HfApi().model_info(repository, revision=revision)
    return str(info.sha), {file.rfilename for file in info.siblings or []}


def download_files(
    repository: str,
    commit: str,
    names: Iterable[str],
    folder: Path,
) -> None:
    """Download files of a commit, by their exact names, as real files into a folder."""
    patterns = sorted(names)
    # without patterns the library would download everything
    if not patterns:
        return

    with _translating_hub_errors(repository):
        huggingface_hub.snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=patterns,
        )


def commit_files(
    repository: str,
    files: Mapping[str, str | bytes],
    message: str,
    *,
    revision: str | None,
    parent: str,
) -> str:
    """Add files, as content or as a path, in one commit on top of `parent`; return its name.

    If all files are there unchanged, there is no commit, and the name is that of `parent`.
    """
    additions = [huggingface_hub.CommitOperationAdd(*file) for file in files.items()]
    with _translating_hub_errors(repository):
        created = huggingface_hub.HfApi().create_commit(
            repository,
            additions,
            commit_message=message,
            revision=revision,
            parent_commit=parent,
        )
    return created.oid


@contextmanager
def _translating_hub_errors(repository: str) -> Iterator[None]:
    """Keep errors of the Hub's library translated to one line while the block runs."""
    try:
        yield
    except _FAILURES as error:
        raise StoreError(f"{repository}: {_find_advice(repository, error)}") from error


def _find_advice(repository: str, error: BaseException) -> str:
    """Return the advice for an error of the Hub's library, or its own message on one line."""
    for matches, advice in _ADVICE:
        if matches(error):
            return advice.format(repository)

    words = str(error).split()
    message = " ".join(words)[:300]
    return f"the Hub could not be used: {message}"


def _match_kinds(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    """Return a function that matches errors of some classes."""
    return lambda error: isinstance(error, kinds)


def _match_statuses(*statuses: int) -> Callable[[BaseException], bool]:
    """Return a function that matches answers of the Hub with some HTTP status."""
    return lambda error: (
        isinstance(error, errors.HfHubHTTPError) and error.response.status_code in statuses
    )


# huggingface_hub has changed its HTTP package with its versions (requests, httpx); the base class
# of its own error belongs to the current one.
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]
_FAILURES = (_HTTP_ERROR, OSError, ValueError, RuntimeError)  # RuntimeError: of its transfers

# The first match wins: a GatedRepoError is a RepositoryNotFoundError, and both have a status.
_ADVICE = (
    (_match_kinds(errors.OfflineModeIsEnabled), "the Hub is switched off; unset HF_HUB_OFFLINE"),
    (_match_kinds(errors.LocalTokenNotFoundError), "the Hub asks who you are; run `hf auth login`"),
    (_match_kinds(errors.RevisionNotFoundError), "the repository has no such revision"),
    (
        _match_kinds(errors.GatedRepoError),
        "its owner decides who may read it; ask there, `hf auth login`",
    ),
    (
        _match_kinds(errors.RepositoryNotFoundError),
        "no such repository on the Hub, or not for this account; `hf auth login` is the way to a "
        "private one, and a folder of that name is written ./{}",
    ),
    (_match_statuses(401, 403), "this account may not do that there; run `hf auth login`"),
    (_match_statuses(409, 412), "somebody else has just changed the repository; do it again"),
)


def folder_of(location: str | Path) -> Path | None:
    """Return the folder of a location; None for a repository of the Hub.

    Raises StoreError for a location that is neither.
    """
    if not isinstance(location, str):
        return as_path(location, "a place")
    if location.startswith("file://"):
        return _parse_file_url(location)
    if not location or "://" in location:
        raise StoreError(f"{location!r} is no place for a store; {_ALLOWED_LOCATIONS}")

    # a folder that exists wins over a repository of the same name
    if location[0] in "./~" or location.count("/") != 1 or Path(location).exists():
        return Path(os.path.expanduser(location))  # noqa: PTH111 - Path's own raises for ~stranger

    if not _REPOSITORY.fullmatch(location):
        raise StoreError(
            f"{location!r} is no repository and no folder that exists; {_ALLOWED_LOCATIONS}"
        )
    return None


def _parse_file_url(url: str) -> Path:
    """Return the folder of a file:// URL of this computer; StoreError for any other."""
    parsed = urlsplit(url)
    is_plain = parsed.netloc in ("", "localhost") and not parsed.query and not parsed.fragment
    if not is_plain or not parsed.path.startswith("/"):
        raise StoreError(f"{url} names no folder of this computer; {_ALLOWED_LOCATIONS}")
    return Path(unquote(parsed.path))
