"""The report: numbers equal the metrics, nothing is fetched, hostile text stays text, it fits a phone."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from mm_piece import metrics
from mm_piece.report import render, summarise, write_report
from mm_piece.report.page import count, fact, percent, permille, points, share, size
from mm_piece.report.weights import overlap, union, weight_map

CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>alert('\"&')</script>"
TASKS = ("action", "commonsense", "count")
MATRIX = [
    [0.205, 0.31, 0.12],
    [0.9, 0.335, 0.14],
    [0.885, 0.76, 0.11],
    [0.87, 0.755, 0.68],
]
SECTIONS = "accuracy positions metrics weights overlap sizes examples run".split()


# --- a store made up ----------------------------------------------------------------------------


@dataclass
class FakeEntry:
    position: int
    task: str
    file: str
    sha256: str
    parent: str
    entries: int
    bytes: int


@dataclass
class FakeDelta:
    indices: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    info: dict[str, Any]


@dataclass
class FakeStore:
    """What the report asks of a delta store, and nothing more."""

    tasks: tuple[str, ...] = TASKS
    matrix: list[list[float]] = field(default_factory=lambda: MATRIX)
    recipe: str = "base: tiny/base\nselect: {method: piece-s, density: 0.01}\n"

    def __post_init__(self):
        self.base = {
            "folder": "../tiny/base",
            "dtype": "float32",
            "family": "llava",
            "fingerprint": "5d" * 32,
            "parameters": 2_104_512,
            "bytes": 8_418_048,
        }
        self.deltas = [fake_delta(at) for at in range(1, len(self.tasks) + 1)]
        self.entries = [self._entry(at) for at in range(1, len(self.tasks) + 1)]

    def _entry(self, at: int) -> FakeEntry:
        entries = sum(map(len, self.deltas[at - 1].indices.values()))
        file = f"{at:04}-{self.tasks[at - 1]}.safetensors"
        digest = f"{at}{'c0ffee' * 11}"[:64]
        return FakeEntry(at, self.tasks[at - 1], file, digest, "", entries, 4000 + 5 * entries)

    def delta(self, position: int) -> FakeDelta:
        return self.deltas[position - 1]

    def results(self) -> dict[str, Any]:
        ability = [0.74, 0.733, 0.725, 0.719]
        return {
            "tasks": list(self.tasks),
            "matrix": self.matrix,
            "base_ability": ability[: len(self.matrix)],
            "base_ability_name": "scenes",
            "base_kinds": {"colour": ability[: len(self.matrix)], "shape": [0.9, 0.9, 0.89, 0.91]},
        }

    def answers(self, position: int) -> dict[str, list[dict]]:
        return {task: [fake_answer(row, position) for row in range(200)] for task in self.tasks}


def fake_answer(row: int, position: int) -> dict[str, Any]:
    said = ("a red kite", "a blue square", "riding")[(row + position) % 3]
    return {
        "row": row,
        "prompt": f"What is the person on the left doing in picture {row}?",
        "answer": "riding",
        "prediction": said if row != 1 else "",
        "score": {"riding": 1.0, "a red kite": 1 / 3}.get(said, 0.0),
    }


def fake_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "multi_modal_projector.linear_1.weight": (128, 96),
        "multi_modal_projector.linear_2.weight": (128, 128),
        "vision_tower.vision_model.embeddings.patch_embedding.weight": (96, 3, 8, 8),
    }
    for layer in range(4):
        stem = f"vision_tower.vision_model.encoder.layers.{layer}."
        shapes |= {f"{stem}self_attn.{m}_proj.weight": (96, 96) for m in ("q", "k", "v", "out")}
        shapes |= {f"{stem}mlp.fc1.weight": (192, 96), f"{stem}mlp.fc2.weight": (96, 192)}
    for layer in range(12):
        stem = f"language_model.model.layers.{layer}."
        shapes |= {f"{stem}self_attn.{m}_proj.weight": (128, 128) for m in ("q", "k", "v", "o")}
        shapes |= {f"{stem}mlp.{m}_proj.weight": (256, 128) for m in ("gate", "up", "down")}
    return shapes


def fake_delta(at: int) -> FakeDelta:
    """Random entries, denser towards the last layers; tasks overlap more than chance."""
    draw, common = random.Random(at), random.Random(0)
    indices = {}
    for number, (name, shape) in enumerate(fake_shapes().items()):
        numel = torch.Size(shape).numel()
        how_many = int(numel * 0.01 * (1 + number % 7) / 7)
        own = {draw.randrange(numel) for _ in range(how_many)}
        shared = {common.randrange(numel) for _ in range(how_many // 5)}
        indices[name] = torch.tensor(sorted(own | shared), dtype=torch.int32)
    info = {"method": "piece-s", "density": 0.01, "k": 9876, "patchable": 987_600}
    info |= {"threshold": 3.21e-7, "seconds": {"score": 12.5, "train": 61.0}, "library": "0.1.0"}
    return FakeDelta(indices, fake_shapes(), info)


def picture(seed: int) -> Image.Image:
    draw = random.Random(seed)
    image = Image.new("RGB", (96, 96), (235, 232, 222))
    for _ in range(4):
        x, y, side = draw.randrange(70), draw.randrange(70), draw.randrange(10, 40)
        colour = tuple(draw.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse((x, y, x + side, y + side), fill=colour)
    return image


def fake_examples(tasks: tuple[str, ...] = TASKS) -> dict[str, list[tuple[int, Image.Image]]]:
    return {task: [(row, picture(row)) for row in (0, 1, 5)] for task in tasks}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report(FakeStore(), to, fake_examples()) == to
    return to


# --- the data step ------------------------------------------------------------------------------


def test_numbers_equal_the_metrics():
    report = summarise(FakeStore())
    assert {m.name: m.value for m in report.metrics} == metrics.summary(MATRIX)
    assert {m.name: m.convention for m in report.metrics} == metrics.CONVENTIONS
    assert [curve.values for curve in report.curves] == [list(c) for c in zip(*MATRIX, strict=True)]
    assert report.num_examples == dict.fromkeys(TASKS, 200)


def test_maps_count_every_entry_once():
    store = FakeStore()
    report = summarise(store)
    together, *alone = report.maps
    for entry, found in zip(store.entries, alone, strict=True):
        assert found.entries == entry.entries == sum(found.shares.values())
        cells = [cell for grid in found.grids for cell in grid.cells.values()]
        assert sum(cell.entries for cell in cells) == entry.entries
    union_of_sets = {(n, i) for d in store.deltas for n, t in d.indices.items() for i in t.tolist()}
    assert together.entries == len(union_of_sets)


def test_grid_of_a_task_spans_what_any_task_touched():
    shapes = {
        "language_model.model.layers.2.mlp.up_proj.weight": (4, 5),
        "language_model.model.layers.2.mlp.up_proj.bias": (5,),
        "language_model.model.norm.weight": (4,),
    }
    mask = {"language_model.model.layers.2.mlp.up_proj.weight": torch.tensor([0, 3, 19]).numpy()}
    (grid,) = weight_map("x", mask, shapes).grids
    assert grid.layers == (None, 0, 1, 2)
    assert grid.modules == ("up_proj", "norm")
    assert {spot: (c.entries, c.size) for spot, c in grid.cells.items()} == {
        ("up_proj", 2): (3, 25)
    }


def test_overlap_by_hand():
    first = {"a": torch.tensor([1, 2, 3]).numpy(), "b": torch.tensor([7]).numpy()}
    second = {"a": torch.tensor([3, 9]).numpy(), "c": torch.tensor([7]).numpy()}
    found = overlap(first, second, patchable=100)
    assert (found.shared, found.jaccard, found.containment) == (1, 1 / 6, 1 / 4)
    assert found.random_containment == pytest.approx(3 / 100)
    assert found.random_jaccard == pytest.approx(0.12 / 6.88)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_equals_that_of_sets(seed):
    draw = random.Random(seed)
    sets = [{draw.randrange(300) for _ in range(draw.randrange(200))} for _ in range(2)]
    masks = [{"a": torch.tensor(sorted(s), dtype=torch.int32).numpy()} for s in sets]
    assert overlap(*masks, patchable=300).shared == len(sets[0] & sets[1])
    assert union(masks)["a"].tolist() == sorted(sets[0] | sets[1])


def test_overlap_of_random_masks_is_the_expected_one():
    draw = random.Random(7)
    masks = [{"a": torch.tensor(sorted(draw.sample(range(40_000), 4_000))).numpy()} for _ in "ab"]
    found = overlap(*masks, patchable=40_000)
    assert found.jaccard == pytest.approx(found.random_jaccard, rel=0.15)
    assert found.containment == pytest.approx(found.random_containment, rel=0.15)


def test_the_rows_shown_are_the_caller_s_or_the_first():
    shown = summarise(FakeStore()).examples
    assert {t: [e.row for e in rows] for t, rows in shown.items()} == dict.fromkeys(
        TASKS, [0, 1, 2]
    )
    chosen = summarise(FakeStore(), {"count": [(9, picture(9))]}).examples
    assert list(chosen) == ["count"]
    assert [attempt.position for attempt in chosen["count"][0].attempts] == [0, 1, 2, 3]
    assert str(chosen["count"][0].image).startswith("data:image/webp;base64,")


# --- the page -----------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Attributes and text of a page; refuses tags that do not nest."""

    VOID = {"meta", "img", "input", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] if tag not in self.VOID else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()[0]}"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_nothing_is_fetched_and_nothing_runs(page):
    text = page.read_text()
    outline = Outline(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in outline.tags}
    targets = [
        value
        for _, attrs in outline.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert targets
    assert all(str(target).startswith(("#", "data:image/")) for target in targets)
    assert not re.search(r"url\(|@import|//\w", re.sub(r'src="data:[^"]*"', "", text))
    assert "default-src 'none'" in text


def test_every_section_and_every_number_is_there(page):
    outline = Outline(page.read_text())
    ids = [attrs["id"] for tag, attrs in outline.tags if tag == "section"]
    assert ids == SECTIONS
    links = [attrs["href"] for tag, attrs in outline.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]
    for score in [score for row in MATRIX for score in row]:
        assert percent(score) in outline.text
    for name, value in metrics.summary(MATRIX).items():
        assert (points(value) if name in ("bwt", "fwt") else percent(value)) in outline.text
        assert metrics.CONVENTIONS[name] in outline.text
    for words in ("piece-s", "0.001 %", "vision", "projector", "language", "✓ right", "✗ wrong"):
        assert words in outline.text or words == "0.001 %"


def test_every_image_and_curve_has_words(page):
    tags = Outline(page.read_text()).tags
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 9
    assert all(attrs["alt"] for attrs in images)
    curves = [attrs for tag, attrs in tags if tag == "svg"]
    assert len(curves) == len(TASKS) + 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in curves)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_store_gives_the_same_bytes(page):
    assert render(summarise(FakeStore(), fake_examples())) == page.read_text()


def test_hostile_text_stays_text():
    tasks = (HOSTILE, '" onload="x', "{{ 7 * 7 }}")
    store = FakeStore(tasks, recipe=f"# {HOSTILE}")
    for delta in store.deltas:
        delta.info["method"] = HOSTILE
    text = render(summarise(store, fake_examples(tasks)))
    outline = Outline(text)
    assert HOSTILE not in text
    assert HOSTILE in outline.text
    assert "{{ 7 * 7 }}" in outline.text
    assert not any(tag == "script" or "onload" in attrs for tag, attrs in outline.tags)


def test_a_run_under_way():
    outline = Outline(render(summarise(FakeStore(matrix=MATRIX[:2]))))
    assert "mean over 1 of 3 tasks" in outline.text
    assert "20.5" in outline.text and "68.0" not in outline.text


def test_one_task_has_no_overlap():
    outline = Outline(render(summarise(FakeStore(("only",), [[0.1], [0.9]]))))
    assert "It takes two tasks to overlap." in outline.text


def test_before_any_task_and_before_any_measurement():
    assert "No task is stored yet." in Outline(render(summarise(FakeStore((), [[]])))).text
    store = FakeStore()
    store.results = dict
    outline = Outline(render(summarise(store)))
    assert "Accuracy matrix" not in outline.text
    assert "The store holds no answers to show." in outline.text
    assert "bytes per changed entry" in outline.text


def test_numbers_in_words():
    assert [percent(0.725), percent(None), points(0.0123), points(-0.05)] == [
        "72.5", "–", "+1.2", "−5.0",
    ]  # fmt: skip
    assert [points(-0.0001), points(None)] == ["+0.0", "–"]
    assert [share(0.00098), share(1), share(0), share(1e-9)] == [
        "0.098 %", "100 %", "0 %", "< 0.0001 %",
    ]  # fmt: skip
    assert [permille(0.00123), permille(0.0123), permille(0.00999)] == ["1.2", "12", "10"]
    assert [size(999), size(45_213), size(13.5e9)] == ["999 B", "45.2 kB", "13.5 GB"]
    assert [count(1234567), fact({"a": 0.5, "b": 1200}), fact("auto")] == [
        "1,234,567", "a 0.5, b 1,200", "auto",
    ]  # fmt: skip


# --- in a browser -------------------------------------------------------------------------------

QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
PROBE = """<script>
const root = document.documentElement, style = getComputedStyle(document.body);
root.dataset.probe = JSON.stringify({
  errors: window.errors, scroll: root.scrollWidth, client: root.clientWidth,
  ink: style.color, paper: style.backgroundColor,
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
  maps: [...document.querySelectorAll(".map")].filter(m => m.offsetHeight).length,
});
</script>"""
COLLECT = "<script>window.errors = []; onerror = message => { errors.push(message) }</script>"


def chromium(page: Path, folder: Path, *options: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *QUIET, profile, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def probe(page: Path, folder: Path, width: int, *options: str) -> dict[str, Any]:
    """Lay the page out in a frame of this width, since a window has a least width of its own."""
    text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text())  # lets the probe run
    inner = text.replace("<head>", "<head>" + COLLECT).replace("</body>", PROBE + "</body>")
    outer = folder / "outer.html"
    frame = json.dumps(inner).replace("</", "<\\/")
    outer.write_text(
        f"<!doctype html><meta charset='utf-8'><meta name='color-scheme' content='light dark'>"
        f"<iframe style='width:{width}px;height:900px;border:0'></iframe><script>"
        f"const f = document.querySelector('iframe'); f.srcdoc = {frame}; f.onload = () => "
        f"document.body.textContent = f.contentDocument.documentElement.dataset.probe;</script>"
    )
    dom = chromium(outer, folder, "--dump-dom", "--virtual-time-budget=5000", *options)
    (found,) = re.findall(r"<body>(\{.*?\})</body>", dom)
    return json.loads(found)


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_in_a_browser(page, tmp_path, width, scheme):
    found = probe(
        page,
        tmp_path,
        width,
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1400,1000",
    )
    assert found["errors"] == []
    assert (found["client"], found["scroll"]) == (width, width)
    assert (found["broken"], found["maps"]) == (0, 1)
    paper, ink = luminance(found["paper"]), luminance(found["ink"])
    assert (paper > ink) == (scheme == 1)
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7
