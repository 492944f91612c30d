"""Small random models laid out as the official code exports them, with the whole of its settings text.

`settings_of` gives the settings under all keys that an exported file has, those that nothing here reads included; the
values of these are our own. `lay_repositories` writes every repository that the published names need.
"""

import copy
import json

import torch
import yaml

from encodec_wrap import CODEC_FILE, REPOSITORY, Codec, CodecConfig
from experiments.export import published_state, write_audiocraft_codec
from experiments.full_size import write_codec
from model import PUBLISHED_MODELS, MAGNeT, ModelConfig
from t5_encoder import REPOSITORIES, T5Config, T5Encoder
from toy.train_text import save_pretrained

SPIECE = "t5_spiece.model"
CARD, WIDTHS = 16, {"t5-base": 8, "t5-large": 12}  # entries per codebook; widths of the text encoders
SETTINGS = """
{device: cuda, dtype: float32, autocast: true, autocast_dtype: float16, seed: 1, show: false, continue_from: null,
execute_only: null, execute_inplace: false, benchmark_no_load: false, efficient_attention_backend: torch,
num_threads: 1, mp_start_method: forkserver, label: null, solver: magnet,
logging: {level: INFO, log_updates: 5, log_tensorboard: false, log_wandb: false},
tensorboard: {with_media_logging: false, name: null, sub_dir: null},
wandb: {with_media_logging: false, project: null, name: null, group: null},
slurm: {gpus: 1, mem_per_gpu: 10, time: 60, constraint: null, partition: null, comment: null, setup: [], exclude: ''},
dora: {dir: '/data/${oc.env:USER}/runs', exclude: [device, 'wandb.*'], use_rendezvous: false, git_save: true},
datasource: {max_sample_rate: 32000, max_channels: 1, train: a, valid: b, evaluate: c, generate: c},
fsdp: {use: false, param_dtype: float16, reduce_dtype: float32, buffer_dtype: float32, sharding_strategy: shard_grad_op,
       per_block: true},
profiler: {enabled: false}, deadlock: {use: true, timeout: 60},
dataset: {batch_size: 8, num_workers: 1, segment_duration: 10, num_samples: null, return_info: true, shuffle: false,
          sample_on_duration: false, sample_on_weight: false, min_segment_ratio: 0.5,
          train: {num_samples: 100, shuffle: true, shuffle_seed: 0, permutation_on_files: false, merge_text_p: 0.25,
                  drop_desc_p: 0.5, drop_other_p: 0.5},
          valid: {num_samples: 10}, evaluate: {num_samples: 10}, generate: {num_samples: 5, return_info: true}},
checkpoint: {save_last: true, save_every: 5, keep_last: 2, keep_every_states: null},
generate: {every: 5, path: samples, num_workers: 1,
           audio: {format: wav, strategy: loudness, sample_rate: '${sample_rate}', loudness_headroom_db: 14},
           lm: {use_sampling: true, temp: 3.0, top_k: 0, top_p: 0.9, prompted_samples: false, unprompted_samples: true,
                no_text_conditioning: false, gen_gt_samples: false, prompt_duration: null, gen_duration: null,
                remove_prompts: false, max_prompt_len: null, max_gen_len: null, max_cfg_coef: 10.0, min_cfg_coef: 1.0,
                decoding_steps: [20, 10, 10, 10], anneal_temp: true, span_scoring: max, span_arrangement: nonoverlap,
                samples: {prompted: false, unprompted: true}}},
evaluate: {every: 5, num_workers: 1, truncate_audio: null, fixed_generation_duration: null,
           metrics: {base: false, fad: false, kld: false, text_consistency: false, chroma_cosine: false}},
optim: {epochs: 5, updates_per_epoch: 10, lr: 1, optimizer: dadam, max_norm: 1.0, eager_sync: true,
        adam: {betas: [0.9, 0.95], weight_decay: 0.1, eps: 1.0e-08},
        ema: {use: true, updates: 10, device: cuda, decay: 0.99}},
schedule: {lr_scheduler: cosine, step: {step_size: null, gamma: null}, exponential: {lr_decay: null},
           cosine: {warmup: 10, lr_min_ratio: 0.0, cycle_length: 1.0},
           polynomial_decay: {warmup: null, zero_lr_warmup_steps: 0, end_lr: 0.0, power: 1},
           inverse_sqrt: {warmup: null, warmup_init_lr: 0.0}, linear_warmup: {warmup: null, warmup_init_lr: 0.0}},
classifier_free_guidance: {training_dropout: 0.3, inference_coef: 3.0}, attribute_dropout: {},
fuser: {cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1, sum: [], prepend: [], cross: [description],
        input_interpolate: []},
conditioners: {
  description: {model: t5, t5: {name: t5-base, finetune: false, word_dropout: 0.3, normalize_text: false}}},
sample_rate: 32000, channels: 1, compression_model_checkpoint: //pretrained/facebook/encodec_32khz,
compression_model_n_q: null, tokens: {padding_with_special_token: false},
interleave_stereo_codebooks: {use: false, per_timestep: false},
cache: {path: null, write: false, write_shard: 0, write_num_shards: 1},
metrics: {fad: {use_gt: false, model: tf, tf: {bin: null, model_path: //reference/a}},
          kld: {use_gt: false, model: passt, passt: {pretrained_length: 20}},
          text_consistency: {use_gt: false, model: clap,
                             clap: {model_path: //reference/b, model_arch: HTSAT-base, enable_fusion: false}},
          chroma_cosine: {use_gt: false, model: chroma_base, chroma_base: {sample_rate: '${sample_rate}', n_chroma: 12,
                          radix2_exp: 14, argmax: true}}},
lm_model: transformer_lm_magnet,
codebooks_pattern: {modeling: parallel, delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0},
                    unroll: {flattening: [0, 1, 2, 3], delays: [0, 0, 0, 0]}, music_lm: {group_by: 2},
                    coarse_first: {delays: [0, 0, 0]}, parallel: {empty_initial: -1}},
transformer_lm: {dim: 16, num_heads: 2, num_layers: 1, hidden_scale: 4, n_q: 4, card: 16, dropout: 0.0, emb_lr: null,
                 activation: gelu, norm_first: true, bias_ff: false, bias_attn: false, bias_proj: false,
                 past_context: null, causal: false, custom: false, memory_efficient: true, attention_as_float32: false,
                 layer_scale: null, positional_embedding: sin, xpos: false, checkpointing: none, weight_init: gaussian,
                 depthwise_init: current, zero_bias_init: true, norm: layer_norm, cross_attention: false,
                 qk_layer_norm: false, qk_layer_norm_cross: false, attention_dropout: null, kv_repeat: 1,
                 two_step_cfg: false, subcodes_context: 5, compression_model_framerate: 50, segment_duration: 10,
                 span_len: 3},
masking: {span_len: 3}}
"""


def settings_of(name):
    """The settings of a published model as the official code exports them, nested; "musicgen-small", for example."""
    settings = copy.deepcopy(yaml.safe_load(SETTINGS))
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


def lay_repositories(folder, data):
    """Write owner/name/file for every published model, the 32 kHz codec and the two text encoders; `data`: where T5's
    tokenizer lies."""
    for name in PUBLISHED_MODELS:
        lay_model(folder / name, name)
    write_codec(Codec(tiny_codec(32_000, (8, 5, 4, 4))), folder / REPOSITORY)
    for name, width in WIDTHS.items():
        save_pretrained(T5Encoder(T5Config(32_128, width, 4, 8, 1, 2), data / SPIECE), folder / REPOSITORIES[name])
        (folder / REPOSITORIES[name] / "config.json").write_text(json.dumps({
            "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32_128, "d_model": width, "d_kv": 4,
            "d_ff": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "is_encoder_decoder": True,
            "feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6,
            "task_specific_params": {"summarization": {"num_beams": 4}}}))
    return folder
