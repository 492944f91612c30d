"""What a run needs around its loop, piece by piece: the log, the parts of a batch, random states.

Whole runs that stop, resume and split up are in test_train.py.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from support import training
from support.training import Log, Run, random_states, set_random_states
from train import TrainConfig

CPU = torch.device("cpu")
ROWS = "step,loss,seconds\n1,5.5,10\n2,5.25,20\n"


@pytest.mark.parametrize("torn", ["3", "3,5.2", "3,5.2,30\n4,5", "x", ",,", "3,5.2,x", "3,\0\0,5", "\0" * 9])
def test_log_drops_the_rows_after_the_checkpoint_and_what_was_torn_and_counts_the_seconds_on(torn, tmp_path):
    (tmp_path / "log.csv").write_text(ROWS + torn)
    Log(tmp_path / "log.csv", ["step", "loss", "seconds"], first=2).write(step=3, loss=1 / 3)
    text = (tmp_path / "log.csv").read_text().replace("\r", "")
    assert text.startswith(ROWS + "3,0.333333,") and text.count("\n") == 4
    assert 20 <= float(text.split(",")[-1]) < 30, "time goes on where the checkpoint's row stopped"


def test_parts_gives_every_process_its_own_rows_and_all_of_them_once(monkeypatch):
    batch, seen = {"codes": torch.arange(24).view(12, 2), "stage": torch.arange(12)}, []
    run = SimpleNamespace(config=TrainConfig(accumulate=3), device=CPU, network=SimpleNamespace(no_sync=nullcontext))
    monkeypatch.setattr(training, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(training, "RANK", rank)
        for part in Run.parts(run, batch):
            assert part["codes"].equal(batch["codes"][part["stage"]]), "the rows of all tensors belong together"
            seen.append(part["stage"].tolist())
    assert len(seen) == 6 and sorted(sum(seen, [])) == list(range(12))


def test_random_states_bring_back_every_number(generator):
    states = random_states(generator, CPU)
    first = torch.rand(3), torch.rand(3, generator=generator)
    set_random_states(states, generator, CPU)
    assert torch.rand(3).equal(first[0]) and torch.rand(3, generator=generator).equal(first[1])


def test_write_samples_that_fails_says_how_to_see_why_and_training_goes_on(tmp_path, capsys):
    training.write_samples(tmp_path / "no_run", 1, ["a flute"], CPU)
    assert "could not write samples" in capsys.readouterr().out
