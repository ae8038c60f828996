"""Deltas to and from the formats of other programs: commands `convert` and `import`.

A foreign file says less than a delta: what is missing is read from the base's own files.
"""

from pathlib import Path

from mm_piece.deltas import file as deltafile
from mm_piece.deltas import interchange
from mm_piece.deltas.delta import Delta
from mm_piece.errors import FormatError
from mm_piece.families import make_translator
from mm_piece.models.base import load_base, tensors
from mm_piece.models.checkpoint import Checkpoint, fetch_checkpoint


def convert_delta(
    source: Path,
    to: Path,
    format_name: str,
    base: str | None = None,
) -> Delta:
    """Write a delta file in another format, or in one of our own codecs; return the delta.

    `base` is the one whose files are meant; by default the delta's own. Raises FormatError for an
    unknown format, or one that can only be read.
    """
    # some foreign formats can only be read
    formats = interchange.FORMATS.items()
    writable = [name for name, (_, write) in formats if write]
    known = [*deltafile.CODECS, *writable]
    if format_name not in known:
        raise FormatError(f"unknown format {format_name!r}; known: {', '.join(known)}")

    delta = Delta.load(source)
    if format_name in deltafile.CODECS:
        delta.save(to, format_name)
        return delta

    layout = None  # the delta's own
    if base:
        folder = fetch_checkpoint(base)
        layout = Checkpoint(folder).layout
    interchange.write_foreign_delta(delta, to, format_name, layout)
    return delta


def import_delta(
    source: Path,
    base: str,
    format_name: str,
    *,
    task: str,
    dtype: str | None = None,
) -> Delta:
    """Return the delta that another program's file makes of a base, cast to `dtype`.

    Raises ModelError for a base that computes with weights which its files do not hold, and what
    `read_foreign_delta` raises.
    """
    folder = fetch_checkpoint(base)
    checkpoint = Checkpoint(folder, dtype)
    model, _ = load_base(checkpoint.folder, dtype=checkpoint.dtype)
    named = tensors(model)
    # no delta can change what the files do not hold
    checkpoint.require_same_weights(named)

    return interchange.read_foreign_delta(
        source,
        format_name,
        named,
        task=task,
        rename=make_translator(model),
        layout=checkpoint.layout,
    )
