"""EnCodec as a codec object, and audio files in and out [Sec. 2].

A codec turns audio into K parallel streams of discrete codes and back. The network is the `encodec` package's own
(SEANet encoder and decoder around a residual vector quantizer); this module only gives it one plain interface and
reads weights: the package's public 24 kHz model, the codecs of the published MAGNeT models (32 kHz in the layout of
Hugging Face, 16 kHz in AudioCraft's), and our own, such as the toy world's. It leaves out what MAGNeT has no use for:
bandwidths, loudness scaling, streaming.
"""

import http.client
import importlib
import json
import os
import re
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

import hub


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
    pad_mode: str = "reflect"


class Codec(nn.Module):
    """An EnCodec with one plain interface: `encode`, `decode`, and four facts about itself.

    `sample_rate` in Hz, `frame_rate` in frames per second, `n_codebooks` (K) and `codebook_size` entries in each.
    """

    config = None  # a `CodecConfig`, but for the package's own 24 kHz model

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
                     causal=config.causal, true_skip=config.true_skip, lstm=config.lstm, pad_mode=config.pad_mode)
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


# ------------------------------------------------------------------------------------------------------------- weights

def load_codec(name_or_path, n_codebooks=None, device="cpu"):
    """Load a codec: "toy", "encodec_24khz", "facebook/encodec_32khz", or a local one.

    A local codec is a file written by `Codec.save`, a folder in the layout of Hugging Face (or its weights alone), or
    AudioCraft's compression_state_dict.bin (or its folder). `n_codebooks` keeps only the first K codebooks (the 24 kHz
    model has up to 32; 4 by default). Public weights are downloaded once. Raises ValueError for an unknown name and a
    file that is not a codec, ConnectionError where a download failed.
    """
    path = TOY_CODEC if name_or_path == "toy" else Path(name_or_path)
    if name_or_path == "encodec_24khz":
        codec, n_codebooks = read_24khz(), n_codebooks or 4
    elif not path.exists() and str(name_or_path) == hub.CODEC:
        hub.fetch({hub.CODEC: hub.CODEC_FILES})
        codec = read_codec(hub.cache_folder(hub.CODEC))
    else:
        codec = read_codec(path)
    kept = Codec(codec.model, n_codebooks)
    kept.config = codec.config
    return kept.to(device).eval().requires_grad_(False)


def read_24khz():
    """The public 24 kHz model, from torch's hub folder or the network."""
    name = "encodec_24khz-d7cc33bc.th"  # with the beginning of its sha256
    url, path = encodec.model.ROOT_URL + name, Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not path.is_file():
            hub.download(url, path, sha256="d7cc33bc")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"download failed ({error}); try again, or fetch by hand {url} into {path.parent}") from error
    codec = Codec(encodec.EncodecModel.encodec_model_24khz(pretrained=False))
    fill(codec, hub.read_state_dict(path), path)
    return codec


def read_codec(path):
    """The codec in a local file or folder, of any of the layouts that `load_codec` names."""
    pointer = path / hub.MODEL_FILES[1]
    path = path if not path.is_dir() else pointer if pointer.is_file() else hub.weights_file(path)
    if not path.is_file():
        raise ValueError(f"unknown codec {str(path)!r}: want toy, encodec_24khz, {hub.CODEC}, or a codec's file or "
                         f"folder (with {' or '.join(hub.WEIGHTS)})")
    if path.suffix == ".safetensors":
        return read_hugging_face(hub.read_safetensors(path), path)
    try:
        content = hub.read_torch(path)
    except Exception as error:  # torch.load has no one type for "not such a file"
        raise ValueError(f"{path} is not a codec file: it is damaged or something else") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a codec file: it holds a {type(content).__name__}")
    if "pretrained" in content:
        return read_pointed(content["pretrained"], path)
    read = read_audiocraft if "best_state" in content else read_own if "codec" in content else read_hugging_face
    return read(content, path)


def read_pointed(name, path):
    """The codec of another repository, which AudioCraft's music models name in place of one of their own."""
    if name != hub.CODEC:
        raise ValueError(f"{path} points to the codec {name!r}; only {hub.CODEC} is known")
    found = Path(hub.beside(path.parent, hub.CODEC))
    return read_codec(hub.weights_file(found)) if found.is_dir() else load_codec(hub.CODEC)


def fill(codec, state, path):
    """Copy weights into a codec, strictly; weight norm may have the spelling of newer versions of torch."""
    state = hub.check_tensors(state, path)
    hub.load_strictly(codec.model, {old_spelling(name): tensor for name, tensor in state.items()}, path)


def old_spelling(name):
    """conv.parametrizations.weight.original0 -> conv.weight_g, original1 -> weight_v; other names stay."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v")


def new_codec(path, settings):
    """A codec of random weights with the shape `settings` describe: a function that gives `CodecConfig`'s fields."""
    try:
        return Codec.from_config(CodecConfig(**settings()))
    except Exception as error:  # settings can be wrong in many ways
        raise ValueError(f"{path} does not hold the settings of a codec ({type(error).__name__}: {error})") from error


def read_own(content, path):
    """A codec written by `Codec.save`."""
    codec = new_codec(path, lambda: content["codec"])
    fill(codec, content.get("weights"), path)
    return codec


def read_audiocraft(content, path):
    """A codec in AudioCraft's layout: the tensors are named as in the `encodec` package, the settings are YAML."""
    def settings():
        yaml = hub.read_yaml(content["xp.cfg"])
        if yaml.get("encodec.renormalize", "false") != "false":
            raise ValueError("renormalize must be false")
        return dict(
            sample_rate=int(yaml["sample_rate"]), ratios=tuple(map(int, re.findall(r"\d+", yaml["seanet.ratios"]))),
            n_codebooks=int(yaml["rvq.n_q"]), codebook_size=int(yaml["rvq.bins"]),
            dimension=int(yaml["seanet.dimension"]), n_filters=int(yaml["seanet.n_filters"]),
            lstm=int(yaml["seanet.lstm"]), causal=yaml["seanet.causal"] == "true",
            true_skip=yaml["seanet.true_skip"] == "true", pad_mode=yaml["seanet.pad_mode"])

    codec = new_codec(path, settings)
    fill(codec, content["best_state"], path)
    return codec


HUGGING_FACE_NAMES = (  # the encodec package's name -> that of Hugging Face
    ("coder.model.", "coder.layers."), (".convtr.convtr.", ".conv."), (".conv.conv.", ".conv."),
    ("quantizer.vq.layers.", "quantizer.layers."), ("._codebook.", ".codebook."),
)


def read_hugging_face(tensors, path):
    """A codec in the layout of Hugging Face; without a config.json beside it, one built like facebook/encodec_32khz."""
    def settings():
        config, path_of_config = {}, path.with_name("config.json")
        if path_of_config.is_file():
            config = json.loads(path_of_config.read_text(encoding="utf-8"))
        if config.get("normalize"):
            raise ValueError("normalize must be false")
        codebook, layers = tensors["quantizer.layers.0.codebook.embed"], "quantizer.layers."
        return dict(
            sample_rate=config.get("sampling_rate", 32_000),
            ratios=tuple(config.get("upsampling_ratios", (8, 5, 4, 4))),
            n_codebooks=len({name.split(".")[2] for name in tensors if name.startswith(layers)}),
            codebook_size=len(codebook), dimension=codebook.shape[1],
            n_filters=len(tensors["encoder.layers.0.conv.bias"]), lstm=config.get("num_lstm_layers", 2),
            causal=config.get("use_causal_conv", False), true_skip=not config.get("use_conv_shortcut", False),
            pad_mode=config.get("pad_mode", "reflect"))

    codec = new_codec(path, settings)
    ours = {hugging_face_name(name): name for name in codec.model.state_dict()}
    fill(codec, {ours.get(old_spelling(name), name): tensor for name, tensor in tensors.items()}, path)
    return codec


def hugging_face_name(name):
    """encoder.model.0.conv.conv.bias -> encoder.layers.0.conv.bias, and so on."""
    for mine, theirs in HUGGING_FACE_NAMES:
        name = name.replace(mine, theirs)
    return name


# ---------------------------------------------------------------------------------------------------------- audio files

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
