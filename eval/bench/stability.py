"""Does the printed stability of a mask hold? Overlaps told beside those of fresh examples.

Run:   OMP_NUM_THREADS=1 python eval/bench/stability.py [--quick] [--out FILE.json]
Needs: checkpoints/tiny/base; ten minutes on one core. --quick: a minute, few examples.
Out:   one table, the goals last; --out: all numbers, versions, commit, goals
"""

from command import bench

main = bench("stability", "Measure how well a mask's stability is told.", {"overlap": "resamples"})

if __name__ == "__main__":
    main()
