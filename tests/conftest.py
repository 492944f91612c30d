"""What the tests share: golden files, small models, a hub on this machine, and the options --slow and --network."""

import http.server
import json
import re
import resource
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import cli
import hub
from model import MAGNeT, ModelConfig, load_audiocraft

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too (minutes)")
    parser.addoption("--network", action="store_true", help="run the tests marked network too (they download)")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; runs with --slow"))
        if "network" in item.keywords and not config.getoption("--network"):
            item.add_marker(pytest.mark.skip(reason="needs the internet; runs with --network"))


def write_safetensors(tensors, path, align=8):
    """Write tensors in the .safetensors format, the header filled up with spaces to a multiple of `align` bytes."""
    names = {dtype: name for name, dtype in hub.DTYPES.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % align)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="session")
def magnet_tiny():
    """A small random model in the published layout (K = 4, 64 entries, 5 frames of context, spans of 3)."""
    return load_audiocraft(DATA / "magnet_tiny_state_dict.bin")


@pytest.fixture(scope="session")
def golden():
    """What the released code computed with `magnet_tiny`: texts, codes, and for each stage its input and logits."""
    return torch.load(DATA / "magnet_tiny_forward.pt", weights_only=True)


@pytest.fixture(scope="session")
def musicgen_tiny():
    """A small random autoregressive model in MusicGen's published layout (K = 4, 64 entries)."""
    return load_audiocraft(DATA / "musicgen_tiny_state_dict.bin")


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


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Serves files as the hub does: a redirect that states the sha256, then the bytes, from any one on."""

    def do_GET(self):
        file = self.server.folder / self.path.replace("/resolve/main/", "/").removeprefix("/storage").lstrip("/")
        offset = int(re.search(r"\d+", self.headers.get("Range", "0")).group())
        if not file.is_file():
            self.send_error(404)
        elif not self.path.startswith("/storage/"):
            self.send_response(302)
            self.send_header("Location", "/storage" + self.path.replace("/resolve/main/", "/"))
            self.send_header("X-Linked-ETag", f'"{self.server.sha256 or hub.file_sha256(file)}"')
            self.end_headers()
        elif offset and offset >= file.stat().st_size:
            self.send_error(416)
        else:
            self.send_bytes(file.read_bytes(), offset)

    def send_bytes(self, content, offset):
        offset = offset if self.server.resumes else 0
        self.server.served.append((self.path.removeprefix("/storage/"), offset))
        self.send_response(206 if offset else 200)
        self.send_header("Content-Length", str(len(content) - offset))
        self.end_headers()
        self.wfile.write(content[offset:self.server.cut_at])

    def log_message(self, *_):
        pass


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1 that serves the files of its `folder`, and an empty cache for what is fetched from it.

    `served` lists (path, first byte) of all it sent; `cut_at` breaks transfers off at that byte; `resumes = False`
    always sends files from their beginning; `sha256` is stated in place of the true one.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.folder, server.cache, server.served = tmp_path / "remote", tmp_path / "hub" / "checkpoints", []
    server.cut_at, server.resumes, server.sha256 = None, True, None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, and an empty cache, whose folder this is."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # a port at which nobody listens
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(module, arguments...) runs a module's command line in an empty folder -> exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.run(module.main)
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


@pytest.fixture
def full_disk():
    """`with full_disk(size):` no file can be written beyond so many bytes, as on a disk with no more room."""
    @contextmanager
    def full_disk(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full_disk
