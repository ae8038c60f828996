"""A slice of the fuzzing, and proof that its oracle sees what it is there for."""

import ctypes
import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz_deltas
import fuzz_oracle
import pytest
import torch
from fuzz import KINDS, fresh
from fuzz_files import samples
from fuzz_oracle import Finding, attempt, judge_delta, judge_store
from fuzz_stores import STORES, Sandbox, changes

from mm_piece.deltas.arrays import DeltaArrays
from mm_piece.deltas.delta import Delta
from mm_piece.errors import MismatchError

HERE = Path(__file__).parent
OTHER_SEED, START = 1, 10_000


@pytest.mark.slow
def test_a_slice_has_no_findings(tmp_path):
    """It goes on where the state says, in the way that the whole run does."""
    path, files = tmp_path / "state.json", START + 8 * len(KINDS)
    path.write_text(json.dumps(fresh(OTHER_SEED) | {"done": START}))
    command = [sys.executable, str(HERE / "fuzz.py"), "--state", str(path)]
    command += ["--files", str(files), "--seed", str(OTHER_SEED)]
    process = subprocess.run(command, capture_output=True, text=True)
    state = json.loads(path.read_text())
    assert state["findings"] == {}
    assert process.returncode == 0, process.stderr
    assert state["done"] == files
    assert {kind: sum(state["outcomes"][kind].values()) for kind in KINDS} == dict.fromkeys(
        KINDS, 8
    )


@pytest.mark.parametrize("kind", fuzz_deltas.DELTAS)
def test_a_delta_is_a_function_of_its_number(kind):
    first, second = (fuzz_deltas.mutated(kind, random.Random("0/1"))[1] for _ in range(2))
    assert first == second


def test_sound_deltas_are_applied_and_sound_stores_read(tmp_path):
    assert {judge_delta(sample.data, sample.model) for sample in samples()} == {"applied"}
    sandbox = Sandbox(tmp_path / "sandbox")
    assert judge_store(sandbox.store, sandbox.listing) == "sound"


@pytest.mark.parametrize("kind", STORES)
def test_a_sandbox_is_restored(tmp_path, kind):
    sandbox = Sandbox(tmp_path / "sandbox")
    changed = changes(kind, sandbox.sound, random.Random(0))
    sandbox.plant(changed)
    sandbox.restore(changed)
    assert all((sandbox.store / name).read_bytes() == data for name, data in sandbox.sound.items())


# --- the oracle -----------------------------------------------------------------------------------


def test_a_missing_range_check_is_found(monkeypatch):
    for kind in (Delta, DeltaArrays):
        monkeypatch.setattr(kind, "__post_init__", lambda self: None)
    with pytest.raises(Finding, match="unsound"):
        for number in range(200):
            sample, data = fuzz_deltas.mutated("forged indices", random.Random(number))
            judge_delta(data, sample.model)


def stray_entry(tensors):
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[0] ^= 1


def stray_byte(tensors):
    for tensor in tensors.values():
        ctypes.memset(tensor.data_ptr() - 1, 0, 1)


def late_error(tensors):
    raise MismatchError("after the fact")


@pytest.mark.parametrize("act", [stray_entry, stray_byte, late_error])
def test_stray_writes_are_found(monkeypatch, act):
    apply = Delta.apply
    monkeypatch.setattr(
        Delta, "apply", lambda self, tensors: (apply(self, tensors), act(tensors))[2:]
    )
    sample = samples()[2]
    with pytest.raises(Finding, match="other than those named"):
        judge_delta(sample.data, sample.model)


@pytest.mark.parametrize("message", ["two\nlines", "\x1b[2J", "\ud800", "x" * 601])
def test_unfit_messages_are_found(message):
    def fail():
        raise MismatchError(message)

    with pytest.raises(Finding, match="message"):
        attempt(fail)


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda store: (store.path / "../outside/secret").read_text(), "outside"),
        (lambda store: (store.path / "new").write_text(""), "changed the store"),
        (lambda store: 1 / 0, "ZeroDivisionError escapes"),
    ],
)
def test_reading_elsewhere_and_writing_are_found(tmp_path, monkeypatch, read, problem):
    sandbox = Sandbox(tmp_path / "sandbox")
    monkeypatch.setattr(fuzz_oracle, "READS", (read,))
    with pytest.raises(Finding, match=problem):
        judge_store(sandbox.store, sandbox.listing)


BAD_CASES = """
import os, signal, time, fuzz
from fuzz_oracle import attempt

def endless():
    while True:
        pass

CASES = [lambda: "well", lambda: os.kill(os.getpid(), signal.SIGSEGV), endless,
         lambda: attempt(bytes, 2**30), lambda: time.sleep(60), lambda: "well"]
fuzz.PROCESSOR_SECONDS, fuzz.PATIENCE = 1, 3
fuzz.judge = lambda seed, number, sandbox: CASES[number]()
state = fuzz.fresh(0)
fuzz.run(state, len(CASES), lambda state: None)
print(state["done"])
for what, found in state["findings"].items():
    print(what, *[example["number"] for example in found["examples"]])
"""


@pytest.mark.slow
def test_cases_that_end_their_worker_are_found_and_passed():
    process = subprocess.run(
        [sys.executable, "-c", BAD_CASES], cwd=HERE, capture_output=True, text=True
    )
    assert process.stdout.splitlines() == [
        "6",
        "the process died: -11 1",
        "more than 1 s of computing 2",
        "MemoryError escapes 3",
        "no end within 3 s 4",
    ], process.stderr
