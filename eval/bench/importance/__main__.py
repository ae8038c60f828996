"""Cost of exact per-example importance beside a batched forward + backward and the usual methods.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.importance [--quick] [--out FILE.json]
Needs: 8 GB of memory. --quick: half a minute, sizes too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {
    "time": "eval.bench.importance.estimates",
    "budget": "eval.bench.importance.budgets",
}

main = make_bench_command("importance", "Measure what importance costs.", SECTIONS)

if __name__ == "__main__":
    main()
