"""What a training run needs around its loop: several processes, precision, stopping, the log, random states."""

import atexit
import contextlib
import copy
import csv
import gc
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # here, before there is a process group: default values of its functions would hold it
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.cli import pick_dtype, say
from support.files import load_strictly, portable, save_whole

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's processes; or alone


def join_processes(device):
    """Join the processes that torchrun started -> the device of this one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # long: one process encodes, the others wait
        atexit.register(dist.destroy_process_group)  # ends its threads if nothing else holds it, so before that
        atexit.register(gc.collect)  # all is freed that does: a thread that outlived Python would abort the process
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    return torch.device("cpu") if device.type == "mps" else device  # gloo knows no MPS


class Run:
    """What lasts in a training run, and what happens between its steps: log, validation, checkpoint, samples, stop."""

    def __init__(self, flags, config, model, companions, device, validate, kinds, valid_clips, state=None):
        """validate(model, clips, device, amp) -> {codebook: {kind: nats}}, for `kinds`; state: a checkpoint."""
        self.flags, self.config, self.companions, self.device = flags, config, companions, device
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self.model, self.ema = model, copy.deepcopy(model, frozen).eval().requires_grad_(False)  # which it shares
        self.network = torch.compile(model) if flags.compile else model
        if WORLD > 1:  # gradients are averaged over the processes
            unused = model.config.objective == "magnet"  # a step has one stage, whose head alone has a gradient
            self.network = DistributedDataParallel(self.network, find_unused_parameters=unused)
            self.network.mask_id, self.network.config = model.mask_id, model.config  # which the losses ask for
        self.validate, self.valid_clips = validate, valid_clips
        self.columns = ["step", "loss", "lr", "seconds", "chance", *(
            f"val_{k}_{kind}" for k in range(model.config.n_codebooks) for kind in kinds)]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.first, self.start, self.losses = 0, time.time(), []  # losses since the last row of the log
        self.optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay, fused=device.type != "mps")
        dtype = torch.float32 if config.dtype == "auto" and device.type == "mps" else pick_dtype(config.dtype, device)
        self.amp = contextlib.nullcontext if dtype == torch.float32 else partial(torch.autocast, device.type, dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.path, self.log = Path(flags.out) / "checkpoint.pt", Path(flags.out) / "log.csv"
        if RANK == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.path.with_name(".lock"))
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise ValueError(f"{flags.out}: another process trains there") from error
        if state:
            load_strictly(self.ema, state["ema"], self.path)
            try:
                self.optimizer.load_state_dict(state["optimizer"])
                if state["scaler"]:  # empty unless it was written in float16
                    self.scaler.load_state_dict(state["scaler"])
                self.first, self.losses = int(state["step"]), list(state.get("losses", []))
                self.start -= state.get("seconds", 0.0)
                self.generator.set_state(state["rng"]["generator"])
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{self.path}: is damaged and cannot be resumed from ({error!r})") from error
        if RANK == 0:
            self.log.touch()  # rows that are newer than the checkpoint are made again
            os.truncate(self.log, min(self.log.stat().st_size, state.get("log_size", math.inf) if state else 0))

    def steps(self):
        """The numbers of the steps to come; ends after a whole step, and a checkpoint, at Ctrl-C or SIGTERM."""
        asked = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: asked.append(number))
        self.bar = tqdm(range(self.first, self.config.steps), initial=self.first, total=self.config.steps,
                        disable=RANK > 0 or None, unit="step")
        for step in self.bar:
            torch.manual_seed(hash((self.config.seed, step, RANK)))  # of dropout, and so alike after a resume
            yield step
            if self.total(len(asked)):
                self.save(step + 1)
                raise KeyboardInterrupt(*asked[:1])

    def parts(self, batch):
        """This process's share of a batch (a dictionary of tensors (B, ...)), in `accumulate` parts on the device."""
        for rows in torch.arange(len(batch["codes"])).view(WORLD, self.config.accumulate, -1)[RANK]:
            yield {name: x[rows].to(self.device) for name, x in batch.items()}

    def total(self, number):
        """The sum of a number over the processes."""
        tensor = torch.tensor(float(number), dtype=torch.float32, device=self.device)
        if WORLD > 1:
            dist.all_reduce(tensor)
        return tensor.item()

    def check(self, step, loss, norm):
        """ValueError if training diverged; the checkpoint stays as it is."""
        if not math.isfinite(loss) or not (norm.isfinite() or self.scaler.is_enabled()):
            raise ValueError(f"step {step + 1}: training diverged (loss {loss:g}, norm of the gradient {norm:g}); the "
                             "last checkpoint is kept; a lower --lr or a longer --warmup may help")

    def after_step(self, done, loss, lr):
        """Log, validate, save and play samples when it is time; loss: of this process's clips, in nats per token."""
        flags, last = self.flags, done == self.config.steps
        self.losses.append(self.total(loss))
        validated = done % flags.val_every == 0 or last
        if validated or done % flags.log_every == 0:
            if RANK == 0:
                row = {"step": done, "loss": sum(self.losses) / len(self.losses), "lr": lr,
                       "seconds": time.time() - self.start, "chance": math.log(self.model.config.card)}
                self.bar.set_postfix_str(f"loss {row['loss']:.3f}")
                if validated:
                    values = self.validate(self.ema, self.valid_clips, self.device, self.amp)
                    row |= {f"val_{k}_{kind}": value for k, kinds in values.items() for kind, value in kinds.items()}
                    means = "  ".join(f"{torch.tensor(list(x.values())).nanmean():.3f}" for x in values.values())
                    self.bar.write(f"step {done}: validation cross-entropy per codebook {means} "
                                   f"(chance {row['chance']:.3f})")
                with self.log.open("a", newline="") as file:
                    writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                    if not file.tell():
                        writer.writeheader()
                    writer.writerow({key: x if isinstance(x, int) else f"{x:.6g}" for key, x in row.items()})
            self.losses = []
        sampled = flags.sample_every and done % flags.sample_every == 0
        if done % flags.save_every == 0 or last or sampled:
            self.save(done)
        if sampled and RANK == 0:  # with the checkpoint just written, by `sample.py`
            command = [sys.executable, str(Path(__file__).parents[1] / "sample.py"), *flags.sample_captions, "--model",
                       os.path.abspath(flags.out),  # which is no name of a model, as "toy" would be
                       "--out", f"{flags.out}/samples/step-{done:06d}.wav", "--device", str(self.device)]
            if subprocess.run(command, capture_output=True).returncode:
                say(f"could not write samples; to see why: {' '.join(map(repr, command))}")

    def save(self, step):
        """Write the checkpoint; ValueError, and the old one stays, if a weight is not finite."""
        if RANK == 0:
            if not all(weight.isfinite().all() for weight in self.model.parameters()):
                raise ValueError(f"step {step}: training diverged, weights are not finite; the last checkpoint is kept")
            save_whole({
                "config": portable(asdict(self.config), self.flags.out), "model_config": asdict(self.model.config),
                **portable(asdict(self.companions), self.flags.out), "step": step, "losses": self.losses,
                "rng": {"generator": self.generator.get_state()}, "seconds": time.time() - self.start,
                "log_size": self.log.stat().st_size if self.log.is_file() else 0, "model": self.model.state_dict(),
                "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()}, self.path)
