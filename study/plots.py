"""What the studies' plots share: grey text on no background, which reads on light and on dark pages, and a line's looks.

matplotlib is imported when a plot is begun, so that a study can be made, and its table written, without it.
"""

STYLES = {
    "speed, BoS on": ("#1f8fe0", "o", "-"),
    "speed, BoS off": ("#e0782f", "s", "--"),
    "pop": ("#35a853", "^", ":"),
    "share": ("#a05fd0", "D", ""),
}  # colour, marker, dash


def subplots(*grid, **options):
    """matplotlib's own `subplots`, on which the lines can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    plt.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "speed",
            "font.size": 11,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 9,
            **dict.fromkeys(grey, "#808080"),
        }
    )
    return plt.subplots(*grid, **options)


def save(figure, path):
    """The same bytes for the same lines, whenever it is drawn."""
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
