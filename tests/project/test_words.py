"""One word for one thing, the field's own: home-made ones that were replaced do not come back."""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Names in the code. Words that are also plain English (keep, part, whole) may name other things.
NAMES = frozenset(
    [
        "stake",
        "stakes",
        "pulls",
        "Kept",
        "kept_before",
        "note_kept",
        "own_answers",
        "taught",
        "standing",
        "told",
        "joined",
        "summed",
        "agreed",
        "gathered",
        "is_cut",
        "part_of",
        "put_all",
        "laid_out",
        "Tap",
        "Watcher",
        "CalledAgain",
        "carriers",
        "Replay",
        "contest",
        "contests",
        "Contest",
        "seat",
        "seats",
        "Seat",
        "knee",
        "Alike",
        "Encoded",
        "fitted",
        "pictured",
        "Feed",
        "Company",
        "said",
        "Answer",
        "peer",
        "peers",
        "rival",
        "rivals",
        "contestant",
        "contestants",
        "zero_of",
        "place_of",
        "rehearse",
    ]
)
# Classes of `eval/baselines` whose paths stand in experiments and in committed results.
ALLOWED_NAMES = {"eval/baselines/replay.py": {"Replay"}, "eval/baselines/agem.py": {"Replay"}}

PHRASES = re.compile(
    r"""
      \bat\ stake\b | \bstakes\b | (?<!'s\ )\bown[ _]answers\b
    | \bheld\ (random\ )?masks?\b | \bfree\ (random\ )?masks?\b
    | \bbase\ kept\b | \btold\ and\ measured\b | \bpast\ the\ machines\b
    | \bcontests?\b | \bseats\b | \bknee\b | \bpictured\b
    | \brivals?\b | \bcontestants?\b | \bpeers?\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Words on disk, which a change would make unreadable, and a word list of the embedded data.
ALLOWED_LINES = (
    '_HEADER_KIND = "stakes"',
    "saw pictured",
    "Connection closed by peer",  # what a library says
)
# What is not written anew: logs, results, shipped stores; and the lists above.
RECORDS = (
    "CHANGELOG.md",
    "checkpoints/tiny/",
    "eval/LOG.md",
    "eval/results/",
    "tests/golden/",
    "tests/project/test_words.py",
)


def tracked(*suffixes):
    """Files of the project that are written by hand, without logs, results and shipped stores."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.endswith(suffixes) and not name.startswith(RECORDS):
            yield name, (ROOT / name).read_text(encoding="utf-8")


def test_no_home_made_name_is_left():
    found = []
    for name, text in tracked(".py"):
        if name.startswith("tests/"):
            continue
        allowed = ALLOWED_NAMES.get(name, set())
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in NAMES - allowed:
                found.append(f"{name}:{token.start[0]}: {token.string}")
    assert not found


def test_no_home_made_word_is_left():
    found = []
    for name, text in tracked(".py", ".md", ".yaml", ".html", ".toml"):
        for number, line in enumerate(text.splitlines(), start=1):
            if PHRASES.search(line) and not any(known in line for known in ALLOWED_LINES):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found


def test_a_home_made_word_is_seen():
    for line in (
        "what is at stake",
        "own answers are trained",
        "the held random mask",
        "two seats",
    ):
        assert PHRASES.search(line)
    assert not PHRASES.search("the model's own answers to the prompts")
