"""EnCodec as a codec object, and audio files in and out [Sec. 2].

A codec turns audio into K parallel streams of discrete codes and back. The network is the `encodec` package's own
(SEANet encoder and decoder around a residual vector quantizer); this module only gives it one plain interface and
knows where weights come from: the package's public 24 kHz model, or any EnCodec whose settings and weights lie in one
file, such as the toy world's. It leaves out what MAGNeT has no use for: bandwidths, loudness scaling, streaming.
"""

import importlib
import os
import sys
import types
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import nn


def import_encodec():
    """Import the `encodec` package even where torchaudio cannot load its native library (a CPU-only torch).

    The package's network does not use torchaudio, but one of its helper files imports it at the top. If that import
    fails, an empty module stands in for the moment of the import and is taken away again.
    """
    try:
        importlib.import_module("torchaudio")
        return importlib.import_module("encodec")
    except (ImportError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]  # what a half-done import left behind
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        return importlib.import_module("encodec")
    finally:
        del sys.modules["torchaudio"]


encodec = import_encodec()
warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)  # the package's kind of it

TOY_CODEC = Path(__file__).parent / "toy" / "weights" / "codec.pt"


@dataclass
class CodecConfig:
    """The shape of an EnCodec: `sample_rate` in Hz; `ratios` are the decoder's strides, their product the hop."""

    sample_rate: int = 16_000
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    n_codebooks: int = 4
    codebook_size: int = 256  # a power of two
    dimension: int = 64
    n_filters: int = 12
    lstm: int = 0
    causal: bool = False
    true_skip: bool = True


class Codec(nn.Module):
    """An EnCodec with one plain interface: `encode`, `decode`, and four facts about itself.

    `sample_rate` in Hz, `frame_rate` in frames per second, `n_codebooks` (K) and `codebook_size` entries in each.
    """

    def __init__(self, model, n_codebooks=None):
        super().__init__()
        available = model.quantizer.n_q
        if n_codebooks is not None and not 1 <= n_codebooks <= available:
            raise ValueError(f"n_codebooks must be between 1 and {available} for this codec, not {n_codebooks}")
        self.model = model
        self.n_codebooks = n_codebooks or available
        self.codebook_size = model.quantizer.bins
        self.sample_rate = model.sample_rate
        self.hop_length = int(model.encoder.hop_length)
        self.frame_rate = self.sample_rate / self.hop_length

    @classmethod
    def from_config(cls, config):
        """A codec of the given `CodecConfig` with random weights."""
        shape = dict(channels=1, dimension=config.dimension, n_filters=config.n_filters, ratios=list(config.ratios),
                     causal=config.causal, true_skip=config.true_skip, lstm=config.lstm)
        quantizer = encodec.model.qt.ResidualVectorQuantizer(
            dimension=config.dimension, n_q=config.n_codebooks, bins=config.codebook_size)
        codec = cls(encodec.EncodecModel(
            encodec.modules.SEANetEncoder(**shape), encodec.modules.SEANetDecoder(**shape), quantizer,
            target_bandwidths=[], sample_rate=config.sample_rate, channels=1))
        codec.config = config
        return codec

    @torch.inference_mode()
    def encode(self, wav):
        """Audio (B, 1, S) at `sample_rate` -> codes (B, K, T) long, T = ceil(S / hop length)."""
        if wav.dim() != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"encode wants audio of shape (B, 1, S) with S > 0, not {tuple(wav.shape)}")
        latents = self.model.encoder(wav)  # (B, D, T)
        return self.model.quantizer.vq.encode(latents, n_q=self.n_codebooks).transpose(0, 1)  # (B, K, T)

    @torch.inference_mode()
    def decode(self, codes):
        """Codes (B, K, T) -> audio (B, 1, T * hop length)."""
        if codes.dim() != 3 or codes.shape[1] > self.model.quantizer.n_q or codes.shape[2] == 0:
            raise ValueError(f"decode wants codes (B, {self.n_codebooks}, T) with T > 0, not {tuple(codes.shape)}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"decode wants codes below {self.codebook_size}; these hold {codes.min()}..{codes.max()}")
        return self.model.decoder(self.model.quantizer.vq.decode(codes.transpose(0, 1)))  # (B, 1, S)

    def save(self, path, extra=None):
        """Write settings and weights (in half precision) into one file, atomically."""
        weights = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        content = {"codec": asdict(self.config), "weights": weights, **(extra or {})}
        temporary = Path(f"{path}.tmp")
        torch.save(content, temporary)
        os.replace(temporary, path)


def load_codec(name_or_path, n_codebooks=None, device="cpu"):
    """Load a codec by name ("toy", "encodec_24khz") or from a file written by `Codec.save`.

    `n_codebooks` keeps only the first K codebooks (the 24 kHz model has up to 32; 4 by default). Raises ValueError for
    an unknown name and a file that is not a codec; the 24 kHz weights are downloaded once, to torch's hub cache.
    """
    if name_or_path == "encodec_24khz":
        try:
            model = encodec.EncodecModel.encodec_model_24khz()
        except Exception as error:  # neither the network nor a damaged file has one type
            url = f"{encodec.model.ROOT_URL}encodec_24khz-d7cc33bc.th"
            folder = Path(torch.hub.get_dir(), "checkpoints")
            raise ValueError(f"could not load {url} from {folder} or download it ({error}); delete the file there "
                             "if it is damaged, fetch it by hand without a network") from error
        return Codec(model, n_codebooks or 4).to(device).eval().requires_grad_(False)
    path = TOY_CODEC if name_or_path == "toy" else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"unknown codec {str(name_or_path)!r}: want toy, encodec_24khz or the file of a trained codec")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = CodecConfig(**content["codec"]), content["weights"]
        whole = Codec.from_config(config)
    except Exception as error:  # torch.load has no one type for "not such a file"
        raise ValueError(f"{path} is not a codec file (want one written by toy/train_codec.py)") from error
    try:
        whole.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: weights do not fit their settings: {str(error).splitlines()[-1].strip()}") from error
    codec = Codec(whole.model, n_codebooks)
    codec.config = config
    return codec.to(device).eval().requires_grad_(False)


def load_audio(path, sample_rate):
    """Read an audio file of any rate and channel count -> (1, S) float32 tensor, mono, at `sample_rate` Hz.

    Raises ValueError naming the file when it is missing, not audio, empty, or holds numbers that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such audio file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as audio (want WAV, FLAC, OGG, MP3 or AIFF)") from error
    mono = samples.mean(axis=1)
    if len(mono):
        mono = soxr.resample(mono, rate, sample_rate)
    if not len(mono):
        raise ValueError(f"{path}: holds no audio samples")
    if not np.isfinite(mono).all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))[None]


def check_audio_path(path):
    """The format that a file name asks for ("WAV", ...); ValueError if audio cannot be written under this name."""
    format = Path(path).suffix[1:].upper()
    if format not in ("WAV", "FLAC", "OGG"):
        raise ValueError(f"{path}: the name of an audio file must end in .wav, .flac or .ogg")
    return format


def save_audio(path, wav, sample_rate):
    """Write audio (1, S) or (S,); the suffix names the format: .wav and .flac (16-bit PCM), .ogg (Vorbis).

    Peaks beyond full scale are turned down, never clipped. The file appears whole or not at all.
    """
    path, format = Path(path), check_audio_path(path)
    samples = torch.as_tensor(wav).detach().float().cpu().reshape(-1).numpy()
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: refusing to write samples that are not finite numbers")
    peak = np.abs(samples).max(initial=0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with soundfile.SoundFile(temporary, "w", sample_rate, channels=1, format=format) as file:
            for start in range(0, len(samples), 65_536):  # in blocks: libsndfile's OGG writer crashes on long ones
                file.write(samples[start:start + 65_536] / max(1.0, peak / 0.999))
        os.replace(temporary, path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
