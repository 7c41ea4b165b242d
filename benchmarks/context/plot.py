"""The bytes and the memory of devices that share a video, as a figure."""

from matplotlib.figure import Figure

COLORS = {"gather": "C0", "ring": "C1"}
MARKERS = {"forward": "o", "backward": "s", "forward+backward": "s"}
MIB = 2**20


def plot(report, path):
    """Points of bytes: measured; lines: as expected. Written to `path`."""
    rows = [row for row in report["rows"] if row["tensor"] == 1 and row["context"] > 1]
    memory = report["memory"]
    figure = Figure(figsize=(15 if memory else 10, 4.5), layout="constrained")
    left, middle, *right = figure.subplots(1, 3 if memory else 2)
    for axes, scaling in ((left, "weak"), (middle, "strong")):
        shown = [row for row in rows if row["scaling"] == scaling]
        _draw_bytes(axes, shown)
        share = "tokens_per_device" if scaling == "weak" else "tokens"
        of = " of each device" if scaling == "weak" else " in all"
        _label(axes, f"{shown[0][share]:,} tokens{of}", "MiB that a device receives")
    for axes in right:
        _draw_memory(axes, memory["rows"])
        title = (
            f"{memory['rows'][0]['tokens_per_device']:,} tokens of each {memory['device'].upper()}"
        )
        _label(axes, f"{title}, compiled for it", "MiB of temporaries of a device")
    figure.suptitle("points: of the compiled programs; lines of bytes: as expected")
    figure.savefig(path, dpi=120)


def _draw_bytes(axes, rows):
    for mode, color in COLORS.items():
        for phase in ("forward", "backward"):
            line = [row for row in rows if (row["mode"], row["phase"]) == (mode, phase)]
            degrees = [row["context"] for row in line]
            dash = "-" if phase == "forward" else "--"
            axes.plot(degrees, [row["expected_bytes"] / MIB for row in line], dash, color=color)
            axes.plot(
                degrees,
                [row["measured_bytes"] / MIB for row in line],
                MARKERS[phase],
                color=color,
                fillstyle="none",
                markersize=11 if mode == "gather" else 6,  # where both receive the same
                label=f"{mode}, {phase}",
            )
    line = [row for row in rows if (row["mode"], row["phase"]) == ("gather", "forward")]
    for term, label, color in (("means", "block means", "C2"), ("halo", "window", "C3")):
        sizes = [row["terms"][term] / MIB for row in line]
        axes.plot(
            [row["context"] for row in line], sizes, ":", color=color, label=f"of it: {label}"
        )


def _draw_memory(axes, rows):
    for mode, color in COLORS.items():
        for phase, dash in (("forward", "-"), ("forward+backward", "--")):
            line = [row for row in rows if row["mode"] == mode]
            sizes = [row["temporary_bytes"][phase] / MIB for row in line]
            degrees = [row["context"] for row in line]
            axes.plot(degrees, sizes, dash + MARKERS[phase], color=color, label=f"{mode}, {phase}")


def _label(axes, title, unit):
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="devices that share a row", ylabel=unit, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
