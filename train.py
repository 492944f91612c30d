"""Training: the paper's objective and the two it is compared with, and one straight loop [Sec. 3.1, Sec. 4, App. D].

A step draws a codebook (the stage) and, for every clip, a time t and a span mask at the rate cos(pi t / 2); the loss is
the cross-entropy of the hidden tokens of that codebook, and of nothing else. Autoregressive and hybrid models
(`--objective`) learn with the same network, other masks and other targets. Codec and text encoder have done their work
beforehand: see `support/data.py`. Read `train` first, then the objective it calls.
Deviation: AdamW as in the paper; the released recipe sets its step sizes by D-Adaptation.

    python train.py --data toy --out runs/toy
    python train.py --out runs/toy --resume                       # goes on as if it had never stopped
    torchrun --nproc-per-node 4 train.py --data toy --out runs/toy
"""

import importlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from encodec_wrap import load_codec
from masking import (
    causal_attention_mask,
    cosine_schedule,
    delay_codes,
    hybrid_attention_mask,
    mask_codes,
    span_mask,
    spans_for_mask_rate,
)
from model import OBJECTIVES, MAGNeT, ModelConfig, load_model
from support.cli import Config, Parser, add_flags, from_flags, option, pick_device, run, say
from support.data import load_data
from support.files import Companions, fingerprint, load_strictly, located, read_checkpoint
from support.musicbench import musicbench_entries
from support.training import RANK, WORLD, Run, join_processes
from t5_encoder import T5Encoder

MASK_RATES = (0.25, 0.5, 0.75, 1.0)  # at which validation measures
VALIDATED = {"magnet": MASK_RATES, "ar": ("ar",), "hybrid": (*MASK_RATES, "ar")}  # what it measures of each codebook
WORLDS = ("toy", "tunes")  # data sets that are synthesised, see `toy`
STATE_KEYS = ("config", "model_config", "codec", "text_encoder", "codec_id", "text_encoder_id", "model", "ema",
              "optimizer", "scaler", "step", "rng")


@dataclass
class TrainConfig(Config):
    """All that decides what a run learns; kept in its checkpoint."""

    objective: str = option("magnet", "masked (magnet), autoregressive (ar), or both (hybrid)", OBJECTIVES)
    data: str = option("toy", "toy, tunes, musicbench, a folder of audio and captions, or a JSON-lines manifest")
    codec: str = option("toy", "toy, tunes, encodec_24khz, or a codec's file or folder")
    text_encoder: str = option("toy", "toy, tunes, t5-small, t5-base, google/flan-t5-small, ..., or a folder")
    n_codebooks: int = option(0, "use only the codec's first K codebooks; 0: all, but 4 of encodec_24khz", low=0)
    seconds: float = option(4.0, "length of the training clips", above=0, high=3600)
    audio_key: str = option("location", "where a manifest's lines name the audio file")
    caption_key: str = option("main_caption", "where JSON captions and a manifest's lines hold the text")
    toy_clips: int = option(6000, "size of a synthesised data set", low=1)
    text_len: int = option(32, "every text attends as if padded to at least so many tokens", low=0, high=1 << 14)
    dim: int = option(160, "width of the transformer", low=4, high=1 << 16)
    n_heads: int = option(5, "attention heads", low=1, high=1 << 10)
    n_layers: int = option(6, "blocks", low=1, high=1 << 10)
    dropout: float = option(0.0, "dropout inside the blocks", low=0, high=1)
    span_len: int = option(3, "frames per masked span", low=1, high=1 << 20)
    context_ms: float = option(100.0, "how far stages after the first see on each side; negative: everywhere",
                               low=-1e6, high=1e6)
    train_blocks: int = option(0, "train only the last N blocks and the heads, to save memory; 0: everything", low=0)
    steps: int = option(18_000, "optimiser steps", low=1)
    stage_weights: tuple[float, ...] = option((2.0, 1.0), "how often each codebook is trained, the last number for all "
                                               "that follow; 1: alike, as in the paper", low=0, high=1e6)
    batch_size: int = option(8, "clips per step, over all processes", low=1, high=1 << 20)
    accumulate: int = option(1, "split each step's clips into this many parts, to save memory", low=1)
    lr: float = option(2e-3, "peak learning rate", above=0, high=1e3)
    warmup: int = option(500, "steps of linear warm-up, before the cosine decay", low=0)
    weight_decay: float = option(0.1, "AdamW's weight decay", low=0, high=1e3)
    clip_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    ema_decay: float = option(0.999, "per step, of the averaged weights that are used for sampling", low=0, high=1)
    condition_dropout: float = option(0.3, "probability that a clip's text is dropped", low=0, high=1)
    codebook_dropout: float = option(0.25, "objective ar: probability that later codebooks, from a random one on, are "
                                           "hidden in a clip, as a rescorer meets them", low=0, high=1)
    seed: int = option(0, "of weights, batches and masks", low=0, high=2**63 - 1)
    dtype: str = option("auto", "of the matrix products; auto: what the device computes fastest",
                        ("auto", "fp32", "bf16", "fp16"))


@dataclass
class RunConfig(Config):
    """Where and how a run is made; nothing of it changes what is learned."""

    out: str = option("runs/toy", "folder of the run")
    resume: bool = option(False, "go on from the checkpoint in --out, with its settings")
    init_from: str = option(None, "start from this model, as --model of sample.py: weights, shape, codec, text "
                                  "encoder, clip length and sampling settings")
    only_encode: bool = option(False, "stop when the data set is encoded into the cache")
    device: str = option("auto", "auto, cpu, cuda or mps")
    compile: bool = option(False, "torch.compile the model")
    checkpoint_blocks: bool = option(False, "compute each block once more for its gradients, to save memory")
    cache: str = option("cache", "folder for codes and text embeddings")
    log_every: int = option(50, "steps between rows of log.csv", low=1)
    val_every: int = option(500, "steps between validations", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)
    sample_every: int = option(2000, "steps between audio samples; 0: none", low=0)
    sample_captions: tuple[str, ...] = option((
        "a slow deep flute plays a rising melody, with drums", "a fast high bell plays an arpeggio, without drums"),
        "what the audio samples play")


# ------------------------------------------------------------------------------------------------- the three objectives
# Each is a sum, in nats, over the tokens in `loss_mask`; the loop divides by their number in the whole batch.

def masked_cross_entropy(model, codes, stage, hidden, loss_mask, text, text_mask):
    """[Eq. 4, Sec. 3.1] -log p(hidden tokens of codebook `stage` | all that is shown, text), summed.

    codes: (B, K, T); stage: int, or (B,) long of one value; hidden: (B, T), what the model does not see; loss_mask:
    (B, T), the part of it that is not padding.
    """
    stage = int(torch.as_tensor(stage).flatten()[0])
    inputs = mask_codes(codes, stage, hidden, model.mask_id)
    logits = model(inputs, stage, text, text_mask)  # (B, T, card)
    return F.cross_entropy(logits[loss_mask], codes[:, stage][loss_mask], reduction="sum")


def next_token_cross_entropy(model, codes, loss_mask, text, text_mask, shown=None):
    """[Eq. 1] -log p(each token | the positions before its own, text), summed.

    codes: (B, K, T); loss_mask: (B, K, T) bool; shown: (B, K, 1) bool, False where a clip's codebook is hidden from the
    model, all by default. Deviation: MusicGen's released code leaves out the last k frames of codebook k, and always
    shows all codebooks.
    """
    delayed = delay_codes(codes, model.mask_id)  # (B, K, T + K)
    inputs = delayed if shown is None else delayed.masked_fill(~shown, model.mask_id)
    logits = model(inputs, None, text, text_mask, mask=causal_attention_mask(*[delayed.shape[2]] * 2))
    loss_mask = delay_codes(loss_mask, False)[:, :, 1:]  # each position predicts what stands in the next
    return F.cross_entropy(logits[:, :, :-1][loss_mask], delayed[:, :, 1:][loss_mask], reduction="sum")


def hybrid_cross_entropy(model, codes, stage, hidden, n_prompt, loss_mask, text, text_mask):
    """[App. D, Fig. 7] Next tokens up to a position, MAGNeT's objective after it, summed; each token counts once.

    codes: (B, K, T); stage, n_prompt: (B,) long, n_prompt frames of prompt, in codebook k k fewer; hidden: (B, T), in
    the frames after the prompt of codebook `stage`; loss_mask: (B, K, T), see `hybrid_loss_mask`.
    """
    mask_id = model.mask_id
    delayed = delay_codes(codes, mask_id)  # (B, K, T + K)
    in_prompt = torch.arange(delayed.shape[2], device=codes.device) <= n_prompt[:, None, None]  # (B, 1, T + K)
    masked = delay_codes(mask_codes(codes, stage, hidden, mask_id), mask_id)
    mask = hybrid_attention_mask(delayed.shape[2], n_prompt, stage, model.config.context)
    logits = model(torch.where(in_prompt, delayed, masked), None, text, text_mask, mask=mask)  # (B, K, T + K, card)
    loss_mask = delay_codes(loss_mask, False)[:, :, 1:]  # every position predicts what stands in the next
    return F.cross_entropy(logits[:, :, :-1][loss_mask], delayed[:, :, 1:][loss_mask], reduction="sum")


def hybrid_loss_mask(valid, n_codebooks, stage, hidden, n_prompt):
    """[App. D] The tokens of `hybrid_cross_entropy`: all of the prompt, and the hidden ones of the stage: (B, K, T).

    valid: (B, T), False at padding.
    """
    frame, level = torch.arange(valid.shape[1]), torch.arange(n_codebooks)[:, None]
    in_prompt = frame < n_prompt[:, None, None] - level  # (B, K, T)
    return (in_prompt | hidden[:, None] & (level == stage[:, None, None])) & valid[:, None]


LOSSES = {"magnet": masked_cross_entropy, "ar": next_token_cross_entropy, "hybrid": hybrid_cross_entropy}


def draw_hidden(n_clips, n_frames, span_len, generator):
    """[Eq. 3, Sec. 3.1] Training masks: t ~ U(0, 1) for each clip, spans at mask rate cos(pi t / 2): (B, T) bool."""
    rate = cosine_schedule(torch.rand(n_clips, generator=generator))
    return span_mask(spans_for_mask_rate(rate, n_frames, span_len), n_frames, span_len, generator)


def draw_batch(clips, config, n_codebooks, generator):
    """[Sec. 3.1, Sec. 4] What a step trains on: clips, their texts (some dropped), and what is hidden. Tensors (B, ...)
    by the names that the objective's loss gives them.

    magnet: one stage for all clips. hybrid: a stage and a prompt of 0 to T - 1 frames for each clip, spans in what
    follows the prompt. ar: in some clips only the first codebooks are shown, as when the model rescores.
    """
    B, K = config.batch_size, n_codebooks
    weights = torch.tensor([*config.stage_weights, *[config.stage_weights[-1]] * K][:K])
    rows = torch.randint(len(clips.codes), (B,), generator=generator)
    keep_text = torch.rand(B, generator=generator) >= config.condition_dropout
    batch = clips.batch(rows)
    valid, T = batch.pop("valid"), batch["codes"].shape[2]  # (B, T)
    batch["text_mask"] = batch["text_mask"] & keep_text[:, None]
    if config.objective == "magnet":
        stage = torch.multinomial(weights, 1, generator=generator).expand(B)
        hidden = draw_hidden(B, T, config.span_len, generator)
        return batch | {"stage": stage, "hidden": hidden, "loss_mask": hidden & valid}
    if config.objective == "ar":
        n_shown = torch.randint(1, K + 1, (B,), generator=generator)
        n_shown[torch.rand(B, generator=generator) >= config.codebook_dropout] = K
        shown = torch.arange(K)[:, None] < n_shown[:, None, None]  # (B, K, 1)
        return batch | {"shown": shown, "loss_mask": valid[:, None] & shown}
    stage = torch.multinomial(weights, B, replacement=True, generator=generator)
    n_prompt = torch.randint(T, (B,), generator=generator)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    for b, first in enumerate((n_prompt - stage).clamp(min=0).tolist()):
        hidden[b, first:] = draw_hidden(1, T - first, config.span_len, generator)[0]
    return batch | {"stage": stage, "hidden": hidden, "n_prompt": n_prompt,
                    "loss_mask": hybrid_loss_mask(valid, K, stage, hidden, n_prompt)}


@torch.no_grad()
def validate(model, clips, device, amp, max_clips=64, seed=0):
    """Cross-entropy per codebook, nats per token: {codebook: {kind: value}}; the same clips and masks every time.

    Kinds: a mask rate, for what is filled in (by a hybrid without a prompt); "ar", for next tokens. nan: no token.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0, len(clips.codes) - 1, min(len(clips.codes), max_clips)).long()  # from all over the set
    T, K, objective = clips.codes.shape[2], model.config.n_codebooks, model.config.objective
    losses = {stage: {} for stage in range(K)}
    for stage in range(K):
        for kind in VALIDATED[objective]:
            total = count = 0
            for part in rows.split(16):
                task = {name: x.to(device) for name, x in clips.batch(part).items()}
                valid, of_stage = task.pop("valid"), torch.arange(K, device=device)[:, None] == stage
                if kind == "ar":
                    loss, task["loss_mask"] = next_token_cross_entropy, valid[:, None] & of_stage
                else:
                    n_spans = torch.full((len(part),), spans_for_mask_rate(kind, T, model.config.span_len))
                    hidden = span_mask(n_spans, T, model.config.span_len, generator).to(device)
                    loss, stages = masked_cross_entropy, torch.full((len(part),), stage, device=device)
                    task |= {"stage": stages, "hidden": hidden, "loss_mask": hidden & valid}
                    if objective == "hybrid":
                        loss, task["loss_mask"] = hybrid_cross_entropy, (hidden & valid)[:, None] & of_stage
                        task["n_prompt"] = torch.zeros_like(stages)
                with amp():
                    total += loss(model, **task).item()
                count += int(task["loss_mask"].sum())
            losses[stage][kind] = total / count if count else math.nan
    return losses


# ------------------------------------------------------------------------------------------------------------- the loop

def learning_rate(step, config):
    """[Sec. 4] Linear warm-up, then a cosine down to zero at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """[Sec. 4] Move the averaged weights `ema`, which validation and sampling use, towards those of the model.

    Deviation: the paper's decay is 0.99, which the released code applies every 10 steps; this is 0.999 at every step.
    """
    decay = min(decay, (1 + step) / (10 + step))  # at first a short memory, to forget the random start
    for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(weight, 1 - decay)


def train(run, config, clips):
    """[Sec. 3.1, Sec. 4] The training loop. `run` holds what lasts, and sees to what happens between the steps."""
    model, network = run.model.train(), run.network  # the network is the model, compiled or in several processes
    for step in run.steps():
        batch = draw_batch(clips, config, model.config.n_codebooks, run.generator)  # alike in every process
        n_tokens, loss = max(1, int(batch["loss_mask"].sum())), 0.0
        run.optimizer.zero_grad(set_to_none=True)
        for part in run.parts(batch):
            with run.amp():
                part_loss = LOSSES[config.objective](network, **part) / n_tokens
            run.scaler.scale(part_loss * WORLD).backward()  # gradients are averaged over the processes
            loss += part_loss.item()
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        run.check(step, loss, norm)
        lr = learning_rate(step, config)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.scaler.step(run.optimizer)
        run.scaler.update()
        update_ema(run.ema, model, config.ema_decay, step)
        run.after_step(step + 1, loss, lr)


# --------------------------------------------------------------------------------------------------------- command line

def read_settings(args, flags):
    """(TrainConfig, what the run starts from): a checkpoint to resume, or the model of --init-from, or {}.

    ValueError: a flag contradicts what the run starts from, or a run would be overwritten.
    """
    checkpoint = Path(flags.out) / "checkpoint.pt"
    if flags.resume:
        if not checkpoint.is_file():
            raise ValueError(f"--resume: there is no {checkpoint}")
        state, source = read_checkpoint(checkpoint, STATE_KEYS), "--resume"
        try:
            base, _ = TrainConfig(**located(state["config"], flags.out)), ModelConfig(**state["model_config"])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint}: its config is not one of this version ({error})") from error
        fixed = vars(base).keys() - {"data", "codec", "text_encoder"}  # these may have moved; their content is checked
    elif checkpoint.exists() and not flags.only_encode:
        raise ValueError(f"{flags.out} holds a run already: give --resume, or another --out")
    elif flags.init_from is None:
        return from_flags(args, TrainConfig()), {}
    else:
        first, companions = load_model(flags.init_from)
        state = {"model_config": asdict(first.config), "model": first.state_dict(), **asdict(companions)}
        source = f"--init-from {flags.init_from}"
        fixed = ["n_codebooks", "seconds", "text_len", "dim", "n_heads", "n_layers"]
        base = TrainConfig(codec=companions.codec, text_encoder=companions.text_encoder, span_len=first.config.span_len,
                           objective=first.config.objective, **{name: getattr(first.config, name) for name in fixed})
        fixed += [name for name in ("codec", "text_encoder") if not state[f"{name}_id"]]
    config = from_flags(args, base)
    for name in fixed:
        if getattr(config, name) != getattr(base, name):
            raise ValueError(f"{source} goes on with {name} {getattr(base, name)}; --{name.replace('_', '-')} "
                             f"{getattr(config, name)} contradicts it")
    if config.objective != base.objective:
        say(f"{source} was trained for the objective {base.objective}; this run is {config.objective}")
    return config, state


def model_config(args, config, state, codec, encoder):
    """The shape of the model: that of what the run starts from, or as the flags, codec and text encoder say."""
    context = round(config.context_ms / 1000 * codec.frame_rate) if config.context_ms >= 0 else -1
    if state and "context_ms" not in args:
        context = state["model_config"]["context"]
    changeable = {"context": context, **{name: getattr(config, name) for name in ("span_len", "dropout", "objective")}}
    shape = state["model_config"] if state else {
        "n_codebooks": codec.n_codebooks, "card": codec.codebook_size, "text_dim": encoder.config.d_model,
        **{name: getattr(config, name) for name in ("dim", "n_heads", "n_layers", "text_len", "seconds")}}
    return ModelConfig(**shape | changeable)


def load_clips(config, flags, codec, encoder, device):
    """The training and validation `Clips`. What is not in the cache yet is encoded, by the first process alone."""
    entries = None
    if config.data in WORLDS:
        numbers = {"train": config.toy_clips, "valid": max(1, config.toy_clips // 20)}
        entries = importlib.import_module("toy").entries_of(config.data, numbers, config.seconds)
    if RANK > 0:
        torch.distributed.barrier()
    if config.data == "musicbench":
        entries = musicbench_entries(Path(flags.cache, "musicbench"), config.caption_key, codec.sample_rate)
    clips = load_data(config.data, codec, encoder, config.seconds, flags.cache, config.audio_key, config.caption_key,
                      device=device, entries=entries)
    if RANK == 0 and WORLD > 1:
        torch.distributed.barrier()
    return clips


def main():
    parser = Parser(description="Train a MAGNeT.")
    add_flags(parser, RunConfig, TrainConfig)
    args = parser.parse_args()
    flags = from_flags(args, RunConfig())
    config, state = read_settings(args, flags)
    if config.batch_size % (WORLD * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} must be a multiple of processes x --accumulate = "
                         f"{WORLD} x {config.accumulate}")
    if config.train_blocks > config.n_layers:
        raise ValueError(f"--train-blocks {config.train_blocks}: the model has only {config.n_layers}")
    device = join_processes(pick_device(flags.device)) if WORLD > 1 else pick_device(flags.device)
    if flags.checkpoint_blocks and config.dropout and device.type == "mps":
        raise ValueError("--checkpoint-blocks on MPS wants --dropout 0: dropout cannot be repeated there")
    codec = load_codec(config.codec, config.n_codebooks or None, device)
    if not sum(config.stage_weights[:codec.n_codebooks]):
        raise ValueError(f"--stage-weights {config.stage_weights}: trains none of {codec.n_codebooks} codebooks")
    encoder = T5Encoder.from_pretrained(config.text_encoder).to(device)
    before = {key: state[key] for key in ("codec_id", "text_encoder_id", "data_id", "sampling") if key in state}
    companions = Companions(config.codec, config.text_encoder, **before)
    if state:
        companions.check(codec, encoder)
    companions.codec_id, companions.text_encoder_id = fingerprint(codec), fingerprint(encoder)
    torch.manual_seed(config.seed)
    model = MAGNeT(model_config(args, config, state, codec, encoder)).to(device)
    if state:
        load_strictly(model, state["model"], Path(flags.out, "checkpoint.pt") if flags.resume else flags.init_from)
    clips, valid_clips = load_clips(config, flags, codec, encoder, device)
    say(f"{len(clips.codes)} training clips and {len(valid_clips.codes)} validation clips of {config.seconds:g} s")
    if flags.only_encode:
        return
    if flags.resume and companions.data_id not in ("", clips.fingerprint):
        raise ValueError(f"--resume: {config.data} has changed since the run began; start a new run with --init-from")
    companions.data_id = clips.fingerprint
    for part in (model.text_proj, model.emb, *model.blocks[:-config.train_blocks]) if config.train_blocks else ():
        part.requires_grad_(False)
    this_run = Run(flags, config, model, companions, device, validate, VALIDATED[config.objective], valid_clips,
                   state if flags.resume else None)
    for block in model.blocks if flags.checkpoint_blocks else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    del codec, encoder, state  # their memory is wanted
    train(this_run, config, clips)
    say(f"{flags.out}: {model}, trained for {config.steps} steps on {device} x {WORLD}")


if __name__ == "__main__":
    run(main)
