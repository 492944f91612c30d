"""How soon the tokens of a MAGNeT's decode are final, and how many of them two seeds share.

For one prompt, and on average over captions of the toy world. The first number is the share of the first codebook's
tokens that a step's candidate has in common with the result, mean of both seeds.

    python -m experiments.settling "a calm low organ"
"""

import torch

from model import load_model
from sample import SamplingConfig, clip_streams, generate
from support.cli import Parser, run, say
from support.hub import make_config
from t5_encoder import T5Encoder
from toy import world_of


def decode(model, text, text_mask, config, seed, n_frames):
    """The result's codes (B, K, T), and the first codebook (B, T) of every candidate of its stage."""
    B, candidates = len(text), []

    def look(stage, step, codes, hidden, confidence):
        if stage == 0:
            candidates.append(codes[:, 0].clone())

    codes = torch.full((B, model.config.n_codebooks, n_frames), model.mask_id)
    return generate(model, text, text_mask, codes, config, clip_streams(seed, [1] * B), on_step=look), candidates


def main():
    parser = Parser(description="how soon tokens are final, and how many two seeds share")
    parser.add_argument("prompt")
    parser.add_argument("--captions", type=int, default=40, help="of the toy world, for the mean")
    args = parser.parse_args()
    if args.captions < 1:
        raise ValueError(f"--captions must be at least 1, not {args.captions}")
    model, companions = load_model("toy")
    config = make_config(SamplingConfig, companions.sampling, "toy")
    captions = [world_of("toy").describe(i, "valid", 1)[1] for i in range(args.captions)]
    text = T5Encoder.from_pretrained(companions.text_encoder).encode_text([args.prompt, *captions])
    decodes = [decode(model, *text, config, seed, n_frames=200) for seed in (1, 2)]
    final = [torch.stack([(x == codes[:, 0]).float().mean(dim=1) for x in candidates]) for codes, candidates in decodes]
    for number, shares in enumerate(sum(final) / 2, 1):  # (B,)
        say(f"step {number:2}: {shares[0]:4.0%} of its tokens are final, {shares[1:].mean():4.0%} of the captions'")
    (one, _), (two, _) = decodes
    for k, shares in enumerate((one == two).float().mean(dim=2).T, 1):
        low, high = shares[1:].aminmax()
        say(f"codebook {k}: both seeds share {shares[0]:.0%} of the tokens, {shares[1:].mean():.0%} of the captions' "
            f"({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    run(main)
