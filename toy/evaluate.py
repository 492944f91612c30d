"""Does the model play what the prompt says? A table of numbers for a model that ships or a training run.

A fixed list of prompts, half of them attribute pairs that training never held, is generated and read by the judge. Real
clips of the same attributes and their codec reconstructions go the same way, as floors. Shares come with 95% Wilson
intervals. The Frechet distance is between judge embeddings of the samples and of other real clips. Of the tunes, all
prompts and real clips are of test tunes, and it is told how much of the training tunes the samples repeat.

    python -m toy.evaluate --model toy --json toy.json
    python -m toy.evaluate --model toy --rescorer toy-ar --rescorer-weight 0.5
    python -m toy.evaluate --data tunes --model runs/tunes
"""

import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encodec_wrap import load_codec
from model import load_model
from sample import BATCH, SamplingConfig, clip_streams, generate
from support.cli import Parser, add_flags, from_flags, pick_device, pick_dtype, run, say
from support.data import encode
from t5_encoder import T5Encoder
from toy import WORLDS, entries_of, memory, signals, world, world_of
from toy.judge import load_judge
from train import validate

SEED = 7  # of prompts and of the real clips beside them; training uses 0 and 1
SPLITS = {"seen": "valid", "unseen": "unseen"}  # of the toy world; of the tunes, "test" is seen


def labels_of(attributes, place=world):
    """The attributes of a clip of the world `place` as indices of their values: (attributes,)."""
    return torch.tensor([values.index(attributes[name]) for name, values in place.ATTRIBUTES.items()])


def wilson(share, n, z=1.96):
    """The 95% confidence interval of a share seen in n trials: (low, high).

    >>> [[round(end, 3) for end in wilson(share, n)] for share, n in ((0.9, 100), (0.9, 1000), (1.0, 100))]
    [[0.826, 0.945], [0.88, 0.917], [0.963, 1.0]]
    """
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


def adherence(read, labels, names=tuple(world.ATTRIBUTES)):
    """{attribute: share, ..., "overall": mean share} of (n, attributes) labels read as asked, each with its interval.

    The interval of the mean is that of n trials, since the readings of one clip depend on each other.
    """
    right, n = (read == labels).float(), len(labels)
    shares = dict(zip([*names, "overall"], [*right.mean(dim=0).tolist(), right.mean().item()], strict=True))
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


def swapped_prompts(n, seed=SEED + 2, place=world):
    """`n` pairs of prompts that differ in the word for one attribute, and that training might have held.

    Gives (captions, captions, what the second ones ask for (n, attributes), index of the attribute (n,)).
    """
    names, seen, pairs = list(place.ATTRIBUTES), place.combinations("valid"), []
    for i in range(n):
        attributes, _, rng = place.describe(i, "valid", seed)
        others, start = [], i % len(names)
        for which in [*range(start, len(names)), *range(start)]:  # hornpipes have no other mode: take what is next
            others = others or [(which, row) for row in seen if differing(row, attributes) == [names[which]]]
        grammar = int(rng.integers(2**31))
        which, changed = others[rng.integers(len(others))]
        captions = (place.caption(row, np.random.default_rng(grammar)) for row in (attributes, changed))
        pairs.append((*captions, labels_of(changed, place), which))
    before, after, labels, which = zip(*pairs, strict=True)
    return list(before), list(after), torch.stack(labels), torch.tensor(which)


def differing(a, b):
    """The names of the attributes in which two dictionaries differ."""
    return [name for name in a if a[name] != b[name]]


def memorised(place, wavs, codes, solo, seconds, codec, judge, device, n=1000):
    """How much of the training tunes stands in samples, and in real clips of test tunes: {who: {measure: value}}.

    wavs and codes: {"model" or "test tunes": (m, S) or (m, K, T)}; solo: {who: (m,) bool, a melody alone}; n: training
    clips among which the nearest neighbours are sought. See `toy.memory`.
    """
    bank = torch.from_numpy(np.stack([place.example(i, "train", 0, seconds)[0] for i in range(n)]))
    bank_codes = in_parts(lambda wav: codec.encode(wav[:, None].to(device)).cpu(), bank)
    bank = in_parts(judge.embed, bank)
    return {who: {
        "melody": memory.found_melodies(wavs[who][solo[who]]).mean().item(),
        "melody clips": len(memory.found_melodies(wavs[who][solo[who]])),
        "distance to the nearest": memory.nearest_embeddings(in_parts(judge.embed, wavs[who]), bank).mean().item(),
        "codes of the nearest": memory.nearest_codes(codes[who], bank_codes).mean().item()} for who in wavs}


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
             repeated=8, rescorer=None, data="toy", judge=None, span_len=None):
    """All numbers for the model called `name`, as one dictionary of plain types.

    data: its world; judge: a judge's file, if not the one that ships for the world; n: prompts; swaps: pairs of prompts
    with one word swapped; floors: whether real clips and their codec reconstructions are read as well, and what is
    memorised is measured; losses: whether to measure the validation cross-entropy; seed: of the sampling; repeated:
    prompts that are played four times each, for the diversity; rescorer: name of a second model to rescore, with the
    weight that `config` gives it; span_len: frames per span in decoding, if not the model's own. "right" holds how many
    attributes are right in each clip, as one digit each.
    """
    model, companions = load_model(name, device, pick_dtype("auto", device))
    model.config.span_len = span_len or model.config.span_len
    codec = load_codec(companions.codec, model.config.n_codebooks, device)
    encoder = T5Encoder.from_pretrained(companions.text_encoder)
    companions.check(codec, encoder)
    place, judge, half = world_of(data), load_judge(judge or data), n // 2
    if codec.sample_rate != place.SAMPLE_RATE or judge.attributes != place.ATTRIBUTES:
        raise ValueError(f"{name} plays at {codec.sample_rate} Hz and the judge hears {', '.join(judge.attributes)}; "
                         f"--data {data} wants {place.SAMPLE_RATE} Hz and {', '.join(place.ATTRIBUTES)}")
    splits = SPLITS | ({"seen": "test"} if "test" in place.SPLITS else {})
    place.example(0, splits["seen"], SEED)  # which asks for the packages of the tunes now, not after the playing
    second = None
    if rescorer is not None and config.rescorer_weight:
        second, needs = load_model(rescorer, device, pick_dtype("auto", device))
        needs.check(codec, encoder, f"--rescorer {rescorer}")
    result = {"model": str(name), "n_prompts": 2 * half, "sampling": vars(config), "device": str(device),
              "rescorer": rescorer and f"{rescorer}, weight {config.rescorer_weight:g}"}

    def play_all(captions, seed):
        return play(model, codec, encoder, captions, config, seed, second)

    def code(wav):
        return in_parts(lambda part: codec.encode(part[:, None].to(device)).cpu(), wav)

    result["adherence"], result["right"] = {}, {}
    embeddings = {"real": [], "codec": [], "model": []} if floors else {"model": []}
    seconds, heard = 0.0, {"model": [], "test tunes": []}
    for kind, split in splits.items():
        prompts = [place.describe(i, split, SEED)[:2] for i in range(half)]
        labels = torch.stack([labels_of(attributes, place) for attributes, _ in prompts])
        start = time.perf_counter()
        wavs = {"model": play_all([caption for _, caption in prompts], seed)}
        seconds += time.perf_counter() - start
        if floors:
            clips = [place.example(i, split, SEED, model.config.seconds)[0] for i in range(half)]
            wavs["real"] = torch.from_numpy(np.stack(clips))
            wavs["codec"] = in_parts(lambda codes: codec.decode(codes.to(device))[:, 0].cpu(), code(wavs["real"]))
            (solo, none), bells = signals.SOLO[data]
            alone = torch.tensor([row[solo] == none and row["instrument"] != bells for row, _ in prompts])
            for who, what in (("model", "model"), ("test tunes", "codec")):
                heard[who].append((wavs[what], code(wavs[what]), alone))
        for what in embeddings:
            read = in_parts(judge.read, wavs[what])
            result["adherence"][f"{what}, {kind}"] = adherence(read, labels, place.ATTRIBUTES)
            result["right"][f"{what}, {kind}"] = "".join(str(n) for n in (read == labels).sum(dim=1).tolist())
            embeddings[what].append(in_parts(judge.embed, wavs[what]))
    reference = torch.stack([torch.from_numpy(place.example(i, split, SEED + 1, model.config.seconds)[0])
                             for split in splits.values() for i in range(half)])
    reference = in_parts(judge.embed, reference)
    result["frechet"] = {what: frechet(torch.cat(parts), reference) for what, parts in embeddings.items()}
    captions = [place.describe(i, "valid", SEED)[1] for i in range(repeated) for _ in range(4)]
    repeats = in_parts(judge.embed, play_all(captions, seed + 1))
    result["diversity"] = {"samples of one prompt": spread(repeats, 4), "real clips": spread(reference[:half], half)}
    if floors and data == "tunes":
        wavs, codes, alone = ({who: torch.cat([row[i] for row in rows]) for who, rows in heard.items()}
                              for i in range(3))
        result["memorised"] = memorised(place, wavs, codes, alone, model.config.seconds, codec, judge, device)
    if swaps:
        *captions, labels, which = swapped_prompts(swaps, place=place)
        read = [judge.read(play_all(side, seed + 2)) for side in captions]
        result["swaps"] = swap_shares(*read, labels, which)
    if losses:
        entries, = entries_of(data, {"valid": 64}, model.config.seconds)
        clips, _ = encode(entries, codec, encoder, model.config.seconds, cache, device)
        values = validate(model, clips, device, nullcontext)
        result["cross_entropy"] = {f"codebook {k + 1}": sum(values[k].values()) / len(values[k]) for k in values}
    result["chance_cross_entropy"] = math.log(model.config.card)
    result["seconds_per_clip"] = seconds / (2 * half)
    return result


def print_table(result, place=world):
    say(f"\nshare of {result['n_prompts']} clips in which the judge hears what the prompt asks for")
    say(f"{'':16}" + "".join(f"{name:>17}" for name in [*place.ATTRIBUTES, "overall"]))
    for who, shares in result["adherence"].items():
        cells = (f"{s['share']:6.1%} {s['interval'][0]:4.0%}-{s['interval'][1]:.0%}" for s in shares.values())
        say(f"{who:16}" + "".join(f"{cell:>17}" for cell in cells))
    say("chance          " + "".join(f"{1 / len(values):>16.1%} " for values in place.ATTRIBUTES.values()))
    for name, case in result.get("swaps", {}).items():
        say(f"one word swapped: {name:32}{case['share']:6.1%}  {case['interval'][0]:.0%}-{case['interval'][1]:.0%}")
    for name in [name for name in ("frechet", "diversity", "cross_entropy") if name in result]:
        say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in result[name].items()))
    for who, shares in result.get("memorised", {}).items():
        say(f"memorised, {who}: " + ", ".join(f"{name} {value:.3f}" for name, value in shares.items()))
    say(f"chance cross-entropy {result['chance_cross_entropy']:.3f}; {result['seconds_per_clip']:.2f} s per clip")


def main():
    parser = Parser(description="evaluate a model of a world")
    parser.add_argument("--data", choices=WORLDS, default="toy")
    parser.add_argument("--judge", help="a judge's file; default: the one that ships for the world")
    parser.add_argument("--model", default="toy", help="as that of sample.py")
    parser.add_argument("--n", type=int, default=300, help="prompts")
    parser.add_argument("--swaps", type=int, default=100, help="pairs of prompts that differ in one attribute; 0: none")
    parser.add_argument("--samples-only", action="store_true", help="no floors and no validation loss")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rescorer", help="a second model that rescores, as that of sample.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", default="cache")
    add_flags(parser, SamplingConfig)
    args = parser.parse_args()
    if args.n < 4 or min(args.seed, args.swaps) < 0:
        raise ValueError(f"want --n at least 4, --seed and --swaps at least 0, not {args.n}, {args.seed}, {args.swaps}")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")
    config = from_flags(args, SamplingConfig(**load_model(args.model)[1].sampling))
    result = evaluate(args.model, config, pick_device(args.device), args.n, args.swaps,
                      not args.samples_only, not args.samples_only, args.seed,
                      cache=args.cache, rescorer=args.rescorer, data=args.data, judge=args.judge)
    print_table(result, world_of(args.data))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
