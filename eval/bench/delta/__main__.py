"""What a delta costs: bytes, time and memory, beside baselines, in one run on one core.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.delta [--quick] [--out FILE.json] [--only SECTION]
Needs: peft (SHiRA is a baseline), zstandard for another baseline; 6 GB of memory, 15 GB of disk in
       the folder for temporary files. --quick: half a minute, sizes too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {
    "size": "eval.bench.delta.size",
    "apply": "eval.bench.delta.apply",
    "load": "eval.bench.delta.load",
    "export": "eval.bench.delta.export",
}

main = make_bench_command("delta", "Measure what deltas cost.", SECTIONS)

if __name__ == "__main__":
    main()
