"""Draw held-out digits with the model's answers beside the run's loss curve, as one PNG."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from evaluate import read_shards

COLUMNS, ROWS = 12, 8


def draw_digits(axes: Any, images: list[np.ndarray], rows: list[dict[str, str]]) -> None:
    """A grid of digits with the answers below them; wrong ones first, in red with the truth."""
    side = images[0].shape[0]
    height, width = side + 12, side + 6
    sheet = np.full((ROWS * height, COLUMNS * width, 3), 255, dtype=np.uint8)
    for cell, (image, row) in enumerate(zip(images, rows, strict=True)):
        top, left = cell // COLUMNS * height, cell % COLUMNS * width + 3
        sheet[top : top + side, left : left + side] = image
        right = row["answer"] == row["prediction"]
        text = row["prediction"][:6] if right else f"{row['prediction'][:6]} (is {row['answer']})"
        axes.text(
            left + side / 2,
            top + side + 1,
            text,
            ha="center",
            va="top",
            fontsize=8,
            color="tab:green" if right else "tab:red",
            weight="normal" if right else "bold",
        )
    axes.imshow(sheet)
    axes.set_axis_off()


def draw_loss(axes: Any, metrics: list[dict[str, float]]) -> None:
    """The loss as logged, and its running mean over a tenth of the run."""
    iterations = [row["iteration"] for row in metrics]
    losses = np.array([row["loss"] for row in metrics])
    window = max(1, len(losses) // 10)
    mean = [losses[max(0, i - window + 1) : i + 1].mean() for i in range(len(losses))]
    axes.plot(iterations, losses, color="tab:blue", alpha=0.4, linewidth=1, label="as logged")
    axes.plot(iterations, mean, color="tab:blue", label="running mean")
    axes.set(xlabel="iteration", ylabel="loss per trained token", yscale="log", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictions", type=Path, required=True, help="what evaluate.py wrote")
    parser.add_argument("--data-path", type=Path, required=True, help="the folder of the shards")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the run")
    parser.add_argument("--output", type=Path, required=True, help="the picture, a .png")
    args = parser.parse_args()

    rows = json.loads(args.predictions.read_text())
    metrics = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    images = {
        sample.key: np.asarray(sample.image) for sample in read_shards(args.data_path, "held-out-*.tar")
    }
    correct = sum(row["answer"] == row["prediction"] for row in rows)
    shown = sorted(rows, key=lambda row: row["answer"] == row["prediction"])[: COLUMNS * ROWS]

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6.5), width_ratios=[1.7, 1], layout="constrained")
    draw_digits(left, [images[row["key"]] for row in shown], shown)
    left.set_title(
        f"{correct} of {len(rows)} held-out digits right ({correct / len(rows):.1%}); wrong ones first"
    )
    draw_loss(right, metrics)
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
