"""What the page of `robustflow measure training` says and draws, each from the JSON of its part alone."""

from __future__ import annotations

from matplotlib.figure import Figure

from robustflow.measurements.family import Record, markdown_table, percent
from robustflow.style import WIDTH, colour

GIGA = 1e9


def profile(part: Record) -> str:
    rows = [
        [row["model"], row["precision"], f"{row['batch']}", f"{1000 * row['seconds']['step']:.0f} ms"]
        + [f"{100 * row['seconds'][phase] / row['seconds']['step']:.0f} %" for phase in part["phases"]]
        + [f"{row['operations_per_second'] / GIGA:.0f}", f"{row['convolution_peak'] / GIGA:.0f}",
           f"{100 * row['share_of_peak']:.0f} %"]
        for row in part["rows"]
    ]  # fmt: skip
    header = ["network", "precision", "batch", "a step", *part["phases"], "GFLOP/s", "peak", "share of the peak"]
    text = (
        f"Median of {part['steps']} training steps on random images. Forward: augmentation excluded, loss included; "
        "update: optimizer; constraint: back to the constraint set. GFLOP/s: three forward passes' multiply-adds, two "
        "operations each, over the whole step. Peak: the fastest 3 × 3 convolution, forward, with the same widths, "
        f"image sizes and batch. Goal: {100 * part['goal']:.0f} % of the bfloat16 peak.\n\n"
    )
    return text + markdown_table(header, rows)


def loop(part: Record) -> str:
    rows = [
        [name, f"{rate:.0f}", "" if name == "plain" else f"{part['ratios'][name]:.2f}×"]
        for name, rate in part["images_per_second"].items()
    ]
    text = (
        f"Training images per second of {part['model']} of {part['config']}, batches of {part['batch']}, the best of "
        "two runs each. Plain: float32, images one at a time through torchvision's transforms and a DataLoader. The "
        f"others: `robustflow train`. Goal: {part['goal']:.0f}×.\n\n"
    )
    return text + markdown_table(["loop", "images per second", "over plain"], rows)


def draw_profile(part: Record) -> Figure:
    """A bar a training: seconds of a step by phase."""
    rows = part["rows"]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
    ax = figure.subplots()
    names = [f"{row['model']}, {row['precision']}" for row in rows]
    left = [0.0] * len(rows)
    for place, phase in enumerate(part["phases"]):
        widths = [row["seconds"][phase] for row in rows]
        ax.barh(names, widths, left=left, color=colour(place), label=phase, height=0.65)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end, row in zip(names, left, rows, strict=True):
        label = f"{100 * row['share_of_peak']:.0f} % of the peak"
        ax.annotate(label, (end, name), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.18 * max(left))
    ax.set_xlabel("seconds of a training step")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=len(part["phases"]))
    return figure


def draw_loop(part: Record) -> Figure:
    """A bar a loop: images per second."""
    rates = part["images_per_second"]
    figure = Figure(figsize=(WIDTH * 0.6, 0.8 + 0.4 * len(rates)), layout="constrained")
    ax = figure.subplots()
    ax.barh(list(rates), list(rates.values()), color=[colour(int(name != "plain")) for name in rates], height=0.6)
    for name, rate in rates.items():
        ratio = "" if name == "plain" else f" ({part['ratios'][name]:.2f}×)"
        text = f"{rate:.0f}{ratio}"
        ax.annotate(text, (rate, name), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(rates.values()))
    ax.set_xlabel("training images per second")
    ax.grid(axis="y", visible=False)
    return figure


def best_runs(part: Record) -> list[Record]:
    """Of every way the run with the most certified images."""
    rows = part["learning"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    return [max((row for row in rows if row["way"] == way), key=lambda row: row["certified"]) for way in ways]


def orthogonality(part: Record) -> str:
    sizes = list(dict.fromkeys(row["size"] for row in part["cost"]))
    times = {(row["way"], row["size"]): row for row in part["cost"]}
    settings = part["settings"]
    rows = []
    for row in best_runs(part):
        costs = [f"{1000 * times[row['way'], size]['seconds']:.1f} ms" for size in sizes]
        defect = max(times[row["way"], size]["defect"] for size in sizes)
        shares = [percent([row[key], *row[f"{key}_interval"]]) for key in ("clean", "certified")]
        rows.append([row["way"], *costs, f"{defect:.0e}", f"{row['rate']:g}", f"{row['steps']}", *shares])
    header = ["way", *(f"update, {size}²" for size in sizes), "‖WWᵀ − I‖", "rate", "steps", "clean", "36/255"]
    return (
        "An update of one square kernel, beside the layer's own products: through the parametrisation and back, "
        "optimizer, return to the constraint. Then one small network (blocks of "
        f"{' and '.join(str(width) for width in settings['channels'])} channels, float32) trained in each way for the "
        f"same {settings['train_seconds']:.0f} seconds, schedule included, one seed; the best of three learning rates, "
        f"chosen on the same {best_runs(part)[0]['n']} validation images of {settings['dataset']} that are shown. "
        "Clean and certified accuracy in percent with 95 % Wilson intervals; kernels were projected exactly first.\n\n"
    ) + markdown_table(header, rows)


def draw_orthogonality(part: Record) -> Figure:
    """Cost of an update against the size of the kernel; what the same seconds learned."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = best_runs(part)
    for place, row in enumerate(rows):
        points = [cost for cost in part["cost"] if cost["way"] == row["way"]]
        left.plot(
            [point["size"] for point in points],
            [1000 * point["seconds"] for point in points],
            marker="o",
            color=colour(place),
            label=row["way"],
        )
    left.set(yscale="log", xlabel="size of the kernel", ylabel="milliseconds of an update", title="Cost of an update")
    left.set_xticks([point["size"] for point in points])
    for place, row in enumerate(rows):
        low, high = row["certified_interval"]
        value = 100 * row["certified"]
        right.barh(row["way"], value, color=colour(place), height=0.6, xerr=[[value - 100 * low], [100 * high - value]])
        right.annotate(f"{row['steps']} steps", (1, place), va="center", fontsize=8, color="white")
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="certified at 36/255, percent", title="What the same seconds learn")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))
    return figure
