"""Decoding from left to right: the autoregressive baseline, and the prompt of a hybrid model [Eq. 1; App. D].

Where MAGNeT fills in a whole codebook in a few passes, an autoregressive model writes one position after the other, all
codebooks at once, each delayed by one frame more than the one before (`masking.delay_codes`). What a position computed
is kept in a cache, so that every step runs the network on a single new position. Here too is what both ways of decoding
share: the checks of their arguments, and guidance. Parallel decoding is in `sample.py`.
"""

import math
from functools import partial

import torch

from masking import delay_codes, hybrid_attention_mask, undelay_codes
from model import Cache

UNKNOWN = -1  # stands for a code that is yet to be written


def guided_logits(model, seen, stage, prepared, scale):
    """[Sec. 3.3] Classifier-free guidance: uncond + scale * (cond - uncond), (B, T, card).

    seen: (B, K, T) with mask tokens; prepared: `model.prepare_text` of B prompts followed by B null conditions, or
    None for no text. Both halves run as one batch; where the scale makes one irrelevant it is skipped.
    """
    if prepared is None or scale == 0:
        return model(seen, stage)
    if math.isclose(scale, 1, abs_tol=1e-6):
        return model(seen, stage, prepared=[keys_values[:, :len(seen)] for keys_values in prepared])
    cond, uncond = model(seen.repeat(2, 1, 1), stage, prepared=prepared).chunk(2)
    return uncond + scale * (cond - uncond)


def check_arguments(model, objectives, text, n_frames, audio_prompt):
    """The audio prompt (B, K, P) that decoding starts from, empty where None is given.

    ValueError if the model was not trained for one of `objectives`, or the other arguments do not fit it.
    """
    K = model.config.n_codebooks
    if model.config.objective not in objectives:
        raise ValueError(f"the model's objective is {model.config.objective}; this decoding wants "
                         f"{' or '.join(objectives)}")
    if n_frames < 1:
        raise ValueError(f"n_frames must be at least 1, not {n_frames}")
    if audio_prompt is None:
        audio_prompt = torch.empty(1 if text is None else len(text), K, 0, dtype=torch.long)
    B, P = audio_prompt.shape[0], audio_prompt.shape[2]
    if audio_prompt.shape[1] != K or P > n_frames or (text is not None and len(text) != B):
        raise ValueError(f"audio_prompt has shape {tuple(audio_prompt.shape)}; want as many rows as prompts, "
                         f"{K} codebooks and at most {n_frames} frames")
    if P and not 0 <= audio_prompt.min() <= audio_prompt.max() < model.config.card:
        raise ValueError(f"audio_prompt must hold codes from 0 to {model.config.card - 1}")
    return audio_prompt.to(model.out_norm.weight.device)


def prepare_both(model, text, text_mask):
    """`prepare_text` of the prompts, then of as many null conditions: what `guided_logits` wants. None for no text."""
    if text is None:
        return None
    device = model.out_norm.weight.device
    text, text_mask = text.to(device), text_mask.to(device)
    return model.prepare_text(torch.cat([text, text * 0]), torch.cat([text_mask, text_mask * 0]))


def draw_tokens(logits, top_k, temperature, greedy=False, generator=None):
    """One token for each row of logits (..., card), among the `top_k` most probable ones (0: all): (...) long."""
    if greedy or temperature == 0:
        return logits.argmax(dim=-1)
    top, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probs = torch.softmax(top / temperature, dim=-1).flatten(0, -2)
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
                            audio_prompt=None, generator=None, on_step=None, n_positions=None):
    """[Eq. 1] Generate codes (B, K, T) of exactly `n_frames` frames from left to right; the defaults are MusicGen's.

    text: (B, N, text_dim) from the text encoder and text_mask (B, N), or None and None for music without a prompt;
    audio_prompt: codes (B, K, P), P <= T, which the result begins with; generator: a `torch.Generator` on the model's
    device. n_positions stops after so many positions of the delayed codes, and leaves the later ones UNKNOWN (for
    `sample.generate_hybrid`). Raises ValueError where an argument does not fit the model.
    """
    if not 0 <= temperature < math.inf or top_k < 0 or not math.isfinite(guidance):
        raise ValueError("temperature and top_k must be zero or positive and guidance finite, not "
                         f"{temperature}, {top_k} and {guidance}")
    audio_prompt = check_arguments(model, ("ar", "hybrid"), text, n_frames, audio_prompt)
    B, K, P = audio_prompt.shape
    codes = audio_prompt.new_full((B, K, n_frames), UNKNOWN)
    codes[:, :, :P] = audio_prompt
    delayed = delay_codes(codes, model.mask_id)  # (B, K, T + K); position P + 1 is the first with an unknown code
    end = n_frames + K if n_positions is None else min(n_positions, n_frames + K)
    draw = partial(draw_tokens, top_k=top_k, temperature=temperature, greedy=greedy, generator=generator)
    write_positions(model, delayed, P + 1, end, prepare_both(model, text, text_mask), guidance, draw, on_step)
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
