"""Several processes: traffic, time and memory of a step, beside full fine-tuning and LoRA.

Run:   OMP_NUM_THREADS=1 python -m eval.bench.distributed [--quick] [--out FILE.json] [--only …]
Needs: peft, deepspeed; Linux; 8 GB of memory
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from eval.bench.harness.command import make_bench_command

SECTIONS = {
    "steps": "eval.bench.distributed.steps",
    "exact": "eval.bench.distributed.exactness",
    "saving": "eval.bench.distributed.saving",
    "model": "eval.bench.distributed.prediction",
    "plan": "eval.bench.distributed.plan",
}

main = make_bench_command("distributed", "Measure training in several processes.", SECTIONS)

if __name__ == "__main__":
    main()
