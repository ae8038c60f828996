"""Work done once in a process of its own, for its time and its memory.

run_in_process(function, *arguments)    result of a function, from a process that has only imports
evict_page_cache(folders)               push files out of the page cache, so that a read is cold
ResourceMeter                           times and memory of the work between its marks
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eval.bench.harness.timing import column_medians

IMPORTED = (
    "mm_piece.store.loading",
    "transformers.models.llama.modeling_llama",
)
_FIELDS = {  # of /proc/self/status, in KiB
    "VmHWM": "peak_B",
    "VmRSS": "resident_B",
    "RssAnon": "anonymous_B",
}


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a module's function, from a process that has run nothing before."""
    # the fork server imports once, so that no process's time or memory has imports in it
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(function, *arguments)
        return future.result()


def evict_page_cache(folders: Iterable[Path]) -> None:
    """Drop the files of folders from the page cache, once they are on disk."""
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file():
                _evict_file(file)


def _evict_file(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        # the kernel drops only pages that are written
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class ResourceMeter:
    """Meter of seconds since it was made, and of memory above the memory at that time.

    CPU seconds are those of all threads: transformers loads with several.
    """

    def __init__(self) -> None:
        # 5 resets VmHWM (proc(5)): the peak is counted from here
        Path("/proc/self/clear_refs").write_text("5")
        self._before = read_memory()
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._thread = time.thread_time()
        self.marks: dict[str, float] = {}

    def record_mark(self, name: str) -> None:
        """Record time and memory under a name."""
        # clocks first: reading memory takes time
        self.marks[f"{name}_wall_s"] = time.perf_counter() - self._wall
        self.marks[f"{name}_cpu_s"] = time.process_time() - self._cpu
        self.marks[f"{name}_thread_s"] = time.thread_time() - self._thread

        now = read_memory()
        for key, size in now.items():
            self.marks[f"{name}_{key}"] = size - self._before[key]
        self.marks[f"{name}_total_peak_B"] = now["peak_B"]


def read_memory() -> dict[str, int]:
    """Return peak, resident and anonymous memory of this process in bytes."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        field, _, value = line.partition(":")
        fields[field] = value

    sizes = {}
    for field, name in _FIELDS.items():
        kibibytes, *_ = fields[field].split()
        sizes[name] = 1024 * int(kibibytes)
    return sizes


def measure_interleaved(
    candidates: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Return the medians of the candidates' own measurements, interleaved."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            found[name].append(candidate())

    medians = {}
    for name, rows in found.items():
        columns = tuple(rows[0])
        values = [tuple(row.values()) for row in rows]
        medians[name] = column_medians(columns, values)
    return medians
