"""A picture of one decode of the shipped model: what each step keeps and what it hides again [Sec. 3.3, Fig. 4].

    python -m experiments.picture

A step (row) samples all hidden frames (columns), keeps the most probable spans and hides the others again. Strong
colours are probable tokens; it is the tempered probability that the spans are ranked by, and so rises as the
temperature falls. Beside it: the share of spans that are hidden when a step begins [Eq. 3].
"""

import matplotlib
import numpy as np
import torch

from encodec_wrap import load_codec
from experiments.ablations import RESULTS
from model import load_model
from sample import SamplingConfig, generate, mask_rate
from support.cli import Parser, run
from t5_encoder import T5Encoder

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

PROMPT = "a slow deep flute plays a rising melody, with drums"
COLOURS = {"kept": "#0072b2", "just sampled, and kept": "#d55e00", "sampled, then hidden again": "#e4e4e4"}


def record():
    """Decode one clip -> {stage: (hidden (steps, T), confidence (steps, T))}, numpy arrays."""
    model, companions = load_model("toy")
    codec, rows = load_codec(companions.codec), {}
    text, text_mask = T5Encoder.from_pretrained(companions.text_encoder).encode_text([PROMPT])
    codes = torch.full((1, model.config.n_codebooks, round(model.config.seconds * codec.frame_rate)), model.mask_id)
    generate(model, text, text_mask, codes, SamplingConfig(**companions.sampling),
             on_step=lambda stage, hidden, confidence, **_: rows.setdefault(stage, []).append((hidden, confidence)))
    return {k: tuple(torch.cat(x).numpy() for x in zip(*steps, strict=True)) for k, steps in rows.items()}


def image(hidden, confidence):
    """The colour of each frame after each step (steps, T, 3), by the probability of its token when sampled."""
    again = np.vstack([hidden[1:], hidden[:1] & False])
    kept, sampled, grey = (np.array(matplotlib.colors.to_rgb(colour)) for colour in COLOURS.values())
    picture, sure = np.tile(grey, (*hidden.shape, 1)), np.zeros(hidden.shape[1])
    for step, now in enumerate(hidden):
        sure = np.where(now, confidence[step], sure)
        colour = 1 - (0.35 + 0.65 * sure)[:, None] * (1 - np.where(now[:, None], sampled, kept))
        picture[step] = np.where(again[step][:, None], grey, colour)
    return picture


def main():
    Parser(description="draw one decode of the shipped model").parse_args()
    shown = min(rows := record()), max(rows)
    figure, panels = plt.subplots(2, 2, figsize=(8, 4.8), sharey="row", layout="constrained", gridspec_kw={
        "width_ratios": (5, 1), "height_ratios": [len(rows[stage][0]) + 3 for stage in shown]})
    for (left, right), stage in zip(panels, shown, strict=True):
        steps = len(rows[stage][0])
        left.imshow(image(*rows[stage]), aspect="auto", interpolation="nearest")
        left.set(title=f"codebook {stage + 1} of {len(rows)}", ylabel="decoding step", xlabel="frame")
        left.set_yticks([0, *range(4, steps, 5)], [1, *range(5, steps + 1, 5)])
        right.plot([mask_rate(step, steps) for step in range(steps)], range(steps), "o-", color="black", markersize=3)
        right.set(title="mask rate", xlim=(0, 1.08), xticks=(0, 0.5, 1))
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(patches, COLOURS, ncols=3, loc="outside upper center", frameon=False)
    figure.savefig(path := RESULTS / "decoding.png", dpi=150)
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
