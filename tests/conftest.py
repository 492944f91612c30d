"""What the tests share: golden files, small models, a hub on this machine, tiny training runs; `--mine`, `-m paper`."""

import csv
import hashlib
import http.server
import json
import os
import re
import resource
import shlex
import signal
import sys
import threading
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import train
from model import MAGNeT, ModelConfig, load_model
from support.cli import run

DATA = Path(__file__).parent / "data"
ROOT = DATA.parents[1]
Ended = namedtuple("Ended", "code out err")  # of a command: its exit code, and what it wrote
torch.set_num_threads(1)  # so that a busy machine slows nothing down tenfold
os.environ["OMP_NUM_THREADS"] = "1"  # nor the processes that tests start


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FOLDER", help="with the functions of this folder in place of ours, see study")


def pytest_configure(config):
    if config.getoption("--mine"):
        from study.mine import plant
        plant(config.invocation_params.dir / config.getoption("--mine"))


def pytest_collection_modifyitems(config, items):
    of_the_paper = paper_tests() if "paper" in (config.getoption("-m") or "") else ()
    for item in items:
        if f"tests/{item.path.name}::{getattr(item, 'originalname', '')}" in of_the_paper:
            item.add_marker("paper")


def paper_tests():
    """What `pytest -m paper` runs: the tests of the functions that have a place in the paper, and of T5's network."""
    from study.paper import functions
    whole = ("train.train", "sample.generate", "model.MAGNeT.forward", "encodec_wrap", "from_pretrained", "tokenize")
    return {test.id for name, function in functions().items() for test in function.tests
            if (function.place or function.module == "t5_encoder") and not any(word in name for word in whole)}


def reference_model(name):
    """A small random model (K = 4, 64 entries) in the published layout. The official code pads both texts of a batch to
    the longer one, of 7 tokens; `text_len` does the same for any batch."""
    model = load_model(DATA / f"{name}_tiny_state_dict.bin")[0]
    model.config.text_len = 7
    return model


@pytest.fixture(scope="session")
def magnet_tiny():
    return reference_model("magnet")  # 5 frames of context, spans of 3


@pytest.fixture(scope="session")
def golden():
    """What the released code computed with `magnet_tiny`: texts, codes, and for each stage its input and logits."""
    return torch.load(DATA / "magnet_tiny_forward.pt", weights_only=True)


@pytest.fixture(scope="session")
def musicgen_tiny():
    return reference_model("musicgen")


@pytest.fixture(scope="session")
def musicgen_golden():
    """What the released code computed with `musicgen_tiny`: logits of given codes, and greedy generations."""
    return torch.load(DATA / "musicgen_tiny_forward.pt", weights_only=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_magnet():
    """A function that makes a small random MAGNeT in eval mode: make_magnet(seed=0, **fields of its config)."""

    def make(seed=0, kind=MAGNeT, **fields):
        torch.manual_seed(seed)
        small = {"card": 16, "dim": 32, "n_heads": 2, "n_layers": 2, "text_dim": 8}
        return kind(ModelConfig(**small | fields)).eval()

    return make


def random_codes(model, T=20, B=2, seed=0):
    """Codes (B, K, T) such as the model may be given."""
    shape = B, model.config.n_codebooks, T
    return torch.randint(model.config.card, shape, generator=torch.Generator().manual_seed(seed))


def random_text(model, B=2, L=3, seed=0):
    """Embeddings (B, L, text_dim) as from T5, and a mask (B, L) of tokens only."""
    text = torch.randn(B, L, model.config.text_dim, generator=torch.Generator().manual_seed(seed))
    return text, torch.ones(B, L, dtype=torch.bool)


def lay(folder, tensors, config, file="pytorch_model.bin"):
    """Write a folder in the layout of Hugging Face: tensors in a file of either kind, and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.save(tensors, folder / file) if file.endswith(".bin") else save_file(tensors, folder / file)
    return folder


def drawn(mask):
    """A (rows, columns) mask as text, "x" for True, so that a failure shows both pictures."""
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def write_tone(path, caption=None, seconds=0.5, hertz=440.0, **more):
    """A sine at 16 kHz in an audio file, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000) / 2, 16_000, **more)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


class RunsCode:
    """Unpickled carelessly, this makes a folder: harmless proof that code was run."""

    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


# ----------------------------------------------------------------------------------------------- a hub on this machine

class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: the commit and the hash of a file in its headers, or why there is no such file."""

    def do_HEAD(self):
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, file = rest.partition("/")
        path = self.server.folder / repository / file
        self.content = path.read_bytes() if path.is_file() else b""
        etag = f'"{hashlib.sha256(self.content).hexdigest()}"'
        why = "EntryNotFound" if (self.server.folder / repository).is_dir() else "RepoNotFound"
        self.send_response(200 if path.is_file() else 404)
        self.send_header("X-Repo-Commit", self.server.commit if revision == "main" else revision)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header(*("ETag", etag) if path.is_file() else ("X-Error-Code", why))
        self.end_headers()

    def do_GET(self):
        if "/resolve/" in self.path:
            self.server.served.append(re.sub("/resolve/[^/]*/", "/", self.path[1:]))
            self.server.token = self.headers.get("Authorization")
        self.do_HEAD()
        self.wfile.write(self.content[:self.server.cut_at])

    def log_message(self, *_):
        pass


def use_hub(monkeypatch, url):
    """What HF_ENDPOINT does, which the library reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def local_hub(offline, tmp_path, monkeypatch):
    """A hub on 127.0.0.1 that serves the files of its `folder` (owner/name/file), and an empty cache for them.

    `served` lists what it sent ("owner/name/file"); `cut_at` breaks files off at that byte; `commit` is the newest;
    `token` is the header by which the last one to fetch a file was known.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.folder, server.served, server.cut_at, server.commit = tmp_path / "remote", [], None, "c" * 40
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A hub at which nobody listens, empty caches, and an empty working directory, whose path this is."""
    use_hub(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(module, arguments...) runs a module's command line in an empty folder -> exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            run(module.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return call


def assert_one_line(ended, *words):
    """The command ended on bad input as it should: exit code 2 and one line that says what was wrong."""
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert len(lines) == 1 and ": error: " in lines[0], ended.err
    for word in words:
        assert word in lines[0]


@contextmanager
def full_disk(size):
    """In its `with`, no file can be written beyond so many bytes, as on a disk with no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --------------------------------------------------------------------------------------------------- tiny training runs

TINY = ("--toy-clips 24 --seconds 1 --steps 10 --batch-size 4 --dim 32 --n-heads 2 --n-layers 2 --warmup 4 "
        "--device cpu --dtype fp32 --log-every 1 --val-every 5 --save-every 5").split()


@pytest.fixture(scope="session")
def train_tiny(tmp_path_factory):
    """train_tiny(out, flags) trains in this process as TINY says -> the folder; later flags win. Its `cache`."""
    cache = tmp_path_factory.mktemp("cache")

    def train_tiny(out, flags=""):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        arguments = ["train.py", "--out", str(out), "--cache", str(cache), *TINY, *shlex.split(flags)]
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            patch.setattr(sys, "argv", arguments)
            try:
                train.main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return Path(out)

    train_tiny.cache = cache
    return train_tiny


def read_log(run):
    """The rows of a run's log.csv, but for the time taken."""
    with (run / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def losses(run):
    return [float(row["loss"]) for row in read_log(run)]


def read_state(run):
    """What a run's checkpoint holds, but for the time taken and the size of the log, in which it stands."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {name: value for name, value in state.items() if name not in ("seconds", "log_size")}


@pytest.fixture(scope="session")
def tiny_run(train_tiny, tmp_path_factory):
    """The folder of one finished run of ten steps on clips of one second; to be read only."""
    return train_tiny(tmp_path_factory.mktemp("run") / "tiny")
