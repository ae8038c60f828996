"""Several processes: what a step sends, lasts and holds, beside full fine-tuning and LoRA.

Run:   OMP_NUM_THREADS=1 python eval/bench/distributed.py [--quick] [--out FILE.json] [--only …]
Needs: peft, deepspeed; Linux; 8 GB of memory
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

from command import bench

SECTIONS = {
    **{"steps": "engines", "exact": "agreement", "saving": "gathering"},
    **{"model": "predictions", "plan": "plan"},
}

main = bench("distributed", "Measure training in several processes.", SECTIONS)

if __name__ == "__main__":
    main()
