"""Draws the pictures of the pages that explain: `python docs/pictures.py [FOLDER]`, by default `docs/images`.

Black on white, and no colour that carries a meaning alone: the site turns light and dark round for its dark colours.
Texts are texts, so that a reader can search and copy them.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import nn

import momentum_distill as md

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#c2600a", "#2b7a3d", "#b3273a", "#8a8f98"
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "momentum-distill",  # the same file every time
}


def concept_momentum() -> None:
    """One weight of a model that learns with noise, and its averages."""
    torch.manual_seed(5)
    model = nn.Linear(1, 1, bias=False)
    averages = {decay: md.EMAWrapper(model, decay=decay) for decay in (0.9, 0.98)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    nn.init.zeros_(model.weight)
    lines: dict[float, list[float]] = {0.0: [], **{decay: [] for decay in averages}}
    for average in averages.values():
        average.update(model, decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (model.weight - 1 - 3 * torch.randn(())).square()).sum().backward()
        optimizer.step()
        lines[0.0].append(model.weight.item())
        for decay, average in averages.items():
            average.update(model)
            lines[decay].append(average.module.weight.item())
    axes = _axes(2.6)
    axes.plot(lines[0.0], color=GREY, linewidth=1.0, label="the weight itself")
    axes.plot(lines[0.9], color=ORANGE, linestyle="--", label="decay 0.9")
    axes.plot(lines[0.98], color=BLUE, label="decay 0.98")
    axes.set(xlabel="optimizer step", ylabel="weight")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def concept_queue() -> None:
    """Twelve slots with labels and three streams; one modality misses some samples, two slots are empty."""
    labels = list("0110210101")
    missing = {2, 5}
    axes = _axes(2.5, frame=False)
    colours = {"0": BLUE, "1": ORANGE, "2": GREEN}
    for row, stream in enumerate(("label", "text", "audio", "audio_momentum")):
        axes.text(-0.3, -row, stream, ha="right", va="center", family="monospace")
        for slot in range(12):
            there = slot < len(labels) and not (row >= 2 and slot in missing)
            colour = colours[labels[slot]] if there else "none"
            patch = plt.Rectangle(
                (slot + 0.06, -row - 0.38), 0.88, 0.76, facecolor=colour, edgecolor=GREY, linewidth=0.8
            )
            axes.add_patch(patch)
            text = labels[slot] if there and row == 0 else "-1" if row == 0 else ""
            axes.text(slot + 0.5, -row, text, ha="center", va="center", color="white" if there else "black")
    axes.annotate("the next sample", (10.5, 0.42), (10.5, 1.0), ha="center", arrowprops={"arrowstyle": "->"})
    axes.annotate("no audio", (2.5, -3.4), (4.0, -4.15), ha="center", va="center", arrowprops={"arrowstyle": "->"})
    axes.annotate("", (5.5, -3.4), (4.6, -3.9), arrowprops={"arrowstyle": "->"})
    axes.text(11, -4.15, "empty", ha="center", va="center")
    axes.set(xlim=(-4.2, 12.1), ylim=(-4.5, 1.4))


def concept_targets() -> None:
    """V, the targets by label and by momentum model, and their mixture, for one query over eight keys."""
    angles = torch.tensor([10.0, 40.0, 75.0, 20.0, 55.0, 100.0, 140.0, 170.0]) * math.pi / 180
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)
    key_labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    query, momentum_query = torch.tensor([[0.55, 0.85]]), torch.tensor([[0.95, 0.45]])
    by_label = (key_labels == 0).float() / 3
    now, by_momentum = (
        md.functional.contrast_logits(rows, keys, temperature=0.35).softmax(dim=1)[0]
        for rows in (query, momentum_query)
    )
    panels = [
        ("V, the student now", now, GREY),
        ("by label", by_label, BLUE),
        ("U, by momentum model", by_momentum, ORANGE),
        ("target, alpha 0.4", 0.6 * by_label + 0.4 * by_momentum, GREEN),
    ]
    figure, places = plt.subplots(2, 2, figsize=(6.4, 3.7), sharex=True, sharey=True, layout="constrained")
    for axes, (title, values, colour) in zip(places.flat, panels, strict=True):
        axes.bar(range(8), values.tolist(), color=colour)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(8), ["+", "+", "+", "-", "-", "-", "-", "-"])
    figure.supxlabel("keys: + of the query's class, - of another", fontsize=11)
    figure.supylabel("share of a key", fontsize=11)


def concept_hard() -> None:
    """The weight of Eq. 14, by its definition through the loss itself."""
    error = torch.linspace(0, 3, 61)
    loss = md.HardSampleFusionLoss(reduction="none").eval()
    weight = loss(student_scores=torch.full((61,), -1.0), fused_scores=torch.zeros(61), targets=error)
    axes = _axes(2.5)
    axes.plot(error.tolist(), weight.tolist(), color=BLUE)
    axes.axhline(1.0, color=GREY, linestyle="--")
    axes.text(0.05, 1.03, "without attention to hard samples", va="bottom")
    axes.set(xlabel="error of the fused score", ylabel="weight of the sample", ylim=(0, 1.2), xlim=(0, 3))


def concept_factors() -> None:
    """A learned factor under noisy gradients, and the average in use."""
    torch.manual_seed(1)
    fuse = md.MomentumFusionFactors(["audio"], decay=0.97)
    optimizer = torch.optim.SGD(fuse.parameters(), lr=0.03)
    learned, used = [], []
    for _ in range(250):
        optimizer.zero_grad()
        out = fuse({"audio": torch.ones(1, 1)})["audio"].sum()
        (0.5 * (out - 0.6 - 2 * torch.randn(())).square()).backward()
        optimizer.step()
        fuse.update()
        learned.append(fuse.weight.item())
        used.append(fuse.factors()["audio"])
    axes = _axes(2.5)
    axes.plot(learned, color=GREY, linewidth=1.0, label="learned: gets the gradient")
    axes.plot(used, color=BLUE, label="average: multiplies")
    axes.set(xlabel="optimizer step", ylabel="factor of one modality")
    axes.legend()


def mutual_information() -> None:
    """The bound of Eq. 20 with the best similarity there is, against the number of keys."""
    torch.manual_seed(0)
    counts = [2**power for power in range(1, 13)]
    axes = _axes(3.2)
    axes.plot(counts, [math.log(count) for count in counts], color=GREY, linewidth=1.0)
    for rho, colour, marker in ((0.4, GREEN, "s"), (0.7, ORANGE, "^"), (0.9, BLUE, "o")):
        truth = -4 * math.log(1 - rho**2)
        bounds = [mean(_bound(rho, count) for _ in range(max(8, 4096 // count))) for count in counts]
        axes.plot(counts, bounds, color=colour, marker=marker, markersize=4)
        axes.axhline(truth, color=colour, linestyle="--", linewidth=1.0)
        axes.text(5600, truth, f"rho {rho}: {truth:.2f} nats", va="center", color=colour)
    axes.text(5600, math.log(5000), "log K", va="center")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="keys K", ylabel="nats", xlim=(1.6, 5000), ylim=(0, 8.9))


def _bound(rho: float, num_keys: int) -> float:
    t = torch.randn(num_keys, 8)
    s = rho * t + math.sqrt(1 - rho**2) * torch.randn(num_keys, 8)
    query = torch.cat([rho * t / (1 - rho**2), torch.ones(num_keys, 1)], dim=1)
    keys = torch.cat([s, -(rho**2) * s.square().sum(dim=1, keepdim=True) / (2 * (1 - rho**2))], dim=1)
    ids = torch.arange(num_keys)
    loss = md.functional.supcon_distill_loss(query, keys, ids, ids, temperature=1.0, normalize=False)
    return md.diagnostics.mutual_information_bound(loss, num_keys).item()


def _axes(height: float, *, frame: bool = True) -> Axes:
    """One pair of axes, as wide as a page."""
    _, axes = plt.subplots(figsize=(6.4, height), layout="constrained")
    if not frame:
        axes.set_axis_off()
    return axes


# ----------------------------------------------------------------------------------------------- the start page

LANES = {"momentum": 68, "student": 188, "teacher": 292, "fusion": 396}
LEFT, RIGHT, TEXT = 20, 756, 458  # of the blocks, and where what they are is said


def blocks() -> str:
    """The six blocks around a student, its teacher and their fusion: what flows goes down, who teaches stands on it."""
    momentum, student, teacher, fusion = LANES.values()
    parts = [
        _line(student - 48, 92, momentum + 50, 92, "arrow dashed"),
        _box(momentum - 48, 12, student - momentum + 96, 34, "weak modality"),
        _box(teacher - 48, 12, 96, 34, "strong one"),
        *(_line(lane, 46, lane, 70, "arrow") for lane in (momentum, student, teacher)),
        _box(momentum - 48, 70, 96, 44, "average", kind="ours"),
        _box(student - 48, 70, 96, 44, "student"),
        _box(teacher - 48, 70, 96, 44, "teacher"),
        _text(TEXT, 88, "EMAWrapper", "name left"),
        _text(TEXT, 105, "the student's slow average", "left"),
        _block(130, "ClassQueue", "the latest samples: further keys"),
        _block(188, "SupConDistillLoss", "features: near those of its class"),
        _block(246, "ResponseDistillLoss", "outputs: near those of its teachers"),
        _block(304, "MomentumFusionFactors", "one learned weight per modality"),
        _block(414, "HardSampleFusionLoss", "outputs: near the fused, where hard"),
        *(_line(lane, 114, lane, end, "lane") for lane, end in ((momentum, 270), (student, 438), (teacher, 340))),
        *(_slot(momentum - 22 + 25 * place, 146) for place in range(11)),
        _line(momentum, 212, student - 8, 212, "arrow"),
        _line(teacher - 8, 212, student + 8, 212, "arrow both"),
        _dots(212, teaches=[momentum], learns=[student, teacher]),
        _line(momentum, 270, student - 8, 270, "arrow"),
        _line(teacher, 270, student + 8, 270, "arrow"),
        _dots(270, teaches=[momentum, teacher], learns=[student]),
        *(_line(lane, y, fusion, y, "lane") for lane, y in ((student, 318), (teacher, 338))),
        *(_weight(lane, y) for lane, y in ((student, 318), (teacher, 338))),
        _line(fusion, 318, fusion, 364, "lane arrow"),
        _box(fusion - 48, 364, 96, 34, "fusion"),
        _line(fusion, 398, fusion, 438, "lane"),
        _line(fusion, 438, student + 8, 438, "arrow"),
        _dots(438, teaches=[fusion], learns=[student]),
        # what the signs mean
        _box(28, 480, 26, 20),
        _text(62, 495, "yours", "left"),
        _box(128, 480, 26, 20, kind="ours"),
        _text(162, 495, "the library's", "left"),
        _dots(490, teaches=[290], learns=[388]),
        _text(304, 495, "teaches", "left"),
        _text(402, 495, "learns", "left"),
        _line(480, 490, 516, 490, "arrow dashed"),
        _text(526, 495, "follows after each step", "left"),
    ]
    return HEAD + "\n".join(parts) + "\n</svg>\n"


HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" width="640" height="431" viewBox="8 0 760 512" role="img">
<title>The six blocks around a student, its teacher and their fusion</title>
<style>
text {{ font: 15px "DejaVu Sans", Verdana, sans-serif; text-anchor: middle; fill: #1d2128 }}
.name {{ font: bold 16px "DejaVu Sans", Verdana, sans-serif }}
.left {{ text-anchor: start }}
.left:not(.name) {{ font-size: 14.5px }}
rect.yours {{ fill: #eceef1; stroke: {GREY} }}
rect.ours {{ fill: #e3edf9; stroke: {BLUE}; stroke-width: 1.4 }}
.slot {{ fill: #fff; stroke: {BLUE} }}
.lane {{ stroke: {GREY}; stroke-width: 1.4 }}
.arrow {{ stroke: #1d2128; stroke-width: 1.8; marker-end: url(#head) }}
.both {{ marker-start: url(#head) }}
.dashed {{ stroke-dasharray: 5 4 }}
.teaches, .learns {{ fill: #1d2128; stroke: #1d2128; stroke-width: 1.8 }}
.learns {{ fill: #fff }}
</style>
<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6.5" markerHeight="6.5" \
orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="#1d2128"/></marker></defs>
<rect x="8" y="0" width="760" height="512" rx="8" fill="#fff"/>
"""


def _block(y: float, name: str, note: str) -> str:
    """A block of the library across all lanes, with what it does on the right."""
    box = _box(LEFT, y, RIGHT - LEFT, 48, kind="ours")
    return box + _text(TEXT, y + 20, name, "name left") + _text(TEXT, y + 38, note, "left")


def _box(x: float, y: float, width: float, height: float, name: str = "", *, kind: str = "yours") -> str:
    middle, base = x + width / 2, y + height / 2 + 5
    text = _text(middle, base, name, kind) if name else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>{text}'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _dots(y: float, *, teaches: list[float], learns: list[float]) -> str:
    """Who teaches and who learns on an arrow."""
    dots = [*(("teaches", lane) for lane in teaches), *(("learns", lane) for lane in learns)]
    return "".join(f'<circle class="{kind}" cx="{lane:g}" cy="{y:g}" r="5.5"/>' for kind, lane in dots)


def _slot(x: float, y: float) -> str:
    return f'<rect class="slot" x="{x:g}" y="{y:g}" width="18" height="15" rx="2"/>'


def _weight(x: float, y: float) -> str:
    return f'<rect class="slot" x="{x - 9:g}" y="{y - 8:g}" width="18" height="16" rx="2"/>' + _text(x, y + 5, "w", "")


PLOTS: list[Callable[[], None]] = [
    concept_momentum,
    concept_queue,
    concept_targets,
    concept_hard,
    concept_factors,
    mutual_information,
]


def main(folder: Path) -> None:
    """Write all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "blocks.svg").write_text(blocks(), encoding="utf-8")
    mpl.use("svg")
    with mpl.rc_context(STYLE):
        for draw in PLOTS:
            draw()
            plt.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close("all")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "images")
