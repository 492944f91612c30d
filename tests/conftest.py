"""What the tests share: the golden files, small models, a seeded generator, and the options --slow and --network."""

from pathlib import Path

import pytest
import torch

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
