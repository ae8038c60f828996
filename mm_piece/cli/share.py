"""Commands that copy and tidy stores: fork, gc, push, pull."""

from pathlib import Path

import click

from mm_piece.cli.options import (
    JSON,
    PATH,
    STORE,
    TO,
    echo,
    echo_json,
)


@click.command()
@STORE
@TO
@click.option(
    "--at",
    type=int,
    required=True,
    help="The last position that both share.",
)
def fork(
    store: Path,
    to: Path,
    at: int,
) -> None:
    """Branch STORE off into a new store TO.

    It shares positions 1 to --at and goes its own way from there.
    """
    from mm_piece.store.copying import fork as make

    make(store, to, at)
    echo(f"made {to} with positions 0…{at} (mm-piece train RECIPE, with `store: {to}`)")


@click.command()
@STORE
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
@JSON
def gc(
    store: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove what a crash left behind in STORE.

    Deltas that are not listed, half-written files, scratch of learned tasks; the scratch of an
    interrupted training stays.
    """
    from mm_piece.store.delta_store import DeltaStore

    paths = DeltaStore.open(store).gc(dry_run)  # those that it removed, or would
    found = [path.relative_to(store).as_posix() for path in paths]

    if as_json:
        removed = [] if dry_run else found
        echo_json({"removed": removed, "found": found})
        return

    for name in found:
        echo(name)
    outcome = "to remove" if dry_run else "removed"
    echo(f"{len(found)} {outcome}")


@click.command()
@STORE
@click.argument("to")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", default=None, help="Branch of the repository. [main]")
def push(
    store: Path,
    to: str,
    private: bool,
    revision: str | None,
) -> None:
    """Copy STORE to the Hub or a folder.

    TO is user/name, a folder or a file:// URL. What is there already is only ever continued. The
    recipe goes along as it is, with the paths of your data in it.
    """
    from mm_piece.store.sharing import push as run

    message = run(store, to, private=private, revision=revision)
    echo(message)


@click.command()
@click.argument("source")
@click.argument("to", type=PATH)
@click.option("--revision", default=None, help="Branch, tag or commit of the repository. [main]")
def pull(
    source: str,
    to: Path,
    revision: str | None,
) -> None:
    """Copy a store from the Hub or a folder to TO.

    SOURCE is user/name, a folder or a file:// URL. Everything is verified before it is written; a
    store at TO is only ever continued.
    """
    from mm_piece.store.sharing import pull as run

    store = run(source, to, revision=revision)
    echo(f"{to}: a store with positions 0…{len(store)}, verified")


COMMANDS = (fork, gc, push, pull)
