"""The settings text (`xp.cfg`, YAML) inside AudioCraft's published models, in our words."""

from support.hub import read_yaml

FIXED = {  # settings that our network does not vary: name -> (ours, what another value means)
    "codebooks_pattern.delay.flatten_first": (0, "a flattened beginning"),
    "codebooks_pattern.delay.empty_initial": (0, "an empty beginning"),
    "channels": (1, "a stereo model"), "interleave_stereo_codebooks.use": (False, "a stereo model"),
    "fuser.sum": ([], "a condition that is added"), "fuser.input_interpolate": ([], "a condition that is interpolated"),
    "fuser.prepend": ([], "a melody-conditioned model"), "fuser.cross": (["description"], "another condition"),
    "conditioners.description.model": ("t5", "a text encoder other than T5"),
    "conditioners.description.t5.finetune": (False, "a T5 trained with the model"),
    "conditioners.description.t5.normalize_text": (False, "normalised text"),
    "fuser.cross_attention_pos_emb": (False, "cross_attention_pos_emb"),
    "transformer_lm.positional_embedding": ("sin", "rotary embeddings"),
    "transformer_lm.activation": ("gelu", "another activation"), "transformer_lm.norm": ("layer_norm", "another norm"),
    "transformer_lm.norm_first": (True, "a post-norm model"), "transformer_lm.layer_scale": (None, "layer scale"),
    "transformer_lm.past_context": (None, "a limited past"), "transformer_lm.kv_repeat": (1, "shared keys and values"),
    **{f"transformer_lm.{name}": (False, name) for name in (
        "xpos", "bias_ff", "bias_attn", "bias_proj", "qk_layer_norm", "qk_layer_norm_cross")}}
SHAPE = {"n_q": "n_codebooks", "card": "card", "dim": "dim", "num_heads": "n_heads", "num_layers": "n_layers",
         "hidden_scale": "ffn_mult"}  # AudioCraft's name -> ours
MAGNET_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "max_cfg_coef": "guidance_start",
    "min_cfg_coef": "guidance_end", "decoding_steps": "decoding_steps", "span_scoring": "span_scoring",
    "span_arrangement": "span_arrangement"}
MUSICGEN_SAMPLING = {"temp": "ar_temperature", "top_k": "ar_top_k"}


def read_settings(text, path):
    """YAML text of the file `path` -> (fields of a model's config, of a sampling config, the name of the text encoder).
    KeyError: a setting is missing; ValueError: it is not supported."""
    settings = read_yaml(text, path)
    for name, (ours, other) in FIXED.items():
        if settings.get(name, ours) != ours:
            raise ValueError(f"{other} is not supported: {name} is {settings[name]}, not {ours}")
    model = {ours: settings[f"transformer_lm.{name}"] for name, ours in SHAPE.items()}
    model["seconds"] = float(settings["dataset.segment_duration"])
    model["text_len"] = settings.get("text_len", 0)  # stands only in what `experiments.export` writes
    sampling_names = MUSICGEN_SAMPLING if settings["transformer_lm.causal"] else MAGNET_SAMPLING
    sampling = {ours: settings[f"generate.lm.{name}"] for name, ours in sampling_names.items()
                if f"generate.lm.{name}" in settings}
    if settings["transformer_lm.causal"]:  # a MusicGen, which has neither spans nor a restricted context
        pattern, delays = settings["codebooks_pattern.modeling"], settings.get("codebooks_pattern.delay.delays")
        if pattern != "delay" or delays not in (None, list(range(model["n_codebooks"]))):
            raise ValueError(f"its codebooks are not delayed by one frame each: {pattern}, {delays}")
        model |= {"objective": "ar", "context": -1}
    else:
        model |= {"context": settings["transformer_lm.subcodes_context"], "span_len": settings["masking.span_len"]}
        sampling["schedule"] = "released"
    return model, sampling, settings["conditioners.description.t5.name"]
