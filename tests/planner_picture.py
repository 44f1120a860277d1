"""Draws docs/images/planner.png: what a sweep computes one forward per patch, what its plan computes, and how.

``python tests/planner_picture.py --write`` writes the picture; without the option its numbers are printed. Everything
in it is taken from a plan: who is measured, where the tokens of each row stand, and which of them see each other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import tracepatch as tp
from tracepatch.climb import standing
from tracepatch.masks import positions, visible
from tracepatch.table import Table

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "planner.png"
CLEAN, CORRUPTED = "John and Mary, John gave the bag to", "John and Mary, Mary gave the bag to"
PALE, INK, EDGE = "#e9e9ec", "#33333a", "white"
WORLDS = {"corrupted": "#8a8a94", "clean": "#c3c3cb"}
WITNESS = "#33333a"
HUES = ("#e6550d", "#1f6fb4", "#2a924a")  # of the layers in which rows are born
Colour = tuple[float, ...]


def planned() -> Any:
    """The recording of a residual-stream sweep of one pair."""
    model = tp.toys.load("gpt2")
    pairs = tp.Pairs([CLEAN], [CORRUPTED], answer=[" Mary"], wrong=[" John"])
    with tp.patching(model, pairs) as p:
        for layer, pos in p.grid("resid_pre"):
            with p.row(layer=layer, pos=pos):
                p.corrupted.resid_pre[layer, pos] = p.clean.resid_pre[layer, pos]
    return p


def colours(table: Table) -> dict[int, Colour]:
    """The number of a seated job → its colour: the hue is its layer, and lighter is later in the prompt."""
    found: dict[int, Colour] = {}
    for number, job in enumerate(table.jobs):
        if job.row < 0:
            found[number] = to_rgb(WITNESS if number >= table.worlds else WORLDS[job.base])
            continue
        first = min(j.start for j in table.jobs[table.worlds :] if j.row >= 0)
        light = 0.55 * (job.start - first) / max(1, table.end - 1 - first)
        found[number] = tuple(c + (1 - c) * light for c in to_rgb(HUES[job.birth]))
    return found


def cell(axes: Axes, x: float, y: float, colour: Any, width: float = 1, height: float = 1, line: float = 0.6) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=EDGE, linewidth=line))


def draw_patches(axes: Axes, p: Any, table: Table, colour: dict[int, Colour]) -> None:
    """A small map for each patch: what a forward of its own computes, and in colour what the plan does."""
    depth, length = p.plan.layers, table.end
    seated = {job.row: number for number, job in enumerate(table.jobs) if job.row >= 0}
    wide, tall = length + 1.6, depth + 1.5
    for row in p.rows:
        layer, pos = row.labels["layer"], row.labels["pos"]
        left, bottom = pos * wide, layer * tall
        number = seated.get(row.number)
        for y in range(depth):
            for x in range(length):
                inside = number is not None and y >= table.jobs[number].birth and x >= table.jobs[number].start
                cell(axes, left + x, bottom + y, colour[number] if inside and number is not None else PALE, line=0.4)
        axes.plot(left + pos + 0.5, bottom + layer + 0.5, "o", color=INK, markersize=1.9, markeredgewidth=0)
    words = [t.lstrip("Ġ▁ ") for t in p.encoded.tokenizer.convert_ids_to_tokens(list(p.encoded.corrupted[0]))]
    first = p.encoded.differing(0)[0]
    axes.set_xticks([pos * wide + length / 2 for pos in range(length)], words)
    axes.get_xticklabels()[first].set_fontweight("bold")
    axes.set_yticks([layer * tall + depth / 2 for layer in range(depth)], [f"layer {i}" for i in range(depth)])
    axes.set_xlim(-0.5, length * wide - 1.1)
    axes.set_ylim(-0.6, depth * tall - 0.9)
    axes.set_aspect("auto")


def draw_table(axes: Axes, table: Table, colour: dict[int, Colour]) -> None:
    """Who sits where in each layer, with the position of every token."""
    depth = len(table.shape) - 1
    for number, job in enumerate(table.jobs):
        for position in range(job.start, table.end):
            _, slot = table.cell(number, position)
            for layer in range(job.birth, depth):
                cell(axes, slot, layer, colour[number], line=0.3)
            ink = INK if sum(colour[number]) > 1.75 else "white"
            axes.text(slot + 0.5, job.birth + 0.5, str(position), ha="center", va="center", fontsize=6.5, color=ink)
        axes.vlines(table.seats[number][1], job.birth, depth, color="white", linewidth=1.4)
        if job.row < 0:  # a world, or the witness
            name = "corrupted run" if job.base == "corrupted" else "clean run"
            name = name if number < table.worlds else "witness"
            middle = table.seats[number][1] + table.length(number) / 2
            axes.text(middle, -0.12, name.replace(" ", "\n"), ha="center", va="top", fontsize=8, color=INK)
    for layer, (_, slots) in enumerate(table.shape[:-1]):
        axes.text(slots + 0.7, layer + 0.5, f"{slots} tokens", va="center", fontsize=8.5, color=INK)
    axes.set_yticks([layer + 0.5 for layer in range(depth)], [f"layer {i}" for i in range(depth)])
    axes.set_xticks([])
    axes.set_xlim(-0.4, table.shape[-1][1] + 7)
    axes.set_ylim(0, depth)


def draw_mask(axes: Axes, table: Table, colour: dict[int, Colour]) -> None:
    """Which token sees which, in the colour of the row of the one that sees."""
    at = positions(standing(table))
    sees = visible(standing(table), at)[0] & (at[0][None] <= at[0][:, None])
    slots = table.shape[-1][1]
    owner = {table.cell(n, q)[1]: n for n, job in enumerate(table.jobs) for q in range(job.start, table.end)}
    picture = torch.tensor(to_rgb("#f6f6f8")).expand(slots, slots, 3).clone()
    for query in range(slots):
        picture[query, sees[query]] = torch.tensor(colour[owner[query]])
    axes.imshow(picture.numpy(), interpolation="nearest", origin="upper", extent=(0, slots, slots, 0))
    axes.set_xlabel("token that is seen", fontsize=8.5, color=INK)
    axes.set_ylabel("token that sees", fontsize=8.5, color=INK)
    edges = sorted({table.seats[n][1] for n in range(len(table.jobs))} | {slots})
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=0.5)
        axes.axvline(edge, color="white", linewidth=0.5)
    axes.set_xticks([])
    axes.set_yticks([])


def numbers(p: Any) -> tuple[int, int, int, int]:
    """Patches, those measured, cells of a forward each and of the unpatched worlds, cells of the plan."""
    (group,) = p.plan.groups
    (batch,) = group.batches
    whole = group.length * p.plan.layers
    cells = sum(lanes * slots for lanes, slots in batch.table.shape[:-1])
    return len(p.rows), p.plan.jobs, whole * (len(p.rows) + len(p.plan.worlds)), cells


def draw(p: Any) -> Figure:
    """The whole picture."""
    table = p.plan.groups[0].batches[0].table
    colour = colours(table)
    patches, measured, every, cells = numbers(p)
    figure = Figure(figsize=(10, 7), dpi=180)
    top = figure.add_axes((0.065, 0.565, 0.925, 0.335))
    low = figure.add_axes((0.065, 0.09, 0.545, 0.29))
    mask = figure.add_axes((0.665, 0.035, 0.325, 0.37))
    draw_patches(top, p, table, colour)
    draw_table(low, table, colour)
    draw_mask(mask, table, colour)
    for axes in (top, low, mask):
        axes.tick_params(length=0, labelsize=9, labelcolor=INK, pad=5)
        for spine in axes.spines.values():
            spine.set_visible(False)
    told = (
        (0.015, 0.962, f"{patches} patches, a map for each: ● is what is patched"),
        (0.015, 0.925, f"A forward for each patch computes every cell, {every} with the two unpatched runs. "
                       f"The planner computes those in colour; {patches - measured} patches need none."),
        (0.015, 0.468, f"One run of {cells} cells"),
        (0.015, 0.431, "Rows join in the layer of their edit, with the tokens from its position on."),
        (0.665, 0.468, "The mask of the last layer"),
        (0.665, 0.431, "A token sees its row, and its base before that."),
    )  # fmt: skip
    for i, (x, y, text) in enumerate(told):
        bold = i % 2 == 0
        figure.text(x, y, text, fontsize=11.5 if bold else 9.5, fontweight="bold" if bold else "normal", color=INK)
    return figure


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = planned()
    print(recorded.plan.explain(), numbers(recorded), sep="\n")
    if "--write" in sys.argv[1:]:
        draw(recorded).savefig(PICTURE)
