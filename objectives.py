"""What a training step asks of the model: one function per objective [Sec. 3.1; Eq. 1; App. D].

- magnet: fill in the hidden tokens of one codebook, with the codebooks below it shown and those above it hidden.
- ar: predict the next position of all codebooks, each delayed by one frame more than the one before.
- hybrid: the second up to a random position, the first after it.

The same network learns each of them: they differ in what is hidden, who may attend to whom, and which tokens count.
Each gives a sum, in nats, over the tokens that are `counted`; `train.py` divides by the count of the whole batch.
"""

import itertools

import torch
import torch.nn.functional as F

from autoregressive import Continuation
from masking import (
    causal_attention_mask,
    cosine_schedule,
    delay_codes,
    hide_codes,
    hybrid_attention_mask,
    span_mask,
    spans_for_mask_rate,
)

MASK_RATES = (0.25, 0.5, 0.75, 1.0)  # at which validation measures
VALIDATED = {"magnet": MASK_RATES, "ar": ("ar",), "hybrid": (*MASK_RATES, "ar")}  # what it measures of each codebook


def model_of(model):
    """The MAGNeT inside what torch.compile or DistributedDataParallel wrapped around it."""
    return getattr(getattr(model, "module", model), "_orig_mod", getattr(model, "module", model))


def draw_hidden(n_clips, n_frames, span_len, generator):
    """[Sec. 3.1] Training masks: t ~ U(0, 1) for each clip, spans at mask rate cos(pi t / 2): (B, T) bool."""
    rate = cosine_schedule(torch.rand(n_clips, generator=generator))
    return span_mask(spans_for_mask_rate(rate, n_frames, span_len), n_frames, span_len, generator)


def masked_cross_entropy(model, codes, stage, hidden, counted, text, text_mask):
    """[Sec. 3.1] Summed cross-entropy of the hidden tokens of codebook `stage`, in nats.

    codes: (B, K, T); hidden: (B, T), what the model does not see; counted: (B, T), the part of it that is not padding.
    """
    seen = hide_codes(codes, stage, hidden, mask_id=model_of(model).mask_id)
    logits = model(seen, stage, text, text_mask)  # (B, T, card)
    return F.cross_entropy(logits[counted], codes[:, stage][counted], reduction="sum")


def next_token_cross_entropy(model, codes, counted, text, text_mask, shown=None):
    """[Eq. 1] Summed cross-entropy of all tokens, each predicted from the positions before its own, in nats.

    codes: (B, K, T); counted: (B, K, T) bool, False at padding; shown: (B, K, 1) bool, False where a clip's codebook is
    hidden from the model, all by default.
    Deviation: MusicGen's released code leaves out the last k frames of codebook k, and always shows all codebooks.
    """
    mask_id = model_of(model).mask_id
    delayed = delay_codes(codes, mask_id)  # (B, K, T + K)
    seen = delayed if shown is None else delayed.masked_fill(~shown, mask_id)
    logits = model(seen, None, text, text_mask, mask=causal_attention_mask(*[delayed.shape[2]] * 2))
    asked = delay_codes(counted, False)[:, :, 1:]
    return F.cross_entropy(logits[:, :, :-1][asked], delayed[:, :, 1:][asked], reduction="sum")


def hybrid_cross_entropy(model, codes, stage, hidden, prompt, counted, text, text_mask):
    """[App. D, Fig. 7] Summed cross-entropy, in nats: next tokens up to a position, MAGNeT's objective after it.

    codes: (B, K, T), of which the delayed codes have S = T + K positions; hidden: (B, S), as far as it lies after the
    prompt; prompt: (B,), how many positions predict the next one; counted: (B, K, S), the weight of what each position
    is asked, see `hybrid_counted`.
    """
    inside = model_of(model)
    delayed = delay_codes(codes, inside.mask_id)
    in_prompt = (torch.arange(delayed.shape[2], device=codes.device) < prompt[:, None])[:, None]  # (B, 1, S)
    seen = torch.where(in_prompt, delayed, hide_codes(delayed, stage, hidden, inside.mask_id))
    answer = torch.where(in_prompt, F.pad(delayed[:, :, 1:], (0, 1)), delayed)
    mask = hybrid_attention_mask(delayed.shape[2], prompt, stage, inside.config.context)
    logits = model(seen, None, text, text_mask, mask=mask)  # (B, K, S, card)
    asked = counted > 0
    return (F.cross_entropy(logits[asked], answer[asked], reduction="none") * counted[asked]).sum()


def hybrid_counted(valid, n_codebooks, stage, hidden, prompt):
    """[App. D] What each token counts for in `hybrid_cross_entropy`, (B, K, S): every position asked counts once.

    In the prompt that is 1 / K for each of the next tokens, after it 1 for the hidden token of codebook `stage`; and 0
    for what is padding, valid (B, T), or not there. The paper does not say how it weighs the two losses.
    """
    real = delay_codes(valid[:, None].expand(-1, n_codebooks, -1), False)  # (B, K, S)
    in_prompt = (torch.arange(real.shape[2]) < prompt[:, None])[:, None]
    counted = F.pad(real[:, :, 1:], (0, 1)) * in_prompt / n_codebooks
    counted[:, stage] += real[:, stage] & hidden & ~in_prompt[:, 0]
    return counted


LOSSES = {"magnet": masked_cross_entropy, "ar": next_token_cross_entropy, "hybrid": hybrid_cross_entropy}


def draw_step(clips, n_codebooks, config, generator):
    """What a step trains on: rows of clips (B,), whose text stays (B,), what the loss takes beside codes and text.

    For MAGNeT a stage, and what is hidden; for the hybrid a prompt of 1 to S positions too, the start among them. For
    the autoregressive model which codebooks are shown: in some clips only the first ones, as when it rescores.
    """
    B, T, K = config.batch_size, clips.codes.shape[2], n_codebooks
    weights = torch.tensor([*config.stage_weights, *[config.stage_weights[-1]] * K][:K])
    stage = int(torch.multinomial(weights, 1, generator=generator))
    rows = torch.randint(len(clips), (B,), generator=generator)
    hidden = draw_hidden(B, T + K if config.objective == "hybrid" else T, config.span_len, generator)
    keep_text = torch.rand(B, generator=generator) >= config.condition_dropout
    valid = clips.valid(rows)
    if config.objective == "ar":
        n_shown = torch.randint(1, K + 1, (B,), generator=generator)
        n_shown[torch.rand(B, generator=generator) >= config.codebook_dropout] = K
        shown = torch.arange(K)[:, None] < n_shown[:, None, None]  # (B, K, 1)
        return rows, keep_text, {"shown": shown, "counted": valid[:, None] & shown}
    if config.objective == "magnet":
        return rows, keep_text, {"stage": stage, "hidden": hidden, "counted": hidden & valid}
    prompt = torch.randint(1, T + K + 1, (B,), generator=generator)
    counted = hybrid_counted(valid, K, stage, hidden, prompt)
    return rows, keep_text, {"stage": stage, "hidden": hidden, "prompt": prompt, "counted": counted}


@torch.no_grad()
def validate(model, clips, device, amp, max_clips=64, seed=0):
    """Cross-entropy per codebook, nats per token: {codebook: {kind: value}}; always the same masks.

    Kinds: a mask rate, for what is filled in (by a hybrid behind the shortest prompt); "ar", for next tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0, len(clips) - 1, min(len(clips), max_clips)).long()  # from all over the set
    T, span_len, K = clips.codes.shape[2], model.config.span_len, model.config.n_codebooks
    losses = {stage: {} for stage in range(K)}
    filler = model
    if model.config.objective == "hybrid":
        filler = Continuation(model, torch.full((1, K, 1), model.mask_id, device=device))
    for stage, kind in itertools.product(losses, VALIDATED[model.config.objective]):
        total = count = 0
        for part in rows.split(16):
            counted, (codes, text, text_mask) = clips.valid(part).to(device), clips.batch(part, device)
            if kind == "ar":
                loss, of_stage = next_token_cross_entropy, (torch.arange(K, device=device) == stage)[:, None]
                task = {"counted": counted[:, None] & of_stage}
            else:
                n_spans = torch.full((len(part),), spans_for_mask_rate(kind, T, span_len))
                hidden = span_mask(n_spans, T, span_len, generator).to(device)
                loss, task = masked_cross_entropy, {"stage": stage, "hidden": hidden, "counted": hidden & counted}
            with amp():
                total += loss(filler if kind != "ar" else model, codes, text=text, text_mask=text_mask, **task).item()
            count += int(task["counted"].sum())
        losses[stage][kind] = total / max(1, count)
    return losses
