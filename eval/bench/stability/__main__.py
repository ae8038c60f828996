"""What does a mask depend on? Overlaps predicted and measured with fresh examples; sums in bf16.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.stability [--quick] [--out FILE.json]
Needs: checkpoints/tiny/base; a quarter of an hour on one core. --quick: a minute, few examples.
Out:   two tables, the goals last; --out: all numbers, versions, commit, goals
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {
    "overlap": "eval.bench.stability.overlap",
    "rounding": "eval.bench.stability.rounding",
}

main = make_bench_command(
    "stability", "Measure what a mask depends on: examples, sums' precision.", SECTIONS
)

if __name__ == "__main__":
    main()
