"""Pretrain a world's text encoder, which `train.py` then keeps frozen, as MAGNeT keeps T5 [Sec. 2].

A SentencePiece model is trained on the world's captions, and a small T5 encoder learns to read the attributes off them,
each with a linear reader on the mean token embedding; an attribute that a caption leaves unsaid is a class of its own.
The encoder sees captions of all combinations, held-out pairs too: a text encoder has read everything, it is the music
that was never heard. The readers are thrown away.

    python -m toy.train_text --out runs/text
    python -m toy.train_text --data tunes --out runs/tunes_text
"""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from support.cli import Parser, run, say
from support.files import rename, save_whole, whole_file
from t5_encoder import CONFIG, TENSOR_NAMES, TOKENIZER, T5Config, T5Encoder
from toy import WORLDS, world, world_of


def draw_caption(rng, p_unsaid=0.3, place=world):
    """A caption of the world `place` and its labels (attributes,).

    Half of the captions leave each attribute unsaid with probability `p_unsaid`.
    """
    rows = place.combinations("train") + place.combinations("unseen")
    attributes = dict(rows[rng.integers(len(rows))])
    if rng.random() < 0.5:
        said = {name: value for name, value in attributes.items() if rng.random() >= p_unsaid}
        attributes = said or attributes
    labels = [len(values) if name not in attributes else values.index(attributes[name])
              for name, values in place.ATTRIBUTES.items()]
    return place.caption(attributes, rng), labels


def train_tokenizer(path, rng, vocab_size, n_captions=20_000, place=world):
    """Write a SentencePiece model with T5's special ids: pad 0, end of sequence 1. Returns its number of pieces."""
    model, captions = io.BytesIO(), (draw_caption(rng, place=place)[0] for _ in range(n_captions))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions, model_writer=model, vocab_size=vocab_size,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def save_pretrained(encoder, folder, dtype=torch.float32):
    """Write a folder that `T5Encoder.from_pretrained` reads, its tensors in `dtype`; each file is whole or absent."""
    folder = Path(folder)
    save_whole({rename(name, TENSOR_NAMES): tensor.to("cpu", dtype) for name, tensor in encoder.state_dict().items()},
               folder / "pytorch_model.bin")
    with whole_file(folder / CONFIG) as path:
        path.write_text(json.dumps(asdict(encoder.config), indent=2))
    if encoder.tokenizer is not None:
        with whole_file(folder / TOKENIZER) as path:
            path.write_bytes(encoder.tokenizer.serialized_model_proto())


def read_attributes(readers, embeddings, mask):
    """Mean over the tokens, then one linear reader per attribute: a list of logits (B, values + 1)."""
    weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)  # (B, L)
    pooled = (embeddings * weights[..., None]).sum(dim=1)  # (B, C)
    return [reader(pooled) for reader in readers]


def main():
    parser = Parser(description="pretrain the text encoder of a world")
    parser.add_argument("--data", choices=WORLDS, default="toy")
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, not {args.steps}")
    if (args.out / TOKENIZER).exists():
        raise ValueError(f"{args.out} holds a text encoder already: give another --out")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    place = world_of(args.data)
    pieces = train_tokenizer(args.out / TOKENIZER, rng, args.vocab_size, place=place)
    config = T5Config(pieces, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    encoder = T5Encoder(config, args.out / TOKENIZER)
    readers = nn.ModuleList(nn.Linear(config.d_model, len(values) + 1) for values in place.ATTRIBUTES.values())
    parameters = [*encoder.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)

    def batch(generator, size):
        captions, labels = zip(*(draw_caption(generator, place=place) for _ in range(size)), strict=True)
        return encoder.tokenize(captions), torch.tensor(labels).T  # labels (attributes, B)

    bar = trange(args.steps)
    for _ in bar:
        (ids, mask), labels = batch(rng, args.batch_size)
        logits = read_attributes(readers, encoder(ids, mask), mask)
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    (ids, mask), labels = batch(np.random.default_rng([args.seed, 1]), 2000)
    with torch.no_grad():
        logits = read_attributes(readers, encoder(ids, mask), mask)
    for name, x, y in zip(place.ATTRIBUTES, logits, labels, strict=True):
        say(f"{name}: {(x.argmax(dim=1) == y).float().mean().item():.2%} of 2000 fresh captions read right")
    save_pretrained(encoder, args.out, dtype=torch.float16)
    n_params = sum(p.numel() for p in encoder.parameters())
    say(f"wrote {args.out}: {n_params:,} parameters, {pieces} pieces")


if __name__ == "__main__":
    run(main)
