"""Write a training run in the layout in which AudioCraft publishes its models; `load_model` reads it, and so should it.

    python -m experiments.export runs/mine published/mine
    python sample.py --model published/mine "a slow flute"

The folder gets state_dict.bin (the averaged weights in float16, and the settings as YAML) and
compression_state_dict.bin (the codec in AudioCraft's own layout, or the name of the published one). A text encoder
that has a name of the T5 family is named; another is written into the folder, where only this code looks for it.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from encodec_wrap import CODEC_FILE, REPOSITORY, load_codec
from model import TENSOR_NAMES, load_model
from sample import SamplingConfig
from support.audiocraft import MAGNET_SAMPLING, MUSICGEN_SAMPLING, SHAPE
from support.cli import Parser, run, say
from support.files import rename, save_whole
from t5_encoder import REPOSITORIES, T5Encoder
from toy.train_text import save_pretrained

NETWORK = {  # what our network does not vary, under the names of AudioCraft's `transformer_lm`
    "activation": "gelu", "norm": "layer_norm", "norm_first": True, "bias_ff": False, "bias_attn": False,
    "bias_proj": False, "positional_embedding": "sin", "xpos": False, "layer_scale": None, "past_context": None,
    "kv_repeat": 1, "qk_layer_norm": False, "qk_layer_norm_cross": False, "cross_attention": False, "emb_lr": None,
    "custom": False, "memory_efficient": True, "attention_as_float32": False, "attention_dropout": None,
    "checkpointing": "none", "weight_init": "gaussian", "depthwise_init": "current", "zero_bias_init": True,
    "two_step_cfg": False}
SEANET = {  # the same of its codec
    "channels": 1, "n_residual_layers": 1, "activation": "ELU", "activation_params": {"alpha": 1.0},
    "norm": "weight_norm", "norm_params": {}, "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 7,
    "dilation_base": 2, "compress": 2, "disable_norm_outer_blocks": 0, "encoder": {},
    "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None}}


def published_state(model, dtype):
    """The weights of a `MAGNeT` under AudioCraft's names, which stack q, k and v."""
    published, state = {}, model.state_dict()
    for name, tensor in state.items():
        if name.endswith("cross_attn.q.weight"):
            tensor = torch.cat([tensor, state[name.replace(".q.", ".kv.")]])
        if not name.endswith("cross_attn.kv.weight"):
            published[rename(name, TENSOR_NAMES)] = tensor.to(dtype)
    return published


def model_settings(config, text_encoder, sampling, sample_rate, frame_rate):
    """The settings of a model, nested as in AudioCraft: all that the official code reads to build and to play it.

    config: its `ModelConfig`; text_encoder: a name; sampling: a `SamplingConfig`; the rates are the codec's, in Hz.
    ValueError: a hybrid, of which AudioCraft has none.
    """
    if config.objective == "hybrid":
        raise ValueError("a hybrid cannot be exported: AudioCraft has none (want the objective magnet or ar)")
    causal, K = config.objective == "ar", config.n_codebooks
    seconds = int(config.seconds) if config.seconds.is_integer() else config.seconds  # want a whole number there
    network = NETWORK | {theirs: getattr(config, ours) for theirs, ours in SHAPE.items()}
    network |= {"dropout": config.dropout, "causal": causal}
    settings = {
        "solver": "musicgen" if causal else "magnet", "lm_model": f"transformer_lm{'' if causal else '_magnet'}",
        "device": "cpu", "dtype": "float32", "sample_rate": sample_rate, "channels": 1, "transformer_lm": network,
        "compression_model_checkpoint": f"//pretrained/{REPOSITORY}", "compression_model_n_q": None,
        "dataset": {"segment_duration": seconds}, "attribute_dropout": {},
        "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": sampling.ar_guidance},
        "codebooks_pattern": {"modeling": "delay" if causal else "parallel", "parallel": {"empty_initial": -1},
                              "delay": {"delays": list(range(K)), "flatten_first": 0, "empty_initial": 0}},
        "fuser": {"cross_attention_pos_emb": False, "cross_attention_pos_emb_scale": 1, "sum": [], "prepend": [],
                  "cross": ["description"], "input_interpolate": []},
        "conditioners": {"description": {"model": "t5", "t5": {
            "name": text_encoder, "finetune": False, "word_dropout": 0.0, "normalize_text": False}}},
        "tokens": {"padding_with_special_token": False},
        "interleave_stereo_codebooks": {"use": False, "per_timestep": False},
        "generate": {"lm": {"use_sampling": not sampling.greedy}},
        "text_len": config.text_len}  # the only key that AudioCraft has not: it pads a text as its batch happens to be
    values = asdict(sampling)
    settings["generate"]["lm"] |= {theirs: list(values[ours]) if isinstance(values[ours], tuple) else values[ours]
                                   for theirs, ours in (MUSICGEN_SAMPLING if causal else MAGNET_SAMPLING).items()}
    if not causal:
        steps = [*sampling.decoding_steps, *[sampling.decoding_steps[-1]] * K][:K]
        settings["generate"]["lm"] |= {"decoding_steps": steps, "anneal_temp": True}
        network |= {"subcodes_context": config.context, "span_len": config.span_len,
                    "segment_duration": seconds, "compression_model_framerate": round(frame_rate)}
        settings["masking"] = {"span_len": config.span_len}
    return settings


def write_model(model, folder, text_encoder, sampling, sample_rate, frame_rate, dtype=torch.float16):
    """Write state_dict.bin; the arguments are those of `published_state` and `model_settings`."""
    settings = model_settings(model.config, text_encoder, sampling, sample_rate, frame_rate)
    save_whole({"best_state": published_state(model, dtype), "xp.cfg": yaml.safe_dump(settings), "version": "1.3.0",
                "exported": True}, Path(folder, "state_dict.bin"))


def write_audiocraft_codec(codec, folder):
    """Write a codec in AudioCraft's own layout, as the sound-effect models have one; only its first K codebooks."""
    c, K = asdict(codec.config), codec.n_codebooks
    shape = {name: c[name] for name in ("dimension", "n_filters", "lstm", "causal", "true_skip", "pad_mode")}
    settings = {
        "solver": "compression", "device": "cpu", "dtype": "float32", "sample_rate": c["sample_rate"], "channels": 1,
        "compression_model": "encodec", "seanet": SEANET | shape | {"ratios": list(c["ratios"])},
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": c["sample_rate"], "channels": 1,
                    "causal": c["causal"], "renormalize": False},
        "rvq": {"n_q": K, "q_dropout": False, "bins": c["codebook_size"], "decay": 0.99, "kmeans_init": True,
                "kmeans_iters": 50, "threshold_ema_dead_code": 2}}
    dropped = tuple(f"quantizer.vq.layers.{k}." for k in range(K, c["n_codebooks"]))
    state = {name: tensor for name, tensor in codec.model.state_dict().items() if not name.startswith(dropped)}
    save_whole({"best_state": state, "xp.cfg": yaml.safe_dump(settings), "version": "1.3.0", "exported": True},
               Path(folder, CODEC_FILE))


def export(run, folder):
    """Write the run `run` (or any model that `load_model` reads) into `folder`. ValueError: it cannot be exported."""
    (model, companions), folder = load_model(run), Path(folder)
    if (folder / "state_dict.bin").exists():
        raise ValueError(f"{folder} holds a model already: give another folder")
    codec, name = load_codec(companions.codec, model.config.n_codebooks), companions.text_encoder
    repository, sampling = REPOSITORIES.get(name.split("/")[-1]), SamplingConfig(**companions.sampling)
    if repository is None:
        name = "text_encoder"
    else:
        name = repository.removeprefix("google-t5/")
    write_model(model, folder, name, sampling, codec.sample_rate, codec.frame_rate)
    if repository is None:
        save_pretrained(T5Encoder.from_pretrained(companions.text_encoder), folder / name)
        say(f"the text encoder is written to {folder / name}: the official code, which knows T5 by its names only, "
            "cannot use it")
    if companions.codec == REPOSITORY:
        save_whole({"pretrained": REPOSITORY}, folder / CODEC_FILE)
    elif Path(companions.codec).name == CODEC_FILE:  # as published: a codec, or the name of one
        shutil.copyfile(companions.codec, folder / CODEC_FILE)
    else:
        write_audiocraft_codec(codec, folder)
    if not model.config.seconds.is_integer():
        say(f"the official code builds models of whole seconds only, not of {model.config.seconds:g}")
    if sampling.schedule != "released" and model.config.objective == "magnet":
        say("a published model is always decoded with the released schedule (--schedule paper for the other)")
    say(f"wrote {folder}: {model}")


def main():
    parser = Parser(description="write a run in the layout of AudioCraft's published models")
    parser.add_argument("run", help="a run's folder, a checkpoint file, or another model, as --model of sample.py")
    parser.add_argument("folder", help="where to write")
    args = parser.parse_args()
    export(args.run, args.folder)


if __name__ == "__main__":
    run(main)
