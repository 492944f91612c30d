"""Does a model know what a word means? Real clips, and captions that differ in the word for one attribute.

The model knows the word where it gives the codes of a clip the highest probability under the true caption. Beside
`toy.evaluate` this tells a model that has not learned a word from one whose decoding loses it. A MAGNeT is asked for
the hidden tokens of its first codebook at the mask rates of validation, an autoregressive model for all next tokens.

    python -m toy.likelihood --model toy
    python -m toy.likelihood --data tunes --model tunes --n 100
"""

import numpy as np
import torch
from tqdm import trange

from encodec_wrap import load_codec
from masking import span_mask, spans_for_mask_rate
from model import load_model
from support.cli import Parser, run, say
from t5_encoder import T5Encoder
from toy import WORLDS, world_of
from toy.evaluate import SEED, with_interval
from train import MASK_RATES, masked_cross_entropy, next_token_cross_entropy


def nats(model, codes, text, text_mask, generator):
    """[Eq. 1, Eq. 4] -log p(codes | text) of one clip, in nats: a float. Of an autoregressive model, of all its tokens;
    of a MAGNeT, of the hidden tokens of codebook 1, summed over the mask rates, in spans drawn with `generator`.

    codes: (1, K, T) long; text: (1, L, C); text_mask: (1, L) bool.
    """
    if model.config.objective == "ar":
        return next_token_cross_entropy(model, codes, torch.ones_like(codes, dtype=torch.bool), text, text_mask).item()
    T, span_len, total = codes.shape[2], model.config.span_len, 0.0
    for rate in MASK_RATES:
        hidden = span_mask(torch.tensor([spans_for_mask_rate(rate, T, span_len)]), T, span_len, generator)
        total += masked_cross_entropy(model, codes, 0, hidden, hidden, text, text_mask).item()
    return total


@torch.inference_mode()
def known_words(name, n, data):
    """{attribute: (share of n clips whose true word is the likeliest, by how many nats it is above the others' mean)}.

    The clips are those that `toy.evaluate` plays beside its samples of seen pairs; all captions of a clip have the same
    grammar, and all are read with the same masks. ValueError: the model is a hybrid.
    """
    model, companions = load_model(name)
    if model.config.objective == "hybrid":
        raise ValueError(f"--model {name}: its objective is hybrid; want a MAGNeT or an autoregressive model")
    codec = load_codec(companions.codec, model.config.n_codebooks)
    encoder = T5Encoder.from_pretrained(companions.text_encoder)
    companions.check(codec, encoder)
    place = world_of(data)
    split = "test" if "test" in place.SPLITS else "valid"
    right, gaps = ({attribute: [] for attribute in place.ATTRIBUTES} for _ in range(2))
    for i in trange(n):
        wav, _, attributes = place.example(i, split, SEED, model.config.seconds)
        codes = codec.encode(torch.from_numpy(wav)[None, None])
        for attribute, values in place.ATTRIBUTES.items():
            captions = [place.caption(attributes | {attribute: value}, np.random.default_rng(i)) for value in values]
            found = torch.tensor([nats(model, codes, *encoder.encode_text([caption]), torch.Generator().manual_seed(i))
                                  for caption in captions])
            true = values.index(attributes[attribute])
            right[attribute].append(int(found.argmin()) == true)
            gaps[attribute].append(found.sum().sub(found[true]).div(len(values) - 1).sub(found[true]).item())
    return {attribute: (np.mean(right[attribute]), np.mean(gaps[attribute])) for attribute in right}


def main():
    parser = Parser(description="which words of a caption does a model know?")
    parser.add_argument("--data", choices=WORLDS, default="toy")
    parser.add_argument("--model", default="toy", help="as that of sample.py; a MAGNeT or an autoregressive model")
    parser.add_argument("--n", type=int, default=100, help="clips")
    args = parser.parse_args()
    if args.n < 1:
        raise ValueError("--n must be at least 1")
    for attribute, (share, gap) in known_words(args.model, args.n, args.data).items():
        say(f"{attribute:13} likeliest is the true word in {with_interval(share, args.n)}, by {gap:.1f} nats a clip "
            f"(chance {1 / len(world_of(args.data).ATTRIBUTES[attribute]):.1%})")


if __name__ == "__main__":
    run(main)
