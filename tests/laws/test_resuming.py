"""A training that always goes on: killed, told to stop, left alone, on more processes or fewer."""

import os
import re
import signal
import time

import pytest
import torch
from engines import ENGINES
from extras import needs
from filelock import FileLock
from forking import launch_forks
from launching import LIMIT, done, launch

from mm_piece.store.delta_store import DeltaStore

pytestmark = [pytest.mark.slow, needs("deepspeed"), pytest.mark.timeout(4 * LIMIT)]

STEPS = {"save_steps": 3, "num_train_epochs": 4}  # 8 steps of the first task, 12 of the second


def train(recipe):
    return ["-m", "mm_piece", "train", str(recipe)]


def wait_for(process, folder, pattern):
    """Until a file is there, while the process runs."""
    deadline = time.monotonic() + LIMIT
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def found_in(store):
    """What a run has to come to, killed or not: its files, byte for byte, and its scores."""
    store = DeltaStore.open(store)
    return [entry.sha256 for entry in store.entries], store.results()["matrix"]


@pytest.fixture
def unstopped(flat_base, write, tmp_path_factory):
    """A function that runs an engine to its end, once for all workers, and returns the store."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def _unstopped(engine):
        store = shared / f"unstopped-{engine}"
        finished = shared / f"unstopped-{engine}.finished"
        with FileLock(shared / f"unstopped-{engine}.lock"):
            if not finished.exists():
                recipe = write(flat_base, f"{engine}-whole", 2, ENGINES[engine], **STEPS)
                done(launch_forks(2, *train(recipe), "--set", f"store={store}"))
                finished.touch()
        return store

    return _unstopped


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_killed_and_started_again(engine, flat_base, write, unstopped, tmp_path):
    """Laws 5 and 8: the same files in the end, byte for byte, in a later epoch too."""
    recipe = write(flat_base, engine, 2, ENGINES[engine], **STEPS)
    for task in ("0001", "0002"):
        process = launch_forks(2, *train(recipe))
        wait_for(process, tmp_path / engine, f"work/{task}/checkpoint-3/trainer_state.json")
        process.kill()
    done(launch_forks(2, *train(recipe)))
    assert found_in(tmp_path / engine) == found_in(unstopped(engine))


def test_on_another_number_of_processes(flat_base, write, unstopped, tmp_path):
    """From ZeRO-3 on two processes to four of them, and on to ZeRO-1 on one."""
    process = launch_forks(2, *train(write(flat_base, "moved", 2, ENGINES["zero3"], **STEPS)))
    wait_for(process, tmp_path / "moved", "work/0001/checkpoint-3/trainer_state.json")
    process.kill()
    process = launch_forks(4, *train(write(flat_base, "moved", 4, ENGINES["zero3"], **STEPS)))
    wait_for(process, tmp_path / "moved", "work/0002/checkpoint-3/trainer_state.json")
    process.kill()
    done(launch_forks(1, *train(write(flat_base, "moved", 1, ENGINES["zero1"], **STEPS))))
    one, other = DeltaStore.open(unstopped("zero3")), DeltaStore.open(tmp_path / "moved")
    for position in (1, 2):
        first, second = one.delta(position), other.delta(position)
        for name, index in first.indices.items():
            assert torch.equal(index, second.indices[name])
            torch.testing.assert_close(second.values[name], first.values[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("engine", "how"), [("ddp", signal.SIGINT), ("zero3", signal.SIGTERM)])
def test_told_to_stop(engine, how, flat_base, write, unstopped, tmp_path):
    """A checkpoint, a line; the same command goes on to the same files."""
    recipe = write(flat_base, engine, 2, ENGINES[engine], **STEPS)
    process = launch(2, *train(recipe))
    wait_for(process, tmp_path / engine, "work/0002/checkpoint-3/trainer_state.json")
    process.send_signal(how)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    (step,) = re.findall(r"stopped at step (\d+)", said)
    assert (tmp_path / engine / f"work/0002/checkpoint-{step}/trainer_state.json").exists()
    done(launch_forks(2, *train(recipe)))
    assert found_in(tmp_path / engine) == found_in(unstopped(engine))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_process_is_lost(how, flat_base, write, tmp_path):
    """The others say so, in one line and within the time limit, whoever started them."""
    recipe = write(
        flat_base, "lost", 2, None, num_train_epochs=2000, save_strategy="no", ddp_timeout=20
    )
    pair = launch_forks(2, *train(recipe))
    waiting, lost = pair.ranks
    try:
        wait_for(pair, tmp_path / "lost", "logs/0001/events*")
        time.sleep(1)
        os.killpg(lost.pid, how)
        begun = time.monotonic()
        waiting.join(LIMIT)
        said = pair.printed()
        assert time.monotonic() - begun < 60
        assert waiting.exitcode == 2
        assert said.count("Error: another process ended or did not answer in time") == 1
        assert "Traceback" not in said
    finally:
        pair.kill()
