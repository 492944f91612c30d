"""The paper's comparison at toy scale: autoregressive, MAGNeT, MAGNeT with rescoring, hybrid.

`quality`  what the judge hears in the clips of each, their Frechet distance, and how long they took, codec included
`latency`  seconds per batch of codes against batch size and clip length, autoregressive and MAGNeT, at random weights
`plot`     draws what the CSV files hold, and says where the curves of `latency` cross

A cell that its CSV file holds is not computed again, so the same command finishes what was stopped.

    python -m experiments.compare quality --magnet toy --ar toy-ar --hybrid toy-hybrid
    python -m experiments.compare latency --shape small --device cuda --dtype bf16
    python -m experiments.compare quality --data tunes --magnet runs/tunes --ar runs/tunes-ar
    python -m experiments.compare plot
"""

import math
import re
import time
from itertools import product
from statistics import mean, median

import torch

from experiments.ablations import RESULTS, add_row, file_of, hardware, is_done, name_with_weights, read_rows
from model import MAGNeT, ModelConfig, load_model
from sample import SamplingConfig, generate
from support.cli import DTYPES, Parser, pick_device, pick_dtype, run, say
from toy import WORLDS, world_of
from toy.evaluate import SPLITS, evaluate, with_interval

WEIGHTS, PROMPTS = (0.25, 0.5, 0.75), (0.0, 1.0, 2.0, 4.0)  # of the rescorer; seconds of a hybrid's prompt
SIBLINGS = {"autoregressive": "MAGNeT", "MAGNeT + rescoring": "MAGNeT", "hybrid 0 s": "MAGNeT",
            "hybrid 4 s": "autoregressive"}
FRAME_RATE = 50  # of the models of `latency`
SHAPES = {  # of the models of `latency`
    "small": {"dim": 1024, "n_heads": 16, "n_layers": 24, "card": 2048, "text_dim": 768},  # as magnet-small
    "toy": {"dim": 160, "n_heads": 5, "n_layers": 6, "card": 256, "text_dim": 128},
    "tiny": {"dim": 32, "n_heads": 2, "n_layers": 1, "card": 16, "text_dim": 8}}
QUALITY = ("method", "setting", "seed", "n_prompts", *(f"{name}_{kind}" for kind in SPLITS for name in
           ("overall", "low", "high")), "frechet", "seconds_per_clip", "model", "rescorer", "dtype", "hardware",
           "right")  # the last: how many attributes are right in each clip, as one digit each
LATENCY = ("method", "shape", "dtype", "batch", "length", "seconds", "repeats", "hardware")


# ------------------------------------------------------------------------------------------------------------- quality

def quality_cells(models, weights):
    """(method, setting, model, changed sampling settings, weight of the rescorer), for the models there are."""
    magnet, ar, hybrid = (models.get(kind) for kind in ("magnet", "ar", "hybrid"))
    cells = [("autoregressive", "", ar, {}, 0.0)] if ar else []
    if magnet:
        cells += [("MAGNeT", "", magnet, {}, 0.0)]
        cells += [("MAGNeT + rescoring", f"w {w:g}", magnet, {}, w) for w in weights if ar]
    return cells + [("hybrid", f"{s:g} s", hybrid, {"hybrid_seconds": s}, 0.0) for s in PROMPTS if hybrid]


def measure(name, config, seed, args, rescorer=None):
    """Play and judge: the measured columns of a row."""
    result = evaluate(name, config, pick_device(args.device), args.n, floors=False, losses=False, seed=seed, repeated=1,
                      rescorer=rescorer, data=args.data, judge=args.judge)
    row = {"frechet": result["frechet"]["model"], "seconds_per_clip": result["seconds_per_clip"], "right": ""}
    for kind in SPLITS:
        overall = result["adherence"][f"model, {kind}"]["overall"]
        row |= dict(zip((f"overall_{kind}", f"low_{kind}", f"high_{kind}"), (overall["share"], *overall["interval"]),
                        strict=True))
        row["right"] += result["right"][f"model, {kind}"]
    return row


def check_objective(name, objective):
    """ValueError if a model was trained for another objective."""
    has = load_model(name)[0].config.objective
    if has != objective:
        raise ValueError(f"--{objective} {name}: the model's objective is {has}")


def compare_quality(args):
    models = {kind: name for kind in ("magnet", "ar", "hybrid") if (name := getattr(args, kind))}
    if not models or args.n < 4:
        raise ValueError("give at least one of --magnet, --ar, --hybrid, and --n of at least 4")
    for kind, name in models.items():
        check_objective(name, kind)
    labels = {name: name_with_weights(name) for name in models.values()}
    device, path = pick_device(args.device), RESULTS / file_of("quality", args.data)
    for seed, (method, setting, name, changes, weight) in product(args.seeds, quality_cells(models, args.weights)):
        rescorer = models["ar"] if weight else None
        cell = {"method": method, "setting": setting, "seed": seed, "model": labels[name], "n_prompts": args.n // 2 * 2,
                "rescorer": labels.get(rescorer, ""), "dtype": str(pick_dtype("auto", device)).removeprefix("torch.")}
        if not is_done(path, cell):
            config = SamplingConfig(**load_model(name)[1].sampling | changes | {"rescorer_weight": weight})
            add_row(path, {**cell, **(row := measure(name, config, seed, args, rescorer)),
                           "hardware": hardware(device)}, QUALITY)
            say(f"{method:20}{setting:8} seed {seed}: {row['overall_seen']:.1%} seen, {row['overall_unseen']:.1%} "
                f"unseen, Frechet distance {row['frechet']:.0f}, {row['seconds_per_clip']:.2f} s per clip")


# ------------------------------------------------------------------------------------------------------------- latency

def seconds_of(model, config, batch, n_frames, repeats):
    """Median seconds to generate a batch of clips, after a short clip to warm up; nan if memory does not suffice."""
    weight, times = model.out_norm.weight, []
    text = torch.randn(batch, 32, model.config.text_dim, device=weight.device)
    text_mask = torch.ones(batch, 32, dtype=torch.bool)
    try:
        for n in (8, *[n_frames] * repeats):
            start = time.perf_counter()
            masked = torch.full((batch, model.config.n_codebooks, n), model.mask_id)
            generate(model, text, text_mask, masked, config).sum().item()  # waits for the device
            times.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return float("nan")
    return median(times[1:])


def compare_latency(args):
    device, config = pick_device(args.device), SamplingConfig()
    dtype, path = pick_dtype(args.dtype, device), RESULTS / "latency.csv"
    for objective in ("magnet", "ar"):
        torch.manual_seed(0)
        model = MAGNeT(ModelConfig(**SHAPES[args.shape], objective=objective)).eval().to(device, dtype)
        for length, batch in product(args.lengths, args.batches):
            cell = {"method": objective, "shape": args.shape, "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch, "length": f"{length:g}", "hardware": hardware(device)}
            if not is_done(path, cell):
                seconds = seconds_of(model, config, batch, round(length * FRAME_RATE), args.repeats)
                add_row(path, {**cell, "seconds": seconds, "repeats": args.repeats}, LATENCY)
                say(f"{objective:8} batch {batch:3}, {length:g} s: {seconds:.3f} s")


def crossings(rows):
    """Where autoregressive decoding becomes faster than MAGNeT as batches grow, of `latency` rows of one setting.

    Gives {length: batch size, in between those measured; None where it never does}.
    """
    times = {(row["method"], row["length"], int(row["batch"])): float(row["seconds"]) for row in rows}
    found = {}
    for length in dict.fromkeys(row["length"] for row in rows):
        batches = sorted(batch for method, of, batch in times if (method, of) == ("ar", length)
                         and ("magnet", length, batch) in times)
        gains = [times["ar", length, batch] / times["magnet", length, batch] for batch in batches]
        found[length] = next((b if g <= 1 and i == 0 else
                              batches[i - 1] * (b / batches[i - 1]) ** ((gains[i - 1] - 1) / (gains[i - 1] - g))
                              for i, (b, g) in enumerate(zip(batches, gains, strict=True)) if g <= 1), None)
    return found


# --------------------------------------------------------------------------------------------------------------- plots

def plot_quality(plt, rows, path):
    """Adherence with its interval, and the Frechet distance, against seconds per clip; a point per cell."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4))
    for panel, (name, title) in zip(panels, {"overall_seen": "adherence, seen", "overall_unseen": "adherence, unseen",
                                             "frechet": "Frechet distance"}.items(), strict=True):
        for colour, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            points = [row for row in rows if row["method"] == method]
            x, y = ([float(row[column]) for row in points] for column in ("seconds_per_clip", name))
            panel.plot(x, y, "o", color=f"C{colour}", label=method)
            for row, at in zip(points, zip(x, y, strict=True), strict=True):
                panel.annotate(row["setting"], at, fontsize=6)
            if name != "frechet":
                kind = name.removeprefix("overall_")
                low, high = ([float(row[f"{end}_{kind}"]) for row in points] for end in ("low", "high"))
                panel.vlines(x, low, high, color=f"C{colour}", linewidth=0.6)
        panel.set(title=title, xlabel="seconds per clip", xscale="log")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_quality(rows):
    """A table in Markdown, the seeds of a cell taken together: shares with the interval of that many clips."""
    say("| method | setting | adherence, seen | adherence, unseen | Frechet distance | seconds per clip |")
    say("|---" * 6 + "|")
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        cell = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        n = sum(int(row["n_prompts"]) for row in cell) // 2
        shares = (with_interval(mean(float(row[f"overall_{kind}"]) for row in cell), n) for kind in SPLITS)
        rest = (format(mean(float(row[name]) for row in cell), form)
                for name, form in (("frechet", ".0f"), ("seconds_per_clip", ".3g")))
        say("| " + " | ".join((method, setting, *shares, *rest)) + " |")


def paired_difference(rows, others, data="toy"):
    """By how many points of adherence `rows` are above `others`, on the same prompts: (mean, low, high) of 95%.

    The seeds of a prompt are averaged before they are compared: they are not trials of their own. Here 5, 5, 4, 4 of 5
    attributes against 5, 4, 4, 4, so that the differences of the four prompts are 0, 20, 0 and 0 points:

    >>> found = paired_difference([{"right": "5544"}, {"right": "5544"}], [{"right": "5434"}, {"right": "5454"}])
    >>> [round(points, 6) for points in found]
    [5.0, -4.8, 14.8]
    """
    means = (torch.tensor([[int(digit) for digit in row["right"]] for row in cell]).double().mean(dim=0)
             for cell in (rows, others))
    points = torch.sub(*means) * 100 / len(world_of(data).ATTRIBUTES)  # (n_prompts,)
    middle, half = points.mean().item(), 1.96 * points.std().item() / len(points) ** 0.5
    return middle, middle - half, middle + half


def print_differences(rows, data="toy"):
    """What each method gains or loses against that of `SIBLINGS`."""
    cells = {}
    for row in rows:
        cells.setdefault((row["method"], row["setting"]), []).append(row)
    for (method, setting), cell in cells.items():
        sibling = SIBLINGS.get(method) or SIBLINGS.get(f"{method} {setting}")
        if (sibling, "") in cells:
            middle, low, high = paired_difference(cell, cells[sibling, ""], data)
            say(f"{method} {setting}".strip() + f" against {sibling}: {middle:+.1f} points ({low:+.1f} to {high:+.1f})")


def plot_latency(plt, rows, path):
    """Seconds per clip against batch size, a panel per clip length, both on log scales."""
    lengths = sorted({float(row["length"]) for row in rows})
    figure, panels = plt.subplots(1, len(lengths), figsize=(3.4 * len(lengths), 3.4), sharey=True, squeeze=False)
    for panel, length in zip(panels[0], lengths, strict=True):
        for method, title in (("ar", "autoregressive"), ("magnet", "MAGNeT")):
            points = sorted((int(row["batch"]), float(row["seconds"]) / int(row["batch"])) for row in rows
                            if row["method"] == method and float(row["length"]) == length)
            panel.plot(*zip(*points, strict=True), "o-", label=title)
        panel.set(title=f"clips of {length:g} s", xlabel="batch size", xscale="log", yscale="log")
    panels[0][0].set_ylabel("seconds per clip")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_latency(rows):
    """A table in Markdown: seconds per clip, MAGNeT / autoregressive, and where the two cross."""
    batches = sorted({int(row["batch"]) for row in rows})
    say("| clips of | " + " | ".join(f"batch of {batch}" for batch in batches) + " | they cross at |")
    say("|---" * (len(batches) + 2) + "|")
    for length, crossing in crossings(rows).items():
        times = {(row["method"], int(row["batch"])): float(row["seconds"]) for row in rows if row["length"] == length}
        cells = (" / ".join(format(times.get((method, batch), math.nan) / batch, ".3g") for method in ("magnet", "ar"))
                 for batch in batches)
        where = {None: "MAGNeT ahead", batches[0]: "autoregressive ahead"}.get(crossing) or f"{crossing:.3g} clips"
        say(f"| {length} s | " + " | ".join(cells) + f" | {where} |")


def draw_all(args):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    latency = read_rows(RESULTS / "latency.csv")
    quality = {data: rows for data in WORLDS if (rows := read_rows(RESULTS / file_of("quality", data)))}
    if not quality and not latency:
        raise ValueError(f"{RESULTS} holds neither quality.csv nor latency.csv: run `quality` or `latency` first")
    for data, rows in quality.items():
        print_quality(rows)
        print_differences(rows, data)
        plot_quality(plt, rows, (RESULTS / file_of("quality", data)).with_suffix(".png"))
    for setting in dict.fromkeys((row["shape"], row["dtype"], row["hardware"]) for row in latency):
        rows = [row for row in latency if (row["shape"], row["dtype"], row["hardware"]) == setting]
        plot_latency(plt, rows, RESULTS / f"latency-{'-'.join(re.findall(r'[a-zA-Z0-9]+', ' '.join(setting)))}.png")
        say(f"\nseconds per clip, MAGNeT / autoregressive: {', '.join(setting)}")
        print_latency(rows)


def main():
    parser = Parser(description="autoregressive, masked and hybrid models compared")
    parser.add_argument("part", choices=("quality", "latency", "plot"))
    for kind in ("magnet", "ar", "hybrid"):
        parser.add_argument(f"--{kind}", help="quality: the model of this kind; without it those cells are left out")
    parser.add_argument("--data", choices=WORLDS, default="toy", help="quality: the world that is played and judged")
    parser.add_argument("--judge", help="quality: a judge's file; default: the one that ships for the world")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="quality: of the sampling")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="quality: of the rescorer")
    parser.add_argument("--n", type=int, default=100, help="quality: prompts per cell, half of them unseen pairs")
    parser.add_argument("--shape", default="toy", choices=SHAPES, help="latency: of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="latency: sizes")
    parser.add_argument("--lengths", type=float, nargs="+", default=[4, 10, 30], help="latency: seconds of the clips")
    parser.add_argument("--repeats", type=int, default=3, help="latency: how often each is timed")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="latency: of the model")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if min(*args.batches, args.repeats, 1) < 1:
        raise ValueError("--batches and --repeats must be at least 1")
    {"quality": compare_quality, "latency": compare_latency, "plot": draw_all}[args.part](args)


if __name__ == "__main__":
    run(main)
