"""Mutate delta files and stores: the library must refuse them or apply them exactly.

Run:    python tests/hardening/fuzz.py --files 100000 --state STATE.json
            [--seed 0] [--out SUMMARY.json]
Again:  the same command goes on where it stopped
One:    python tests/hardening/fuzz.py --only NUMBER [--seed 0]
            what a case is and what comes of it

A case is a pure function of seed and number. It runs in a worker with little memory and little
time; a worker that dies, hangs or swells is a finding like any other, and the next one goes on
with the case after it. The status is 1 if there were findings.
"""

import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers are forks: no other thread may run

import click  # noqa: E402
import fuzz_deltas  # noqa: E402
import fuzz_stores  # noqa: E402
from fuzz_files import bomb, samples  # noqa: E402
from fuzz_oracle import Finding, judge_delta, judge_store  # noqa: E402
from tqdm import tqdm  # noqa: E402

tqdm.monitor_interval = 0  # nor a thread of the progress bar
KINDS = (*fuzz_deltas.DELTAS, *fuzz_stores.STORES)
CHUNK = 2000  # cases of one worker, between two states on the disk
PROCESSOR_SECONDS, PATIENCE = 5, 15  # a case: of computing, of waiting
MEMORY = 384 * 2**20  # beyond what the library takes before the first case
EXAMPLES = 5  # of each finding that are kept


# --- one case -------------------------------------------------------------------------------------


def judge(seed: int, number: int, sandbox: fuzz_stores.Sandbox) -> str:
    """Make a case and return what came of it; raises a `Finding`."""
    kind, rng = KINDS[number % len(KINDS)], random.Random(f"{seed}/{number}")
    if kind in fuzz_deltas.DELTAS:
        sample, data = fuzz_deltas.mutated(kind, rng)
        return judge_delta(data, sample.model)
    changes = fuzz_stores.changes(kind, sandbox.sound, rng)
    sandbox.plant(changes)
    try:
        return judge_store(sandbox.store, sandbox.listing)
    finally:
        sandbox.restore(changes)


def work(folder: Path, seed: int, numbers: range, sender: Connection) -> None:
    """Judge cases in a process of its own and send (number, outcome, finding or None) for each."""
    warnings.simplefilter("error")
    sandbox = fuzz_stores.Sandbox(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sender.send("ready")
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)  # the kernel ends it, in C too
        try:
            sender.send((judge(seed, number, sandbox), None))
        except Finding as finding:
            if len(numbers) == 1:  # somebody looks at this case alone
                traceback.print_exc()
            sender.send(("finding", finding.args))


# --- many cases -----------------------------------------------------------------------------------


def fresh(seed: int) -> dict[str, Any]:
    """Return the state before the first case."""
    return {"seed": seed, "done": 0, "seconds": 0.0, "outcomes": {}, "findings": {}}


def run(state: dict[str, Any], files: int, save: Any) -> None:
    """Judge the cases up to `files` that are not done yet."""
    samples(), bomb()  # before the fork, so that the workers share them
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=files, initial=state["done"], mininterval=5) as bar,
    ):
        while state["done"] < files:
            start, began = state["done"], time.monotonic()
            numbers = range(start, min(files, start + CHUNK))
            run_worker(Path(folder) / "sandbox", numbers, state)
            state["seconds"] += time.monotonic() - began
            save(state)
            bar.update(state["done"] - start)
            bar.set_postfix(findings=sum(f["count"] for f in state["findings"].values()))


class WorkerLost(Exception):
    """A case ended the worker that judged it."""


def run_worker(folder: Path, numbers: range, state: dict[str, Any]) -> None:
    """Judge cases in one worker until all are done or one ends it."""
    forks = get_context("fork")
    receiver, sender = forks.Pipe(duplex=False)
    worker = forks.Process(target=work, args=(folder, state["seed"], numbers, sender))
    worker.start()
    sender.close()
    receiver.recv()  # an EOFError here is a mistake of ours
    try:
        for _ in numbers:
            note(state, *receive(receiver, worker))
    except WorkerLost as lost:
        note(state, "finding", (str(lost), ""))
    worker.join()


def receive(receiver: Connection, worker: Any) -> tuple[str, tuple[str, str] | None]:
    """Return what came of the case in progress."""
    if not receiver.poll(PATIENCE):
        worker.kill()
        raise WorkerLost(f"no end within {PATIENCE} s")
    try:
        return receiver.recv()
    except EOFError as error:
        worker.join()
        if worker.exitcode == -signal.SIGPROF:
            raise WorkerLost(f"more than {PROCESSOR_SECONDS} s of computing") from error
        raise WorkerLost(f"the process died: {worker.exitcode}") from error


def note(state: dict[str, Any], outcome: str, finding: tuple[str, str] | None) -> None:
    """Count what came of the next case."""
    number = state["done"]
    kind = KINDS[number % len(KINDS)]
    counts = state["outcomes"].setdefault(kind, {})
    counts[outcome] = counts.get(outcome, 0) + 1
    if finding:
        what, detail = finding
        entry = state["findings"].setdefault(what, {"count": 0, "kinds": {}, "examples": []})
        entry["count"] += 1
        entry["kinds"][kind] = entry["kinds"].get(kind, 0) + 1
        if entry["kinds"][kind] <= EXAMPLES:
            entry["examples"].append({"number": number, "kind": kind, "detail": detail})
    state["done"] += 1


# --- from and to files ----------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Return what a result must say about what it was measured with."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    packages = ("mm-piece", "torch", "safetensors", "numpy", "transformers")
    versions = {name: version(name) for name in packages}
    return {
        "commit": commit.stdout.strip(),
        "dirty": bool(status.stdout.strip()),
        "versions": {"python": platform.python_version(), **versions},
    }


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """Return what is worth keeping of a finished run."""
    total: Counter[str] = Counter()
    for counts in state["outcomes"].values():
        total.update(counts)
    return {
        **provenance(),
        "seed": state["seed"],
        "files": state["done"],
        "seconds": round(state["seconds"]),
        "limits": {"seconds": PROCESSOR_SECONDS, "bytes": MEMORY},
        "outcomes": dict(total.most_common()),
        "kinds": state["outcomes"],
        "findings": state["findings"],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def show(seed: int, number: int) -> None:
    """Judge one case as in a run and print what comes of it; a finding with its traceback."""
    state = fresh(seed) | {"done": number}
    with tempfile.TemporaryDirectory() as folder:
        run_worker(Path(folder) / "sandbox", range(number, number + 1), state)
    print(json.dumps({key: state[key] for key in ("outcomes", "findings")}, indent=1))


@click.command()
@click.option("--files", default=1000, show_default=True, help="How many cases there are.")
@click.option("--state", "path", type=click.Path(path_type=Path), help="Where to go on from.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where the summary goes.")
@click.option("--only", type=int, help="Judge this case alone.")
def main(files: int, path: Path | None, seed: int, out: Path | None, only: int | None) -> None:
    """Mutate delta files and stores and judge what the library does with them."""
    if only is not None:
        show(seed, only)
        return
    state = json.loads(path.read_text()) if path and path.exists() else fresh(seed)
    if state["seed"] != seed:
        raise click.UsageError(f"{path} is of seed {state['seed']}")
    run(state, files, lambda state: path and write_json(path, state))
    if out:
        write_json(out, summary(state))
    print(json.dumps({key: summary(state)[key] for key in ("files", "outcomes", "findings")}))
    sys.exit(bool(state["findings"]))


if __name__ == "__main__":
    main()
