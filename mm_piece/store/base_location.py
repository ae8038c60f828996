"""Where a store's base lies: in a folder, relative to the store, or on the Hub; without torch."""

import os.path
from pathlib import Path

from mm_piece.errors import ModelError
from mm_piece.store.records import BaseRecord


def locate_base(
    base: str | Path,
    revision: str | None,
    store: Path,
) -> dict[str, str | None]:
    """Return `{"folder": relative to the store}` or `{"hub": id, "revision": …}`."""
    if Path(base).is_dir():
        folder = Path(base).resolve()
        relative = _relative_path(folder, store.resolve())
        return {"folder": relative}

    return {
        "hub": str(base),
        "revision": revision,
    }


def relocate_base(
    base: BaseRecord,
    store: Path,
    to: Path,
) -> BaseRecord:
    """Return the record of `store`'s base for a store at `to`; the base's folder stays in place."""
    # a hub id means the same from everywhere
    if base.folder is None:
        return base

    # the record of `store` is relative to `store`
    folder = (store / base.folder).resolve()
    relative = _relative_path(folder, to.resolve())
    return base.with_facts({"folder": relative})


def base_source(
    base: BaseRecord,
    store: Path,
) -> tuple[str, str | None]:
    """Return source and revision of a recorded base, as `load_base` takes them.

    Raises ModelError if the record has no location or its folder is not there.
    """
    advice = "name it with --base"
    if base.folder is not None:
        folder = (store / base.folder).resolve()
        if not folder.is_dir():
            raise ModelError(f"the base of store {store} is not at {folder}; {advice}")
        return str(folder), None

    if base.hub is None:
        raise ModelError(f"store {store} does not say where its base is; {advice}")

    return base.hub, base.revision


def _relative_path(folder: Path, start: Path) -> str:
    relative = os.path.relpath(folder, start)  # Path climbs only from 3.12 on
    return Path(relative).as_posix()
