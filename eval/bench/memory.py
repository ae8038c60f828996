"""The whole path on a 1.7 B-parameter LLaVA in bf16 on a CPU: what each stage holds at its peak.

Run:   python eval/bench/memory.py [--quick] [--out FILE.json]
Needs: 10 GB of memory; half an hour, most of it in bf16 products on a CPU without units for them.
Out:   one table, the goals last; --out: all numbers, versions, commit, goals
"""

from command import bench

main = bench("memory", "Take a 1.7 B-parameter model the whole way.", {"path": "cpupath"})

if __name__ == "__main__":
    main()
