"""Speed, as ratios measured side by side in one run: what local attention saves, what attention written out saves when
training in bfloat16 on a CPU, and how long decoding and a training step take beside the official code.

    python -m experiments.bench

For the last of these: pip install --no-deps --target /tmp/official audiocraft==1.3.0
and put /tmp/official into PYTHONPATH; nothing else that it names is needed, xformers included.
"""

import argparse
import copy
import importlib
import importlib.util
import platform
import sys
import time
import types
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from experiments.export import published_state
from masking import mask_codes, restricted_attention_mask
from model import MAGNeT, ModelConfig, attention, local_attention
from sample import SamplingConfig, generate
from support.cli import pick_dtype, run, say
from train import draw_hidden, masked_cross_entropy

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SHAPE = ModelConfig(n_codebooks=4, card=2048, dim=512, n_heads=8, n_layers=8, text_dim=768)  # 42M parameters
TEXT_LEN, FRAME_RATE, CPU = 16, 50, torch.device("cpu")
# What the official language model imports but does not call here, and so need not be installed.
UNUSED = ("av", "flashy", "flashy.distrib", "julius", "librosa", "num2words", "omegaconf", "spacy", "torchaudio",
          "torchaudio.transforms", "transformers", "xformers.profiler")


def race(*functions, repeats, clock=time.perf_counter):
    """Run the functions in turn, `repeats` rounds after one to warm up: the fastest time of each, in seconds."""
    times = [[] for _ in functions]
    for round_number in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = clock()
            function()
            if round_number:
                seconds.append(clock() - start)
    return [min(seconds) for seconds in times]


# ------------------------------------------------------------------------------------------------------------ attention

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


def print_attention(frames, repeats):
    say("attention within 5 frames    dense + mask      local    ratio")
    for n_frames in frames:
        for backward in (False, True):
            dense, local = attention_race(n_frames, 5, backward, repeats)
            what = "forward and backward" if backward else "forward"
            say(f"T = {n_frames:4} {what:20} {dense * 1e3:8.1f} ms {local * 1e3:7.1f} ms  {dense / local:6.1f}x")
    say("training in bfloat16               fused    written out  ratio")
    for what, n_keys in (("self-attention, T = 200", 200), ("cross-attention, N = 32", 32)):
        fused, ours = training_race(200, n_keys, repeats)
        say(f"{what:30} {fused * 1e3:7.1f} ms {ours * 1e3:9.1f} ms {fused / ours:6.1f}x")


# ---------------------------------------------------------------------------------------------------- the official code

def xformers_attention(q, k, v, attn_bias=None, p=0.0):
    """What xformers computes for the official code, with torch's fused kernel: (B, T, H, D), the bias is added."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, dropout_p=p).transpose(1, 2)


@lru_cache
def import_official():
    """AudioCraft's modules lm_magnet, conditioners, codebooks_patterns.

    Its packages are entered without their `__init__`, which would import all the other models.
    """
    spec = importlib.util.find_spec("audiocraft")
    ops = types.SimpleNamespace(unbind=torch.unbind, memory_efficient_attention=xformers_attention,
                                LowerTriangularMask=None)
    sys.modules |= {name: mock.MagicMock() for name in UNUSED}
    sys.modules |= {"xformers": types.SimpleNamespace(ops=ops), "xformers.ops": ops}
    for name in ("audiocraft", "audiocraft.data", "audiocraft.models", "audiocraft.modules"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
    names = ("models.lm_magnet", "modules.conditioners", "modules.codebooks_patterns")
    return [importlib.import_module(f"audiocraft.{name}") for name in names]


def official_model(ours, embeddings, seconds):
    """The official MAGNeT of the same shape and weights for clips of `seconds`, in eval mode.

    Its text encoder is replaced by `embeddings` (B, L, text_dim), which stand for T5's output for texts "0", "1", ...
    """
    lm_magnet, conditioners, patterns = import_official()

    class Precomputed(conditioners.TextConditioner):
        def tokenize(self, texts):
            return texts

        def forward(self, texts):
            rows = torch.tensor([int(text or 0) for text in texts])
            mask = torch.tensor([text is not None for text in texts])[:, None].expand(-1, embeddings.shape[1])
            x = self.output_proj(embeddings[rows].to(self.output_proj.weight.dtype))
            return x * mask[..., None], mask

    c = ours.config
    provider = conditioners.ConditioningProvider({"description": Precomputed(c.text_dim, c.dim)})
    fuser = conditioners.ConditionFuser({"cross": ["description"], "sum": [], "prepend": [], "input_interpolate": []})
    model = lm_magnet.MagnetLMModel(
        pattern_provider=patterns.ParallelPatternProvider(c.n_codebooks), condition_provider=provider, fuser=fuser,
        n_q=c.n_codebooks, card=c.card, dim=c.dim, num_heads=c.n_heads, num_layers=c.n_layers, hidden_scale=c.ffn_mult,
        norm_first=True, bias_proj=False, bias_ff=False, bias_attn=False, dropout=0.0, activation="gelu", causal=False,
        memory_efficient=True, cross_attention=True, subcodes_context=c.context, span_len=c.span_len,
        compression_model_framerate=FRAME_RATE, segment_duration=seconds, device="cpu", dtype=torch.float32)
    sys.modules["audiocraft.modules.transformer"].set_efficient_attention_backend("xformers")
    model.load_state_dict(published_state(ours, torch.float32))
    return model.eval()


def conditions(n_clips):
    """The official code's wrapping of texts "0", "1", ..."""
    attributes = sys.modules["audiocraft.modules.conditioners"].ConditioningAttributes
    return [attributes(text={"description": str(i)}) for i in range(n_clips)]


def conditioned(model, n_clips):
    """The condition tensors of those texts."""
    provider = model.condition_provider
    return provider(provider.tokenize(conditions(n_clips)))


def largest_difference(ours, official, embeddings, n_frames):
    """The largest difference between a logit of ours and of the official code, over all stages, in one pass each."""
    codes = torch.randint(ours.mask_id + 1, (len(embeddings), ours.config.n_codebooks, n_frames))
    text_mask, difference = torch.ones(embeddings.shape[:2], dtype=torch.bool), 0.0
    with torch.no_grad():
        for stage in range(ours.config.n_codebooks):
            theirs = official(codes, [], conditioned(official, len(codes)), stage=stage)[:, stage]
            difference = max(difference, float((ours(codes, stage, embeddings, text_mask) - theirs).abs().max()))
    return difference


# ------------------------------------------------------------------------------- decoding and a training step, of both

def decode_ours(model, embeddings, n_frames, steps):
    codes, text_mask = torch.full((1, model.config.n_codebooks, n_frames), model.mask_id), torch.ones(1, TEXT_LEN)
    generate(model, embeddings[:1], text_mask, codes, SamplingConfig(decoding_steps=steps, schedule="released"))


def decode_official(model, n_frames, steps):
    model.generate(conditions=conditions(1), max_gen_len=n_frames, use_sampling=True, temp=3.0, top_k=0, top_p=0.9,
                   max_cfg_coef=10.0, min_cfg_coef=1.0, decoding_steps=list(steps))


def train_step(loss_of, model, optimizer, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = loss_of(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def decoding(ours, official, embeddings, n_frames, steps, dtypes):
    """What to time: ours in each type, the official code in each type, and the FLOPs of ours. Models are copied."""
    mine = [partial(decode_ours, copy.deepcopy(ours).to(dtype), embeddings, n_frames, steps) for dtype in dtypes]
    theirs = [partial(decode_official, copy.deepcopy(official).to(dtype), n_frames, steps) for dtype in dtypes]
    codes = torch.full((2, ours.config.n_codebooks, n_frames), ours.mask_id)
    passes = [count_flops(partial(ours, codes, stage, embeddings[:1], torch.ones(1, TEXT_LEN)))
              for stage in range(ours.config.n_codebooks)]
    return mine, theirs, sum(n * flops for n, flops in zip(steps, passes, strict=True))


def training(ours, official, embeddings, n_frames, dtypes, stage=1):
    """The same of a training step: all clips have a text, the loss is on codebook `stage`, AdamW."""
    B, K = len(embeddings), ours.config.n_codebooks
    codes, text_mask = torch.randint(ours.config.card, (B, K, n_frames)), torch.ones(B, TEXT_LEN)
    hidden = draw_hidden(B, n_frames, ours.config.span_len, torch.Generator().manual_seed(0))
    inputs, targets = mask_codes(codes, stage, hidden, ours.mask_id), codes[:, stage].masked_fill(~hidden, -100)

    def our_loss(model):
        return masked_cross_entropy(model, codes, stage, hidden, hidden, embeddings, text_mask) / hidden.sum()

    def official_loss(model):
        logits = model.compute_predictions(inputs, [], conditioned(model, B), stage=stage).logits[:, stage]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    steps = []
    for loss_of, model, settings in ((our_loss, ours, {"fused": True}), (official_loss, official, {})):
        for dtype in dtypes:
            trained = copy.deepcopy(model).train()
            optimizer = torch.optim.AdamW(trained.parameters(), **settings)
            steps.append(partial(train_step, loss_of, trained, optimizer, dtype))
    n = len(dtypes)
    return steps[:n], steps[n:], count_flops(lambda: our_loss(copy.deepcopy(ours)).backward())


def matmul_peak(dtype, clock, n=2048):
    """FLOP/s of a big matrix product."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n ** 3 / race(lambda: a @ b, repeats=5, clock=clock)[0]


def count_flops(function):
    """FLOPs of the matrix products in what `function` computes, without torch's fused attention."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def print_official(lengths, steps, repeats, clock):
    """Decoding a clip of so many seconds each, and a training step of 4 clips of 10 s. What --dtype auto picks is raced
    against the official code in the same type, and in float32, in which that runs on a CPU by default."""
    torch.manual_seed(0)
    ours, embeddings, auto = MAGNeT(SHAPE).eval(), torch.randn(4, TEXT_LEN, SHAPE.text_dim), pick_dtype("auto", CPU)
    dtypes = list(dict.fromkeys((torch.float32, auto)))
    peak = {dtype: matmul_peak(dtype, clock) for dtype in dtypes}
    tasks, difference = {}, 0.0
    for seconds in lengths:
        n_frames = seconds * FRAME_RATE // SHAPE.span_len * SHAPE.span_len  # the official code drops the others
        official = official_model(ours, embeddings, seconds)
        difference = max(difference, largest_difference(ours, official, embeddings[:2], n_frames))
        if not difference < 1e-3:
            raise ValueError(f"logits differ from the official code's by {difference}: the two do not compute the same")
        tasks[f"{seconds} s, decoding"] = decoding(ours, official, embeddings, n_frames, steps, dtypes)
        if seconds == 10:
            tasks[f"{seconds} s, training step"] = training(ours, official, embeddings, n_frames, dtypes)
    say(f"beside the official code: {ours}, decoding steps {'/'.join(map(str, steps))};\n"
        f"logits of one pass in float32 differ by at most {difference:.0e}; matrix products of 2048 x 2048: "
        + ", ".join(f"{SHORT[dtype]} {peak[dtype] / 1e9:.0f} GFLOP/s" for dtype in dtypes))
    say("                              ours       official     ratio   ours: share of that peak")
    for task, (mine, theirs, flops) in tasks.items():
        times = race(*mine, *theirs, repeats=repeats, clock=clock)
        rows = [*zip(dtypes, dtypes, times, times[len(dtypes):], strict=False)]
        if auto != torch.float32:
            rows.append((auto, torch.float32, times[1], times[2]))
        for dtype, other, seconds, official_seconds in rows:
            say(f"{task:19} {SHORT[dtype]} {seconds:6.2f} s   {SHORT[other]} {official_seconds:6.2f} s "
                f"{official_seconds / seconds:7.2f}x {flops / seconds / peak[dtype]:8.0%}")


def main():
    parser = argparse.ArgumentParser(description="benchmarks that print ratios")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--frames", type=int, nargs="*", default=[200, 500, 1500], help="of the attention rows")
    parser.add_argument("--seconds", type=int, nargs="*", default=[10, 30], help="clips beside the official code")
    parser.add_argument("--steps", type=int, nargs=4, default=[20, 10, 10, 10], help="decoding steps there")
    parser.add_argument("--cpu-time", action="store_true",
                        help="there, on a busy machine: CPU seconds, want OMP_NUM_THREADS=1")
    args = parser.parse_args()
    if min(args.repeats, *args.frames, *args.seconds, *args.steps) < 1:
        raise ValueError("--repeats, --frames, --seconds and --steps must be at least 1")
    say(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; best of {args.repeats}")
    if args.frames:
        print_attention(args.frames, args.repeats)
    if args.seconds and importlib.util.find_spec("audiocraft") is None:
        say("no rows beside the official code: audiocraft is not installed (see the head of experiments/bench.py)")
    elif args.seconds:
        clock = time.process_time if args.cpu_time else time.perf_counter
        print_official(args.seconds, tuple(args.steps), args.repeats, clock)


if __name__ == "__main__":
    run(main)
