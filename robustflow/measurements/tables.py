"""What the page of `robustflow measure certificates` says of each part."""

from __future__ import annotations

from robustflow.measurements.family import Record, markdown_table

NOISE = 0.01  # of a share: what two CPU times of one machine differ by


def tightness(part: Record) -> str:
    families = part["summary"]
    rows = [
        [method, "yes" if bound else "no"]
        + [f"{s['median']:.5g} ({s['least']:.5g}…{s['most']:.5g})" for s in (f[method] for f in families.values())]
        for method, bound in part["is_bound"].items()
    ]
    header = ["method", "a bound?", *(f"{name}: median (range)" for name in families)]
    small = part["second_difference_on_three_pixels"]
    text = (
        "Value over the true norm (dense float64 SVD; at 32×32 Lanczos, converged), 3×3 kernels, zero padding. Small "
        "images are mostly border, which these bounds do not see. Below 1 a value is no bound: the FFT at the image "
        f"size gives {small['FFT at the image size']:.3f} for [−1, 2, −1] on three pixels, the embedding bound "
        f"{small['embedding (ours)']:.3f}.\n\n"
    )
    return text + markdown_table(header, rows)


def cost(part: Record) -> str:
    rows = [
        [f"{row['channels']}", f"{row['image']}×{row['image']}", f"{row['forward_100_images']:.3g} s"]
        + [f"{value:.2g}" for value in row["of_forward"].values()]
        for row in part["rows"]
    ]
    header = ["channels", "image", "100 images forward", *part["rows"][0]["of_forward"]]
    text = "CPU time of one bound, in convolutions of 100 images with the same kernel in float64, same run.\n\n"
    return text + markdown_table(header, rows)


def share(part: Record) -> str:
    rows = [
        [
            row["network"],
            f"{row['images']:,}" + (" (extrapolated)" if row["extrapolated"] else ""),
            f"{row['forward_cpu_seconds']:.1f} s",
            f"{row['certify_cpu_seconds']:.1f} s",
            f"{100 * row['share_on_top']:.1f} %" if row["share_on_top"] >= NOISE else "< 1 %",
        ]
        for row in part["rows"]
    ]
    header = ["network", "images", "one float64 forward pass", "certifying (with it)", "on top"]
    text = (
        f"Goal: below {100 * part['goal']:.0f} % on top. Counted are norms, rounding errors and radii of `certify`; "
        "the search for a refutation that an evaluation adds, the falsifier, is not. Below 1 % a share is within the "
        "noise of the two CPU times.\n\n"
    )
    return text + markdown_table(header, rows)


def gains(part: Record) -> str:
    """Rows of models that were trained under the published inequality first: theirs is the comparison that counts."""
    rows = [
        [
            row["model"],
            f"{row['images']}",
            f"{row['lipschitz']:.4g}",
            f"{row['lipschitz_by_published_constant']:.4g}",
            f"{row['median_gain_of_exact_constant']:.3f}×",
            f"{row['median_gain_of_pairwise_head']:.3f}×",
        ]
        for row in sorted(part["rows"], key=lambda row: "prescribed" not in row["model"])
    ]
    header = ["model", "certified images", "L, exact constants", "L, √(1 − 2ah + h²)", "gain of the exact constant",
              "gain of pairwise head norms"]  # fmt: skip
    text = (
        "Radii of the same weights and images two ways, median gain. *Prescribed*, first, is trained under the "
        "published inequality: its gain is what the exact constant is worth. The published constant needs AᵀA = I and "
        "a > 0; where it does not apply (nonexpansive, naive, resnet) both sides take ours. *Sharp* and *flexible* "
        "take steps that the inequality never allows: their factors compare with a constant that no one would train "
        "under.\n\n"
    )
    return text + markdown_table(header, rows)


def campaign(part: Record) -> str:
    rows = [
        [
            regime,
            f"{entry['networks']}",
            f"{entry['random_pairs']:,}",
            f"{entry['searched_pairs']:,}",
            f"{entry['violations']}",
            *(f"{entry[f'closest_{kind}']:.6f}" for kind in ("random", "searched", "layer")),
        ]
        for regime, entry in (part["regimes"] | {"all": _all(part)}).items()
    ]
    header = ["regime", "networks", "random pairs", "searched pairs", "violations", "closest random",
              "closest searched", "closest layer"]  # fmt: skip
    text = "Networks with random weights, biases and admissible step sizes; observed over claimed expansion.\n\n"
    return text + markdown_table(header, rows)


def _all(part: Record) -> Record:
    kinds = ("closest_random", "closest_searched", "closest_layer")
    return part["total"] | {kind: max(entry[kind] for entry in part["regimes"].values()) for kind in kinds}
