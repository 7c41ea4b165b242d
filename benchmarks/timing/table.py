"""The benchmark's rows as text and as a figure."""

from matplotlib.figure import Figure

from benchmarks.inputs import HEADS, KV_HEADS, WIDTH

WHOLE = ("dense", "nsa")  # operations that the figure shows


def growth(rows, row):
    """Time of `row` over that at half its tokens, None where that was not measured."""
    half = [
        other["ms_median"]
        for other in rows
        if 2 * other["tokens"] == row["tokens"]
        and (other["what"], other["input"]) == (row["what"], row["input"])
    ]
    return row["ms_median"] / half[0] if half else None


def print_rows(rows):
    """One line per row; the input is named where there are several."""
    several = _several(rows)
    names = [f"{row['what']}, {_source(row)}" if several else row["what"] for row in rows]
    wide = max([24, *map(len, names)])
    print(
        f"{'what':{wide}} {'tokens':>7} {'median ms':>11} {'p10':>11} {'p90':>11} {'growth':>7} "
        f"{'vs dense':>9} {'roofline':>9} {'union':>6}"
    )
    for name, row in zip(names, rows, strict=True):
        digits = 1 if row["ms_median"] >= 100 else 3
        times = (row["ms_median"], row["ms_p10"], row["ms_p90"])
        print(
            f"{name:{wide}} {row['tokens']:7}",
            *(f"{time:11.{digits}f}" for time in times),
            f"{_text(growth(rows, row), '.2f'):>7} {_text(row['ratio_to_dense'], '.2f'):>9} "
            f"{_text(row['roofline_fraction'], '.2f'):>9} {_text(row['mean_union'], '.1f'):>6}",
        )


def plot(rows, path):
    """Seconds over tokens of the whole operations, written to `path`."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if row["what"].split()[0] in WHOLE]
    several = _several(rows)
    for what, source in dict.fromkeys((row["what"], _source(row)) for row in rows):
        line = [
            (row["tokens"], row["ms_median"] / 1e3)
            for row in rows
            if (row["what"], _source(row)) == (what, source)
        ]
        dash = "--" if what.startswith("dense") else "-"
        label = f"{what}, {source}" if several else what
        axes.loglog(*zip(*line, strict=True), dash, marker="o", base=2, label=label)
    axes.set(xlabel="tokens", ylabel="seconds", title=f"{HEADS}/{KV_HEADS} heads of {WIDTH}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _source(row):
    return row["input"].partition(",")[0]


def _several(rows):
    return len({_source(row) for row in rows}) > 1


def _text(number, form):
    return "" if number is None else format(number, form)
