"""The command that makes a base: assemble."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mm_piece.cli.options import TO, echo

if TYPE_CHECKING:
    from mm_piece.models.assembly.alignment import ImageTextPair


class VisionLayers(click.ParamType):
    """One number of hidden states, or several with commas between."""

    name = "N[,N…]"

    def convert(
        self,
        value: str,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> list[int]:
        try:
            return [int(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a number, or several with commas between", param, ctx)


@click.command()
@click.argument("vision")
@click.argument("language")
@TO
@click.option(
    "--pretrained", default=None, help="open_clip's tag, a checkpoint file, or `random` (blind)."
)
@click.option(
    "--vision-layer",
    type=VisionLayers(),
    default=None,
    help="Hidden states that the projector reads, one or several. [-2 for CLIP, else -1]",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    default=None,
    help="Edge of the images in pixels. [the tower's own]",
)
@click.option(
    "--pairs",
    default=None,
    help="Source of images and short answers that name them: the projector is solved from them.",
)
@click.option(
    "--images",
    default=None,
    help="Where the image paths of --pairs start. [their source's folder]",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="A Jinja file in place of the LLM's own chat template.",
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
    pairs: str | None,
    images: str | None,
    chat_template: Path | None,
    **options: Any,
) -> None:
    """Make a LLaVA base TO of a vision tower and an LLM.

    VISION is a folder or hub id of transformers (CLIP, SigLIP, DINOv2, DINOv3, ViT …), or
    open_clip's: an architecture with --pretrained, hf-hub:owner/name or local-dir:folder. LANGUAGE
    is a folder, hub id or GGUF file of a causal language model. The projector between them is new,
    and untrained without --pairs.
    """
    from mm_piece.models.assembly import assemble as make

    if images and not pairs:
        raise click.UsageError("--images is where the images of --pairs are; name these too")

    made = make(
        vision,
        language,
        to,
        pairs=read_pairs(pairs, images) if pairs else None,
        chat_template=chat_template.read_text(encoding="utf-8") if chat_template else None,
        **options,
    )
    for note in made.notes:
        echo(f"note: {note}")
    echo(f"made {to} (mm-piece train RECIPE, with `base: {to}`)")


def read_pairs(source: str, images: str | None) -> "Iterator[ImageTextPair]":
    """Return the image and the answer of each row, opened one by one.

    Raises DataError at once for rows that are wrong, or have another number of images.
    """
    from mm_piece.data import read
    from mm_piece.errors import DataError

    # a folder of labelled images has no questions, and none is needed
    rows = read(source, images, prompt="What is it?")
    for example in rows:
        if len(example.images) != 1:
            raise DataError(
                f"{example.source} row {example.row} has {len(example.images)} images; each of the "
                "pairs has one"
            )
    return ((example.open_images()[0], example.answer) for example in rows)


COMMANDS = (assemble,)
