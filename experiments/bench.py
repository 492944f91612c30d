"""Speed, as ratios measured side by side in one run: what local attention saves, and what attention written out saves
when training in bfloat16 on a CPU.

    python -m experiments.bench
"""

import argparse
import platform
import time

import torch
import torch.nn.functional as F

from masking import restricted_attention_mask
from model import attention, local_attention


def race(*functions, repeats):
    """Run the functions in turn, `repeats` rounds after one to warm up: the fastest time of each, in seconds."""
    times = [[] for _ in functions]
    for round_number in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]


def attention_race(n_frames, context, backward, repeats):
    """Seconds of dense masked attention and of local attention, one clip, 16 heads of 64."""
    q, k, v = (torch.randn(1, 16, n_frames, 64, requires_grad=backward) for _ in range(3))
    mask = restricted_attention_mask(n_frames, context)

    def run(attend):
        out = attend(q, k, v)
        if backward:
            out.sum().backward()

    return race(lambda: run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)),
                lambda: run(lambda q, k, v: local_attention(q, k, v, context)), repeats=repeats)


def training_race(n_queries, n_keys, repeats):
    """Seconds of torch's fused attention and of ours, forward and backward in bfloat16, 8 clips, 5 heads of 32."""
    q, k, v = (torch.randn(8, 5, n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (n_queries, n_keys, n_keys))
    return race(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(),
                lambda: attention(q, k, v).sum().backward(), repeats=repeats)


def main():
    parser = argparse.ArgumentParser(description="benchmarks that print ratios")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 500, 1500])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; best of {args.repeats}")
    print("attention within 5 frames    dense + mask      local    ratio")
    for n_frames in args.frames:
        for backward in (False, True):
            dense, local = attention_race(n_frames, 5, backward, args.repeats)
            what = "forward and backward" if backward else "forward"
            print(f"T = {n_frames:4} {what:20} {dense * 1e3:8.1f} ms {local * 1e3:7.1f} ms  {dense / local:6.1f}x")
    print("training in bfloat16               fused    written out  ratio")
    for what, n_keys in (("self-attention, T = 200", 200), ("cross-attention, N = 32", 32)):
        fused, ours = training_race(200, n_keys, args.repeats)
        print(f"{what:30} {fused * 1e3:7.1f} ms {ours * 1e3:9.1f} ms {fused / ours:6.1f}x")


if __name__ == "__main__":
    main()
