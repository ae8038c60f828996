"""Images of every usual kind open as what a person sees; others are refused by name."""

import base64
import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from mm_piece.data import Example, read
from mm_piece.data import images as pictures
from mm_piece.errors import DataError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8))
ALPHA = Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 14), dtype=np.uint8))


def saved(image, form, **options):
    held = io.BytesIO()
    image.save(held, form, **options)
    return held.getvalue()


def opened(picture):
    return pictures.open_image(picture, "here")


def refused(picture, match, check=pictures.require_image):
    with pytest.raises(DataError, match=f"^here {match}") as caught:
        check(picture, "here")
    assert "\n" not in str(caught.value)


def pixels(image):
    return np.asarray(image).astype(int)


def example(*images):
    message = {"role": "user", "content": [{"type": "image"}]}
    return Example(0, [message], list(images), "rows.json")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_file_its_bytes_and_the_picture_are_the_same(tmp_path, form):
    data = saved(NOISE, form, **({"lossless": True} if form == "WEBP" else {}))
    file = tmp_path / "a"
    file.write_bytes(data)
    for picture in (file, data, NOISE):
        pictures.require_image(picture, "here")
        assert np.array_equal(pixels(opened(picture)), pixels(NOISE))


@pytest.mark.parametrize("mode", sorted(pictures._ALLOWED_MODES))
def test_every_allowed_mode_becomes_rgb(mode):
    picture = NOISE.convert("RGB").convert(mode) if mode != "PA" else Image.new("PA", (3, 2))
    pictures.require_image(picture, "here")
    assert opened(picture).mode == "RGB"


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "LAB"])
def test_other_modes_are_refused_rather_than_clipped(mode):
    data = saved(Image.new(mode, (4, 4)), "TIFF")
    refused(data, f"has mode {mode}; convert it to 8 bits")
    refused(data, f"has mode {mode}", opened_at)


def opened_at(picture, where):
    return pictures.open_image(picture, where)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_orientation_is_followed(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = pixels(opened(saved(NOISE, "PNG", exif=exif)))
    rows, columns = pixels(NOISE), pixels(NOISE).transpose(1, 0, 2)
    expected = {
        1: rows,
        2: rows[:, ::-1],
        3: rows[::-1, ::-1],
        4: rows[::-1],
        5: columns,
        6: columns[:, ::-1],
        7: columns[::-1, ::-1],
        8: columns[::-1],
    }
    assert np.array_equal(turned, expected[orientation])


def test_transparency_lies_on_white():
    layer = NOISE.copy()
    layer.putalpha(ALPHA)
    share = pixels(ALPHA)[..., None] / 255
    expected = share * pixels(NOISE) + (1 - share) * 255
    assert np.abs(pixels(opened(saved(layer, "PNG"))) - expected).max() <= 1
    layer.putalpha(255)
    assert np.array_equal(pixels(opened(layer)), pixels(NOISE))
    grey = Image.merge("LA", (Image.new("L", (3, 3)), Image.new("L", (3, 3))))
    indexed = NOISE.quantize(16)
    for clear in (
        grey,
        saved(Image.new("P", (3, 3), 7), "GIF", transparency=7),
        saved(indexed, "PNG", transparency=bytes(16)),
    ):
        assert (pixels(opened(clear)) == 255).all()


def test_an_animation_is_its_first_frame():
    data = saved(Image.new("RGB", (4, 4), "red"), "GIF", save_all=True, append_images=[NOISE])
    assert opened(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (1, 300)])
def test_thin_images_are_images(size):
    data = saved(Image.new("RGB", size), "PNG")
    pictures.require_image(data, "here")
    assert opened(data).size == size


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "is empty: it has no bytes")
    refused(b"", "is empty")
    refused(tmp_path / "absent.png", "does not exist")
    refused(tmp_path / ("long" * 100), "cannot be read: File name too long")
    refused(tmp_path, "cannot be read: Is a directory")
    refused(b"no picture", "cannot be read: it is no image of a known format")
    refused(Image.new("RGB", (0, 5)), "has no pixels: its size is 0 x 5")


@pytest.mark.parametrize("let_pass", [False, True])  # by a library, in the whole process
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_files_cut_short_are_found_by_their_ends(form, let_pass, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", let_pass)
    data = saved(NOISE.resize((140, 90)), form)
    refused(data[: len(data) // 2], "cannot be read")
    refused(data[: len(data) // 2], "cannot be read", opened_at)
    refused(data[:-15], "cannot be read")


def test_a_jpeg_with_something_behind_it_is_an_image():
    data = saved(NOISE, "JPEG")
    pictures.require_image(data + b"a camera's own data", "here")
    assert np.array_equal(pixels(opened(data + b"more")), pixels(opened(data)))


def test_whole_files_are_not_decoded_to_be_checked(monkeypatch):
    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF"):
        pictures.require_image(saved(NOISE, form), "here")
        refused(saved(NOISE, form), "cannot be read: decoded", opened_at)


def blank(width, height):
    """A PNG of one bit a pixel, a thousandth of its pixels in bytes."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + checksum

    packed = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = blank(13_300, 13_300)
SIZE = "13300 x 13300 = 176,890,000"
ICON = blank(10_000, 10_000)
BOMBS = {
    "png": (BOMB, SIZE),
    "png cut short": (BOMB[:5000], SIZE),
    "far larger": (blank(20_000, 20_000), "400,000,000"),
    "bmp": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 13300, 13300, 1, 24, *[0] * 6),
        SIZE,
    ),
    "pgm": (b"P5 13300 13300 255\n", SIZE),
    "a frame beyond a GIF's screen": (
        b"GIF89a"
        + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHB", 0, 0, 20_000, 10_000, 0)
        + b"\x02\x02\x4c\x01\x00;",
        "200,000,000",
    ),
    "an icon's picture beyond its directory": (
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(ICON), 22) + ICON,
        "100,000,000",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(kind, tmp_path, monkeypatch):
    data, size = BOMBS[kind]
    assert len(data) < 200_000
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    line = f"is too large: {size} pixels; allowed: at most 89,478,485$"
    for picture in (data, tmp_path / "a"):
        refused(picture, line)
        refused(picture, line, opened_at)


def test_a_large_picture_that_is_opened_but_not_decoded_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.open(io.BytesIO(BOMB))
    refused(picture, f"is too large: {SIZE} pixels")
    refused(picture, f"is too large: {SIZE} pixels", opened_at)


def test_further_frames_do_not_count():
    held = io.BytesIO()
    large = Image.new("1", (13_300, 13_300))
    Image.new("1", (9, 9)).save(
        held, "TIFF", save_all=True, append_images=[large], compression="group4"
    )
    pictures.require_image(held.getvalue(), "here")
    assert opened(held.getvalue()).size == (9, 9)


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 9 * 14)
    assert opened(saved(NOISE, "PNG")).size == NOISE.size
    refused(saved(NOISE.resize((15, 9)), "PNG"), "is too large: 15 x 9 = 135 pixels; .* most 126")


def test_a_large_picture_in_a_row_is_named(tmp_path):
    (tmp_path / "bomb.png").write_bytes(BOMB)
    row = {"prompt": "a", "answer": "b"}
    inline = "data:image/png;base64," + base64.b64encode(BOMB).decode()
    for image, name in (("bomb.png", f"{tmp_path}/bomb.png"), (inline, "1")):
        (tmp_path / "rows.json").write_text(json.dumps([{**row, "image": image}]))
        with pytest.raises(DataError, match=f"rows.json row 0: image {name} is too large: {SIZE}"):
            read(str(tmp_path / "rows.json"))
    pq.write_table(
        pa.Table.from_pylist([{**row, "image": {"bytes": BOMB, "path": None}}]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(DataError, match=f"a.parquet row 0: image 1 is too large: {SIZE}"):
        read(str(tmp_path / "a.parquet"))


def test_damaged_files_are_one_line_or_an_image():
    forms = [saved(NOISE, form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")]
    random = np.random.default_rng(3)
    outcomes = set()
    for data in forms * 60:
        damaged = np.frombuffer(data[: random.integers(len(data) // 3, len(data) + 1)], np.uint8)
        damaged = damaged.copy()
        damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
        for check in (pictures.require_image, opened_at):
            try:
                check(damaged.tobytes(), "here")
                outcomes.add("image")
            except DataError as error:
                assert "\n" not in str(error)
                outcomes.add("error")
    assert outcomes == {"image", "error"}


def test_the_digest_is_the_content(tmp_path):
    data = saved(NOISE, "PNG")
    for name in ("a.png", "other/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    same = {example(p).compute_digest() for p in (tmp_path / "a.png", tmp_path / "other/b", data)}
    assert len(same) == 1
    changed = NOISE.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    assert example(saved(changed, "PNG")).compute_digest() not in same
    assert example(NOISE).compute_digest() == example(NOISE.copy()).compute_digest()
    assert example(NOISE).compute_digest() != example(changed).compute_digest()
    assert (
        example(NOISE).compute_digest()
        != example(NOISE.transpose(Image.Transpose.ROTATE_90)).compute_digest()
    )
    assert (
        example(Image.new("L", (2, 3))).compute_digest()
        != example(Image.new("L", (3, 2))).compute_digest()
    )
    assert example(data, NOISE).compute_digest() != example(NOISE, data).compute_digest()
    red, blue = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    assert example(red).compute_digest() != example(blue).compute_digest()


def test_the_digest_is_of_the_texts_not_of_the_row():
    said = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    one = Example(0, [said], [], "rows.json", "kind", ["a"])
    assert one.compute_digest() == Example(7, [said], [], "other.json").compute_digest()
    assert (
        one.compute_digest()
        == Example(0, [dict(reversed(said.items()))], [], "rows.json").compute_digest()
    )
    other = {"role": "user", "content": [{"type": "text", "text": "b"}]}
    assert one.compute_digest() != Example(0, [other], [], "rows.json").compute_digest()
    assert (
        one.compute_digest()
        != Example(0, [{**said, "role": "system"}], [], "rows.json").compute_digest()
    )


def test_an_image_that_went_away_is_named(tmp_path):
    gone = example(Path(tmp_path / "gone.png"), b"")
    for ask in (gone.compute_digest, gone.open_images, gone.require_images):
        with pytest.raises(DataError, match=r"^rows.json row 0: image .*gone\.png"):
            ask()
    with pytest.raises(DataError, match=r"^rows.json row 0: image 2 is empty"):
        example(NOISE, b"").open_images()
