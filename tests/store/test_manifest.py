"""What the JSON files of a store may say: one line for everything else, and never a traceback."""

import itertools
import json
import os

import numpy as np
import pytest
from made_store import delta_for, make, rewrite

from mm_piece.errors import PieceError, StoreError
from mm_piece.store import manifest
from mm_piece.store.delta_store import DeltaStore

HEX = "ab" * 32


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "store", deltas=3)


def refused(act, *parts: str) -> None:
    """Expect one line that names all of these."""
    with pytest.raises(StoreError) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- the manifest -------------------------------------------------------------------------------

HOSTILE_ENTRIES = {
    "position": [0, 1, 4, "2", 2.0, True, None],
    "task": [None, 3, ["x"]],
    "sha256": ["", "x" * 64, "AB" * 32, None],
    "parent": ["", "ab" * 32, None],
    "entries": [-1, 1.5, None, True, 2**63],
    "bytes": [-1, None],
    "file": [
        "0001-task-1.safetensors",
        "../0002-x.safetensors",
        "/0002-x.safetensors",
        "sub/0002-x.safetensors",
        "0002-x.safetensors\n",
        "0002-\u0661.safetensors",
        "\u0660002-x.safetensors",
        "0002-..safetensors",
        "store.json",
        "",
        "0" * 5000 + "2-x.safetensors",
        "00002-x.safetensors",
        None,
    ],
}


@pytest.mark.parametrize("field", HOSTILE_ENTRIES)
def test_hostile_manifest_entries_are_refused(store, field):
    sound = (store.path / "store.json").read_text()
    for value, row in itertools.product(HOSTILE_ENTRIES[field], (1, 2)):
        rewrite(store, lambda manifest, v=value, r=row: manifest["deltas"][r].update({field: v}))
        refused(lambda: DeltaStore.open(store.path), "store.json: position")
        (store.path / "store.json").write_text(sound)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.update(format="1"),
        lambda manifest: manifest.update(format=True),
        lambda manifest: manifest.update(stranger=1),
        lambda manifest: manifest.update(base=[]),
        lambda manifest: manifest.update(base={}),
        lambda manifest: manifest.update(deltas={}),
        lambda manifest: manifest.update(deltas=[3]),
        lambda manifest: manifest.pop("deltas"),
        lambda manifest: manifest["deltas"].pop(0),
        lambda manifest: manifest["deltas"].reverse(),
        lambda manifest: manifest["deltas"][1].pop("parent"),
        lambda manifest: manifest["deltas"][1].update(stranger=1),
    ],
)
def test_hostile_manifests_are_refused(store, change):
    rewrite(store, change)
    refused(lambda: DeltaStore.open(store.path), "store.json: ")


DAMAGED = ["", "{", "[]", "3", "\xff", '{"format":' + "[" * 100_000, '{"format":' + "9" * 5000]


@pytest.mark.parametrize("text", [*DAMAGED, '{"format": NaN}', '{"format": -Infinity}', "[1e999]"])
def test_a_damaged_manifest_is_one_line(store, text):
    (store.path / "store.json").write_text(text, encoding="latin-1")
    refused(lambda: DeltaStore.open(store.path), "store.json: damaged")


def test_an_altered_manifest_is_refused_or_sound(store):
    data = (store.path / "store.json").read_bytes()
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] = int(rng.integers(256))
        (store.path / "store.json").write_bytes(altered)
        try:
            deltas = DeltaStore.open(store.path).deltas()
        except PieceError:
            continue
        assert [delta.values["w"][0] for delta in deltas] == [1, 2, 3][: len(deltas)]


def test_a_link_out_of_the_store_is_refused(store, tmp_path):
    file = store.path / store.entries[0].file
    file.rename(tmp_path / file.name)
    for target in (tmp_path / file.name, f"../{file.name}", "/dev/zero"):
        file.symlink_to(target)
        refused(lambda: DeltaStore.open(store.path), f"{file.name}: leads out of the store")
        file.unlink()


READERS = {
    "store.json": lambda store: DeltaStore.open(store.path),
    "results.json": lambda store: store.results(),
    "recipe.yaml": lambda store: store.recipe,
    "0001-task-1.safetensors": lambda store: store.data(1),
}


@pytest.mark.parametrize("name", READERS)
def test_no_file_of_a_store_may_lie_outside(store, tmp_path, name):
    store.write_results({})
    (store.path / name).rename(tmp_path / name)
    (store.path / name).symlink_to(tmp_path / name)
    refused(lambda: READERS[name](store), f"{name}: leads out of the store")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling"])
def test_what_is_no_file_is_refused(store, name, kind):
    path = store.path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if kind == "loop" else "nowhere")
    refused(lambda: READERS[name](store), name)


SOUND_BASE = {
    "fingerprint": HEX,
    "digest": "0" * 64,
    "family": "llava",
    "dtype": "float32",
    "folder": "../base",
    "hub": "some/base",
    "revision": None,
    "parameters": 0,
    "bytes": 7,
    "of our own": [{"plain": None}, 1.5],
}
HOSTILE_BASE = {
    "fingerprint": ["ab", HEX.upper(), HEX + "\n", 3, None],
    "digest": ["", "x" * 64, None, [HEX]],
    "family": [None, 1, "a\nb"],
    "dtype": [["float32"], {}, "\0"],
    "folder": [None, 3, "a\0b", "\ud800"],
    "hub": [None, True, "some/base\n"],
    "revision": [0, [], "a\rb"],
    "parameters": [-1, 1.0, "7", True, 2**63],
    "bytes": [-1, None],
}


def test_a_base_may_say_all_that_is_known_and_more(tmp_path):
    DeltaStore.create(tmp_path / "a", SOUND_BASE, "")
    assert DeltaStore.open(tmp_path / "a").base.facts == SOUND_BASE
    for key in SOUND_BASE.keys() - {"fingerprint"}:
        base = {other: value for other, value in SOUND_BASE.items() if other != key}
        assert DeltaStore.create(tmp_path / key, base, "").base.facts == base


@pytest.mark.parametrize("field", HOSTILE_BASE)
def test_hostile_bases_are_refused(store, tmp_path, field):
    for value in HOSTILE_BASE[field]:
        rewrite(store, lambda content, v=value: content["base"].update({field: v}))
        parts = (f"base: {field} is ", "; allowed: ")
        refused(lambda: DeltaStore.open(store.path), "store.json: ", *parts)
        hostile = {**SOUND_BASE, field: value}
        refused(lambda b=hostile: DeltaStore.create(tmp_path / "new", b, ""), *parts)
    assert not (tmp_path / "new").exists()


def test_text_is_what_is_read(store):
    text = manifest.serialize_manifest(store.base, store.entries)
    assert text == (store.path / "store.json").read_text()
    assert manifest.read_manifest(store.path) == (store.base, store.entries)


# --- results and answers ------------------------------------------------------------------------

RESULTS = {
    "tasks": ["a", "b", "c", "d"],
    "general": ["base"],
    "matrix": [[0, 0.5, 1, 1.0]] * 3,
    "base_ability": [1, 0.5, 0.25],
    "base_ability_name": "base",
    "base_kinds": {"colour": [0.5, 0.5, 0.5], "shape": [1, 0, 1]},
    "seconds": {"a": {"select": 0.5, "loss": 3.25}},
    "of our own": None,
}
HOSTILE_RESULTS = {
    "tasks": [None, "abcd", ["a", "a", "b", "c"], ["a", 1, "b", "c"], ["a"], [], [["a"]] * 4],
    "general": [None, "base", [3], ["x", "x"]],
    "matrix": [None, {}, [3], [[]], [[0, 0, 0]], [[0, 0, 0, "1"]], [[0, 0, 0, True]], [None]],
    "base_ability": [None, [], [0.5], [0, 0, -0.1], [0, 0, 1.1], [0, 0, None], {"0": 1}, 3],
    "base_ability_name": [None, 3],
    "base_kinds": [None, [], {"colour": 0.5}, {"colour": [0.5]}, {"colour": [0, 0, "x"]}],
    "seconds": [None, 3, {"a": 3}, [{}]],
}


def test_results_may_say_all_that_is_known_and_more(store):
    for content in (RESULTS, {}, {"tasks": [], "matrix": [[]]}, {"tasks": ["a"], "matrix": []}):
        store.write_results(content)
        assert DeltaStore.open(store.path).results() == content
    for key in RESULTS.keys() - {"tasks", "matrix"}:
        content = {other: value for other, value in RESULTS.items() if other != key}
        store.write_results(content)
        assert store.results() == content


@pytest.mark.parametrize("field", HOSTILE_RESULTS)
def test_hostile_results_are_refused(store, field):
    for value in HOSTILE_RESULTS[field]:
        content = {**RESULTS, field: value}
        refused(lambda c=content: store.write_results(c), "results.json: ", "; allowed: ")
        (store.path / "results.json").write_text(json.dumps(content))
        refused(store.results, "results.json: ", "; allowed: ")


def test_there_is_one_row_per_position_at_most(store):
    rows = [[0, 0, 0, 0]]
    store.write_results({"tasks": RESULTS["tasks"], "matrix": rows * 4})
    few = {"tasks": ["a", "b"], "matrix": [[0, 0]] * 4}
    for content, most in (({"tasks": RESULTS["tasks"], "matrix": rows * 5}, 4), (few, 3)):
        refused(lambda c=content: store.write_results(c), f"at most {most}")
        (store.path / "results.json").write_text(json.dumps(content))
        refused(store.results, f"at most {most}")
    for key in ("tasks", "matrix"):
        content = {other: RESULTS[other] for other in ("tasks", "matrix") if other != key}
        refused(lambda c=content: store.write_results(c), f"results.json: it has no {key}")


def test_a_reader_sees_rows_of_positions_that_came_after_it(store):
    reader = DeltaStore.open(store.path)
    store.append(delta_for(store))
    store.write_results({"tasks": RESULTS["tasks"], "matrix": [[0, 0, 0, 0]] * 5})
    assert len(reader.results()["matrix"]) == 5


ANSWER = {"row": 0, "prompt": "?", "answer": "a", "prediction": "", "score": 1, "kind": "x"}
HOSTILE_ANSWERS = [
    {"a": None},
    {"a": {}},
    {"a": [None]},
    {"a": [{**ANSWER, "score": 2}]},
    {"a": [{**ANSWER, "score": "1"}]},
    {"a": [{**ANSWER, "row": -1}]},
    {"a": [ANSWER, {**ANSWER, "row": "0"}]},
    {"a": [{**ANSWER, "prompt": None}]},
    {"a": [{**ANSWER, "answer": ["a"]}]},
    {"a": [{key: value for key, value in ANSWER.items() if key != "prediction"}]},
]


def test_hostile_answers_are_refused(store):
    store.write_answers(2, {"a": [ANSWER] * 2, "b": []})
    for content in HOSTILE_ANSWERS:
        refused(lambda c=content: store.write_answers(2, c), "answers/0002.json: task 'a'")
        (store.path / "answers" / "0002.json").write_text(json.dumps(content))
        refused(lambda: store.answers(2), "answers/0002.json: task 'a'")


def test_numbers_that_json_cannot_write_are_not_read(store):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        (store.path / "results.json").write_text(f'{{"tasks": [], "matrix": [], "x": {number}}}')
        refused(store.results, "results.json: damaged JSON", "no finite number")
