"""Small random models laid out as the official code exports them, with the whole of its settings text.

`settings_of` gives the settings under all keys that an exported file has, those that nothing here reads included: see
`data/published_settings.yaml`. `lay_repositories` writes every repository that the published names need.
"""

import torch
import yaml
from conftest import DATA

from encodec_wrap import CODEC_FILE, REPOSITORY, Codec, CodecConfig
from experiments.export import published_state, write_audiocraft_codec
from experiments.full_size import write_codec
from model import PUBLISHED_MODELS, MAGNeT, ModelConfig
from t5_encoder import REPOSITORIES, T5Config, T5Encoder
from toy.train_text import save_pretrained

CARD, WIDTHS = 16, {"t5-base": 8, "t5-large": 12}  # entries per codebook; widths of the text encoders


def settings_of(name):
    """The settings of a published model as the official code exports them, nested; "musicgen-small", for example."""
    settings = yaml.safe_load((DATA / "published_settings.yaml").read_text(encoding="utf-8"))
    lm = settings["generate"]["lm"]
    if "30secs" in name or "musicgen" in name:
        settings["dataset"]["segment_duration"] = settings["transformer_lm"]["segment_duration"] = 30
        lm["decoding_steps"] = [60, 10, 10, 10]
    if "audio" in name:
        settings |= {"solver": "audio_magnet", "sample_rate": 16000, "compression_model_checkpoint": "//reference/c"}
        lm |= {"temp": 3.5, "top_p": 0.8, "max_cfg_coef": 20.0}
        settings["conditioners"]["description"]["t5"]["name"] = "t5-large"
    if "musicgen" in name:
        settings |= {"solver": "musicgen", "lm_model": "transformer_lm"}
        del settings["masking"], settings["codebooks_pattern"]["parallel"]
        settings["codebooks_pattern"]["modeling"], settings["transformer_lm"]["causal"] = "delay", True
        for key in ("subcodes_context", "compression_model_framerate", "segment_duration", "span_len"):
            del settings["transformer_lm"][key]
        for key in ("max_prompt_len", "max_gen_len", "max_cfg_coef", "min_cfg_coef", "decoding_steps", "anneal_temp",
                    "span_scoring", "span_arrangement", "samples"):
            del lm[key]
        lm |= {"temp": 1.0, "top_k": 250, "top_p": 0.0, "prompted_samples": True}
    return settings


def lay_model(folder, name, change=lambda settings: None, flow=False):
    """Write state_dict.bin and compression_state_dict.bin of a small random model into a folder.

    change(settings) may alter them, but for the shape; flow: "[0, 1]" in place of a line per entry.
    """
    torch.manual_seed(0)
    text_encoder = "t5-large" if "audio" in name else "t5-base"
    model = MAGNeT(ModelConfig(card=CARD, dim=16, n_heads=2, n_layers=1, text_dim=WIDTHS[text_encoder]))
    settings = settings_of(name)
    change(settings)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"best_state": published_state(model, torch.float16), "version": "1.3.0", "exported": True,
                "xp.cfg": yaml.safe_dump(settings, default_flow_style=flow)}, folder / "state_dict.bin")
    if "audio" in name:
        write_audiocraft_codec(Codec(tiny_codec(16_000, (8, 5, 4, 2))), folder)
    else:
        torch.save({"pretrained": REPOSITORY}, folder / CODEC_FILE)
    return folder


def tiny_codec(sample_rate, ratios):
    return CodecConfig(sample_rate, ratios, codebook_size=CARD, dimension=4, n_filters=2, lstm=2)


def lay_repositories(folder):
    """Write owner/name/file for every published model, the 32 kHz codec and the two text encoders."""
    for name in PUBLISHED_MODELS:
        lay_model(folder / name, name)
    write_codec(Codec(tiny_codec(32_000, (8, 5, 4, 4))), folder / REPOSITORY)
    for name, width in WIDTHS.items():
        encoder = T5Encoder(T5Config(32_128, width, 4, 8, 1, 2), DATA / "t5_spiece.model")
        save_pretrained(encoder, folder / REPOSITORIES[name])
    return folder
