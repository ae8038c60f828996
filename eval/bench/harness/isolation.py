"""Work done once in a process of its own, for its time and its memory.

fresh(function, *arguments)    what the function returns, from a process that has only imports
evict(folders)                 push files out of the page cache, so that a read is cold
Meter                          times and memory of what happens between its marks
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eval.bench.harness.timing import column_medians

IMPORTED = ("mm_piece.store.loading", "transformers.models.llama.modeling_llama")
_FIELDS = {"VmHWM": "peak_B", "VmRSS": "resident_B", "RssAnon": "anonymous_B"}


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a process that has run nothing before."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def evict_page_cache(folders: Iterable[Path]) -> None:
    """Drop the files of folders from the page cache, once they are on disk."""
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class ResourceMeter:
    """Starts when made; each mark tells seconds since then, and memory above what was there then.

    CPU seconds are those of all threads: transformers loads with several.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        self._before = read_memory()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._thread = time.thread_time()
        self.marks: dict[str, float] = {}

    def record_mark(self, name: str) -> None:
        """Note time and memory under a name."""
        self.marks[f"{name}_wall_s"] = time.perf_counter() - self._wall
        self.marks[f"{name}_cpu_s"] = time.process_time() - self._cpu
        self.marks[f"{name}_thread_s"] = time.thread_time() - self._thread
        now = read_memory()
        self.marks |= {f"{name}_{key}": now[key] - self._before[key] for key in now}
        self.marks[f"{name}_total_peak_B"] = now["peak_B"]


def read_memory() -> dict[str, int]:
    """Return peak, resident and anonymous memory of this process in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0].rstrip(":"): words[1:2] for words in lines if words}
    return {name: 1024 * int(found[field][0]) for field, name in _FIELDS.items()}


def measure_interleaved(
    candidates: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Return the medians of what contestants measure, interleaved."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            found[name].append(candidate())
    return {
        name: column_medians(tuple(rows[0]), [tuple(row.values()) for row in rows])
        for name, rows in found.items()
    }
