"""Ctrl-C, a hang-up and SIGTERM: a training stops where it can go on, and says how."""

import os
import pty
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from tiny_recipe import deltas_of, measured, recipe_for
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState

import mm_piece
from mm_piece.cli import main
from mm_piece.data import EncodedDataset
from mm_piece.errors import StoreError
from mm_piece.selection import cache
from mm_piece.store.delta_store import DeltaStore
from mm_piece.training import loop as training
from mm_piece.training.stopping import GracefulStop
from mm_piece.training.trainer import SparseTrainer

pytestmark = pytest.mark.slow

LIMIT = 200  # seconds, a hundredth of it where nothing else runs
GO_ON = "the same command goes on from there"


class Killed(Exception):
    """Ends a run at an instant."""


def recipe_of(base, store, **settings):
    """Two tasks of six steps."""
    recipe = recipe_for(base, store, "piece-s")
    few = {"max_new_tokens": 2, "test": "scenes:charts/test[:1]"}
    tasks = tuple(
        task.model_copy(update={"train": f"scenes:{task.name}/train[:12]", **few})
        for task in recipe.tasks[:2]
    )
    train = {**recipe.train, "per_device_train_batch_size": 2, **settings}
    return recipe.model_copy(update={"tasks": tasks, "general": (), "train": train})


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The store of a run that nothing stopped."""
    return mm_piece.train(recipe_of(base, tmp_path_factory.mktemp("whole") / "store"))


@pytest.fixture(scope="module")
def whole(finished):
    """What such a run comes to."""
    return deltas_of(finished), measured(finished)


def at_step(step, task, number):
    """`Stop.on_step_end`, which sends this process a signal when a step of a task has ended."""
    real = GracefulStop.on_step_end

    def on_step_end(stop, args, state, control, **others):
        if (state.global_step, Path(args.output_dir).name) == (step, task):
            os.kill(os.getpid(), number)
        return real(stop, args, state, control, **others)

    return on_step_end


def at_call(call, times, number):
    """A call, which sends this process a signal when it has been made so many times."""
    calls = iter(range(1, 1000))

    def wrapped(*arguments, **options):
        found = call(*arguments, **options)
        if next(calls) == times:
            os.kill(os.getpid(), number)
        return found

    return wrapped


# Where a run may be when it is told: what stands in whose place, and what it says.
PLACES = {
    "scoring": (
        training,
        "make_penalty_strengths",
        partial(at_call, training.make_penalty_strengths, 2),
        "",
    ),
    "measuring": (training, "measure_position", partial(at_call, training.measure_position, 2), ""),
    "task 2": (GracefulStop, "on_step_end", partial(at_step, 3, "0002"), " at step 3"),
    "appending": (training, "_append_delta", partial(at_call, training._append_delta, 1), ""),
}
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.mark.parametrize(("place", "number"), [*zip(PLACES, NUMBERS, strict=True)])
def test_a_stop_anywhere_goes_on_to_the_same_end(
    place, number, base, whole, tmp_path, monkeypatch, capfd
):
    owner, name, telling, said = PLACES[place]
    recipe, before = recipe_of(base, tmp_path / "store"), signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, telling(number))
        with pytest.raises(SystemExit) as stopped:
            mm_piece.train(recipe)
    assert stopped.value.code == 128 + number
    lines = [line for line in capfd.readouterr().out.splitlines() if "stopped" in line]
    assert lines == [f"stopped{said}; {GO_ON}"]
    assert signal.getsignal(number) == before
    if said:
        saved = tmp_path / "store" / f"work/0002/checkpoint-{said.split()[-1]}"
        assert (saved / "trainer_state.json").exists()
    store = mm_piece.train(recipe)
    assert (deltas_of(store), measured(store)) == whole


def test_a_kill_between_a_delta_and_its_row_loses_no_record(base, whole, tmp_path, monkeypatch):
    """Losses and stability are there as soon as the delta is."""
    recipe, append = recipe_of(base, tmp_path / "store"), training._append_delta

    def append_and_die(store, delta):
        append(store, delta)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "_append_delta", append_and_die)
        mm_piece.train(recipe)
    assert len(DeltaStore.open(tmp_path / "store")) == 1
    store = mm_piece.train(recipe)
    assert (deltas_of(store), measured(store)) == whole


# --- processes of their own -----------------------------------------------------------------------


def fork(call, log):
    """Start a call in a fork, its output in a file."""

    def run():
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        as_a_process(call)

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def as_a_process(call):
    """Run a call as the whole of a process: words go to its descriptors, it ends by a status."""
    status = 1
    try:
        with open(1, "w", buffering=1) as out, open(2, "w", buffering=1) as err:
            sys.stdout, sys.stderr = out, err
            call()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def command(recipe):
    """`mm-piece train`."""
    return lambda: main(["train", str(recipe)])


@pytest.fixture
def written(base, tmp_path):
    """A recipe's file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(base, tmp_path / "store").to_yaml())
    return file


def wait_for(file, process):
    deadline = time.monotonic() + LIMIT
    while not file.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_again_ends_at_once(written, tmp_path, monkeypatch):
    """Also in the middle of a step that never ends."""

    def fit(*_):
        (tmp_path / "here").touch()
        time.sleep(LIMIT)

    monkeypatch.setattr(training, "fit", fit)
    process = fork(command(written), tmp_path / "log")
    wait_for(tmp_path / "here", process)
    for _ in range(2):
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        time.sleep(1)
    process.join(20)
    assert process.exitcode == 130
    assert "stopping after this step" in (tmp_path / "log").read_text()


def test_ctrl_c_in_another_command(tmp_path, monkeypatch, capsys):
    """The status that shells know."""
    monkeypatch.setattr(DeltaStore, "open", lambda path: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(["log", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Aborted!\n"


def test_what_a_shell_has_ignored_stays_ignored(base, whole, tmp_path, monkeypatch):
    """`nohup mm-piece train …` outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(GracefulStop, "on_step_end", at_step(3, "0001", signal.SIGHUP))
        store = mm_piece.train(recipe_of(base, tmp_path / "store"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (deltas_of(store), measured(store)) == whole


def test_ctrl_c_and_a_terminal_that_is_gone(written, whole, tmp_path, monkeypatch):
    """The command: a hang-up in task 1 (its terminal refuses all words), Ctrl-C in task 2."""
    real = GracefulStop.on_step_end

    def hung_up(stop, args, state, control, **others):
        (tmp_path / "here").touch()
        while not stop.requested_signal:
            time.sleep(0.01)
        return real(stop, args, state, control, **others)

    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_step_end", hung_up)
        process, terminal = pty.fork()
        if process == 0:
            as_a_process(command(written))
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "here").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129

    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_step_end", at_step(3, "0002", signal.SIGINT))
        interrupted = fork(command(written), tmp_path / "log")
        interrupted.join(LIMIT)
    assert interrupted.exitcode == 130
    said = (tmp_path / "log").read_text()
    assert said.count(GO_ON) == 1 and "Traceback" not in said and "Aborted" not in said

    store = mm_piece.train(written)
    assert (deltas_of(store), measured(store)) == whole


def test_one_of_two_processes_is_told(base, tmp_path):
    """All of them stop at the same step, with its status."""
    recipe = recipe_of(base, tmp_path / "store", per_device_train_batch_size=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def train(rank):
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        if rank == 1:
            GracefulStop.on_step_end = at_step(3, "0001", signal.SIGTERM)
        mm_piece.train(recipe)

    pair = [fork(partial(train, rank), tmp_path / f"log{rank}") for rank in range(2)]
    for process in pair:
        process.join(LIMIT)
    said = (tmp_path / "log0").read_text()
    assert [process.exitcode for process in pair] == [143, 143], said
    assert f"stopped at step 3; {GO_ON}" in said
    assert (tmp_path / "store" / "work/0001/checkpoint-3/trainer_state.json").exists()


def test_loaders_leave_ctrl_c_to_the_main_process(base, whole, tmp_path):
    """A terminal sends it to all processes; those that load data would end, and the step fail."""
    recipe = recipe_of(base, tmp_path / "store", dataloader_num_workers=1)
    real = SparseTrainer.training_step

    def stop(trainer, *arguments):
        if trainer.state.global_step == 3:
            os.killpg(os.getpgrp(), signal.SIGINT)
            time.sleep(1)
        return real(trainer, *arguments)

    def train():
        os.setpgrp()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SparseTrainer, "training_step", stop)
            mm_piece.train(recipe)

    process = fork(train, tmp_path / "log")
    process.join(LIMIT)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and f"stopped at step 4; {GO_ON}" in said, said
    store = mm_piece.train(recipe)
    assert (deltas_of(store), measured(store)) == whole


# --- a disk that is full --------------------------------------------------------------------------

SPACE = 64  # bytes that a file may have


def limited(call, space=SPACE):
    """A call during which no file can grow."""

    def wrapped(*arguments, **options):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, hard))
        try:
            return call(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return wrapped


def add_scalar(writer, *arguments, real=SummaryWriter.add_scalar):
    """TensorBoard's, waiting for the thread that writes."""
    real(writer, *arguments)
    writer.flush()


# What a run writes, in its order, and what the message names of it.
WRITES = [
    (DeltaStore, "write_results", "results.json"),
    (EncodedDataset, "_write_encoded", "0001/encoded/"),
    (cache, "write_mask", "0001/mask-"),
    (SparseTrainer, "save_model", "work/0001"),
    (SparseTrainer, "_save_optimizer_and_scheduler", "work/0001"),
    (TrainerState, "save_to_json", "work/0001"),
    (SummaryWriter, "add_scalar", "store"),
    (DeltaStore, "append", "0001-digits.safetensors"),
]


def test_a_full_disk_is_one_line_and_the_run_goes_on(base, whole, tmp_path, monkeypatch, capfd):
    recipe = recipe_of(base, tmp_path / "store")
    for owner, name, place in WRITES:
        with monkeypatch.context() as patch:
            call = add_scalar if owner is SummaryWriter else getattr(owner, name)
            patch.setattr(owner, name, limited(call))
            with pytest.raises(StoreError) as refused:
                mm_piece.train(recipe)
        said = str(refused.value)
        assert place in said and str(tmp_path) in said and "\n" not in said, (name, said)
        assert "Traceback" not in capfd.readouterr().err
    store = mm_piece.train(recipe)
    assert (deltas_of(store), measured(store)) == whole


def test_the_command_says_it_in_one_line(written, tmp_path):
    process = fork(limited(command(written), 2000), tmp_path / "log")
    process.join(LIMIT)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2
    assert said.count("Error: ") == 1 and "File too large" in said and "Traceback" not in said


# --- a store that is not whole --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes expected"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "expected SHA-256"),
    ],
)
def test_a_finished_run_reads_its_deltas(damage, said, base, finished, tmp_path, capsys):
    """Before it shows a table: of what `verify` would refuse there is none."""
    shutil.copytree(finished.path, tmp_path / "store")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_of(base, tmp_path / "store").to_yaml())
    damage(tmp_path / "store" / finished.entries[1].file)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file)])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "accuracy" not in shown.out
    (line,) = shown.err.strip().splitlines()
    assert line.startswith("Error: position 2: ") and said in line
    assert finished.entries[1].file in line
