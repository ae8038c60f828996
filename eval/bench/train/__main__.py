"""Cost of sparse training beside full fine-tuning, LoRA, SHiRA, masked gradients and the floor.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.train [--quick] [--out FILE.json] [--only SECTION]
Needs: peft; 12 GB of memory. --quick: half a minute, sizes too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {
    "steps": "eval.bench.train.steps",
    "growth": "eval.bench.train.growth",
    "entries": "eval.bench.train.memory",
}

main = make_bench_command("train", "Measure what a training step costs.", SECTIONS)

if __name__ == "__main__":
    main()
