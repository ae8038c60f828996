"""Kill writers of delta stores at random instants: what is listed is whole, the end is the same.

Run:    PYTHONPATH=tests/support python tests/hardening/kill.py --kills 50 --out RESULT.json
            [--seed 0] [--what VICTIM]
Again:  the same command goes on where it stopped

    store    a writer that appends deltas, answers and results in a loop
    train    `mm_piece.train` on a tiny LLaVA, the three tasks of `tiny_recipe`; train-random and
             train-few: other methods, densities and seeds
    ddp      the same in two processes, of which one or both are killed
    zero3    the same under DeepSpeed ZeRO-3

A round starts a victim, kills it, inspects what it left and starts it again, until one comes to
its end; that must be, bit for bit, the end of a run that nobody killed. Instants are uniform over
the length of that run. The status is 1 if there were findings.
"""

import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # victims are forks: no other thread may run

import click  # noqa: E402
import psutil  # noqa: E402
from fuzz import provenance, write_json  # noqa: E402
from kill_victims import VICTIMS, End, Finding, Report, Victim, end_of, inspect, require  # noqa: E402
from tqdm import tqdm  # noqa: E402

tqdm.monitor_interval = 0  # nor a thread of the progress bar
FORKS = get_context("fork")
PATIENCE = 600  # seconds; a victim that takes longer hangs
ORPHANS = 60  # seconds that processes may take to notice that one of them was killed
MOST_FINDINGS = 10

# --- processes ------------------------------------------------------------------------------------


@dataclass
class Child:
    """A fork of this process, its reports and its last words."""

    process: Any
    receiver: Connection
    log: Path

    def acknowledged(self) -> int:
        """Return the last position that it reported."""
        position = 0
        with contextlib.suppress(EOFError):
            while self.receiver.poll(0):
                position = self.receiver.recv()
        return position


def start(call: Callable[[Report], None], log: Path) -> Child:
    """Run a call in a fork and return once it reported that it began."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_in_child, args=(call, sender, log))
    process.start()
    sender.close()
    child = Child(process, receiver, log)
    if not receiver.poll(PATIENCE):
        process.kill()
    return child


def _in_child(call: Callable[[Report], None], sender: Connection, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        call(sender.send)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)


def kill(child: Child, chance: random.Random) -> None:
    """Kill a child and what it has started; of several processes sometimes only one."""
    started = psutil.Process(child.process.pid).children(recursive=True)
    if started and chance.random() < 0.5:
        chance.choice(started).kill()
        child.process.join(ORPHANS)
        alone = child.process.exitcode is None
    else:
        alone = False
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.process.kill()
    child.process.join()
    require(not alone, f"processes that lost one of them were there {ORPHANS} seconds later")


def finish(child: Child) -> None:
    """Wait for the end of a child that nobody kills; it must be a good one."""
    child.process.join(PATIENCE)
    child.process.kill()
    child.process.join()
    words = child.log.read_text().strip().splitlines() or [""]
    require(child.process.exitcode == 0, f"ended with {child.process.exitcode}: {words[-1][:300]}")


def ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call gives in a fork, so that this process never computes."""
    with tempfile.NamedTemporaryFile() as log:
        child = start(lambda report: report(call(*arguments)), Path(log.name))
        found = None
        with contextlib.suppress(EOFError):
            found = child.receiver.recv()
        finish(child)
    return found


# --- rounds ---------------------------------------------------------------------------------------


@dataclass
class Campaign:
    """Rounds of one victim in one folder, and what was seen."""

    victim: Victim
    folder: Path
    state: dict[str, Any]
    seed: str
    whole: End

    def round(self, kills: int) -> None:
        """Kill victims of one store until one comes to its end, or `kills` are done."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            store = Path(name) / "store"
            while not self._victim(store, self.state["kills"] < kills):
                pass
            require(ask(end_of, store) == self.whole, "another end than that of a whole run")
        self.state["rounds"] += 1

    def _victim(self, store: Path, dies: bool) -> bool:
        """Return whether a victim came to its end before the instant of its death."""
        chance = random.Random(f"{self.seed}/{self.state['kills']}/{self.state['rounds']}")
        instant = chance.random() * self.state["seconds"] if dies else None
        fresh, began = not store.exists(), time.monotonic()
        child = start(partial(self.victim, store), self.folder / "log")
        child.process.join(PATIENCE if instant is None else instant)
        if instant is None or not child.process.is_alive():
            finish(child)
            if fresh:  # the clock of a machine that others use
                self.state["seconds"] = round(time.monotonic() - began, 3)
            return True
        kill(child, chance)
        self.state["kills"] += 1
        place = ask(inspect, store, child.acknowledged(), self.whole)
        self.state["died"][place] = self.state["died"].get(place, 0) + 1
        return False


def run(what: str, kills: int, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Kill until `kills` victims are dead."""
    state = result.setdefault(what, {"kills": 0, "rounds": 0, "died": {}, "findings": []})
    with (
        tempfile.TemporaryDirectory() as name,
        tqdm(total=kills, initial=state["kills"], desc=what, mininterval=5) as bar,
    ):
        campaign = prepare(what, Path(name), state, f"{result['seed']}/{what}")
        while state["kills"] < kills and len(state["findings"]) < MOST_FINDINGS:
            before = state["kills"]
            try:
                campaign.round(kills)
            except Finding as finding:
                state["findings"].append(f"{finding}")
            save()
            bar.update(state["kills"] - before)


def prepare(what: str, folder: Path, state: dict[str, Any], seed: str) -> Campaign:
    """Run one victim that nobody kills, for its length and its end."""
    victim = VICTIMS[what](folder, lambda call: finish(start(call, folder / "log")))
    gc.collect()
    gc.freeze()  # victims collect garbage often, and nothing of what they inherit is any
    child = start(partial(victim, folder / "whole"), folder / "log")
    began = time.monotonic()
    finish(child)
    state["seconds"] = round(time.monotonic() - began, 3)
    return Campaign(victim, folder, state, seed, ask(end_of, folder / "whole"))


@click.command()
@click.option("--kills", default=50, show_default=True, help="How many victims of each kind die.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--what", type=click.Choice([*VICTIMS]), multiple=True, help="Only these victims.")
def main(kills: int, seed: int, out: Path, what: tuple[str, ...]) -> None:
    """Kill writers of delta stores and look at what they leave."""
    result = json.loads(out.read_text()) if out.exists() else {"seed": seed}
    if result["seed"] != seed:
        raise click.UsageError(f"{out} is of seed {result['seed']}")
    for name in what or VICTIMS:
        run(name, kills, result, lambda: write_json(out, {**provenance(), **result}))
    print(json.dumps({name: result[name] for name in what or VICTIMS}))
    gc.unfreeze()
    sys.exit(any(result[name]["findings"] for name in what or VICTIMS))


if __name__ == "__main__":
    main()
