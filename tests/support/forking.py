"""Runs commands as forks of a process that has imported torch and transformers.

A process that trains spends about ten seconds on imports before its first step. Forks spend none.
They are for tests that run many commands; that a user's launcher works too, others show with
`launching.launch`.
"""

import os
import runpy
import socket
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import forkserver, get_context
from pathlib import Path
from shutil import rmtree
from subprocess import TimeoutExpired

import psutil

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
PATHS = [SUPPORT, SUPPORT.parent / "hardening", ROOT]  # as pyproject.toml has them for pytest
LAST_WORDS = 60  # seconds for the others once one process has failed, as a launcher gives them
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["forked_imports"])


def launch_forks(processes, *command):
    """Start a command in as many forks that know of each other; `command` follows `python`."""
    return Forks(command, _environments_of(processes))


def start_fork(*command, **environment):
    """Start a command in one fork, without a launcher."""
    return Forks(command, [environment])


class Forks:
    """A command in forks; the part of `subprocess.Popen` that tests use."""

    def __init__(self, command, environments):
        """`environments`: one for each fork."""
        _ensure_server()
        self.args = command
        self.folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self.outputs = [self.folder / "stdout", self.folder / "stderr"]
        for file in self.outputs:
            file.touch()
        self.ranks = []
        for environment in environments:
            arguments = (command, environment, self.outputs, Path.cwd())
            self.ranks.append(CONTEXT.Process(target=run_command, args=arguments))
        for rank in self.ranks:
            rank.start()

    @property
    def returncode(self):
        """The first status that is not 0; None while a process runs."""
        codes = [rank.exitcode for rank in self.ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    def stdout(self):
        """Return what the processes have printed so far, without errors."""
        return self._read_outputs()[0]

    def printed(self):
        """Return what the processes have printed so far, errors last."""
        return "".join(self._read_outputs())

    def _read_outputs(self):
        return [file.read_text(encoding="utf-8", errors="replace") for file in self.outputs]

    def poll(self):
        """Return the status, None while a process runs."""
        return self.returncode

    def communicate(self, timeout=None):
        """Wait for all processes; return what they printed, and what they printed as errors."""
        deadline = time.monotonic() + (timeout or float("inf"))
        while self.returncode is None:
            if any(rank.exitcode for rank in self.ranks):
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        printed = self._read_outputs()
        rmtree(self.folder)
        return tuple(printed)

    def kill(self):
        """`kill -9` for all processes and what they have started."""
        for rank in self.ranks:
            if rank.exitcode is None:
                _kill_family(rank.pid)
        for rank in self.ranks:
            rank.join()
        rmtree(self.folder)


def _kill_family(pid):
    """Kill a process and what it has started; any of them may have just ended."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def run_command(command, environment, outputs, folder):
    """Become `python COMMAND`, in a session of its own; `outputs` are stdout and stderr."""
    os.setsid()
    for number, file in enumerate(outputs, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
    os.chdir(folder)
    os.environ.update(environment)

    sys.stdout.reconfigure(line_buffering=True)
    name, *arguments = command
    if name == "-m":
        name, *arguments = arguments
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *arguments]
        runpy.run_path(name, run_name="__main__")


def _environments_of(processes):
    """What a launcher on one machine tells each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environments = []
    for rank in range(processes):
        environments.append(
            {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
            }
        )
    return environments


def _ensure_server():
    """Start the process that is forked; its libraries read these variables when imported."""
    settings = {
        "OMP_NUM_THREADS": "1",  # a fork has no threads but its own
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
