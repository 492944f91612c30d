"""What a training run needs around its loop: several processes, precision, stopping, the log, random states."""

import contextlib
import copy
import csv
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.cli import DTYPES, pick_dtype, say
from support.files import load_strictly, portable, save_whole, whole_file


class Processes:
    """The processes that train together, under torchrun, or the only one: rank 0 of 1."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu") if self.world > 1 and device.type == "mps" else device  # gloo knows no MPS
        if self.world > 1:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # long: one process encodes, the others wait

    @contextlib.contextmanager
    def first_alone(self):
        """Rank 0 runs the body before the others do, so that they find what it has written."""
        if self.world > 1 and self.rank > 0:
            dist.barrier()
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier()

    def claim(self, folder):
        """Lock the folder of a run until this process ends. ValueError: another one trains there."""
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(Path(folder, ".lock"))
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise ValueError(f"{folder}: another process trains there") from error

    def wrap(self, model):
        """The model, its gradients averaged over the processes."""
        return DistributedDataParallel(model, find_unused_parameters=True) if self.world > 1 else model

    def parts(self, batch, n_parts, model):
        """This process's share of a batch (a dictionary of tensors (B, ...)), in `n_parts` parts on the device.

        Gradients are exchanged after the last part only.
        """
        B = len(batch["codes"])
        for i, rows in enumerate(torch.arange(B).view(self.world, n_parts, -1)[self.rank]):
            part = {name: x[rows].to(self.device) for name, x in batch.items()}
            with model.no_sync() if self.world > 1 and i + 1 < n_parts else contextlib.nullcontext():
                yield part

    def total(self, number):
        """The sum of a number over the processes."""
        tensor = torch.tensor(float(number), dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.item()

    def close(self):
        if self.rank == 0:
            self.lock.release()
        if self.world > 1:
            dist.destroy_process_group()


class Log:
    """log.csv: one row per logged step. Rows after the checkpoint that a run resumes from go: they are made again."""

    def __init__(self, path, columns, first):
        rows = []
        if first and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if all(row.get(name) is not None for name in columns)
                        and row["step"].isdigit() and int(row["step"]) <= first]  # a torn row is left out
        with whole_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.start = time.time() - (float(rows[-1]["seconds"]) if rows else 0.0)

    def write(self, **row):
        row = {"seconds": time.time() - self.start, **row}
        self.writer.writerow({name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()})
        self.file.flush()


class Run:
    """What lasts in a training run, and what happens between its steps: log, validation, checkpoint, samples, stop."""

    def __init__(self, flags, config, model, companions, processes, validate, kinds, valid_clips, state=None):
        """validate(model, clips, device, amp) -> {codebook: {kind: nats}}, for `kinds`; state: a checkpoint to go on
        from."""
        device = processes.device
        self.flags, self.config, self.companions, self.processes = flags, config, companions, processes
        self.model, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        self.validate, self.valid_clips, self.chance = validate, valid_clips, math.log(model.config.card)
        self.generator, self.first = torch.Generator().manual_seed(config.seed), 0
        self.losses = []  # since the last row of the log
        self.optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay, fused=device.type != "mps")
        self.amp, scaled = precision(config.dtype, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.path = Path(flags.out) / "checkpoint.pt"
        if state:
            load_strictly(self.ema, state["ema"], self.path)
            try:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                restore_random_states(state["rng"], self.generator, device)
                self.first, self.losses = int(state["step"]), list(state.get("losses", []))
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{self.path}: is damaged and cannot be resumed from ({error!r})") from error
        if processes.rank == 0:
            columns = [f"val_{k}_{kind}" for k in range(model.config.n_codebooks) for kind in kinds]
            columns = ["step", "loss", "lr", "seconds", "chance", *columns]
            self.log = Log(self.path.with_name("log.csv"), columns, self.first)

    def steps(self):
        """The numbers of the steps to come; ends after a whole step, and a checkpoint, at Ctrl-C or SIGTERM."""
        asked = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: asked.append(number))
        self.bar = tqdm(range(self.first, self.config.steps), initial=self.first, total=self.config.steps,
                        disable=self.processes.rank > 0 or None, unit="step")
        for step in self.bar:
            yield step
            if self.processes.total(len(asked)):
                self.save(step + 1)
                raise KeyboardInterrupt(*asked[:1])

    def check(self, step, loss, norm):
        """ValueError if training diverged; the checkpoint stays as it is."""
        if not math.isfinite(loss) or not (norm.isfinite() or self.scaler.is_enabled()):
            raise ValueError(f"step {step + 1}: training diverged (loss {loss:g}, norm of the gradient {norm:g}); the "
                             "last checkpoint is kept; a lower --lr or a longer --warmup may help")

    def after_step(self, done, loss, lr):
        """Log, validate, save and play samples when it is time; loss: of this process's clips, in nats per token."""
        flags, last, main = self.flags, done == self.config.steps, self.processes.rank == 0
        self.losses.append(self.processes.total(loss))
        validated = done % flags.val_every == 0 or last
        if main and (validated or done % flags.log_every == 0):
            row, mean = {}, sum(self.losses) / len(self.losses)
            if validated:
                values = self.validate(self.ema, self.valid_clips, self.processes.device, self.amp)
                row = {f"val_{k}_{kind}": value for k, kinds in values.items() for kind, value in kinds.items()}
                means = "  ".join(f"{torch.tensor(list(kinds.values())).nanmean():.3f}" for kinds in values.values())
                self.bar.write(f"step {done}: validation cross-entropy per codebook {means} (chance {self.chance:.3f})")
            self.bar.set_postfix_str(f"loss {mean:.3f}")
            self.log.write(step=done, loss=mean, lr=lr, chance=self.chance, **row)
        if validated or done % flags.log_every == 0:
            self.losses = []
        sampled = flags.sample_every and done % flags.sample_every == 0
        if done % flags.save_every == 0 or last or sampled:
            self.save(done)
        if sampled and main:
            write_samples(flags.out, done, flags.sample_captions, self.processes.device)

    def save(self, step):
        """Write the checkpoint; ValueError, and the old one stays, if a weight is not finite."""
        if self.processes.rank == 0:
            if not all(weight.isfinite().all() for weight in self.model.parameters()):
                raise ValueError(f"step {step}: training diverged, weights are not finite; the last checkpoint is kept")
            save_whole({
                "config": portable(asdict(self.config), self.flags.out), "model_config": asdict(self.model.config),
                **portable(asdict(self.companions), self.flags.out),
                "step": step, "model": self.model.state_dict(), "ema": self.ema.state_dict(), "losses": self.losses,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": random_states(self.generator, self.processes.device)}, self.path)


def unwrapped(model):
    """The model inside what torch.compile or DistributedDataParallel wrapped around it."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def precision(name, device):
    """A --dtype on a device: (a function that gives the autocast context, whether gradients need scaling)."""
    dtype = pick_dtype(name, device)
    if dtype == torch.float32 or name == "auto" and device.type == "mps":
        return contextlib.nullcontext, False
    return lambda: torch.autocast(device.type, dtype), dtype == DTYPES["fp16"]


def random_states(generator, device):
    """Every random state that training draws from, by name."""
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
    command = [sys.executable, str(Path(__file__).parents[1] / "sample.py"), *captions, "--model", str(out),
               "--out", str(Path(out) / "samples" / f"step-{step:06d}.wav"), "--device", device.type]
    if subprocess.run(command, capture_output=True).returncode:
        say(f"could not write samples; to see why: {' '.join(map(repr, command))}")
