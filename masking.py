"""What is hidden, and who may attend to whom [Sec. 3.1, Sec. 3.2, App. C, App. D].

Pure functions on tensors, no model. MAGNeT learns to fill in hidden tokens; here are the cosine schedule that says how
many, the spans that say which, and the attention mask of the restricted context. Autoregressive and hybrid models
delay their codebooks and have attention masks of their own. A *hidden* mask is True where a token is hidden; an
*attention* mask is True where a query may attend. Which spans are hidden again while decoding depends on the model's
probabilities: that is in `sample.py`.
"""

import math

import torch


def cosine_schedule(t):
    """[Eq. 3] The share of tokens to hide at time t: gamma = cos(pi t / 2), from 1 at t = 0 to 0 at t = 1.

    t: float or tensor in [0, 1]; gives the same kind. In training t ~ U(0, 1); in decoding t = i / steps.
    """
    if isinstance(t, torch.Tensor):
        return torch.cos(t * (math.pi / 2))
    return math.cos(t * math.pi / 2)


def expected_mask_rate(n_spans, n_frames, span_len):
    """[App. C] Expected share of hidden frames with `n_spans` starts among `n_frames`: 1 - C(T - l, u) / C(T, u).

    n_spans: int or tensor of ints, any shape; gives a float64 tensor of that shape on the CPU. The binomials cancel to
    a product of l factors (T - u - i) / (T - i), which neither overflows nor loses precision. The formula takes every
    frame to lie in l possible spans; the first l - 1 frames lie in fewer, so that the true rate is lower: by about
    0.001 for T = 500 and l = 3, by more in clips of few spans.

    >>> expected_mask_rate(2, 10, 3)  # 1 - C(7, 2) / C(10, 2) = 1 - 21/45
    tensor(0.5333, dtype=torch.float64)
    """
    u = torch.as_tensor(n_spans).cpu().double()  # on the CPU: not every device has float64
    visible = torch.ones_like(u)
    for i in range(min(span_len, n_frames)):
        visible = visible * (n_frames - u - i) / (n_frames - i)
    return 1 - visible


def spans_for_mask_rate(rate, n_frames, span_len):
    """[App. C] The number of spans u >= 1 whose expected mask rate is nearest to `rate`.

    rate: float -> int, or a (B,) tensor -> (B,) long.
    Deviation: the released code reads u from a table in steps of one percent; this is exact.
    """
    counts = torch.arange(1, n_frames + 1)
    rates = expected_mask_rate(counts, n_frames, span_len)  # (T,)
    wanted = torch.as_tensor(rate).cpu().double()
    nearest = counts[(rates - wanted[..., None]).abs().argmin(dim=-1)]
    return nearest.to(rate.device) if isinstance(rate, torch.Tensor) else nearest.item()


def span_mask(n_spans, n_frames, span_len, generator=None):
    """[Eq. 7] Hide `n_spans[b]` spans in row b: starts drawn without replacement, spans may overlap, cut at the end.

    n_spans: (B,) long; gives (B, T) bool, True = hidden, on the device of `n_spans`. Never an empty row: u >= 1.
    Random numbers are drawn on the generator's device, so one seed gives one mask on every device.
    """
    B = len(n_spans)
    device = generator.device if generator is not None else n_spans.device
    noise = torch.rand(B, n_frames, generator=generator, device=device).to(n_spans.device)
    rank = noise.argsort(dim=1).argsort(dim=1)  # a random order of the frames, (B, T)
    starts = rank < n_spans.clamp(min=1)[:, None]
    return spans_from_starts(starts, span_len)


def spans_from_starts(starts, span_len):
    """[Eq. 7] The union of {t, .., t + l - 1} over all starts t: (B, T) bool -> (B, T) bool, cut at T.

    >>> spans_from_starts(torch.tensor([[False, True, False, False, False, True]]), 3).int()
    tensor([[0, 1, 1, 1, 0, 1]], dtype=torch.int32)
    """
    hidden = starts.clone()
    for i in range(1, min(span_len, starts.shape[1])):
        hidden[:, i:] |= starts[:, :-i]
    return hidden


def mask_codes(codes, stage, hidden, mask_id):
    """[Sec. 3.1] The model's inputs at `stage`: codebooks below it shown, it masked where `hidden`, those above masked.

    codes: (B, K, T) long; stage: int, or (B,) long; hidden: (B, T) bool; gives new codes with `mask_id` where hidden.

    >>> mask_codes(torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]), 1, torch.tensor([[True, False, False]]), 0)
    tensor([[[1, 2, 3],
             [0, 5, 6],
             [0, 0, 0]]])
    """
    stage = torch.as_tensor(stage, device=codes.device).view(-1, 1, 1)
    level = torch.arange(codes.shape[1], device=codes.device)[:, None]  # (K, 1)
    shown = (level < stage) | (level == stage) & ~hidden[:, None]  # (B, K, T)
    return codes.masked_fill(~shown, mask_id)


def restricted_attention_mask(n_frames, context):
    """[Sec. 3.2, Fig. 8] The band |query - key| <= context: (T, T) bool, True = may attend; `context` in frames.

    >>> restricted_attention_mask(4, 1).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    frames = torch.arange(n_frames)
    return (frames[:, None] - frames[None, :]).abs() <= context


def causal_attention_mask(n_queries, n_keys):
    """[Eq. 1, Eq. 2] Each position sees itself and what is before it: (n_queries, n_keys) bool, True = may attend.

    The queries are the last of the positions, as when a cache holds the first ones.

    >>> causal_attention_mask(2, 4).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    query, key = torch.arange(n_keys - n_queries, n_keys), torch.arange(n_keys)
    return key <= query[:, None]


def hybrid_attention_mask(n_positions, n_prompt, stage=0, context=-1):
    """[Sec. 3.5, App. D, Fig. 7] Who attends to whom in a hybrid's delayed codes: (B, n, n) bool, n = n_positions.

    n_prompt: frames of the prompt, stage: 0-based codebook; int each, or (B,) long. Every position predicts the code in
    the next one. Those that predict the prompt, 0 to n_prompt - 1, attend causally. The others attend to all; at stages
    after the first only to what lies within `context` positions of the one they predict; context -1: all.

    >>> hybrid_attention_mask(6, 2, stage=1, context=1)[0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, 1]], dtype=torch.int32)
    """
    n_prompt, stage = torch.as_tensor(n_prompt).view(-1, 1, 1), torch.as_tensor(stage).view(-1, 1, 1)
    query = torch.arange(n_positions, device=n_prompt.device)[:, None]
    ahead = torch.arange(n_positions, device=n_prompt.device) - query  # how far a key lies after a query, (n, n)
    local = ((ahead - 1).abs() <= context) | (ahead == 0) & (query == n_positions - 1)  # no row is ever empty
    after_prompt = local if context >= 0 else torch.ones_like(local)
    after_prompt = torch.where(stage.to(ahead.device) > 0, after_prompt, True)
    return torch.where(query < n_prompt, ahead <= 0, after_prompt)


def delay_codes(codes, special):
    """[App. D] MusicGen's delay pattern: (B, K, T) -> (B, K, T + K), codebook k beginning one position after k - 1.

    Position 0 is the start, where nothing is known; a position holds what one step of autoregressive decoding writes.
    `special` fills the places without a code; published models use the mask token.

    >>> delay_codes(torch.tensor([[[11, 12, 13], [21, 22, 23], [31, 32, 33]]]), 0)
    tensor([[[ 0, 11, 12, 13,  0,  0],
             [ 0,  0, 21, 22, 23,  0],
             [ 0,  0,  0, 31, 32, 33]]])
    """
    B, K, T = codes.shape
    delayed = codes.new_full((B, K, T + K), special)
    for k in range(K):
        delayed[:, k, k + 1:k + 1 + T] = codes[:, k]
    return delayed


def undelay(delayed, shift=0):
    """[App. D] The inverse of `delay_codes`: (B, K, T + K, ...) -> (B, K, T, ...).

    shift = -1 reads one position earlier: there the autoregressive model's logits for the token stand.
    """
    K, T = delayed.shape[1], delayed.shape[2] - delayed.shape[1]
    return torch.stack([delayed[:, k, k + 1 + shift:k + 1 + shift + T] for k in range(K)], dim=1)
