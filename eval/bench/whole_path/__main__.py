"""The whole path on models of published shapes: memory and time of each stage, on CPU or GPU.

Run:   python -m eval.bench.whole_path cpu [--quick] [--out FILE.json]
           a LLaVA of 1.7 B parameters in bf16: 10 GB of memory; half an hour, most of it in bf16
           products on a CPU without units for them
       python -m eval.bench.whole_path gpu [--quick] [--out FILE.json]
           the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B: a GPU of 40 GB or more; --quick: toys of
           the same kinds, on a CPU
Needs: nothing is downloaded, weights are random.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals
"""

import click

from eval.bench.harness.command import make_bench_command

main = click.Group(
    "whole_path",
    {
        "cpu": make_bench_command(
            "memory",
            "Take a 1.7 B-parameter model the whole way.",
            {"path": "eval.bench.whole_path.on_cpu"},
        ),
        "gpu": make_bench_command(
            "gpu",
            "Take 7B-shaped models the whole way on a GPU.",
            {"path": "eval.bench.whole_path.on_gpu"},
        ),
    },
    help="Take models of published shapes the whole way.",
)

if __name__ == "__main__":
    main()
