"""The judge: a small network that listens to a toy clip and says which instrument, melody, tempo, register and drums it
hears; its last hidden layer serves as the embedding for a Frechet audio distance.

It is trained on synthesised clips of all attribute combinations, with random loudness, shifts, noise and tone. Some of
them it also hears through the toy codec, so as not to take the codec's hiss for a drum; the clips that it judges later
are others, and what a model made it never hears.

    python -m toy.judge --out runs/judge            # train
    python -m toy.judge --check    # how well the shipped judge reads fresh clips, and whether plain measures agree
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from encodec_wrap import load_codec
from support.cli import Parser, run
from support.files import load_strictly, read_checkpoint, save_whole
from toy import signals
from toy.mel import log_mel, mel_spectrogram
from toy.world import ATTRIBUTES, SAMPLE_RATE, combinations, render

WEIGHTS = Path(__file__).parent / "weights" / "judge.pt"
FLOOR = math.log(1e-2)  # of `log_mel`


class Judge(nn.Module):
    """A convolutional network on log-mel spectrograms with one linear reader per attribute."""

    def __init__(self, width=48, embedding=96):
        super().__init__()
        channels = (1, width // 2, width, width)
        self.images = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(channels, channels[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in channels[1:])
        self.squeeze = nn.Conv1d(width * 8, 2 * width, 1)
        self.times = nn.ModuleList(nn.Conv1d(2 * width, 2 * width, 5, padding=2) for _ in range(3))
        self.hidden = nn.Linear(4 * width, embedding)
        self.readers = nn.ModuleDict({name: nn.Linear(embedding, len(values)) for name, values in ATTRIBUTES.items()})

    def embed(self, wav):
        """Audio (B, S) at 16 kHz -> embeddings (B, E)."""
        return self.embed_image(log_mel(mel_spectrogram(wav, SAMPLE_RATE)))

    def embed_image(self, image):
        """Log-mel spectrograms (B, mels, frames) -> embeddings (B, E)."""
        x = image[:, None]
        for conv, norm in zip(self.images, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        x = F.gelu(self.squeeze(x.flatten(1, 2)))  # (B, 2 W, frames / 8)
        for conv in self.times:
            x = x + F.gelu(conv(x))
        return F.gelu(self.hidden(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)))

    def forward(self, image):
        """Log-mel spectrograms (B, mels, frames) -> {attribute: logits (B, values)}."""
        embedding = self.embed_image(image)
        return {name: reader(embedding) for name, reader in self.readers.items()}

    @torch.inference_mode()
    def read(self, wav):
        """Audio (B, S) -> (B, 5) long: the index of the value heard, in the order of `ATTRIBUTES`."""
        logits = self(log_mel(mel_spectrogram(wav, SAMPLE_RATE)))
        return torch.stack([x.argmax(dim=1) for x in logits.values()], dim=1)


def load_judge(path=WEIGHTS):
    """The shipped judge, in eval mode."""
    judge = Judge()
    content = read_checkpoint(path, ("judge",))
    load_strictly(judge, {name: tensor.float() for name, tensor in content["judge"].items()}, path)
    return judge.eval().requires_grad_(False)


def draw_clips(n, seed):
    """`n` clips of random combinations: (wav (n, S), labels (n, 5))."""
    rng = np.random.default_rng([seed, 99])
    rows = combinations("train") + combinations("unseen")
    wavs, labels = [], []
    for _ in trange(n, desc="synthesis"):
        attributes = rows[rng.integers(len(rows))]
        wavs.append(torch.from_numpy(render(attributes, rng)).half())
        labels.append([values.index(attributes[name]) for name, values in ATTRIBUTES.items()])
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


def through_codec(wav, name="toy"):
    """Clips (n, S) as the codec writes and reads them: (n, S) float16."""
    codec = load_codec(name)
    parts = tqdm(wav.split(8), desc="through the codec")
    return torch.cat([codec.decode(codec.encode(part[:, None].float()))[:, 0].half() for part in parts])


def accuracy(judge, wav, labels):
    """{attribute: share read right} over clips (n, S) with labels (n, 5)."""
    read = torch.cat([judge.read(part.float()) for part in wav.split(50)])
    return dict(zip(ATTRIBUTES, (read == labels).float().mean(dim=0).tolist(), strict=True))


def cross_check(judge, wav, labels):
    """How often plain signal measures and the judge agree on clips without drums: {attribute: (n, three shares)}.

    The shares: the measure reads what was played, the judge reads it, and both read the same. A bell's partials are no
    multiples of one pitch, so that its register is not asked of the measure.
    """
    names, result = list(ATTRIBUTES), {}
    for name, measure in signals.READERS.items():
        rows = labels[:, names.index("drums")] == ATTRIBUTES["drums"].index("off")
        if name == "register":
            rows &= labels[:, names.index("instrument")] != ATTRIBUTES["instrument"].index("bell")
        truth = labels[rows, names.index(name)]
        heard = torch.cat([judge.read(part.float()) for part in wav[rows].split(50)])[:, names.index(name)]
        measured = torch.tensor([ATTRIBUTES[name].index(measure(x.float().numpy())) for x in wav[rows]])
        pairs = (measured, truth), (heard, truth), (measured, heard)
        result[name] = int(rows.sum()), [(a == b).float().mean().item() for a, b in pairs]
    return result


def train(args):
    torch.manual_seed(args.seed)
    wav, labels = draw_clips(args.clips, args.seed)
    if args.through_codec:
        wav = torch.cat([wav, through_codec(wav[:args.through_codec])])
        labels = torch.cat([labels, labels[:args.through_codec]])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
    bar = trange(args.steps)
    for _ in bar:
        rows = torch.randint(len(wav), (32,))
        image = log_mel(mel_spectrogram(disturb(wav[rows].float()), SAMPLE_RATE))
        logits = judge(smudge(image))
        loss = sum(F.cross_entropy(x, y) for x, y in zip(logits.values(), labels[rows].T, strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    save_whole({"judge": {name: tensor.half() for name, tensor in judge.state_dict().items()}}, args.out / "judge.pt")
    return args.out / "judge.pt"


def main():
    parser = Parser(description="train or check the toy judge")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--through-codec", type=int, default=2000, help="clips to hear through the toy codec as well")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="do not train, check the shipped weights")
    args = parser.parse_args()
    judge = load_judge(WEIGHTS if args.check else train(args))
    wav, labels = draw_clips(500, args.seed + 1)
    coded = accuracy(judge, through_codec(wav), labels)
    for name, share in accuracy(judge, wav, labels).items():
        print(f"{name:10} {share:.1%} of 500 fresh clips read right, {coded[name]:.1%} of them through the codec")
    for name, (n, shares) in cross_check(judge, wav, labels).items():
        measured, heard, alike = (f"{share:.1%}" for share in shares)
        print(f"{name:10} of {n} clips without drums: a plain measure {measured}, judge {heard}, the same {alike}")


if __name__ == "__main__":
    run(main)
