"""The judge: a small network that listens to a clip and says which value of each attribute of its world it hears; its
last hidden layer serves as the embedding for a Frechet audio distance.

It is trained on clips of all attribute combinations, with random loudness, shifts, noise and tone. Some of them it also
hears through the world's codec, so as not to take the codec's hiss for a drum; the clips that it judges later are
others, of other tunes where there are tunes, and what a model made it never hears.

    python -m toy.judge --out runs/judge            # train
    python -m toy.judge --check    # how well the shipped judge reads fresh clips, and whether plain measures agree
    python -m toy.judge --data tunes --clips 8000 --steps 3000 --out runs/tunes_judge
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from encodec_wrap import load_codec
from support.cli import Parser, run, say
from support.files import load_strictly, read_checkpoint, save_whole
from toy import WORLDS, signals, weights_of, world, world_of
from toy.mel import log_mel, mel_spectrogram, onset_bands, pitch_profile

FLOOR = math.log(1e-2)  # of `log_mel`


@dataclass
class Ears:
    """What a judge hears by: a log-mel spectrogram and, for keys and dances, what the two nets below read."""

    sample_rate: int = world.SAMPLE_RATE
    n_fft: int = 1024
    hop: int = 256
    n_mels: int = 64  # a multiple of 8
    music: bool = False  # whether there are a `KeyNet` and a `RhythmNet`


EARS = {"toy": Ears(), "tunes": Ears(music=True)}


class KeyNet(nn.Module):
    """Reads keys off a pitch profile. It slides round the octave, so that no key is different from any other."""

    def __init__(self, width=48):
        super().__init__()
        self.slide, self.mix = nn.Conv1d(6, width, 36), nn.Conv1d(width, width, 1)

    def forward(self, profile):
        """Profiles (B, 6, 36) -> (B, 2 * width)."""
        x = (profile - profile.mean(dim=(1, 2), keepdim=True)) / profile.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        x = F.gelu(self.mix(F.gelu(self.slide(F.pad(x, (0, 35), mode="circular")))))
        return torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)


class RhythmNet(nn.Module):
    """Reads rhythms off onsets: dilated convolutions that see two seconds in steps of 10 ms."""

    def __init__(self, width=48):
        super().__init__()
        self.first = nn.Conv1d(14, width, 7, padding=3)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation) for dilation in (1, 2, 4, 8, 16, 24))

    def forward(self, bands):
        """Onset bands (B, 14, frames) -> (B, 2 * width)."""
        x = F.gelu(self.first(bands))
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)


class Judge(nn.Module):
    """A convolutional network on log-mel spectrograms with one linear reader per attribute.

    attributes: {name: values}, those of a world.
    """

    def __init__(self, attributes=world.ATTRIBUTES, ears=EARS["toy"], width=48, embedding=96):
        super().__init__()
        self.attributes, self.ears = attributes, ears
        channels = (1, width // 2, width, width)
        self.images = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, channels[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in channels[1:])
        self.squeeze = nn.Conv1d(width * ears.n_mels // 8, 2 * width, 1)
        self.times = nn.ModuleList(nn.Conv1d(2 * width, 2 * width, 5, padding=2) for _ in range(3))
        self.music = nn.ModuleList([KeyNet(width), RhythmNet(width)] if ears.music else [])
        self.hidden = nn.Linear(4 * width * (2 if ears.music else 1), embedding)
        self.readers = nn.ModuleDict({name: nn.Linear(embedding, len(values)) for name, values in attributes.items()})

    def hear(self, wav):
        """Audio (B, S) at 16 kHz -> what is read of it: [log-mel spectrograms (B, mels, frames), ...]."""
        rate, n_fft, hop, n_mels, music = vars(self.ears).values()
        heard = [log_mel(mel_spectrogram(wav, rate, n_fft, hop, n_mels))]
        return heard + ([pitch_profile(wav, rate), onset_bands(wav, rate)] if music else [])

    def embed(self, wav):
        """Audio (B, S) at 16 kHz -> embeddings (B, E)."""
        return self.embed_heard(*self.hear(wav))

    def embed_heard(self, image, *music):
        """What `hear` gives -> embeddings (B, E)."""
        x = image[:, None]
        for conv, norm in zip(self.images, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = F.gelu(self.squeeze(x.flatten(1, 2)))  # (B, 2 W, frames / 8)
        for conv in self.times:
            x = x + F.gelu(conv(x))
        more = [net(part) for net, part in zip(self.music, music, strict=True)]
        return F.gelu(self.hidden(torch.cat([x.mean(dim=2), x.amax(dim=2), *more], dim=1)))

    def forward(self, *heard):
        """What `hear` gives -> {attribute: logits (B, values)}."""
        embedding = self.embed_heard(*heard)
        return {name: reader(embedding) for name, reader in self.readers.items()}

    @torch.inference_mode()
    def read(self, wav):
        """Audio (B, S) -> (B, attributes) long: the index of the value heard of each attribute."""
        return torch.stack([x.argmax(dim=1) for x in self(*self.hear(wav)).values()], dim=1)


def load_judge(name_or_path="toy"):
    """The judge that ships for a world, "toy" or "tunes", or that of a file; in eval mode."""
    path = weights_of(name_or_path) / "judge.pt" if name_or_path in WORLDS else Path(name_or_path)
    content = read_checkpoint(path, ("judge",))
    judge = Judge(content.get("attributes", world.ATTRIBUTES), Ears(**content.get("ears", {})))
    load_strictly(judge, {name: tensor.float() for name, tensor in content["judge"].items()}, path)
    return judge.eval().requires_grad_(False)


def draw_clips(n, seed, name="toy", **tunes):
    """`n` clips of random combinations: (wav (n, S) float16, labels (n, attributes)); `tunes` goes to `render`."""
    place, rng = world_of(name), np.random.default_rng([seed, 99])
    rows = place.combinations("train") + place.combinations("unseen")
    wavs, labels = [], []
    for _ in trange(n, desc="synthesis"):
        attributes = rows[rng.integers(len(rows))]
        wavs.append(torch.from_numpy(place.render(attributes, rng, **tunes)).half())
        labels.append([values.index(attributes[name]) for name, values in place.ATTRIBUTES.items()])
    return torch.stack(wavs), torch.tensor(labels)


def disturb(wav):
    """Random loudness, a small shift in time, and faint noise: (B, S) -> (B, S)."""
    wav = wav.roll(int(torch.randint(-1600, 1600, ())), dims=1) * (0.4 + 0.8 * torch.rand(len(wav), 1))
    return wav + torch.randn_like(wav) * 10 ** (-2 - 3 * torch.rand(len(wav), 1))


def smudge(image):
    """Another room and a rough playback: log-mel (B, mels, frames) -> the same with a random tone control and speckle.

    What music is must be heard through how it sounds, or the judge would take a codec's roughness for an instrument.
    """
    B, mels, _ = image.shape
    control = F.interpolate(torch.randn(B, 1, 6), mels, mode="linear", align_corners=True)  # (B, 1, mels)
    speckle = 0.8 * torch.rand(B, 1, 1) * torch.randn_like(image)
    return (image + control.transpose(1, 2) + speckle).clamp(min=FLOOR)


def through_codec(wav, path):
    """Clips (n, S) as the codec in a file writes and reads them: (n, S) float16."""
    codec = load_codec(path)
    parts = tqdm(wav.split(8), desc="through the codec")
    return torch.cat([codec.decode(codec.encode(part[:, None].float()))[:, 0].half() for part in parts])


def accuracy(judge, wav, labels):
    """{attribute: share read right} over clips (n, S) with labels (n, attributes)."""
    read = torch.cat([judge.read(part.float()) for part in wav.split(50)])
    return dict(zip(judge.attributes, (read == labels).float().mean(dim=0).tolist(), strict=True))


def cross_check(judge, wav, labels, name="toy"):
    """How often plain signal measures and the judge agree on clips of nothing but a melody: {attribute: (n, 3 shares)}.

    The shares: the measure reads what was played, the judge reads it, and both read the same. The partials of bells are
    no multiples of one pitch, so that their register is not asked of the measure.
    """
    attributes, result = judge.attributes, {}
    names = list(attributes)
    (solo, alone), bells = signals.SOLO[name]

    def rows_of(attribute, value):
        return labels[:, names.index(attribute)] == attributes[attribute].index(value)

    for what, measure in signals.READERS[name].items():
        rows = rows_of(solo, alone)
        if what == "register":
            rows &= ~rows_of("instrument", bells)
        truth = labels[rows, names.index(what)]
        heard = torch.cat([judge.read(part.float()) for part in wav[rows].split(50)])[:, names.index(what)]
        measured = torch.tensor([attributes[what].index(measure(x.float().numpy())) for x in wav[rows]])
        pairs = (measured, truth), (heard, truth), (measured, heard)
        result[what] = int(rows.sum()), [(a == b).float().mean().item() for a, b in pairs]
    return result


def train(args):
    if (args.out / "judge.pt").exists():
        raise ValueError(f"{args.out} holds a judge already: give another --out")
    torch.manual_seed(args.seed)
    wav, labels = draw_clips(args.clips, args.seed, args.data)
    if args.through_codec:
        wav = torch.cat([wav, through_codec(wav[:args.through_codec], args.codec)])
        labels = torch.cat([labels, labels[:args.through_codec]])
    judge = Judge(world_of(args.data).ATTRIBUTES, EARS[args.data])
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
    bar = trange(args.steps)
    for _ in bar:
        rows = torch.randint(len(wav), (32,))
        image, *music = judge.hear(disturb(wav[rows].float()))
        logits = judge(smudge(image), *(part + 0.1 * torch.randn_like(part) for part in music))
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits.values(), labels[rows].T, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    content = {"judge": {name: tensor.half() for name, tensor in judge.state_dict().items()}}
    if args.data != "toy":  # the toy judge's file says nothing of itself
        content |= {"attributes": judge.attributes, "ears": asdict(judge.ears)}
    save_whole(content, args.out / "judge.pt")
    return args.out / "judge.pt"


def main():
    parser = Parser(description="train or check the judge of a world")
    parser.add_argument("--data", choices=WORLDS, default="toy")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--codec", help="a codec's file; default: the one that ships for the world")
    parser.add_argument("--through-codec", type=int, default=2000, help="clips to hear through the codec as well")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", nargs="?", const=True, help="do not train, check the judge that ships, or this file")
    args = parser.parse_args()
    if min(args.steps, args.clips) < 1 or args.through_codec < 0:
        raise ValueError(f"want --steps and --clips at least 1 and --through-codec at least 0, not {args.steps}, "
                         f"{args.clips}, {args.through_codec}")
    args.codec = args.codec or weights_of(args.data) / "codec.pt"
    judge = load_judge((args.data if args.check is True else args.check) if args.check else train(args))
    wav, labels = draw_clips(500, args.seed + 1, args.data, **world_of(args.data).FRESH)
    coded = accuracy(judge, through_codec(wav, args.codec), labels)
    for name, share in accuracy(judge, wav, labels).items():
        say(f"{name:13} {share:.1%} of 500 fresh clips read right, {coded[name]:.1%} of them through the codec")
    for name, (n, shares) in cross_check(judge, wav, labels, args.data).items():
        measured, heard, alike = (f"{share:.1%}" for share in shares)
        say(f"{name:13} of {n} clips of a melody alone: a plain measure {measured}, judge {heard}, the same {alike}")


if __name__ == "__main__":
    run(main)
