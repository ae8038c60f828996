"""Laws of stores on the Hub: one commit that continues, a pull that cannot do harm, one line."""

import json
import re

import pytest
from fake_hub import FakeHub, Visitor
from full_store import RESULTS, content, full
from made_store import BASE, delta_for, make

from mm_piece.store.copying import fork
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.model_card import GENERATED_MARK, format_model_card
from mm_piece.store.records import BaseRecord


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with FakeHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def visit(hub, tmp_path_factory):
    visitor = Visitor(hub.url, tmp_path_factory.mktemp("home"))
    yield visitor
    visitor.leave()


@pytest.fixture(autouse=True)
def nothing_yet(hub):
    hub.branches.clear()
    hub.commits.clear()
    hub.listed.clear()
    hub.interlude = lambda: None


@pytest.fixture
def store(tmp_path):
    return full(tmp_path / "store")


# --- pushing and pulling ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_store_goes_there_and_comes_back(hub, visit, store, tmp_path):
    said = visit("push", store.path, "me/mine", private=True)
    assert said.startswith("me/mine on the Hub: a store with positions 0…3, commit ")
    assert [(r, message) for r, message, _ in hub.commits[1:]] == [("me/mine", "Positions 0…3")]
    assert hub.private["me/mine"]
    sent = {n for n in content(store.path) if n.split("/")[0] not in ("logs", "work", "base")}
    assert set(hub.names("me/mine")) == sent | {".gitattributes", "README.md"}
    assert visit("pull", "me/mine", tmp_path / "got" / "it") == "3"
    got = DeltaStore.open(tmp_path / "got" / "it")
    assert (got.verify(), got.base.facts, got.results()) == (store.entries, BASE, RESULTS)
    assert got.answers(3) == store.answers(3)
    assert set(content(got.path)) == sent
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["it"]


@pytest.mark.slow
def test_what_is_there_is_continued(hub, visit, store, tmp_path):
    visit("push", store.path, "me/mine")
    visit("pull", "me/mine", tmp_path / "got")
    assert "nothing had changed" in visit("push", store.path, "me/mine")
    assert len(hub.commits) == 2
    store.append(delta_for(store, "further"))
    assert "positions 0…4, commit" in visit("push", store.path, "me/mine")
    assert hub.commits[2][2] == ["0004-further.safetensors", "README.md", "store.json"]
    behind = content(tmp_path / "got")
    assert "nothing to push" in visit("push", tmp_path / "got", "me/mine")
    assert (len(hub.commits), content(tmp_path / "got")) == (3, behind)
    for _ in range(2):
        assert visit("pull", "me/mine", tmp_path / "got") == "4"
        assert DeltaStore.open(tmp_path / "got").verify() == store.entries


@pytest.mark.slow
def test_another_history_is_refused(hub, visit, store, tmp_path):
    visit("push", store.path, "me/mine")
    branch = fork(store, tmp_path / "branch", 2)
    branch.append(delta_for(branch, "other"))
    foreign = DeltaStore.create(tmp_path / "foreign", BASE | {"fingerprint": "cd" * 32}, "")
    before = content(branch.path)
    for act in (("push", branch.path, "me/mine"), ("pull", "me/mine", branch.path)):
        said = visit(*act)
        assert said.startswith("StoreError: ") and "has diverged at position 3" in said
        assert {entry.sha256[:12] for entry in (branch.entries[2], store.entries[2])} <= set(
            re.findall("[0-9a-f]{12}", said)
        )
        assert ".tmp" not in said
    assert "of another base: fingerprint ab" in visit("push", foreign.path, "me/mine")
    assert (len(hub.commits), content(branch.path)) == (2, before)


@pytest.mark.slow
def test_no_folder_of_this_computer_is_named(hub, visit, tmp_path):
    folder = make(tmp_path / "folder", deltas=1)
    base = {**BASE, "folder": "../secret/place", "hub": "some/base", "revision": "v1"}
    named = DeltaStore.create(folder.path / "named", base, "")
    visit("push", named.path, "me/mine")
    files = content(hub.folder("me/mine"))
    assert not [name for name, data in files.items() if b"secret" in data]
    manifest = json.loads(files["store.json"])
    assert manifest["base"] == {**BASE, "hub": "some/base", "revision": "v1"}
    assert b"base_model: some/base" in files["README.md"]
    manifest["base"]["folder"] = "../../etc"
    (hub.folder("me/mine") / "store.json").write_text(json.dumps(manifest))
    visit("pull", "me/mine", tmp_path / "got")
    assert "folder" not in DeltaStore.open(tmp_path / "got").base.facts


@pytest.mark.slow
def test_a_card_that_a_person_wrote_stays(hub, visit, store):
    hub.create("me/mine")
    hub.commit("me/mine", "main", "by hand", {"README.md": b"# Mine", "notes.txt": b"x"})
    assert "was written by hand and stays" in visit("push", store.path, "me/mine")
    assert (hub.folder("me/mine") / "README.md").read_text() == "# Mine"
    hub.commit("me/mine", "main", "as it was", {"README.md": GENERATED_MARK.encode()})
    assert "stays" not in visit("push", store.path, "me/mine")
    assert "## Positions" in (hub.folder("me/mine") / "README.md").read_text()


@pytest.mark.slow
def test_a_repository_of_something_else_is_left_alone(hub, visit, store, tmp_path):
    hub.create("me/mine")
    hub.commit("me/mine", "main", "a model", {"results.json": b"{}"})
    assert "is no store but has a results.json" in visit("push", store.path, "me/mine")
    assert "has no store.json" in visit("pull", "me/mine", tmp_path / "got")
    assert len(hub.commits) == 2 and not (tmp_path / "got").exists()


@pytest.mark.slow
def test_revisions(hub, visit, store, tmp_path):
    visit("push", store.path, "me/mine")
    first = hub.resolve("me/mine", "main")
    store.append(delta_for(store, "further"))
    assert "positions 0…4" in visit("push", store.path, "me/mine", revision="next")
    for revision, positions in ((None, "3"), ("main", "3"), ("next", "4"), (first, "3")):
        got = tmp_path / f"got {revision}"
        assert visit("pull", "me/mine", got, revision=revision) == positions
    assert "no such revision" in visit("pull", "me/mine", tmp_path / "got", revision="never")


@pytest.mark.slow
def test_somebody_else_was_faster(hub, visit, store):
    hub.create("me/mine")
    hub.interlude = lambda: hub.commit("me/mine", "main", "quick", {"x": b""})
    assert "somebody else has just changed" in visit("push", store.path, "me/mine")
    assert hub.names("me/mine") == [".gitattributes", "x"]


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.slow
def test_who_is_not_let_in(visit, store, tmp_path):
    for act in (("push", store.path, "me/mine"), ("pull", "me/nothing", tmp_path / "got")):
        said = visit(*act, token=None)
        assert said.startswith("StoreError: me/") and "hf auth login" in said
        assert "\n" not in said
    assert "written ./me/nothing" in said
    assert "HFValidationError" not in visit("pull", "me/a--b..c", tmp_path / "got")
    assert not (tmp_path / "got").exists()


@pytest.mark.slow
def test_a_hub_that_is_not_there(store, tmp_path):
    visitor = Visitor("http://127.0.0.1:9", tmp_path / "home")
    for act in (("push", store.path, "me/mine"), ("pull", "me/mine", tmp_path / "got")):
        said = visitor(*act)
        assert said.startswith("StoreError: me/mine: the Hub could not be used: ")
        assert "\n" not in said
    visitor.leave()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0002-task-2.safetensors", "results.json", "answers/0003.json"])
@pytest.mark.parametrize("how", ["altered", "cut", "missing"])
def test_a_damaged_store_is_not_pulled(hub, visit, store, tmp_path, name, how):
    visit("push", store.path, "me/mine")
    file = hub.folder("me/mine") / name
    data = file.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:middle] + (b"\xff" + data[middle + 1 :]) * (how == "altered"))
    said = visit("pull", "me/mine", tmp_path / "got")
    if how == "missing" and name != "0002-task-2.safetensors":
        assert said == "3"  # nothing says that there were any
        return
    assert name in said and said.split(":")[0].endswith("Error") and "me/mine: " in said
    assert str(tmp_path) not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


HOSTILE = ["../evil", "0009-x/../../evil.safetensors", "/evil", "0009-unlisted.safetensors", "x.py"]


@pytest.mark.slow
def test_only_what_the_manifest_lists_is_downloaded(hub, visit, store, tmp_path):
    visit("push", store.path, "me/mine")
    hub.commit("me/mine", "main", "more", {name: b"x" for name in HOSTILE[3:]})
    hub.listed += HOSTILE[:3]
    assert visit("pull", "me/mine", tmp_path / "a" / "got") == "3"
    assert not {path.name for path in (tmp_path / "a").rglob("*")} & {"evil", *HOSTILE[3:]}
    manifest = json.loads((hub.folder("me/mine") / "store.json").read_text())
    for name in HOSTILE[:3]:
        manifest["deltas"][2]["file"] = name
        (hub.folder("me/mine") / "store.json").write_text(json.dumps(manifest))
        said = visit("pull", "me/mine", tmp_path / "b" / "got")
        assert said.startswith("StoreError: me/mine: store.json: position 3: file is ")
    assert not (tmp_path / "b").exists() and not list(tmp_path.rglob("*evil*"))


# --- the model card -----------------------------------------------------------------------------


def test_a_card_says_what_there_is(store):
    base = {**BASE, "hub": "llava/base", "revision": "v1", "family": "llava"}
    card = format_model_card(BaseRecord(base), store.entries, RESULTS, "me/mine")
    assert card.startswith(
        "---\nbase_model: llava/base\nlibrary_name: mm-piece\ntags:\n- mm-piece\n"
    )
    assert card.index(GENERATED_MARK) < card.index("# me/mine")
    first = store.entries[0]
    row = f"| 1 | Task 1\\! | 4 | 33.3 % | {first.bytes:,} | {first.sha256[:12]} |"
    for part in (
        *("llava/base at revision v1", row, "mm-piece pull me/mine my-store", "## Accuracy, %"),
        *(
            "| 2 Task 2\\! | 50.0 | 100.0 | 0.0 | 50.0 |",
            "* OP 58.3: mean over",
            "* BWT -62.5: mean",
        ),
        *(f"Total: {sum(e.bytes for e in store.entries):,} bytes", 'load(store="my-store", at=3)'),
    ):
        assert part in card, part


@pytest.mark.slow
def test_a_card_of_little(tmp_path):
    store = make(tmp_path / "bare")
    card = format_model_card(BaseRecord({"fingerprint": "ab" * 32}), [], store.results(), "me/mine")
    assert card.startswith("---\nlibrary_name: mm-piece\n")
    assert "Accuracy" not in card
    assert 'load("path/to/base", store="my-store", at=0)' in card
    store.append(delta_for(store, "a|b `c` <b> [x](y) # z"))
    results = {"tasks": ["a|b"], "matrix": [[0.5]]}
    card = format_model_card(BaseRecord(BASE), store.entries, results, "me/mine")
    assert r"| 1 | a\|b \`c\` \<b\> \[x\](y) \# z |" in card
    assert "OP" not in card  # nothing was measured after a task
