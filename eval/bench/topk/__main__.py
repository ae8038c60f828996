"""Cost of the global top-k beside torch's and numpy's, and beside reading the scores once.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.topk [--quick] [--out FILE.json]
Needs: 3 GB of memory. --quick: a few seconds, a size too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {"topk": "eval.bench.topk.selection"}

main = make_bench_command("topk", "Measure what a selection costs.", SECTIONS)

if __name__ == "__main__":
    main()
