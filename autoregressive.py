"""Decoding from left to right: the autoregressive baseline, and the prompt of a hybrid model [Eq. 1; App. D].

Where MAGNeT fills in a whole codebook in a few passes, an autoregressive model writes one position after the other, all
codebooks at once, each delayed by one frame more than the one before (`masking.delay_codes`). What a position computed
is kept in a cache, so that every step runs the network on a single new position. A hybrid model begins like this and
goes on in parallel, as in `decoding.py`.
"""

import math
from functools import partial

import torch

from decoding import (
    SamplingConfig,
    check_arguments,
    decode_stages,
    fit_steps,
    guided_logits,
    prepare_both,
    rescoring,
)
from masking import delay_codes, hybrid_attention_mask, undelay_codes
from model import Cache

UNKNOWN = -1  # stands for a code that is yet to be written


def draw_tokens(logits, top_k, temperature, greedy=False, generator=None):
    """One token for each row of logits (..., card), among the `top_k` most probable ones (0: all): (...) long."""
    if greedy or temperature == 0:
        return logits.argmax(dim=-1)
    top, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probs = torch.softmax(top / max(temperature, 1e-6), dim=-1).flatten(0, -2)
    drawn = torch.multinomial(probs, 1, generator=generator).view(*logits.shape[:-1], 1)
    return ids.gather(-1, drawn)[..., 0]


def write_positions(model, delayed, first, end, prepared, guidance, draw, on_step=None):
    """[Eq. 1] Write what is UNKNOWN at the positions from `first` to `end` - 1 of delayed codes (B, K, S), in place.

    All before `first` is known, and read in one pass; then every step reads the one position written last. draw:
    logits (B, K, card) -> tokens (B, K); on_step(position) is called after every step.
    """
    cache = [Cache(end) for _ in model.blocks]
    for position in range(first, end):
        unread = delayed[:, :, cache[0].filled:position]
        logits = guided_logits(partial(model, cache=cache), unread, None, prepared, guidance)  # (B, K, T, card)
        known = delayed[:, :, position]
        delayed[:, :, position] = torch.where(known == UNKNOWN, draw(logits[:, :, -1]), known)
        if on_step is not None:
            on_step(position=position)


@torch.inference_mode()
def generate_autoregressive(model, text, text_mask, n_frames, guidance=3.0, top_k=250, temperature=1.0, greedy=False,
                            audio_prompt=None, generator=None, on_step=None, negative=None, n_positions=None):
    """[Eq. 1] Generate codes (B, K, T) of exactly `n_frames` frames from left to right; the defaults are MusicGen's.

    text: (B, N, text_dim) from the text encoder and text_mask (B, N), or None and None for music without a prompt;
    audio_prompt: codes (B, K, P), P <= T, which the result begins with; generator: a `torch.Generator` on the model's
    device; negative: (text, text_mask) in place of the null condition. n_positions stops after so many positions of the
    delayed codes, and leaves the later ones UNKNOWN (for `generate_hybrid`). Raises ValueError where an argument does
    not fit the model.
    """
    for name, value in (("temperature", temperature), ("top_k", top_k)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be zero or positive, not {value}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, not {guidance}")
    audio_prompt = check_arguments(model, ("ar", "hybrid"), text, n_frames, audio_prompt)
    B, K, P = audio_prompt.shape
    codes = audio_prompt.new_full((B, K, n_frames), UNKNOWN)
    codes[:, :, :P] = audio_prompt
    delayed = delay_codes(codes, model.mask_id)  # (B, K, T + K); position P + 1 is the first with an unknown code
    end = n_frames + K if n_positions is None else min(n_positions, n_frames + K)
    draw = partial(draw_tokens, top_k=top_k, temperature=temperature, greedy=greedy, generator=generator)
    write_positions(model, delayed, P + 1, end, prepare_both(model, text, text_mask, negative), guidance, draw, on_step)
    return undelay_codes(delayed)


class Continuation:
    """[App. D] A hybrid model behind its prompt, to be called as a MAGNeT is: codes with hidden places in, logits out.

    prompt: (B, K, S) delayed codes, which attend causally and are always shown; position 0, the start, is one of them.
    """

    def __init__(self, model, prompt):
        self.model, self.prompt, self.config, self.mask_id = model, prompt, model.config, model.mask_id

    def __call__(self, codes, stage, *text, **prepared):
        """codes (B, K, T), or several times as many rows; gives the logits of codebook `stage`, (B, T, card)."""
        T, S = codes.shape[2], self.prompt.shape[2]
        delayed = delay_codes(codes, self.mask_id)
        delayed[:, :, :S] = self.prompt.repeat(len(codes) // len(self.prompt), 1, 1)
        mask = hybrid_attention_mask(delayed.shape[2], S, stage, self.config.context)
        return self.model(delayed, stage, *text, **prepared, mask=mask)[:, stage + 1:stage + 1 + T]


@torch.inference_mode()
def generate_hybrid(model, text, text_mask, n_frames, prompt_seconds, config=None, audio_prompt=None, generator=None,
                    on_step=None, negative=None, rescorer=None, rescorer_weight=0.0, frame_rate=50.0):
    """[App. D, Fig. 7] Write the first `prompt_seconds` from left to right and the rest in parallel: codes (B, K, T).

    frame_rate: the codec's; the audio prompt counts as a part of the prompt; the rest is as for `generate`, but that
    on_step(position) is called while the prompt is written. The prompt ends at one position of the delayed codes:
    codebook k of it is k frames shorter than the first, if not given.
    """
    if not 0 <= prompt_seconds < math.inf:
        raise ValueError(f"prompt_seconds must be zero or positive, not {prompt_seconds}")
    config = fit_steps(config or SamplingConfig(), model.config.n_codebooks)
    audio_prompt = check_arguments(model, ("hybrid",), text, n_frames, audio_prompt)
    n_prompt = max(round(min(prompt_seconds * frame_rate, n_frames)), audio_prompt.shape[2])
    n_positions = 1 + n_prompt if n_prompt < n_frames else n_frames + model.config.n_codebooks
    codes = generate_autoregressive(
        model, text, text_mask, n_frames, config.ar_guidance, config.ar_top_k, config.ar_temperature, config.greedy,
        audio_prompt, generator, on_step, negative, n_positions)
    codes = codes.masked_fill(codes == UNKNOWN, model.mask_id)
    behind_prompt = Continuation(model, delay_codes(codes, model.mask_id)[:, :, :n_positions])
    return decode_stages(behind_prompt, codes, prepare_both(model, text, text_mask, negative), config, generator,
                         on_step, rescoring(rescorer, rescorer_weight, text, text_mask))
