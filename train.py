"""Training: one straight loop for the paper's objective, and for the two it is compared with [Sec. 3.1, Sec. 4].

A step draws a codebook (the stage) for the whole batch and, for every clip, a time t and a span mask at the rate
cos(pi t / 2); the loss is the cross-entropy of the hidden tokens of that codebook, and of nothing else. It and those of
the autoregressive and the hybrid model (`--objective`) are in `objectives.py`. The codec and the text encoder have done
their work beforehand: see `data.py`. It leaves out sharding.
Deviation: AdamW as in the paper; the released recipe sets its step sizes by D-Adaptation.

    python train.py --data toy --out runs/toy
    python train.py --data toy --objective ar --out runs/ar
    python train.py --out runs/toy --resume                       # goes on as if it had never stopped
    torchrun --nproc-per-node 4 train.py --data toy --out runs/toy
"""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cli import (
    Parser,
    add_flags,
    check_same,
    from_flags,
    identities,
    multiplies_bf16,
    option,
    pick_device,
    positive,
    run,
    save_whole,
)
from data import load_data
from encodec_wrap import load_codec
from model import OBJECTIVES, MAGNeT, ModelConfig, load_model, load_strictly, read_checkpoint
from objectives import LOSSES, VALIDATED, draw_step, validate
from objectives import MASK_RATES as MASK_RATES  # for those who read what `validate` gives
from t5_encoder import T5Encoder

STATE_KEYS = ("config", "model_config", "codec", "text_encoder", "codec_id", "text_encoder_id",
              "model", "ema", "optimizer", "scaler", "step", "rng")


@dataclass
class TrainConfig:
    """All that decides what a run learns; kept in its checkpoint."""

    objective: str = option("magnet", "masked (magnet), autoregressive (ar), or both (hybrid)", OBJECTIVES)
    data: str = option("toy", "toy, a folder of audio with .txt or .json captions, or a JSON-lines manifest")
    codec: str = option("toy", "toy, encodec_24khz, or a codec file")
    text_encoder: str = option("toy", "toy, t5-small, t5-base, google/flan-t5-small, or a folder")
    n_codebooks: int = option(0, "use only the codec's first K codebooks; 0: all of the toy codec, 4 of encodec_24khz")
    seconds: float = option(4.0, "length of the training clips")
    audio_key: str = option("location", "where a manifest's lines name the audio file")
    caption_key: str = option("main_caption", "where JSON captions and a manifest's lines hold the text")
    toy_clips: int = option(6000, "size of the toy data set")
    text_len: int = option(32, "texts are padded to at least so many tokens")
    dim: int = option(160, "width of the transformer")
    n_heads: int = option(5, "attention heads")
    n_layers: int = option(6, "blocks")
    dropout: float = option(0.0, "dropout inside the blocks")
    span_len: int = option(3, "frames per masked span")
    context_ms: float = option(100.0, "how far stages after the first see on each side; negative: everywhere")
    steps: int = option(18_000, "optimiser steps")
    stage_weights: tuple[float, ...] = option((2.0, 1.0), "how often each codebook is trained, the last number for all "
                                               "that follow; 1: alike, as in the paper")
    batch_size: int = option(8, "clips per step, over all processes")
    accumulate: int = option(1, "split each step's clips into this many parts, to save memory")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(500, "steps of linear warm-up, before the cosine decay")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    clip_norm: float = option(1.0, "gradients are clipped to this norm")
    ema_decay: float = option(0.999, "per step, of the averaged weights that are used for sampling")
    condition_dropout: float = option(0.3, "probability that a clip's text is dropped")
    codebook_dropout: float = option(0.25, "objective ar: probability that later codebooks, from a random one on, are "
                                           "hidden in a clip, as a rescorer meets them")
    seed: int = option(0, "of weights, batches and masks")
    dtype: str = option("auto", "of the matrix products; auto: what the device computes fastest",
                        ("auto", "fp32", "bf16", "fp16"))

    def __post_init__(self):
        for name in ("seconds", "steps", "batch_size", "accumulate", "lr", "span_len", "toy_clips", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name in ("dropout", "condition_dropout", "codebook_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("data", "codec", "text_encoder"):  # local files are found again from any folder
            if getattr(self, name) != "toy" and Path(getattr(self, name)).exists():
                setattr(self, name, str(Path(getattr(self, name)).resolve()))
        if not self.stage_weights or not 0 <= min(self.stage_weights) <= sum(self.stage_weights) - 1e-9:
            raise ValueError(f"--stage-weights must be zero or positive and not all zero, not {self.stage_weights}")
        if not math.isfinite(self.context_ms):
            raise ValueError(f"--context-ms must be a number, negative for full context, not {self.context_ms}")


def learning_rate(step, config):
    """[Sec. 4] Linear warm-up, then a cosine down to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


class AveragedWeights:
    """[Sec. 4] The exponential moving average of a model's weights, which sampling and validation use.

    Deviation: the paper's decay is 0.99, which the released code applies every 10 steps; this is 0.999 at every step.
    """

    def __init__(self, model):
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model, decay, step):
        decay = min(decay, (1 + step) / (10 + step))  # at first a short memory, to forget the random start
        for name, tensor in model.state_dict().items():
            self.weights[name].lerp_(tensor, 1 - decay)


class Log:
    """log.csv: one row per logged step. On resuming, rows after the checkpoint are cut off: they will be made again."""

    def __init__(self, path, columns, resumed_step):
        rows = []
        if resumed_step and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed_step]
        self.seconds = float(rows[-1]["seconds"]) if rows else 0.0  # that the run has taken so far
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def write(self, **row):
        self.writer.writerow({name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()})
        self.file.flush()


def precision(dtype, device):
    """(a function giving the autocast context, whether gradients need scaling) for a --dtype on a device."""
    if dtype == "auto":
        dtype = "bf16" if multiplies_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if dtype == "fp32":
        return nullcontext, False
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return lambda: torch.autocast(device.type, kind), dtype == "fp16"


def random_states(generator, device):
    """Every random state that training draws from."""
    states = {"generator": generator.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def restore_random_states(states, generator, device):
    generator.set_state(states["generator"])
    torch.set_rng_state(states["torch"])
    if device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type])


def write_samples(out, step, captions, device):
    """Let `sample.py` play a few captions with the checkpoint just written; a failure is told, and training goes on."""
    command = [sys.executable, str(Path(__file__).with_name("sample.py")), *captions, "--model", str(out),
               "--out", str(out / "samples" / f"step-{step:06d}.wav"), "--device", device.type]
    if subprocess.run(command, capture_output=True).returncode:
        print(f"could not write samples; to see why: {' '.join(map(repr, command))}")


def parse_args():
    parser = Parser(description="Train a MAGNeT.")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, with its settings")
    parser.add_argument("--init-from", help="start from the weights of this run folder, checkpoint file, or toy")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder for codes and text embeddings")
    parser.add_argument("--log-every", type=positive, default=50)
    parser.add_argument("--val-every", type=positive, default=500)
    parser.add_argument("--save-every", type=positive, default=500)
    parser.add_argument("--sample-every", type=int, default=2000, help="steps between audio samples; 0: none")
    parser.add_argument("--sample-captions", nargs="+", default=["a slow deep flute plays a rising melody, with drums",
                                                                 "a fast high bell plays an arpeggio, without drums"])
    add_flags(parser, TrainConfig)
    return parser.parse_args()


def read_config(args, checkpoint):
    """(what to train, the state to go on from or None); a run that exists is only ever touched by --resume."""
    if not args.resume:
        if checkpoint.exists():
            raise ValueError(f"{args.out} holds a run already: give --resume, or another --out")
        return from_flags(args, TrainConfig), None
    if not checkpoint.is_file():
        raise ValueError(f"--resume: there is no {checkpoint}")
    state = read_checkpoint(checkpoint, STATE_KEYS)
    try:
        config = TrainConfig(**state["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}: its config is not one of this version ({error})") from error
    given, default, saved = asdict(from_flags(args, TrainConfig)), asdict(TrainConfig()), asdict(config)
    for name, value in given.items():
        if value not in (default[name], saved[name]):
            raise ValueError(f"--resume goes on with the run's own settings: {name} is {saved[name]}, not {value}; "
                             "to change it start a new run with --init-from")
    return config, state


def train(args, device, rank, world):
    """One process's part of a run; `world` processes draw the same batches and each takes its slice of them."""
    checkpoint = args.out / "checkpoint.pt"
    config, state = read_config(args, checkpoint)
    if config.batch_size % (world * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} must be a multiple of processes x --accumulate = "
                         f"{world} x {config.accumulate}")
    codec = load_codec(config.codec, config.n_codebooks or None, device)
    if not sum(config.stage_weights[:codec.n_codebooks]):
        raise ValueError(f"--stage-weights {config.stage_weights}: trains none of {codec.n_codebooks} codebooks")
    encoder = T5Encoder.from_pretrained(config.text_encoder).to(device)
    if rank > 0:
        dist.barrier()  # the first process fills the cache, the others find it filled
    clips, valid_clips = load_data(config.data, codec, encoder, config.seconds, args.cache, config.audio_key,
                                   config.caption_key, config.toy_clips, device)
    if world > 1 and rank == 0:
        dist.barrier()

    torch.manual_seed(config.seed)
    context = round(config.context_ms / 1000 * codec.frame_rate) if config.context_ms >= 0 else -1
    model_config = ModelConfig(
        n_codebooks=codec.n_codebooks, card=codec.codebook_size, dim=config.dim, n_heads=config.n_heads,
        n_layers=config.n_layers, text_dim=encoder.config.d_model, text_len=config.text_len, context=context,
        span_len=config.span_len, seconds=config.seconds, dropout=config.dropout, objective=config.objective)
    model = MAGNeT(model_config).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    amp, scaled = precision(config.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    if args.init_from and not args.resume:
        load_strictly(model, load_model(args.init_from)[0].state_dict(), args.init_from)
    averaged, first = AveragedWeights(model), 0
    judged = MAGNeT(model_config).to(device).eval()  # wears the averaged weights for validation
    if state:
        check_same(state, codec, encoder)
        load_strictly(model, state["model"], checkpoint)
        try:
            averaged.weights = {name: tensor.to(device) for name, tensor in state["ema"].items()}
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            restore_random_states(state["rng"], generator, device)
            first = int(state["step"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{checkpoint}: is damaged and cannot be resumed from ({error!r})") from error
    if rank == 0:
        print(f"{model}\n{len(clips)} training and {len(valid_clips)} validation clips, on {device} x {world}")
    wrapped = torch.compile(model) if args.compile else model
    if world > 1:
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=True)  # a step uses one stage's head

    def save(step):
        if rank == 0:
            save_whole({
                "config": asdict(config), "model_config": asdict(model_config), "codec": config.codec,
                "text_encoder": config.text_encoder, **identities(codec, encoder), "step": step,
                "model": model.state_dict(), "ema": averaged.weights, "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "rng": random_states(generator, device)}, checkpoint)

    stages, chance, kinds = range(codec.n_codebooks), math.log(model_config.card), VALIDATED[config.objective]
    columns = ["step", "loss", "lr", "seconds", "chance", *(f"val_{k}_{kind}" for k in stages for kind in kinds)]
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "log.csv", columns, first) if rank == 0 else None
    stopping = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopping.append(True))
    losses, start = [], time.time() - (log.seconds if log else 0)
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=rank > 0, unit="step")
    for step in bar:
        rows, keep_text, task = draw_step(clips, len(stages), config, generator)  # alike in every process
        total = max(1.0, task["counted"].sum().item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad(set_to_none=True)
        step_loss = torch.zeros((), device=device)
        codes, text, text_mask = clips.batch(rows)  # as one batch, since the width of the padding has a say
        task |= {"codes": codes, "text": text, "text_mask": text_mask * keep_text[:, None]}
        parts = torch.arange(config.batch_size).view(world, config.accumulate, -1)[rank]
        for i, part in enumerate(parts):
            mine = {name: x[part].to(device) if torch.is_tensor(x) else x for name, x in task.items()}
            waiting = world > 1 and i + 1 < len(parts)  # gradients are exchanged after the last part
            with wrapped.no_sync() if waiting else nullcontext():
                with amp():
                    loss = LOSSES[config.objective](wrapped, **mine)
                scaler.scale(loss / total * world).backward()  # DistributedDataParallel averages over processes
            step_loss += loss.detach() / total
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        averaged.update(model, config.ema_decay, step)
        if world > 1:
            dist.all_reduce(step_loss)
        losses.append(step_loss.item())
        done = step + 1

        last = done == config.steps or stop_requested(stopping, world, device)
        row = {}
        if rank == 0 and (done % args.val_every == 0 or done == config.steps):
            judged.load_state_dict(averaged.weights)
            values = validate(judged, valid_clips, device, amp)
            row = {f"val_{k}_{kind}": values[k][kind] for k in stages for kind in kinds}
            means = "  ".join(f"{sum(values[k].values()) / len(kinds):.3f}" for k in stages)
            bar.write(f"step {done}: validation cross-entropy per codebook {means}  (chance {chance:.3f})")
        if rank == 0 and (row or done % args.log_every == 0 or last):
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.3f}")
            log.write(step=done, loss=sum(losses) / len(losses), lr=learning_rate(step, config), chance=chance,
                      seconds=time.time() - start, **row)
            losses = []
        if done % args.save_every == 0 or last:
            save(done)
        if rank == 0 and args.sample_every and done % args.sample_every == 0:
            save(done)
            write_samples(args.out, done, args.sample_captions, device)
        if last:
            break


def stop_requested(stopping, world, device):
    """Whether any process was asked to stop (Ctrl-C or SIGTERM): all stop after the same step."""
    flag = torch.tensor(float(bool(stopping)), device=device)
    if world > 1:
        dist.all_reduce(flag)
    return bool(flag)


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        device = torch.device("cpu") if device.type == "mps" else device  # gloo knows no MPS
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # long: one process encodes, the others wait
    try:
        train(args, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
