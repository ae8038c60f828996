"""What exact per-example importance costs beside a batched forward + backward and the usual ways.

Run:   OMP_NUM_THREADS=1 python eval/bench/importance.py [--quick] [--out FILE.json]
Needs: 8 GB of memory. --quick: half a minute, sizes too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from command import bench

SECTIONS = {"time": "estimates", "budget": "budgets"}

main = bench("importance", "Measure what importance costs.", SECTIONS)

if __name__ == "__main__":
    main()
