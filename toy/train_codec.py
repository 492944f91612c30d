"""Train an EnCodec of 16 kHz, 50 frames per second, K = 4 codebooks for the toy world, the tunes, or your music.

The losses are EnCodec's without its discriminators: L1 in time, distances between mel spectrograms at several
resolutions, linear and logarithmic, and the quantizer's commitment loss. The first two, taken relative to the target,
weigh most: they are what makes a small network find the notes in minutes. The package's quantizer learns its codebooks
by moving averages; entries that die are put back on real latents here. Latents flow unquantized for the first steps, so
that k-means, which starts the codebooks, sees an encoder that already encodes something.

    python -m toy.train_codec --out runs/codec --minutes 30
    python -m toy.train_codec --data tunes --out runs/tunes_codec --minutes 80 --bf16
    python -m toy.train_codec --data tunes --check runs/tunes_codec/codec.pt       # how near it comes to fresh clips
    python -m toy.train_codec --data my_music --out runs/my_codec --minutes 120    # any folder of audio files
"""

import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm, trange

from encodec_wrap import Codec, CodecConfig, load_codec
from support.audio import load_audio
from support.cli import Parser, run, say
from toy import WORLDS, world_of
from toy.mel import log_mel, mel_spectrogram
from toy.world import FRAME_RATE, SAMPLE_RATE, SECONDS

UNQUANTIZED_STEPS, UNQUANTIZED_SHARE = 1500, 0.2  # whichever is over first; a share of the steps or the minutes


@dataclass
class Recipe:
    """What differs between a small tuned world and real sounds: the network's size and what its loss compares.

    resolutions: (n_fft, mel bands) of each spectrogram; weights: of the three reconstruction losses.
    """

    codec: CodecConfig
    resolutions: tuple = ((256, 64), (512, 64), (1024, 64), (2048, 64))
    weights: tuple = (10.0, 10.0, 1.0)


RECIPES = {
    "toy": Recipe(CodecConfig()),
    "tunes": Recipe(CodecConfig(codebook_size=1024, dimension=128, n_filters=16),
                    ((128, 16), (256, 32), (512, 64), (1024, 128), (2048, 256)), (3.0, 10.0, 3.0)),
}


def world_clips(name, n, split="train"):
    """`n` clips of a world: (n, S) float16."""
    world = world_of(name)
    clips = (world.example(i, split, seed=1)[0] for i in trange(n, desc="synthesis"))
    return torch.stack([torch.from_numpy(clip).half() for clip in clips])


def folder_clips(folder, n, seconds):
    """At most `n` pieces of `seconds` from the audio files in a folder, in random order: (n, S) float16.

    Raises ValueError if there is no folder or no audio of that length in it.
    """
    length, pieces = int(seconds * SAMPLE_RATE), []
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".txt", ".json")]
    for path in tqdm(paths, desc="reading"):
        try:
            wav = load_audio(path, SAMPLE_RATE)[0]
        except ValueError as error:
            say(f"skipped {path}: {error}")
            continue
        pieces.append(wav[:len(wav) // length * length].view(-1, length).half())
    if not sum(map(len, pieces)):
        raise ValueError(f"--data {folder}: want a folder of audio files of {seconds:g} seconds or more")
    clips = torch.cat(pieces)
    return clips[torch.randperm(len(clips))[:n]]


def draw_cuts(clips, n, seconds):
    """`n` cuts of `seconds` from random frames of random clips on: (n, S) float32."""
    samples, hop = int(seconds * SAMPLE_RATE), SAMPLE_RATE // FRAME_RATE
    rows = torch.randint(len(clips), (n,))
    starts = hop * torch.randint((clips.shape[1] - samples) // hop + 1, (n,))
    return torch.stack([clips[row, start:start + samples] for row, start in zip(rows, starts, strict=True)]).float()


def reconstruction_losses(wav, target, resolutions=RECIPES["toy"].resolutions):
    """(B, S) twice -> relative L1 in time and between mel spectrograms, L1 between log-mel spectrograms."""
    time_loss = (wav - target).abs().mean() / target.abs().mean()
    linear_loss = log_loss = 0.0
    for n_fft, mels in resolutions:
        a, b = (mel_spectrogram(x, SAMPLE_RATE, n_fft, n_fft // 4, mels) for x in (wav, target))
        linear_loss = linear_loss + (a - b).abs().mean() / b.mean() / len(resolutions)
        log_loss = log_loss + (log_mel(a) - log_mel(b)).abs().mean() / len(resolutions)
    return time_loss, linear_loss, log_loss


def check(codec, clips):
    """What a codec makes of clips (n, S): {measure: value}; both distances between mel spectrograms of 64 bands."""
    sums, codes = torch.zeros(3), []
    for wav in tqdm(clips.split(8), desc="through the codec"):
        codes.append(codec.encode(wav[:, None].float()))
        a, b = (mel_spectrogram(x, SAMPLE_RATE) for x in (codec.decode(codes[-1])[:, 0, :wav.shape[1]], wav.float()))
        logs = (log_mel(a) - log_mel(b)).abs().mean(dim=(1, 2)).sum()
        sums += torch.stack([(a - b).abs().sum(), b.sum(), logs])
    codes = torch.cat(codes).transpose(0, 1).flatten(1)  # (K, n * T)
    shares = [row.bincount(minlength=codec.codebook_size) / len(row) for row in codes]
    bits = [-(share * share.clamp(min=1e-9).log2()).sum().item() for share in shares]
    return {"relative mel distance": (sums[0] / sums[1]).item(), "log-mel distance": sums[2].item() / len(clips),
            "bits per code": sum(bits) / len(bits)}


@torch.no_grad()
def start_codebooks(model, wav):
    """Let the quantizer run its k-means on the latents of audio (B, S)."""
    model.quantizer.vq(model.encoder(wav[:, None]))


@torch.no_grad()
def revive_dead_codes(quantizer, latents, threshold=0.1):
    """Move codebook entries that hardly any latent chooses onto residuals of this batch: latents (B, D, T)."""
    residual = latents.transpose(1, 2).reshape(-1, latents.shape[1])  # (B * T, D)
    for layer in quantizer.vq.layers:
        book = layer._codebook
        dead = (book.cluster_size < threshold).nonzero().flatten()[:len(residual)]
        fresh = residual[torch.randperm(len(residual))[:len(dead)]]
        book.embed[dead], book.embed_avg[dead], book.cluster_size[dead] = fresh, fresh * 2.0, 2.0
        residual = residual - book.decode(book.quantize(residual))


def main():
    parser = Parser(description="train the toy codec")
    parser.add_argument("--out", type=Path, default=Path("runs/codec"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=30_000, help="the learning rate reaches zero here or at --minutes")
    parser.add_argument("--data", default="toy", help="toy, tunes, or a folder of audio files")
    parser.add_argument("--clips", type=int, default=3000, help="4-second clips to synthesise or read, and cut from")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", choices=RECIPES, help="size and loss; default: that of --data, toy for a folder")
    parser.add_argument("--bf16", action="store_true", help="run encoder and decoder in bfloat16")
    parser.add_argument("--check", type=Path, help="do not train: measure this codec file on 200 fresh clips of --data")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    if args.steps < 1 or not args.minutes > 0:
        raise ValueError(f"--steps {args.steps} --minutes {args.minutes:g}: both must be above 0")
    if args.check:
        codec = load_codec(args.check)
        fresh = world_clips(args.data, 200, "test" if args.data == "tunes" else "valid")
        say(", ".join(f"{name} {value:.3f}" for name, value in check(codec, fresh).items()))
        return
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.recipe or (args.data if args.data in RECIPES else "toy")]
    codec = Codec(recipe.codec).to(args.device).train()
    model = codec.model
    for layer in model.quantizer.vq.layers:
        layer._codebook.threshold_ema_dead_code = 0  # revive_dead_codes does it
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=0.01)
    step, spent = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        if not checkpoint.is_file():
            raise ValueError(f"--resume: there is no {checkpoint}")
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
        torch.manual_seed(args.seed + step)  # other cuts than before
    elif checkpoint.exists():
        raise ValueError(f"{args.out} holds a run already: give --resume, or another --out")
    known = args.data in WORLDS
    clips = world_clips(args.data, args.clips) if known else folder_clips(Path(args.data), args.clips, SECONDS)
    amp = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)
    start, log = time.time() - spent, (args.out / "log.csv").open("a")
    writer, bar = csv.writer(log), tqdm(total=args.steps, initial=step)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    while True:
        progress = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * min(1, 2 * (1 - progress))
        target = draw_cuts(clips, args.batch_size, args.seconds).to(args.device)  # (B, S)
        with amp:
            latents = model.encoder(target[:, None])  # (B, D, T)
        latents = latents.float()
        commit = torch.zeros((), device=args.device)
        quantized = latents
        if step >= UNQUANTIZED_STEPS or progress >= UNQUANTIZED_SHARE:
            if not model.quantizer.vq.layers[0]._codebook.inited:
                start_codebooks(model, draw_cuts(clips, 60, args.seconds).to(args.device))
            quantized, _, commits = model.quantizer.vq(latents)
            commit = commits.mean()
            if step % 50 == 0:
                revive_dead_codes(model.quantizer, latents)
        with amp:
            wav = model.decoder(quantized)[:, 0]
        losses = reconstruction_losses(wav.float(), target, recipe.resolutions)
        loss = sum(weight * x for weight, x in zip(recipe.weights, losses, strict=True)) + commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        bar.update()
        if step % 50 == 0:
            used = [int((layer._codebook.cluster_size > 0.5).sum()) for layer in model.quantizer.vq.layers]
            row = [step, round(time.time() - start), *(round(x.item(), 4) for x in (*losses, commit)), *used]
            writer.writerow(row)
            log.flush()
            bar.set_postfix_str(f"time {row[2]} mel {row[3]} log-mel {row[4]} commit {row[5]} used {used}")
        if step % 500 == 0:
            save(args, codec, optimizer, step, time.time() - start)
    save(args, codec, optimizer, step, time.time() - start)


def save(args, codec, optimizer, step, spent):
    """Write the training state and the codec file, each whole or not at all."""
    state = {"model": codec.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, args.out / "checkpoint.tmp")
    os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
    codec.save(args.out / "codec.pt", {"steps": step, "minutes": spent / 60, "seed": args.seed})


if __name__ == "__main__":
    run(main)
