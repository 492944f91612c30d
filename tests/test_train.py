"""What training promises: the loss of the paper, and runs that stop, go on and split up without changing their course.

The runs here are tiny: they show that numbers are equal, not that music is learned.
"""

import csv
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from data import Clips, load_data
from encodec_wrap import Codec, load_codec
from model import MAGNeT, ModelConfig, load_model
from objectives import LOSSES, draw_hidden, masked_cross_entropy, model_of, validate
from t5_encoder import T5Encoder
from train import AveragedWeights, TrainConfig, learning_rate

ROOT = Path(__file__).parent.parent
TINY = ("--toy-clips 24 --seconds 1 --steps 10 --batch-size 4 --dim 48 --n-heads 2 --n-layers 2 --warmup 4 "
        "--device cpu --dtype fp32 --log-every 1 --val-every 5 --save-every 5").split()


@pytest.fixture(autouse=True)
def global_state():
    """A run sets signal handlers and seeds; both are put back."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    with torch.random.fork_rng(devices=[]):
        yield
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run_tiny(cache):
    """run_tiny(out, flags) trains in this process; later flags win over those of TINY."""
    def run_tiny(out, flags=""):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", "--out", str(out), "--cache", str(cache), *TINY, *flags.split()])
            train.main()
        return out
    return run_tiny


@pytest.fixture(scope="module")
def tiny_run(run_tiny, tmp_path_factory):
    """The folder of one finished run of ten steps."""
    return run_tiny(tmp_path_factory.mktemp("run") / "tiny")


def command(out, cache, flags, launcher=("train.py",)):
    """A training process; OMP_NUM_THREADS as here, so that sums are added up in the same order."""
    arguments = [sys.executable, *launcher, "--out", str(out), "--cache", str(cache), *TINY, *flags.split()]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})


def read_log(out):
    """The rows of log.csv, but for the time taken."""
    with (out / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def losses(out):
    return [float(row["loss"]) for row in read_log(out)]


def read_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(a, b, where="checkpoint"):
    """Two nested structures are equal, every number in them."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ------------------------------------------------------------------------------------------------------------ the masks

def test_draw_hidden_hides_two_over_pi_of_all_tokens_on_average(generator):
    hidden = draw_hidden(4000, 50, 3, generator)
    assert hidden.shape == (4000, 50) and hidden.dtype == torch.bool
    assert hidden.float().mean() == pytest.approx(2 / math.pi, abs=0.015)


def test_draw_hidden_draws_another_rate_for_every_clip(generator):
    rates = draw_hidden(2000, 200, 3, generator).float().mean(dim=1)
    # A rate cos(pi t / 2) with t ~ U(0, 1) is below r in 1 - 2/pi * acos(r) of all cases.
    for r in (0.2, 0.5, 0.8, 0.95):
        assert (rates < r).float().mean() == pytest.approx(1 - 2 / math.pi * math.acos(r), abs=0.04)


def test_draw_hidden_hides_something_of_every_clip(generator):
    assert draw_hidden(2000, 7, 3, generator).any(dim=1).all()
    assert draw_hidden(50, 1, 3, generator).all()


# ------------------------------------------------------------------------------------------------------------- the loss

class Oracle(nn.Module):
    """Stands for the model: gives logits which were chosen beforehand, and remembers what it was shown."""

    def __init__(self, B, T, card):
        super().__init__()
        self.mask_id = card
        self.logits = nn.Parameter(torch.randn(B, T, card))

    def forward(self, seen, stage, text=None, text_mask=None):
        self.seen, self.stage = seen, stage
        return self.logits


@pytest.fixture
def example():
    """codes (2, 4, 9), hidden (2, 9), counted (2, 9): the last three frames of the second clip are padding."""
    torch.manual_seed(0)
    hidden = torch.rand(2, 9) < 0.6
    counted = hidden.clone()
    counted[1, 6:] = False
    assert (hidden & ~counted).any() and (~hidden).any()
    return torch.randint(16, (2, 4, 9)), hidden, counted


@pytest.mark.parametrize("stage", range(4))
def test_masked_cross_entropy_is_the_sum_done_by_hand(example, stage):
    codes, hidden, counted = example
    oracle = Oracle(2, 9, 16)
    loss = masked_cross_entropy(oracle, codes, stage, hidden, counted, None, None)
    by_hand = 0.0
    for b in range(2):
        for t in range(9):
            if counted[b, t]:
                exponentials = [math.exp(x) for x in oracle.logits[b, t].tolist()]
                by_hand -= math.log(exponentials[codes[b, stage, t]] / sum(exponentials))
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_masked_cross_entropy_gives_gradient_to_the_counted_positions_only(example):
    codes, hidden, counted = example
    oracle = Oracle(2, 9, 16)
    masked_cross_entropy(oracle, codes, 1, hidden, counted, None, None).backward()
    assert torch.equal(oracle.logits.grad.abs().sum(dim=2) > 0, counted)


def test_masked_cross_entropy_does_not_depend_on_other_targets(example):
    codes, hidden, counted = example
    oracle = Oracle(2, 9, 16)
    loss = masked_cross_entropy(oracle, codes, 1, hidden, counted, None, None)
    others = torch.randint(16, codes.shape)
    others[:, 1] = torch.where(counted, codes[:, 1], others[:, 1])
    assert torch.equal(masked_cross_entropy(oracle, others, 1, hidden, counted, None, None), loss)


@pytest.mark.parametrize("stage", range(4))
def test_masked_cross_entropy_shows_the_model_nothing_hidden_and_no_later_codebook(example, stage):
    codes, hidden, counted = example
    oracle = Oracle(2, 9, 16)
    masked_cross_entropy(oracle, codes, stage, hidden, counted, None, None)
    assert oracle.stage == stage
    assert torch.equal(oracle.seen[:, :stage], codes[:, :stage])
    assert torch.equal(oracle.seen[:, stage], codes[:, stage].masked_fill(hidden, 16))
    assert (oracle.seen[:, stage + 1:] == 16).all()


def test_masked_cross_entropy_of_nothing_is_zero_and_can_be_trained_on(example):
    codes, hidden, _ = example
    oracle = Oracle(2, 9, 16)
    loss = masked_cross_entropy(oracle, codes, 0, hidden, torch.zeros_like(hidden), None, None)
    loss.backward()
    assert loss.item() == 0 and not oracle.logits.grad.any()


# ----------------------------------------------------------------------------------------------------------- the pieces

def test_learning_rate_rises_linearly_and_then_falls_as_a_cosine_to_zero():
    config = TrainConfig(lr=2.0, warmup=10, steps=110)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0, abs=1e-9)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


@pytest.mark.parametrize("warmup, steps", [(0, 5), (5, 5), (9, 5), (4, 5)])
def test_learning_rate_is_never_zero_nor_above_its_peak_while_training(warmup, steps):
    config = TrainConfig(lr=1.0, warmup=warmup, steps=steps)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(steps))


def test_averaged_weights_move_by_one_minus_the_decay_and_faster_at_first():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    averaged = AveragedWeights(model)
    nn.init.constant_(model.weight, 2.0)
    assert averaged.weights["weight"].item() == 1.0, "a copy"
    averaged.update(model, 0.9, step=10_000)
    assert averaged.weights["weight"].item() == pytest.approx(0.9 * 1 + 0.1 * 2)
    averaged.update(model, 0.9, step=0)
    assert averaged.weights["weight"].item() == pytest.approx(0.1 * 1.1 + 0.9 * 2)
    assert not averaged.weights["weight"].requires_grad and model.weight.item() == 2.0


@pytest.fixture
def small():
    """A small random model, and 12 random clips for it of which some end early."""
    torch.manual_seed(0)
    model = MAGNeT(ModelConfig(card=64, dim=32, n_heads=2, n_layers=2, text_dim=8)).eval()
    text = [torch.randn(n, 8).half() for n in (3, 0, 5)]
    n_frames = torch.tensor([30] * 8 + [12] * 4)
    return model, Clips(torch.randint(64, (12, 4, 30)).to(torch.int16), n_frames, text, torch.arange(12) % 3)


def test_validate_gives_the_same_numbers_each_time_and_draws_nothing_from_the_global_generator(small):
    model, clips = small
    state = torch.get_rng_state()
    first = validate(model, clips, "cpu", nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert validate(model, clips, "cpu", nullcontext) == first
    assert list(first) == [0, 1, 2, 3] and all(tuple(values) == (0.25, 0.5, 0.75, 1.0) for values in first.values())


def test_validate_is_at_chance_level_for_a_model_that_knows_nothing(small):
    model, clips = small
    for head in model.heads:
        nn.init.zeros_(head.weight)
    for values in validate(model, clips, "cpu", nullcontext).values():
        assert list(values.values()) == pytest.approx([math.log(64)] * 4, rel=1e-5)


def test_validate_is_near_chance_level_at_random_weights(small):
    values = validate(*small, "cpu", nullcontext)
    mean = sum(sum(row.values()) for row in values.values()) / 16
    assert math.log(64) - 0.1 < mean < math.log(64) + 0.8


def test_validate_does_not_count_padding(small):
    """The Oracle knows the true token of every frame but those that are padding."""
    _, clips = small
    oracle = Oracle(12, 30, 64)
    oracle.config = ModelConfig(n_codebooks=1, card=64)
    real = clips.valid(torch.arange(12))
    with torch.no_grad():
        oracle.logits.copy_(100.0 * F.one_hot(clips.codes[:, 0].long(), 64) * real[..., None])
    assert all(value == pytest.approx(0) for value in validate(oracle, clips, "cpu", nullcontext)[0].values())


def test_model_of_finds_the_model_inside_its_wrappers():
    model = nn.Linear(1, 1)
    wrapped, compiled = nn.Module(), nn.Module()
    compiled._orig_mod = model
    wrapped.module = compiled
    assert model_of(model) is model_of(compiled) is model_of(wrapped) is model


@pytest.mark.parametrize("name, value", [
    ("seconds", 0), ("steps", 0), ("batch_size", -1), ("lr", math.nan), ("seconds", math.inf), ("dropout", 1.5),
    ("condition_dropout", -0.1), ("span_len", 0)])
def test_train_config_names_the_flag_that_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        TrainConfig(**{name: value})


# ---------------------------------------------------------------------------------------------------------- a whole run

def test_train_logs_validation_per_codebook_and_rate_and_they_are_those_of_the_averaged_weights(tiny_run, cache):
    rows = read_log(tiny_run)
    columns = {f"val_{k}_{rate}" for k in range(4) for rate in (0.25, 0.5, 0.75, 1.0)}
    assert set(rows[0]) == {"step", "loss", "lr", "chance"} | columns
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [bool(row["val_0_0.5"]) for row in rows] == [step in (5, 10) for step in range(1, 11)]
    model, names = load_model(tiny_run)
    encoder = T5Encoder.from_pretrained(names["text_encoder"])
    _, valid = load_data("toy", load_codec(names["codec"]), encoder, 1.0, cache, toy_clips=24)
    for stage, values in validate(model, valid, "cpu", nullcontext).items():
        for rate, value in values.items():
            assert float(rows[-1][f"val_{stage}_{rate}"]) == pytest.approx(value, rel=1e-4)


def test_train_writes_a_checkpoint_of_tensors_and_plain_types(tiny_run):
    state = read_checkpoint(tiny_run)
    assert state["step"] == 10 and state["config"]["dim"] == 48 and state["model_config"]["seconds"] == 1.0
    assert state["config"] == vars(TrainConfig(**state["config"]))
    assert sorted(os.listdir(tiny_run)) == ["checkpoint.pt", "log.csv"]


def test_train_starts_near_chance_level(tiny_run):
    assert abs(losses(tiny_run)[0] - math.log(256)) < 1.2


def test_train_starts_alike_with_the_same_seed_only(run_tiny, tiny_run, tmp_path):
    assert losses(run_tiny(tmp_path / "same", "--steps 1 --val-every 9"))[0] == losses(tiny_run)[0]
    assert losses(run_tiny(tmp_path / "other", "--steps 1 --seed 1"))[0] != losses(tiny_run)[0]


def test_train_learns_a_few_clips_by_heart(run_tiny, tmp_path):
    flags = "--toy-clips 4 --seconds 0.4 --steps 150 --dim 64 --lr 0.004 --val-every 150 --save-every 150"
    curve = losses(run_tiny(tmp_path / "run", flags))
    assert sum(curve[-20:]) / 20 < 0.5 * sum(curve[:5]) / 5


def test_train_reads_only_the_cache_once_it_is_filled(run_tiny, tiny_run, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("called while training")
    monkeypatch.setattr(Codec, "encode", fail)
    monkeypatch.setattr(T5Encoder, "encode_text", fail)
    again = run_tiny(tmp_path / "again")
    assert read_log(again) == read_log(tiny_run)


class LossSpy:
    """Stands for masked_cross_entropy while training, and keeps what it was called with."""

    def __init__(self):
        self.calls, self.function = [], masked_cross_entropy

    def __call__(self, model, codes, stage, hidden, counted, text, text_mask):
        self.calls.append((codes, stage, hidden, counted, text_mask))
        return self.function(model, codes, stage, hidden, counted, text, text_mask)


@pytest.fixture
def loss_spy(monkeypatch):
    spy = LossSpy()
    monkeypatch.setitem(LOSSES, "magnet", spy)
    return spy


def test_train_takes_every_codebook_and_every_clip_in_turn(run_tiny, tmp_path, loss_spy):
    run_tiny(tmp_path / "run", "--steps 60 --val-every 60")
    stages = [stage for _, stage, *_ in loss_spy.calls]
    assert set(stages) == {0, 1, 2, 3} and max(map(stages.count, range(4))) < 30
    seen = {tuple(row.flatten().tolist()) for codes, *_ in loss_spy.calls for row in codes}
    assert len(seen) > 20


def test_stage_weights_say_how_often_each_codebook_is_trained(run_tiny, tmp_path, loss_spy):
    run_tiny(tmp_path / "run", "--steps 60 --val-every 60 --stage-weights 3 1 0 0")
    stages = [stage for _, stage, *_ in loss_spy.calls]
    assert set(stages) == {0, 1} and 35 <= stages.count(0) <= 55


def test_the_last_stage_weight_is_that_of_all_codebooks_that_follow(run_tiny, tmp_path, loss_spy):
    run_tiny(tmp_path / "run", "--steps 60 --val-every 60 --stage-weights 0 1")
    stages = [stage for _, stage, *_ in loss_spy.calls]
    assert set(stages) == {1, 2, 3} and max(map(stages.count, range(4))) < 35


@pytest.mark.parametrize("weights, want", [("0 0 0 0 1", "none of 4 codebooks"), ("1 -1 1 1", "zero or positive"),
                                           ("0 0 0 0", "not all zero")])
def test_train_refuses_stage_weights_that_make_no_sense(run_tiny, tmp_path, weights, want):
    with pytest.raises(ValueError, match=want):
        run_tiny(tmp_path / "run", f"--stage-weights {weights}")


def test_train_counts_the_hidden_tokens_that_are_not_padding(run_tiny, tmp_path, loss_spy, monkeypatch):
    def short_clips(*args, **kwargs):
        clips, valid = load_data(*args, **kwargs)
        clips.n_frames = torch.full_like(clips.n_frames, 20)
        return clips, valid
    monkeypatch.setattr(train, "load_data", short_clips)
    run_tiny(tmp_path / "run")
    for codes, _, hidden, counted, _ in loss_spy.calls:
        assert codes.shape == (4, 4, 50)
        assert torch.equal(counted[:, :20], hidden[:, :20]) and not counted[:, 20:].any()
    assert any(hidden[:, 20:].any() for _, _, hidden, _, _ in loss_spy.calls)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_train_drops_the_condition_of_a_share_of_the_clips(run_tiny, tmp_path, loss_spy, share):
    run_tiny(tmp_path / "run", f"--steps 40 --batch-size 8 --val-every 40 --condition-dropout {share}")
    dropped = torch.cat([mask.sum(dim=1) == 0 for *_, mask in loss_spy.calls])
    assert len(dropped) == 320 and dropped.float().mean() == pytest.approx(share, abs=0.09)
    assert share not in (0.0, 1.0) or dropped.float().mean() == share


def test_train_logs_the_mean_loss_per_hidden_token(run_tiny, tmp_path, loss_spy):
    spied, function = [], loss_spy.function

    def keep(*args):
        loss = function(*args)
        spied.append(loss.item() / int(args[4].sum()))
        return loss
    loss_spy.function = keep
    run = run_tiny(tmp_path / "run", "--log-every 5")
    assert losses(run) == pytest.approx([sum(spied[:5]) / 5, sum(spied[5:]) / 5], rel=1e-4)


def test_train_refuses_a_folder_that_holds_a_run_and_leaves_it_alone(run_tiny, tiny_run):
    before = {path.name: path.read_bytes() for path in tiny_run.iterdir()}
    with pytest.raises(ValueError, match="holds a run already.*--resume"):
        run_tiny(tiny_run)
    assert {path.name: path.read_bytes() for path in tiny_run.iterdir()} == before


def test_train_resume_of_a_finished_run_changes_nothing(run_tiny, tmp_path):
    run = run_tiny(tmp_path / "run")
    before = read_checkpoint(run), read_log(run)
    run_tiny(run, "--resume")
    assert_same((read_checkpoint(run), read_log(run)), before)


def test_train_resume_refuses_other_settings_than_those_of_the_run(run_tiny, tmp_path):
    run = run_tiny(tmp_path / "run")
    with pytest.raises(ValueError, match="dim is 48, not 96"):
        run_tiny(run, "--resume --dim 96")
    assert read_checkpoint(run)["config"]["dim"] == 48 and read_checkpoint(run)["step"] == 10


# SIGKILL at the beginning of the eighth step: three steps after the checkpoint of step 5, two rows of the log too far.
KILLED = """
import os, signal, train
learning_rate = train.learning_rate
def stumble(step, config):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(step, config)
train.learning_rate = stumble
train.main()
"""


def test_train_resume_after_a_kill_ends_bit_for_bit_as_if_never_stopped(tmp_path, cache, tiny_run):
    whole = command(tmp_path / "whole", cache, "--dropout 0.2")
    killed = command(tmp_path / "killed", cache, "--dropout 0.2", ("-c", KILLED))
    assert whole.wait(300) == 0, whole.stdout.read()
    assert killed.wait(300) == -signal.SIGKILL, killed.stdout.read()
    assert read_checkpoint(tmp_path / "killed")["step"] == 5 and len(read_log(tmp_path / "killed")) == 7
    resumed = command(tmp_path / "killed", cache, "--resume")
    assert resumed.wait(300) == 0, resumed.stdout.read()
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")
    assert_same(read_checkpoint(tmp_path / "killed"), read_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("objective", ["ar", "hybrid"])
def test_train_of_another_objective_resumes_and_splits_up_as_well(objective, run_tiny, tmp_path, cache, monkeypatch):
    """Stopped and resumed it is bit for bit the same; in parts, and in two processes, it gives the same losses."""
    flags = f"--objective {objective} --dropout 0.2 --steps 6 --val-every 6"
    whole = run_tiny(tmp_path / "whole", flags)

    def interrupt(step, config):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(step, config)
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupt)
        stopped = run_tiny(tmp_path / "stopped", flags)
    assert read_checkpoint(stopped)["step"] == 3
    run_tiny(stopped, f"{flags} --resume")
    assert read_log(stopped) == read_log(whole)
    assert_same(read_checkpoint(stopped), read_checkpoint(whole))

    flags = flags.replace("--dropout 0.2", "")  # each process draws dropout by itself
    undropped = losses(run_tiny(tmp_path / "undropped", flags))
    assert losses(run_tiny(tmp_path / "parts", f"{flags} --accumulate 4")) == pytest.approx(undropped, rel=1e-4)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    process = command(tmp_path / "two", cache, flags, launcher)
    assert process.wait(300) == 0, process.stdout.read()
    assert losses(tmp_path / "two") == pytest.approx(undropped, rel=1e-4)


@pytest.mark.parametrize("objective, kinds", [("ar", ["ar"]), ("hybrid", ["0.25", "0.5", "0.75", "1.0", "ar"])])
def test_a_checkpoint_says_its_objective_and_the_log_validates_it(objective, kinds, run_tiny, tmp_path):
    run = run_tiny(tmp_path / "run", f"--objective {objective} --steps 2 --val-every 2")
    assert load_model(run)[0].config.objective == objective
    last = read_log(run)[-1]
    assert {name for name in last if name.startswith("val_")} == {f"val_{k}_{kind}" for k in range(4) for kind in kinds}
    assert all(abs(float(last[name]) - math.log(256)) < 1.2 for name in last if name.startswith("val_"))


def test_train_stops_at_ctrl_c_with_a_checkpoint_from_which_it_goes_on(run_tiny, tiny_run, tmp_path, monkeypatch):
    def interrupt(step, config):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(step, config)
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupt)
        run = run_tiny(tmp_path / "run")
    assert read_checkpoint(run)["step"] == 3 and len(read_log(run)) == 3
    run_tiny(run, "--resume")
    assert read_log(run) == read_log(tiny_run)
    assert_same(read_checkpoint(run), read_checkpoint(tiny_run))


def test_train_init_from_takes_the_averaged_weights_and_nothing_else(run_tiny, tiny_run, tmp_path):
    state = read_checkpoint(run_tiny(tmp_path / "run", f"--init-from {tiny_run} --steps 1 --lr 1e-9 --seed 5"))
    source = read_checkpoint(tiny_run)
    assert state["step"] == 1 and state["config"]["seed"] == 5
    assert all(entry["step"] == 1 for entry in state["optimizer"]["state"].values())
    for weights in (state["model"], state["ema"]):
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, source["ema"][name], atol=1e-6, rtol=0)


def test_train_init_from_names_a_checkpoint_of_another_shape(run_tiny, tiny_run, tmp_path):
    with pytest.raises(ValueError, match="tiny.*shape"):
        run_tiny(tmp_path / "run", f"--init-from {tiny_run} --dim 32")


def test_train_init_from_toy_starts_from_the_weights_that_ship(run_tiny, tmp_path):
    toy, _ = load_model("toy")
    shape = f"--dim {toy.config.dim} --n-heads {toy.config.n_heads} --n-layers {toy.config.n_layers}"
    run = run_tiny(tmp_path / "run", f"--init-from toy --steps 1 --lr 1e-9 {shape}")
    torch.testing.assert_close(read_checkpoint(run)["model"], dict(toy.state_dict()), atol=1e-6, rtol=0)


def test_train_in_four_parts_gives_the_losses_and_weights_of_one(run_tiny, tiny_run, tmp_path):
    parts = run_tiny(tmp_path / "parts", "--accumulate 4")
    assert losses(parts) == pytest.approx(losses(tiny_run), rel=1e-4)
    for name, tensor in read_checkpoint(tiny_run)["model"].items():
        torch.testing.assert_close(read_checkpoint(parts)["model"][name], tensor, atol=1e-4, rtol=1e-3)


def test_train_in_two_processes_gives_the_losses_and_weights_of_one(tiny_run, tmp_path, cache):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    process = command(tmp_path / "two", cache, "--accumulate 2", launcher)
    assert process.wait(300) == 0, process.stdout.read()
    assert losses(tmp_path / "two") == pytest.approx(losses(tiny_run), rel=1e-4)
    for name, tensor in read_checkpoint(tiny_run)["model"].items():
        torch.testing.assert_close(read_checkpoint(tmp_path / "two")["model"][name], tensor, atol=1e-4, rtol=1e-3)


def test_train_refuses_a_batch_that_cannot_be_split(run_tiny, tmp_path):
    with pytest.raises(ValueError, match="--batch-size 4 must be a multiple"):
        run_tiny(tmp_path / "run", "--accumulate 3")


def test_train_in_bf16_stays_finite_and_close_to_fp32(run_tiny, tiny_run, tmp_path):
    run = run_tiny(tmp_path / "run", "--dtype bf16")
    assert losses(run) == pytest.approx(losses(tiny_run), abs=0.1)


def test_train_of_one_codebook_and_full_context_works(run_tiny, tmp_path):
    state = read_checkpoint(run_tiny(tmp_path / "run", "--n-codebooks 1 --context-ms -1 --steps 2"))
    assert state["model_config"]["n_codebooks"] == 1 and state["model_config"]["context"] == -1


def test_train_turns_the_context_window_from_milliseconds_into_frames(tiny_run):
    assert read_checkpoint(tiny_run)["model_config"]["context"] == 5


def test_train_writes_audio_samples_when_asked(run_tiny, tmp_path):
    run = run_tiny(tmp_path / "run", "--sample-every 10 --sample-captions flute")
    assert [path.name for path in (run / "samples").iterdir()] == ["step-000010.wav"]
