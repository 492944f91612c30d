"""EnCodec as a codec object [Sec. 2]: audio to K parallel streams of discrete codes, and back.

The network is the `encodec` package's own (SEANet encoder and decoder around a residual vector quantizer); this module
gives it one plain interface, works on long audio piece by piece, and reads weights as they are published: the package's
24 kHz model, the codecs of the published MAGNeT models (32 kHz in Hugging Face's layout, 16 kHz in AudioCraft's), and
our own, such as the toy world's. Left out is what MAGNeT has no use for: bandwidths, loudness scaling, streaming.

Letters: B batch, K codebooks, T frames, S samples = T * hop length, C width of a latent.
"""

import importlib
import sys
import types
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from support.cli import Config, option
from support.files import load_strictly, read_checkpoint, save_whole
from support.hub import WEIGHTS, beside, fetch, fetch_url, make_config, read_yaml


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
SHIPPED = {"toy": TOY_CODEC, "tunes": TOY_CODEC.parent / "tunes" / "codec.pt"}
REPOSITORY = "facebook/encodec_32khz"  # the codec of the published music models
CODEC_FILE = "compression_state_dict.bin"  # of a published model's folder: its codec, or a pointer to REPOSITORY
FILE_24KHZ = f"{encodec.model.ROOT_URL}encodec_24khz-d7cc33bc.th", "d7cc33bc"  # address, beginning of its SHA-256
PIECE, CONTEXT = 512, 16  # frames worked on at once, and frames on each side of them that are thrown away again
TENSOR_NAMES = (  # ours, which are the package's -> Hugging Face's, see `support.files.rename`
    ("coder.model.", "coder.layers."), (".convtr.convtr.", ".conv."), (".conv.conv.", ".conv."),
    ("quantizer.vq.layers.", "quantizer.layers."), ("._codebook.", ".codebook."),
)
NEWER_NAMES = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))


@dataclass(frozen=True)
class CodecConfig(Config):
    """The shape of an EnCodec; the product of `ratios` is its hop length."""

    sample_rate: int = option(16_000, "samples per second", low=1000, high=384_000)
    ratios: tuple[int, ...] = option((8, 5, 4, 2), "the decoder's strides", low=2, high=16)
    n_codebooks: int = option(4, "codebooks K", low=1, high=64)
    codebook_size: int = option(256, "entries in each", choices=tuple(2**n for n in range(1, 15)))
    dimension: int = option(64, "width C of a latent", low=1, high=1024)
    n_filters: int = option(12, "width next to the audio; each stride doubles it", low=2, high=1024)
    lstm: int = option(0, "LSTM layers at the frame rate", low=0, high=4)
    causal: bool = option(False, "no look ahead")
    true_skip: bool = option(True, "residual blocks without a convolution in their shortcut")
    pad_mode: str = option("reflect", "what stands beyond the edges", choices=("reflect", "constant", "replicate"))


CODEC_24KHZ = CodecConfig(24_000, (8, 5, 4, 2), n_codebooks=32, codebook_size=1024, dimension=128, n_filters=32,
                          lstm=2, causal=True, true_skip=False)


class Codec(nn.Module):
    """An EnCodec with one plain interface: `encode`, `decode`, and facts about itself. New ones have random weights.

    `sample_rate` in Hz, `hop_length` in samples per frame, `frame_rate` in frames per second, `n_codebooks` (K: the
    first ones of those in `config`), `codebook_size` entries in each.
    """

    def __init__(self, config, n_codebooks=None):
        super().__init__()
        if n_codebooks is not None and not 1 <= n_codebooks <= config.n_codebooks:
            raise ValueError(f"n_codebooks must be 1 to {config.n_codebooks} for this codec, not {n_codebooks}")
        shape = dict(channels=1, dimension=config.dimension, n_filters=config.n_filters, ratios=list(config.ratios),
                     causal=config.causal, true_skip=config.true_skip, lstm=config.lstm, pad_mode=config.pad_mode)
        quantizer = encodec.model.qt.ResidualVectorQuantizer(
            dimension=config.dimension, n_q=config.n_codebooks, bins=config.codebook_size)
        self.model = encodec.EncodecModel(
            encodec.modules.SEANetEncoder(**shape), encodec.modules.SEANetDecoder(**shape), quantizer,
            target_bandwidths=[], sample_rate=config.sample_rate, channels=1)
        self.config = config
        self.n_codebooks = n_codebooks or config.n_codebooks
        self.codebook_size = config.codebook_size
        self.sample_rate = config.sample_rate
        self.hop_length = int(self.model.encoder.hop_length)
        self.frame_rate = self.sample_rate / self.hop_length

    @torch.inference_mode()
    def encode(self, wav):
        """[Sec. 2] Audio (B, 1, S) at `sample_rate`, any device -> codes (B, K, T) long, T = ceil(S / hop length)."""
        if wav.dim() != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"encode wants audio of shape (B, 1, S) with S > 0, not {tuple(wav.shape)}")
        layers = self.model.encoder.model
        split = len(layers) - (3 if self.config.lstm else 2)
        wav, short = wav.to(next(self.parameters()).device), wav.shape[2] <= PIECE * self.hop_length
        inner = layers[:split](wav) if short else self.in_pieces(layers[:split], wav, self.hop_length, 1)
        latents = layers[split:](inner)  # (B, C, T)
        return self.model.quantizer.vq.encode(latents, n_q=self.n_codebooks).transpose(0, 1)  # (B, K, T)

    @torch.inference_mode()
    def decode(self, codes):
        """[Sec. 2] Codes (B, K, T), on any device -> audio (B, 1, T * hop length) on that of the codec."""
        if codes.dim() != 3 or not 1 <= codes.shape[1] <= self.config.n_codebooks or codes.shape[2] == 0:
            raise ValueError(f"decode wants codes (B, {self.n_codebooks}, T) with T > 0, not {tuple(codes.shape)}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(f"decode wants codes below {self.codebook_size}; these hold {codes.min()}..{codes.max()}")
        layers = self.model.decoder.model
        split = 2 if self.config.lstm else 1
        codes = codes.to(next(self.parameters()).device).transpose(0, 1)  # (K, B, T)
        latents = layers[:split](self.model.quantizer.vq.decode(codes))  # (B, C, T)
        return self.in_pieces(layers[split:], latents, 1, self.hop_length)  # (B, 1, S)

    def in_pieces(self, layers, x, step, made):
        """`layers` on x (B, ..., T * step) -> (B, ..., T * made), PIECE frames at a time, so that memory is bounded.

        The layers between samples and frames are convolutions that reach less than CONTEXT frames to either side: the
        result is that of the whole but for rounding. The LSTM, which has no such bound, is not among them; it and the
        convolution beside it run at the frame rate, where hours are small.
        """
        frames, pieces = -(-x.shape[-1] // step), []
        for start in range(0, frames, PIECE):
            first = max(0, start - CONTEXT)
            y = layers(x[..., first * step:(start + PIECE + CONTEXT) * step])
            pieces.append(y[..., (start - first) * made:(start - first + PIECE) * made])
        return torch.cat(pieces, dim=-1)

    def save(self, path, extra=None):
        """Write config and weights (in half precision) into one file, whole or not at all."""
        weights = {name: tensor.half() for name, tensor in self.model.state_dict().items()}
        save_whole({"codec": asdict(self.config), "weights": weights, **(extra or {})}, path)


# ------------------------------------------------------------------------------------------------------------- weights

def load_codec(name_or_path, n_codebooks=None, device="cpu"):
    """Load a codec, frozen: "toy", "tunes", "encodec_24khz", "facebook/encodec_32khz", or a local one.

    A local codec is a file written by `Codec.save`, a folder in the layout of Hugging Face (or its weights alone), or
    AudioCraft's compression_state_dict.bin (or its folder). `n_codebooks` keeps only the first K codebooks (the 24 kHz
    model has up to 32; 4 by default). Public weights are downloaded once. ValueError: an unknown name, a file that is
    not a codec or does not fit; ConnectionError: a download failed. Each names the file.
    """
    name, path = str(name_or_path), SHIPPED.get(str(name_or_path), Path(name_or_path))
    if name in ("encodec_24khz", REPOSITORY) and not path.exists():
        path = fetch(REPOSITORY, WEIGHTS, "config.json") if name == REPOSITORY else fetch_url(*FILE_24KHZ)
    if path.is_dir():
        path = next((path / file for file in (CODEC_FILE, *WEIGHTS.split("|")) if (path / file).is_file()), path)
    if not path.is_file():
        raise ValueError(f"codec {str(path)!r} is unknown: want toy, tunes, encodec_24khz, {REPOSITORY}, or a codec's "
                         f"file or folder (with {CODEC_FILE} or {' or '.join(WEIGHTS.split('|')[::2])})")
    content = read_checkpoint(path)
    if "pretrained" in content:  # AudioCraft's music models name the codec of another repository
        if content["pretrained"] != REPOSITORY:
            raise ValueError(f"{path}: points to the codec {content['pretrained']!r:.80}; only {REPOSITORY} is known")
        return load_codec(beside(path.parent, REPOSITORY), n_codebooks, device)
    if "codec" in content:
        config, state = make_config(CodecConfig, content["codec"], path), content.get("weights")
    elif path.name == FILE_24KHZ[0].split("/")[-1]:
        config, state, n_codebooks = CODEC_24KHZ, content, n_codebooks or 4
    else:
        config, state = (read_audiocraft if "best_state" in content else read_hugging_face)(content, path)
    if config.n_filters * 2 ** len(config.ratios) > 4096:  # 1024 in the published ones
        raise ValueError(f"{path}: n_filters {config.n_filters}, doubled {len(config.ratios)} times, is above 4,096")
    codec = Codec(config, n_codebooks)
    names = () if "codec" in content else TENSOR_NAMES
    names += NEWER_NAMES if any("parametrizations" in str(name) for name in state or ()) else ()
    load_strictly(codec.model, state, path, names=names)
    return codec.to(device).eval().requires_grad_(False)


def check_fixed(settings, fixed, path):
    """ValueError, if published settings say another value than one that is built in here; what they lack passes."""
    for name, value in fixed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: a codec with {name} {settings[name]!r:.80} is not supported (only {value!r})")


def read_audiocraft(content, path):
    """AudioCraft's layout: our names, the settings as YAML -> (`CodecConfig`, tensors)."""
    settings = read_yaml(content.get("xp.cfg"), path)
    check_fixed(settings, {
        "channels": 1, "compression_model": "encodec", "encodec.autoencoder": "seanet", "encodec.quantizer": "rvq",
        "encodec.renormalize": False, "seanet.n_residual_layers": 1, "seanet.activation": "ELU",
        "seanet.activation_params.alpha": 1, "seanet.norm": "weight_norm", "seanet.kernel_size": 7,
        "seanet.residual_kernel_size": 3, "seanet.last_kernel_size": 7, "seanet.dilation_base": 2,
        "seanet.compress": 2, "seanet.disable_norm_outer_blocks": 0, "seanet.decoder.trim_right_ratio": 1,
        "seanet.decoder.final_activation": None}, path)
    names = {"sample_rate": "sample_rate", "rvq.n_q": "n_codebooks", "rvq.bins": "codebook_size"} | {
        f"seanet.{field}": field for field in (
            "dimension", "n_filters", "ratios", "lstm", "causal", "true_skip", "pad_mode")}
    if lacking := sorted(names.keys() - settings.keys()):
        raise ValueError(f"{path}: its settings are not those of a codec; {lacking[0]} is missing")
    return make_config(CodecConfig, {names[name]: settings[name] for name in names}, path), content["best_state"]


def read_hugging_face(tensors, path):
    """Hugging Face's layout, the settings in config.json; without it those of the 32 kHz codec -> (config, tensors)."""
    codebook, bias = tensors.get("quantizer.layers.0.codebook.embed"), tensors.get("encoder.layers.0.conv.bias")
    if getattr(codebook, "ndim", 0) != 2 or getattr(bias, "ndim", 0) != 1:
        raise ValueError(f"{path}: is not a codec; it lacks the tensors of an EnCodec")
    config_path = path.with_name("config.json")
    settings = read_checkpoint(config_path) if config_path.is_file() else {}
    shortcut = settings.get("use_conv_shortcut", False)
    check_fixed(settings, {
        "normalize": False, "audio_channels": 1, "norm_type": "weight_norm", "num_residual_layers": 1,
        "kernel_size": 7, "last_kernel_size": 7, "residual_kernel_size": 3, "dilation_growth_rate": 2,
        "compress": 2, "trim_right_ratio": 1}, config_path)
    return make_config(CodecConfig, {
        "sample_rate": settings.get("sampling_rate", 32_000), "ratios": settings.get("upsampling_ratios", (8, 5, 4, 4)),
        "n_codebooks": len({name.split(".")[2] for name in tensors if name.startswith("quantizer.layers.")}),
        "codebook_size": len(codebook), "dimension": codebook.shape[1], "n_filters": len(bias),
        "lstm": settings.get("num_lstm_layers", 2), "causal": settings.get("use_causal_conv", False),
        "true_skip": not shortcut if isinstance(shortcut, bool) else shortcut,
        "pad_mode": settings.get("pad_mode", "reflect"),
    }, config_path if settings else path), tensors
