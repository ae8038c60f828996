"""The report's page: nothing is fetched, hostile text stays text, it fits a phone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_up_store import MATRIX, TASKS, FakeStore, load_pictures

from mm_piece.metrics import continual
from mm_piece.report import render_report, summarise_store, write_report
from mm_piece.report.formats import format_percent, format_points, shorten_digests

CHROMIUM = shutil.which("chromium")
HOSTILE = "<script>alert('\"&')</script>"
SECTIONS = ["tasks", "accuracy", "positions", "metrics", "examples", "training"]
SECTIONS += ["weights", "overlap", "changes", "stability", "sizes", "run"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_report(FakeStore(), to, load_pictures) == to
    return to


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
        assert format_percent(score) in outline.text
    for name, value in continual.summarise_matrix(MATRIX).items():
        assert (
            format_points(value) if name in ("bwt", "fwt") else format_percent(value)
        ) in outline.text
        assert continual.CONVENTIONS[name] in outline.text
    assert "2,104,512 parameters in float32) · piece-s at density 0.01" in outline.text
    for words in ("vision", "projector", "language", "✓ right", "✗ wrong", "◐ 33.3 %"):
        assert words in outline.text


def test_every_image_and_curve_has_words(page):
    tags = Outline(page.read_text()).tags
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert len(images) == 2 + 1 + 1  # a task learned and forgot; of the others no kind is there
    assert all(attrs["alt"] for attrs in images)
    curves = [attrs for tag, attrs in tags if tag == "svg"]
    assert len(curves) == len(TASKS) + 3 + 2  # base ability and its kinds; two tasks' losses
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in curves)
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_same_store_gives_the_same_bytes(page):
    assert render_report(summarise_store(FakeStore(), load_pictures)) == page.read_text()


def test_hostile_text_stays_text():
    tasks = (HOSTILE, '" onload="x', "{{ 7 * 7 }}")
    store = FakeStore(tasks, recipe=f"# {HOSTILE}")
    for delta in store.deltas:
        delta.info["method"] = HOSTILE
    text = render_report(summarise_store(store, load_pictures))
    outline = Outline(text)
    assert HOSTILE not in text
    assert HOSTILE in outline.text
    assert "{{ 7 * 7 }}" in outline.text
    assert not any(tag == "script" or "onload" in attrs for tag, attrs in outline.tags)


def test_a_run_under_way():
    outline = Outline(render_report(summarise_store(FakeStore(matrix=MATRIX[:2]))))
    assert "over 1 of 3 tasks" in outline.text
    assert "20.5" in outline.text and "68.0" not in outline.text


def test_one_task_has_no_overlap():
    outline = Outline(render_report(summarise_store(FakeStore(("only",), [[0.1], [0.9]]))))
    assert "It takes two tasks to overlap." in outline.text


def test_before_any_task_and_before_any_measurement():
    assert (
        "No task is stored yet."
        in Outline(render_report(summarise_store(FakeStore((), [[]])))).text
    )
    store = FakeStore()
    store.results = dict
    outline = Outline(render_report(summarise_store(store)))
    assert "Accuracy matrix" not in outline.text
    assert "The store holds no answers to show." in outline.text
    assert "bytes per changed entry" in outline.text


def test_the_first_screen_answers_three_questions():
    text = Outline(render_report(summarise_store(FakeStore()))).text
    top = text[: text.index("Task by task")]
    figures = [
        *("Did it learn?", "Learned", "78.0", "over 3 of 3 tasks", "21.2"),
        *("Did it forget?", "Retained at the end", "76.8", "Each at its own position", "78.0"),
        *("Base ability retained", "74.0 → 71.9"),
        *("What does it cost to keep?", "3 deltas", "3 full checkpoints: 25.3 MB", "3 min 40 s"),
    ]
    places = [top.index(figure) for figure in figures[:2]]
    for figure in figures[2:]:
        places.append(top.index(figure, places[-1]))
    assert places == sorted(places)


def test_the_title_is_the_store_s_name():
    text = render_report(summarise_store(FakeStore(path=Path("deep/<i>run"))))
    assert "<title>&lt;i&gt;run · mm-piece report</title>" in text
    assert "&lt;i&gt;run</h1>" in text and "<i>run" not in text


def test_a_task_s_scores_stand_beside_each_other():
    text = Outline(render_report(summarise_store(FakeStore(matrix=MATRIX[:3])))).text
    table = text[text.index("Task by task") : text.index("Accuracy matrix")]
    assert "1 action 20.5 90.0 88.5 −1.5" in table
    assert "2 commonsense 31.0 76.0 76.0 +0.0" in table
    assert "3 count 12.0 – – –" in table
    assert "mean of 2 25.8 83.0 82.2 −0.8" in table


def test_losses_and_times_of_each_task(page):
    text = Outline(page.read_text()).text
    training = text[text.index("Training loss over the steps") : text.index("Where the changed")]
    assert "1 action 0.5" in training and "3 count 0.5" not in training
    assert "1 action 12.5 s 1 min 1 s 25 1.25" in training
    assert "3 count 12.5 s 1 min 1 s – 1.25" in training


def test_a_run_without_losses_says_so(monkeypatch):
    store = FakeStore()
    known = store.results()
    del known["losses"]
    monkeypatch.setattr(store, "results", lambda: known)
    assert "This run recorded no losses." in render_report(summarise_store(store))


def test_changes_have_a_row_for_each_task_and_a_column_for_each_changed_group(page):
    text = Outline(page.read_text()).text
    table = text[text.index("What each task changed") : text.index("How sure")]
    assert "No task changed head: bit-identical" in table
    assert "task vision projector 1 action 1,990 1.23 % of norm – 2 commonsense 1,990 7" in table


def test_digests_are_short_and_whole_in_a_title(page):
    text = page.read_text()
    outline = Outline(text)
    titles = {attrs.get("title") for tag, attrs in outline.tags if tag == "code"}
    store = FakeStore()
    for digest in ("5d" * 32, "da7a" * 16, store.entries[0].sha256):
        assert digest in titles
        assert digest[:12] in outline.text and digest not in outline.text


def test_a_digest_in_hostile_text_is_no_way_in():
    shown = shorten_digests(f'<b onclick="x">{"ab" * 32}</b>\x1b {"cd" * 31}')
    assert shown == (
        f'&lt;b onclick=&#34;x&#34;&gt;<code title="{"ab" * 32}">abababababab</code>&lt;/b&gt;'
        f"\\x1b {'cd' * 31}"
    )


# --- in a browser -------------------------------------------------------------------------------

QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
QUIET += ["--hide-scrollbars", "--window-size=1400,1000"]
QUIET += ["--enable-logging=stderr"]  # what the page writes to the console, refusals included
PROBE = """<script>
const root = document.documentElement, style = getComputedStyle(document.body);
const maps = [...document.querySelectorAll(".map")];
const matrix = document.querySelector("#accuracy .scroll");
const fade = getComputedStyle(matrix, "::after");
const shown = () => maps.flatMap((map, at) => map.offsetHeight ? [at] : []);
const first = shown();
if (maps.length) document.getElementById("map-2").click();
root.dataset.probe = JSON.stringify({
  errors: window.errors, scroll: root.scrollWidth, client: root.clientWidth,
  ink: style.color, paper: style.backgroundColor,
  broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
  maps: [...first, ...shown()],
  goes_on: matrix.scrollWidth > matrix.clientWidth,
  fade: [fade.position, fade.right, fade.backgroundImage.split("(")[0]],
});
</script>"""
COLLECT = "<script>window.errors = []; onerror = message => { errors.push(message) }</script>"


def chromium(page: Path, folder: Path, *options: str) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *QUIET, profile, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
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


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_keeps_its_own_policy(page, tmp_path):
    assert "</html>" in chromium(page, tmp_path, "--dump-dom")
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>1</script></body>"))
    with pytest.raises(AssertionError, match="CONSOLE.*Content Security Policy"):
        chromium(broken, tmp_path, "--dump-dom")


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
    assert (found["broken"], found["maps"]) == (0, [0, 2])
    # on a phone the matrix goes on, and fades at the edge where it does
    assert found["goes_on"] == (width == 390)
    assert found["fade"] == ["sticky", "0px", "linear-gradient"]
    paper, ink = luminance(found["paper"]), luminance(found["ink"])
    assert (paper > ink) == (scheme == 1)
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7


def test_stability_is_told_by_number_of_examples(page):
    text = Outline(page.read_text(encoding="utf-8")).text
    assert "41.0 % 125 examples 58.0 % 250 examples 72.5 % 500 examples" in text


@pytest.mark.parametrize("carried", [{}, {"x": 1}, {"5": "y"}])
def test_a_stability_that_is_none_leaves_its_section_out(carried, monkeypatch):
    store = FakeStore()
    known = {**store.results(), "stability": dict.fromkeys(store.tasks, carried)}
    monkeypatch.setattr(store, "results", lambda: known)
    assert 'id="stability"' not in render_report(summarise_store(store))
