"""Samples of a run that fail. Whole runs that stop, resume and split up are in test_train.py."""

from types import SimpleNamespace

import torch

from support.training import Run
from train import TrainConfig


def test_after_step_tells_of_samples_that_fail_and_training_goes_on(tmp_path, capsys):
    flags = SimpleNamespace(val_every=9, log_every=9, save_every=9, sample_every=1, sample_captions=["a flute"],
                            out=str(tmp_path / "no_run"))
    run = SimpleNamespace(flags=flags, config=TrainConfig(steps=9), losses=[], total=float,
                          save=lambda step: None, device=torch.device("cpu"))
    Run.after_step(run, 1, 5.5, 1e-3)
    assert "could not write samples" in capsys.readouterr().out
