"""The whole path on models in the shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B, on one GPU.

Run:   python eval/bench/gpu.py [--out FILE.json]          on a GPU of 40 GB or more
       python eval/bench/gpu.py --quick                    toys of the same kinds, on a CPU
Needs: for the full run a CUDA device. Weights are random, so nothing is downloaded.
Out:   one table for each shape with what reading the weights takes beside it, the goals last
"""

from command import bench

main = bench("gpu", "Take 7B-shaped models the whole way on a GPU.", {"path": "gpupaths"})

if __name__ == "__main__":
    main()
