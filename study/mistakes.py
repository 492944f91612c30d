"""The classic mistakes: one changed line each, and the claims that must catch it.

`python -m study mistakes` plants each in a copy of the repository, in a temporary folder, and runs the claims about the
function in which it stands: its examples first, then its tests, to the first that fails.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from study import ROOT
from study.code import functions
from support.cli import say


class Mistake(NamedTuple):
    """name, function in which it is made, the text that is replaced (once in it), by what, the idea in a sentence."""

    name: str
    function: str
    old: str
    new: str
    idea: str


MISTAKES = [Mistake(*fields) for fields in (
    # masking.py
    ("sine schedule", "masking.cosine_schedule", "math.cos(t", "math.sin(t", "much is hidden at the end, not at first"),
    ("linear schedule", "masking.cosine_schedule", "return math.cos(t * math.pi / 2)", "return 1 - t",
     "the share falls as a line, not as a cosine"),
    ("tokens, not spans", "masking.span_mask", "spans_from_starts(starts, span_len)", "starts",
     "single tokens are hidden, which their neighbours give away"),
    ("starts with replacement", "masking.span_mask", "starts = rank < n_spans.clamp(min=1)[:, None]",
     "starts = noise < n_spans.clamp(min=1)[:, None] / n_frames", "the number of spans is right on average only"),
    ("nothing hidden", "masking.span_mask", ".clamp(min=1)", "", "a row may have nothing to learn"),
    ("spans wrap around", "masking.spans_from_starts", "hidden[:, i:] |= starts[:, :-i]",
     "hidden |= starts.roll(i, dims=1)", "the last span goes on at the beginning of the clip"),
    ("span too short", "masking.spans_from_starts", "range(1, min(span_len,", "range(1, min(span_len - 1,",
     "spans are a frame shorter than asked"),
    ("no overlaps", "masking.expected_mask_rate", "return 1 - visible", "return u * span_len / n_frames",
     "overlapping spans are counted twice"),
    ("no least span", "masking.spans_for_mask_rate", "torch.arange(1, n_frames + 1)", "torch.arange(0, n_frames + 1)",
     "a low rate may ask for no span at all"),
    ("later codebooks shown", "masking.mask_codes", "shown = (level < stage) | (level == stage) & ~hidden[:, None]",
     "shown = (level != stage) | ~hidden[:, None]", "later codebooks leak into the input"),
    ("earlier codebooks hidden", "masking.mask_codes", "(level < stage) | (level == stage)", "(level == stage)",
     "what is decoded already is not used"),
    ("mask inverted", "masking.mask_codes", "& ~hidden", "& hidden", "hidden and shown are mixed up"),
    ("band too narrow", "masking.restricted_attention_mask", "<= context", "< context",
     "one frame too few on each side"),
    ("band looks back only", "masking.restricted_attention_mask", ".abs() <= context", "% n_frames <= context",
     "the context is to one side, and wraps"),
    ("blind to itself", "masking.causal_attention_mask", "key <= query", "key < query",
     "a position does not see itself"),
    ("delay off by one", "masking.delay_codes", "k + 1:k + 1 + T", "k:k + T",
     "the start holds a code, so that the first token predicts itself"),
    ("shift forgotten", "masking.undelay", "k + 1 + shift:k + 1 + shift + T", "k + 1:k + 1 + T",
     "logits are read at a token's own place, which has seen it"),
    ("hybrid band around the query", "masking.hybrid_attention_mask", "(ahead - 1).abs()", "ahead.abs()",
     "the context lies around the query, not around what it predicts"),
    ("hybrid prompt sees ahead", "masking.hybrid_attention_mask", "ahead <= 0, after", "ahead <= 1, after",
     "the prompt is trained on what it predicts"),
    ("hybrid restricted at once", "masking.hybrid_attention_mask", "stage.to(ahead.device) > 0",
     "stage.to(ahead.device) >= 0", "the first stage is restricted too"),
    # train.py
    ("loss on shown frames", "train.masked_cross_entropy", "logits[loss_mask], codes[:, stage][loss_mask]",
     "logits.flatten(0, 1), codes[:, stage].flatten()", "the loss rewards copying what is shown"),
    ("loss of another codebook", "train.masked_cross_entropy", "codes[:, stage][loss_mask]", "codes[:, 0][loss_mask]",
     "every stage learns the first codebook"),
    ("mean over clips", "train.masked_cross_entropy", 'reduction="sum"', 'reduction="mean"',
     "the loop divides by the number of tokens once more"),
    ("one rate for all clips", "train.draw_hidden", "torch.rand(n_clips, generator=generator)",
     "torch.rand(1, generator=generator).expand(n_clips)", "every clip of a batch has the same time t"),
    ("uniform rates", "train.draw_hidden", "cosine_schedule(torch.rand(n_clips, generator=generator))",
     "torch.rand(n_clips, generator=generator)", "the mask rate is uniform, not the cosine of a uniform time"),
    ("own position read", "train.next_token_cross_entropy", "logits[:, :, :-1]", "logits[:, :, 1:]",
     "each position predicts what it has just read"),
    ("texts dropped the other way", "train.draw_batch", ">= config.condition_dropout", "< config.condition_dropout",
     "the text is dropped in seven of ten clips, not in three"),
    ("padding counted", "train.draw_batch", '"loss_mask": hidden & valid', '"loss_mask": hidden',
     "what lies behind the end of a clip is learned"),
    ("prompt of one length", "train.hybrid_loss_mask", "n_prompt[:, None, None] - level",
     "n_prompt[:, None, None] + 0 * level", "later codebooks of the prompt are a frame shorter each"),
    ("no warm-up", "train.learning_rate", "if step < config.warmup:", "if step < 0:", "the rate begins at its peak"),
    ("average the other way", "train.update_ema", "weight, 1 - decay", "weight, decay",
     "the averaged weights are the newest ones"),
    # model.py
    ("unscaled attention", "model.attention", "attn_mask=may_attend)", "attn_mask=may_attend, scale=1.0)",
     "without 1 / sqrt(D) softmax is too sharp"),
    ("local band too wide", "model.local_attention", ".abs() <= context)", ".abs() <= context + 1)",
     "one frame too many on each side"),
    ("dense local attention", "model.local_attention", "    block = max(32, context)\n",
     "    at = torch.arange(T)\n    return attention(q, k, v, (at[:, None] - at).abs() <= context)\n"
     "    block = max(32, context)\n", "right numbers, but memory grows with the square of the length"),
    ("first stage restricted", "model.MAGNeT.forward", "elif mask is None and stage and",
     "elif mask is None and stage is not None and", "the first codebook cannot plan ahead"),
    ("sines first", "model.positions", "[phase.cos(), phase.sin()]", "[phase.sin(), phase.cos()]",
     "published weights expect the cosines in the first half"),
    ("rates of 2017", "model.positions", "(dim // 2 - 1)", "(dim // 2)", "the slowest rate is not 1/10000"),
    ("tanh GELU", "model.Block.forward", "self.linear1(self.norm2(x)))", 'self.linear1(self.norm2(x)), "tanh")',
     "the exact GELU is x times the normal distribution"),
    ("ReLU", "model.Block.forward", "F.gelu(", "F.relu(", "GELU is not zero below zero"),
    ("post-norm", "model.Block.forward", "x = x + self.dropout(self.self_attn(self.norm1(x), mask, context, cache))",
     "x = self.norm1(x + self.dropout(self.self_attn(x, mask, context, cache)))",
     "the residual stream itself is normalised"),
    ("another epsilon", "model.Block", "nn.LayerNorm(config.dim)", "nn.LayerNorm(config.dim, eps=1e-6)",
     "LayerNorm adds 1e-5 to the variance"),
    ("one head for all", "model.MAGNeT.forward", "self.heads[stage](x)", "self.heads[-1 - stage](x)",
     "the heads of the codebooks are mixed up"),
    ("embeddings averaged", "model.MAGNeT.forward", "for k, emb in enumerate(self.emb))",
     "for k, emb in enumerate(self.emb)) / K", "the embeddings of the codebooks are summed"),
    ("bias in the null condition", "model.MAGNeT.forward", " * text_mask[..., None]", "",
     "the projection's bias comes through where there is no text"),
    ("text mask as key mask", "model.text_attention_mask", "n_tokens.clamp(min=text_len)", "n_tokens",
     "padding takes part as zero keys, as in the released code"),
    ("cache forgets", "model.Cache.append", "return self.stored[..., :self.filled, :]", "return keys_values",
     "each step sees its own position only"),
    ("token scores itself", "model.MAGNeT.score_codes", "shift=-1", "shift=0",
     "the rescorer has seen the token that it gives a probability to"),
    # t5_encoder.py
    ("scaled T5", "t5_encoder.Attention.forward", "scale=1.0", "scale=None", "T5's scores are not divided by sqrt(D)"),
    ("gate and value swapped", "t5_encoder.FeedForward.forward",
     'F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)',
     'self.wi_0(x) * F.gelu(self.wi_1(x), approximate="tanh")', "the gate is wi_0"),
    ("exact GELU in T5", "t5_encoder.FeedForward.forward", ', approximate="tanh"', "", "T5 uses GELU's tanh form"),
    ("buckets mirrored", "t5_encoder.relative_buckets", "(distance > 0)", "(distance < 0)",
     "keys before and after the query are mixed up"),
    ("distance's sign", "t5_encoder.T5Encoder.forward", "position[None, :] - position[:, None]",
     "position[:, None] - position[None, :]", "a distance is key minus query"),
    ("bias in one layer", "t5_encoder.T5Encoder.forward", "x = block(x, bias)",
     "x, bias = block(x, bias), bias.clamp(max=0)", "every layer adds the bias of the distances"),
    # sample.py
    ("schedule a step ahead", "sample.mask_rate", "cosine_schedule(step / steps)",
     "cosine_schedule((step + 1) / steps)", "at first not everything is hidden"),
    ("guidance backwards", "sample.guidance_scale", "rate * start + (1 - rate) * end",
     "rate * end + (1 - rate) * start", "guidance is weak while much is hidden"),
    ("guidance by the step", "sample.decode_stage", "guidance_scale(rate,", "guidance_scale(1 - step / steps,",
     "guidance follows the mask rate, not the number of the step"),
    ("guidance once too often", "sample.guided_logits", "uncond + scale * (cond", "cond + scale * (cond",
     "guidance begins at the null condition"),
    ("a text as null condition", "sample.guided_logits", "stage, text, text_mask, mask, cache).chunk(2)",
     "stage, *(torch.cat([x, x[:, :1].expand_as(x)]) for x in (text, text_mask)), mask, cache).chunk(2)",
     "the null condition is no text at all, not the embedding of some caption"),
    ("hot to the end", "sample.annealed_temperature", "max(start * (steps - 1 - step) / steps, 1e-2)", "start",
     "the temperature does not fall"),
    ("a step too hot", "sample.annealed_temperature", "steps - 1 - step", "steps - step",
     "the last step still draws at random"),
    ("temperature after the nucleus", "sample.draw_tokens", "draw(nucleus(probs, top_p, top_k)",
     "draw(probs * (nucleus(logits.softmax(dim=-1), top_p, top_k) > 0)",
     "the nucleus is that of the tempered probabilities"),
    ("nucleus too small", "sample.nucleus", "top.cumsum(dim=-1) - top >= top_p", "top.cumsum(dim=-1) >= top_p",
     "the token with which the sum reaches top_p belongs to it"),
    ("impossible tokens", "sample.draw", "(total > uniform[:, None] * total[:, -1:]) & (weights > 0)",
     "total >= uniform[:, None] * total[:, -1:]", "a token that was cut from the nucleus can be drawn"),
    ("the surest hidden", "sample.hide_nonoverlapping", "largest=False", "largest=True",
     "the most probable spans are hidden again"),
    ("fixed spans scored again", "sample.hide_nonoverlapping", ".masked_fill(~is_open, torch.inf)", "",
     "a span that was kept is chosen again"),
    ("weakest token of a span", "sample.span_confidence", "spans.amax(dim=2)", "spans.amin(dim=2)",
     "a span counts as its most probable token"),
    ("rounded up", "sample.spans_to_hide", "max(int(rate * n_spans), 1)", "max(round(rate * n_spans), 1)",
     "the number of hidden spans is rounded down"),
    ("nothing is kept", "sample.decode_stage", "fixed = ~hidden", "fixed = given.expand(len(codes), -1)",
     "a kept token can be hidden again in a later step"),
    ("confidence without temperature", "sample.decode_stage", "log_odds(logits / temperature, candidate)",
     "log_odds(logits, candidate)", "spans are ranked by the tempered probability"),
    ("weight the other way", "sample.rescored", "torch.lerp(tokens.sigmoid(), scores, weight)",
     "torch.lerp(scores, tokens.sigmoid(), weight)", "the weight is the rescorer's"),
    ("geometric mean", "sample.rescored", "torch.lerp(tokens.sigmoid(), scores, weight)",
     "tokens.sigmoid() ** (1 - weight) * scores ** weight", "the combination is convex: a sum of probabilities"),
    ("prompt not read", "sample.decode_autoregressively", "cache[0].filled:position", "position - 1:position",
     "of a given beginning only the last frame is read"),
    ("first logits read", "sample.decode_autoregressively", "cache=cache)[:, :, -1]", "cache=cache)[:, :, 0]",
     "the last position read predicts the next"),
)]


def planted(mistake, root):
    """The text of the file with the mistake in it. ValueError if the line it changes is not there, or not once."""
    function = functions(root)[mistake.function]
    path = root / f"{function.module}.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    first, last = function.node.body[bool(function.docstring)].lineno - 1, function.node.end_lineno
    body = "".join(lines[first:last])
    if body.count(mistake.old) != 1:
        raise ValueError(f"mistake {mistake.name!r}: {mistake.old!r} stands {body.count(mistake.old)} times in "
                         f"{mistake.function}; it must stand there once")
    return path, "".join(lines[:first]) + body.replace(mistake.old, mistake.new) + "".join(lines[last:])


def try_one(mistake):
    """Plant a mistake in a copy and run its function's claims -> (the first that fails, or None; is it a reference)."""
    with tempfile.TemporaryDirectory(prefix="magnet mistake ") as folder:
        root = Path(folder).resolve() / "repository"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "my", "runs", "cache", "results", "*.wav"))
        path, text = planted(mistake, root)
        path.write_text(text, encoding="utf-8")
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{ROOT}{os.sep}"):
                del sys.modules[name]
        sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        os.chdir(root)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        from study.check import run_claims
        from study.exercises import examples_of
        function = functions()[mistake.function]
        results = run_claims(function, examples_of(mistake.function), stop=True)
        os.chdir(ROOT)
        return next(((f.claim, f.is_reference) for _, f in results if f), (None, False))


def leave_signals():
    """Ctrl-C is for the parent, which ends these processes without a word of theirs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def plant_all(names, processes=2):
    """Plant the mistakes named, or all, two at a time; print which claim catches each -> exit code."""
    if unknown := [name for name in names if name not in [mistake.name for mistake in MISTAKES]]:
        raise ValueError(f"there is no mistake {unknown[0]!r}: want one of {', '.join(m.name for m in MISTAKES)}")
    chosen = [mistake for mistake in MISTAKES if not names or mistake.name in names]
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    import torch

    import train  # noqa: F401  (what is imported before the fork need not be imported by each)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    start, missed, references = time.perf_counter(), [], 0
    with multiprocessing.get_context(kind).Pool(processes, leave_signals, maxtasksperchild=1) as pool:
        for mistake, (claim, is_reference) in zip(chosen, pool.imap(try_one, chosen, chunksize=1), strict=True):
            missed += [mistake.name] if claim is None else []
            references += is_reference
            say(f"{'caught' if claim else 'NOT CAUGHT'}  {mistake.name} ({mistake.function}): {mistake.idea}"
                + f"\n        {'by the reference' if is_reference else 'by'}: {claim}" * (claim is not None))
    say(f"{len(chosen) - len(missed)} of {len(chosen)} mistakes caught in {time.perf_counter() - start:.0f} s, "
        f"{references} of them by a reference only")
    return 1 if missed else 0
