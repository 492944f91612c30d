"""Does the model play what the prompt says? A table of numbers for the shipped model or a training run.

A fixed list of prompts, half of them attribute pairs that training never held, is generated and read by the judge. Real
clips of the same attributes and their codec reconstructions go the same way, as floors. Shares come with 95% Wilson
intervals. The Frechet distance is between judge embeddings of the samples and of other real clips.

    python -m toy.evaluate --model toy --json toy.json
    python -m toy.evaluate --model toy --rescorer toy-ar --rescorer-weight 0.5
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encodec_wrap import load_codec
from model import load_model
from sample import BATCH, SamplingConfig, clip_streams, generate
from support.cli import Parser, add_flags, from_flags, pick_device, pick_dtype, run
from support.data import collect, encode
from support.training import precision
from t5_encoder import T5Encoder
from toy import world
from toy.judge import load_judge
from toy.world import ATTRIBUTES, SAMPLE_RATE, UNSEEN_PAIRS, caption, describe, example
from train import validate, world_entries

SEED = 7  # of prompts and of the real clips beside them; training uses 0 and 1
SPLITS = {"seen": "valid", "unseen": "unseen"}


def labels_of(attributes):
    return torch.tensor([values.index(attributes[name]) for name, values in ATTRIBUTES.items()])


def wilson(share, n, z=1.96):
    """The 95% confidence interval of a share seen in n trials: (low, high)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(share, n):
    """A share in words: `95.0% (89%-98%)`."""
    low, high = wilson(share, n)
    return f"{share:.1%} ({low:.0%}-{high:.0%})"


def frechet(a, b):
    """Frechet distance between Gaussians fitted to embeddings (n, E) and (m, E)."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + a.T.cov().trace() + b.T.cov().trace() - 2 * cross).item()


def in_parts(function, wav, size=32):
    """Apply `function` to audio (n, S) in parts and join the results."""
    return torch.cat([function(part) for part in wav.split(size)])


def adherence(read, labels):
    """{attribute: share, ..., "overall": mean share} of (n, 5) labels read as asked, each with its interval.

    The interval of the mean is that of n trials, since the readings of one clip depend on each other.
    """
    right, n = (read == labels).float(), len(labels)
    shares = dict(zip([*ATTRIBUTES, "overall"], [*right.mean(dim=0).tolist(), right.mean().item()], strict=True))
    return {name: {"share": share, "interval": wilson(share, n)} for name, share in shares.items()}


def play(model, codec, encoder, captions, config, seed, rescorer=None):
    """Generate a clip for every caption, as the model was trained to: audio (n, S) on the CPU."""
    n_frames, wavs = round(model.config.seconds * codec.frame_rate), []
    for i in tqdm(range(0, len(captions), BATCH), desc="generating"):
        text, text_mask = encoder.encode_text(captions[i:i + BATCH])
        codes = torch.full((len(text), codec.n_codebooks, n_frames), model.mask_id)
        streams = clip_streams(seed, range(i, i + len(text)))
        codes = generate(model, text, text_mask, codes, config, streams, rescorer=rescorer, frame_rate=codec.frame_rate)
        wavs.append(codec.decode(codes)[:, 0].cpu())
    return torch.cat(wavs)


def spread(embeddings, group):
    """Mean distance between the members of consecutive groups of embeddings (n * group, E)."""
    distances = [torch.pdist(part).mean() for part in embeddings.split(group)]
    return torch.stack(distances).mean().item()


def swapped_prompts(n, seed=SEED + 2):
    """`n` pairs of prompts that differ in the word for one attribute.

    Gives (captions, captions, what the second ones ask for (n, 5), index of the attribute (n,)).
    """
    pairs = []
    for i in range(n):
        attributes, _, rng = describe(i, "valid", seed)
        name, grammar = list(ATTRIBUTES)[i % len(ATTRIBUTES)], int(rng.integers(2**31))
        others = [attributes | {name: value} for value in ATTRIBUTES[name] if value != attributes[name]]
        others = [row for row in others if (row["instrument"], row["melody"]) not in UNSEEN_PAIRS]
        rows = attributes, others[rng.integers(len(others))]
        pairs.append((*(caption(row, np.random.default_rng(grammar)) for row in rows), labels_of(rows[1])))
    before, after, labels = zip(*pairs, strict=True)
    return list(before), list(after), torch.stack(labels), torch.arange(n) % len(ATTRIBUTES)


def swap_shares(before, after, labels, which):
    """How swapped prompts were played, from what is read in both clips (n, 5): shares with their intervals."""
    swapped = torch.nn.functional.one_hot(which, labels.shape[1]).bool()
    changed = (after == labels)[swapped]  # (n,): the swapped attribute reads as the new word says
    kept = (after == before) | swapped  # (n, 5)
    cases = {"the attribute changes as asked": changed, "each other one stays": kept[~swapped].float(),
             "both, with all others": changed & kept.all(dim=1)}
    return {name: {"share": x.float().mean().item(), "interval": wilson(x.float().mean().item(), len(labels))}
            for name, x in cases.items()}


def evaluate(name, config, device, n=300, swaps=0, floors=True, losses=True, seed=0, cache="cache",
             repeated=8, rescorer=None):
    """All numbers for the model called `name`, as one dictionary of plain types.

    n: prompts; swaps: pairs of prompts with one word swapped; floors: whether real clips and their codec
    reconstructions are read as well; losses: whether to measure the validation cross-entropy; seed: of the sampling;
    repeated: prompts that are played four times each, for the diversity; rescorer: name of a second model to rescore,
    with the weight that `config` gives it.
    "right" holds how many attributes are right in each clip, as one digit each.
    """
    model, companions = load_model(name, device, pick_dtype("auto", device))
    codec = load_codec(companions.codec, model.config.n_codebooks, device)
    encoder = T5Encoder.from_pretrained(companions.text_encoder)
    companions.check(codec, encoder)
    if codec.sample_rate != SAMPLE_RATE:
        raise ValueError(f"the judge listens at {SAMPLE_RATE} Hz; {name} plays at {codec.sample_rate}")
    judge, half = load_judge(), n // 2
    second = None
    if rescorer is not None and config.rescorer_weight:
        second, needs = load_model(rescorer, device, pick_dtype("auto", device))
        needs.check(codec, encoder)
    result = {"model": str(name), "n_prompts": 2 * half, "sampling": vars(config), "device": str(device),
              "rescorer": rescorer and f"{rescorer}, weight {config.rescorer_weight:g}"}

    def play_all(captions, seed):
        return play(model, codec, encoder, captions, config, seed, second)

    result["adherence"], result["right"] = {}, {}
    embeddings = {"real": [], "codec": [], "model": []} if floors else {"model": []}
    seconds = 0.0
    for kind, split in SPLITS.items():
        prompts = [describe(i, split, SEED)[:2] for i in range(half)]
        labels = torch.stack([labels_of(attributes) for attributes, _ in prompts])
        start = time.perf_counter()
        wavs = {"model": play_all([caption for _, caption in prompts], seed)}
        seconds += time.perf_counter() - start
        if floors:
            clips = [example(i, split, SEED, model.config.seconds)[0] for i in range(half)]
            wavs["real"] = torch.from_numpy(np.stack(clips))
            wavs["codec"] = in_parts(lambda wav: codec.decode(codec.encode(wav[:, None].to(device)))[:, 0].cpu(),
                                     wavs["real"])
        for what in embeddings:
            read = in_parts(judge.read, wavs[what])
            result["adherence"][f"{what}, {kind}"] = adherence(read, labels)
            result["right"][f"{what}, {kind}"] = "".join(str(n) for n in (read == labels).sum(dim=1).tolist())
            embeddings[what].append(in_parts(judge.embed, wavs[what]))
    reference = torch.stack([torch.from_numpy(example(i, split, SEED + 1, model.config.seconds)[0])
                             for split in SPLITS.values() for i in range(half)])
    reference = in_parts(judge.embed, reference)
    result["frechet"] = {what: frechet(torch.cat(parts), reference) for what, parts in embeddings.items()}
    captions = [describe(i, "valid", SEED)[1] for i in range(repeated) for _ in range(4)]
    repeats = in_parts(judge.embed, play_all(captions, seed + 1))
    result["diversity"] = {"samples of one prompt": spread(repeats, 4), "real clips": spread(reference[:half], half)}
    if swaps:
        *captions, labels, which = swapped_prompts(swaps)
        read = [judge.read(play_all(side, seed + 2)) for side in captions]
        result["swaps"] = swap_shares(*read, labels, which)
    if losses:
        entries = world_entries(world, 64, "valid", model.config.seconds)
        audio, text, _ = encode(entries, codec, encoder, model.config.seconds, cache, device)
        clips = collect(entries, audio, text)
        values = validate(model, clips, device, precision("fp32", device)[0])
        result["cross_entropy"] = {f"codebook {k + 1}": sum(values[k].values()) / len(values[k]) for k in values}
    result["chance_cross_entropy"] = math.log(model.config.card)
    result["seconds_per_clip"] = seconds / (2 * half)
    return result


def print_table(result):
    print(f"\nshare of {result['n_prompts']} clips in which the judge hears what the prompt asks for")
    print(f"{'':16}" + "".join(f"{name:>17}" for name in [*ATTRIBUTES, "overall"]))
    for who, shares in result["adherence"].items():
        cells = (f"{s['share']:6.1%} {s['interval'][0]:4.0%}-{s['interval'][1]:.0%}" for s in shares.values())
        print(f"{who:16}" + "".join(f"{cell:>17}" for cell in cells))
    print("chance          " + "".join(f"{1 / len(values):>16.1%} " for values in ATTRIBUTES.values()))
    for name, case in result.get("swaps", {}).items():
        print(f"one word swapped: {name:32}{case['share']:6.1%}  {case['interval'][0]:.0%}-{case['interval'][1]:.0%}")
    for name in ("frechet", "diversity", "cross_entropy"):
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in result[name].items()))
    print(f"chance cross-entropy {result['chance_cross_entropy']:.3f}; {result['seconds_per_clip']:.2f} s per clip")


def main():
    parser = Parser(description="evaluate a toy model")
    parser.add_argument("--model", default="toy", help="as that of sample.py")
    parser.add_argument("--n", type=int, default=300, help="prompts")
    parser.add_argument("--swaps", type=int, default=100, help="pairs of prompts that differ in one attribute; 0: none")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rescorer", help="a second model that rescores, as that of sample.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", default="cache")
    add_flags(parser, SamplingConfig)
    args = parser.parse_args()
    if args.n < 4:
        raise ValueError(f"--n must be at least 4, not {args.n}")
    config = from_flags(args, SamplingConfig(**load_model(args.model)[1].sampling))
    result = evaluate(args.model, config, pick_device(args.device), args.n, args.swaps, seed=args.seed,
                      cache=args.cache, rescorer=args.rescorer)
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
