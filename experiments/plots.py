"""Draw the CSV files of `experiments.ablations`: one PNG beside each, and a table of it in Markdown on the screen.

    python -m experiments.plots
    python -m experiments.plots --against "constant 10"
"""

from statistics import mean

import matplotlib

from experiments.ablations import OWN, RESULTS, SAMPLING_CELLS, file_of, read_rows
from experiments.compare import paired_difference
from support.cli import Parser, run, say
from toy import WORLDS
from toy.evaluate import wilson, with_interval

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

MEASURES = {"overall_seen": "adherence, seen", "overall_unseen": "adherence, unseen", "frechet": "Frechet distance",
            "diversity": "diversity"}
LOSSES = ("val_1", "val_2", "val_3", "val_4")  # of cells that were trained


def by_setting(rows):
    """{setting: {column: values over seeds}}, in the order of the file."""
    settings = {}
    for row in rows:
        columns = settings.setdefault(row["setting"], {})
        for name in (*MEASURES, "n_prompts", *LOSSES):
            columns.setdefault(name, []).append(float(row[name] or "nan"))
    return settings


def draw(rows, path):
    """A panel per measure: the mean over seeds, a dot for each seed, and the interval of a share."""
    settings = by_setting(rows)
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(13, 0.6 + 0.32 * len(settings)), sharey=True)
    for panel, (name, title) in zip(panels, MEASURES.items(), strict=True):
        for y, columns in enumerate(settings.values()):
            middle = mean(columns[name])
            if name.startswith("overall"):
                panel.hlines(y, *wilson(middle, sum(columns["n_prompts"]) // 2), color="#7aa6c2", linewidth=1)
            panel.plot(middle, y, "o", color="#7aa6c2", markersize=8)
            panel.plot(columns[name], [y] * len(columns[name]), "k.", markersize=4)
        panel.grid(axis="y", alpha=0.3)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(settings)), settings)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_table(rows, data, against=None):
    """Means over the seeds; shares with the interval of that many clips, of which half are of each kind. Last, where
    clips were noted one by one: how many points of adherence more than the setting `against`, or, where there is none,
    than the models' own, paired by prompt."""
    cells_of = {setting: [row for row in rows if row["setting"] == setting] for setting in by_setting(rows)}
    trained, own = bool(rows[0]["val_1"]), against if against in cells_of else OWN.get(rows[0]["experiment"])
    paired = own in cells_of and all(row.get("right") for row in rows)
    titles = [rows[0]["experiment"], *MEASURES.values(), *["cross-entropy of codebooks 1-4"] * trained,
              *[f"against {own}"] * paired]
    say("\n| " + " | ".join(titles) + " |" + "\n|" + "---|" * len(titles))
    for setting, columns in by_setting(rows).items():
        n, means = sum(columns["n_prompts"]) // 2, {name: mean(columns[name]) for name in columns}
        cells = [setting, *(with_interval(means[f"overall_{kind}"], n) for kind in ("seen", "unseen")),
                 f"{means['frechet']:.0f}", f"{means['diversity']:.1f}"]
        if trained:
            cells.append(" / ".join(f"{means[name]:.2f}" for name in LOSSES))
        if paired:
            middle, low, high = paired_difference(cells_of[setting], cells_of[own], data)
            cells.append(f"{middle:+.1f} ({low:+.1f} to {high:+.1f})" if setting != own else "")
        say("| " + " | ".join(cells) + " |")


def main():
    parser = Parser(description="draw the results of the ablations")
    parser.add_argument("--against", help="the setting to compare with, in the tables that have it")
    args = parser.parse_args()
    paths = {RESULTS / file_of(name, data): data for data in WORLDS for name in ("spans", *SAMPLING_CELLS)}
    paths = {path: data for path, data in paths.items() if path.is_file()}
    if not paths:
        raise ValueError(f"{RESULTS} holds no CSV file of an ablation: run experiments.ablations first")
    tables = {path: read_rows(path) for path in paths}
    if args.against and not any(row["setting"] == args.against for rows in tables.values() for row in rows):
        raise ValueError(f"--against {args.against!r}: is no setting of these tables")
    for path, rows in tables.items():
        if len({(row["model"], row["n_prompts"], row.get("dtype")) for row in rows}) > 1:
            raise ValueError(f"{path}: has rows of several models, numbers of prompts or dtypes; keep those of one")
        draw(rows, path.with_suffix(".png"))
        print_table(rows, paths[path], args.against)


if __name__ == "__main__":
    run(main)
