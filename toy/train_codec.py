"""Train the toy world's EnCodec: 16 kHz, 50 frames per second, K = 4 codebooks, on toy music or yours.

The losses are EnCodec's without its discriminators: L1 in time, distances between mel spectrograms at several
resolutions, linear and logarithmic, and the quantizer's commitment loss. The first two, taken relative to the target,
weigh most: they are what makes a small network find the notes in minutes. The package's quantizer learns its codebooks
by moving averages; entries that die are put back on real latents here. Latents flow unquantized for the first steps, so
that k-means, which starts the codebooks, sees an encoder that already encodes something.

    python -m toy.train_codec --out runs/codec --minutes 30
    python -m toy.train_codec --data my_music --out runs/my_codec --minutes 120    # any folder of audio files
"""

import csv
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm, trange

from encodec_wrap import Codec, CodecConfig
from support.audio import load_audio
from support.cli import Parser, run
from toy.mel import log_mel, mel_spectrogram
from toy.world import FRAME_RATE, SAMPLE_RATE, SECONDS, example

UNQUANTIZED_STEPS, UNQUANTIZED_SHARE = 1500, 0.2  # whichever is over first; a share of the steps or the minutes


def toy_clips(n):
    """`n` clips of the toy world: (n, S) float16."""
    return torch.stack([torch.from_numpy(example(i, "train", seed=1)[0]).half() for i in trange(n, desc="synthesis")])


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
            print(f"skipped {path}: {error}")
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


def reconstruction_losses(wav, target):
    """(B, S) twice -> relative L1 in time and between mel spectrograms, L1 between log-mel spectrograms."""
    time_loss = (wav - target).abs().mean() / target.abs().mean()
    linear_loss = log_loss = 0.0
    for n_fft in (256, 512, 1024, 2048):
        a, b = (mel_spectrogram(x, SAMPLE_RATE, n_fft, n_fft // 4) for x in (wav, target))
        linear_loss = linear_loss + (a - b).abs().mean() / b.mean() / 4
        log_loss = log_loss + (log_mel(a) - log_mel(b)).abs().mean() / 4
    return time_loss, linear_loss, log_loss


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
    parser.add_argument("--data", default="toy", help="toy, or a folder of audio files")
    parser.add_argument("--clips", type=int, default=3000, help="4-second clips to synthesise or read, and cut from")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    codec = Codec.from_config(CodecConfig()).to(args.device).train()
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
    clips = toy_clips(args.clips) if args.data == "toy" else folder_clips(Path(args.data), args.clips, SECONDS)
    start, log = time.time() - spent, (args.out / "log.csv").open("a")
    writer, bar = csv.writer(log), tqdm(total=args.steps, initial=step)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    while True:
        progress = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * min(1, 2 * (1 - progress))
        target = draw_cuts(clips, args.batch_size, args.seconds).to(args.device)  # (B, S)
        latents = model.encoder(target[:, None])  # (B, D, T)
        commit = torch.zeros((), device=args.device)
        quantized = latents
        if step >= UNQUANTIZED_STEPS or progress >= UNQUANTIZED_SHARE:
            if not model.quantizer.vq.layers[0]._codebook.inited:
                start_codebooks(model, draw_cuts(clips, 60, args.seconds).to(args.device))
            quantized, _, commits = model.quantizer.vq(latents)
            commit = commits.mean()
            if step % 50 == 0:
                revive_dead_codes(model.quantizer, latents)
        wav = model.decoder(quantized)[:, 0]
        losses = reconstruction_losses(wav, target)
        loss = 10 * losses[0] + 10 * losses[1] + losses[2] + commit
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
