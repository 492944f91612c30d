"""What a run needs around its loop, piece by piece: the log, and samples that fail.

Whole runs that stop, resume and split up are in test_train.py.
"""

from types import SimpleNamespace

import pytest
import torch

from support.training import Run, drop_rows
from train import TrainConfig

ROWS = "step,loss,lr,seconds\n1,5.5,1,10\n2,5.25,1,20\n"


@pytest.mark.parametrize("torn", ["3", "1", "3,5.2", "3,5.2,1,30\n4,5", "x", ",,", "3,\0\0,5", "\0" * 9])
def test_drop_rows_drops_those_after_the_checkpoint_and_what_was_torn_and_gives_the_seconds(torn, tmp_path):
    (tmp_path / "log.csv").write_text(ROWS + torn)
    assert drop_rows(tmp_path / "log.csv", 2) == 20
    assert (tmp_path / "log.csv").read_text() == ROWS
    assert drop_rows(tmp_path / "log.csv", 0) == 0 and (tmp_path / "log.csv").read_text() == ROWS.splitlines(True)[0]


def test_after_step_tells_of_samples_that_fail_and_training_goes_on(tmp_path, capsys):
    flags = SimpleNamespace(val_every=9, log_every=9, save_every=9, sample_every=1, sample_captions=["a flute"],
                            out=str(tmp_path / "no_run"))
    run = SimpleNamespace(flags=flags, config=TrainConfig(steps=9), losses=[], total=float,
                          save=lambda step: None, device=torch.device("cpu"))
    Run.after_step(run, 1, 5.5, 1e-3)
    assert "could not write samples" in capsys.readouterr().out
