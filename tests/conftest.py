"""Fixtures that many tests share: tiny bases, and rows beside pictures."""

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from tiny_llava import make_llava  # first: it sets what libraries read when they are imported

# Many tests start processes: each would compile torch and transformers anew, for most of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A clock fails no law: the machine may be busy with something else.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a picture of each colour."""
    from made_up_rows import COLOURS, IMAGES, data_of

    path = tmp_path_factory.mktemp("rows")
    for name, colour in zip(IMAGES, COLOURS, strict=True):
        (path / name).write_bytes(data_of(colour))
    return path


@pytest.fixture(scope="session", autouse=True)
def no_full_collection_before_each_training():
    """Leave garbage to Python: accelerate collects all of it whenever a Trainer begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session")
def frozen_modules():
    """How many modules were imported when what is alive was last frozen."""
    yield [0]
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def imports_out_of_garbage_collections(frozen_modules):
    """Spare what imports left from the full collections that a Trainer asks for when it begins."""
    if len(sys.modules) > frozen_modules[0] + 100:
        gc.collect()
        gc.freeze()
        frozen_modules[0] = len(sys.modules)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny LLaVA base."""
    return make_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def family_base(tmp_path_factory):
    """A function from a family's name to the folder of its tiny base, made once."""
    from newer_families import make_any

    made = {}

    def _base(family: str) -> Path:
        if family not in made:
            made[family] = make_any(family, tmp_path_factory.mktemp(family) / "base")
        return made[family]

    return _base


@pytest.fixture
def read_rows(folder):
    """A function that writes rows beside those pictures and reads them back."""
    from mm_piece.data import read

    def _read(*rows, **options):
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return read(str(folder / "rows.json"), **options)

    return _read
