"""The command that makes a base: assemble."""

from pathlib import Path

import click

from mm_piece.cli.options import TO, echo


@click.command()
@click.argument("vision")
@click.argument("language")
@TO
@click.option(
    "--pretrained", default=None, help="open_clip's tag, a checkpoint file, or `random` (blind)."
)
@click.option(
    "--feature-layer",
    type=int,
    default=None,
    help="Hidden states that the projector reads. [-2; -1 for SigLIP]",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of the projector's weights.",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of all weights.",
)
def assemble(
    vision: str,
    language: str,
    to: Path,
    pretrained: str | None,
    feature_layer: int | None,
    seed: int,
    dtype: str,
) -> None:
    """Make a LLaVA base TO of an open_clip tower and an LLM.

    VISION is an architecture of open_clip, hf-hub:owner/name or local-dir:folder; LANGUAGE a folder
    or hub id of a causal language model. The projector between them is new and untrained.
    """
    from mm_piece.models.assembly import assemble as make

    made = make(
        vision,
        language,
        to,
        pretrained,
        feature_layer=feature_layer,
        seed=seed,
        dtype=dtype,
    )
    for note in made.notes:
        echo(f"note: {note}")
    echo(f"made {to} (mm-piece train RECIPE, with `base: {to}`)")


COMMANDS = (assemble,)
