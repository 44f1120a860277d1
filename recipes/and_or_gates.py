"""AND and OR gates: what denoising and noising see of parts that need each other, or stand in for each other.

If a behaviour needs two parts, restoring one of them in the corrupted run does nothing, so that denoising misses both,
while taking one away destroys it: an AND. If either of two parts is enough, taking one away does nothing, so that
noising misses both, while either restores it: an OR. Hence a sweep in one direction sees half of the picture, and a
part with no effect in it may be all that matters (Heimersheim & Nanda 2024, *How to use and interpret activation
patching*, arXiv:2404.15255).

Each head is patched in both directions, and each two of those that do anything are patched together. Their interaction
is the joint effect less the sum of both alone, as a share of clean − corrupted.

What to expect, of an input of a gate:

            denoised  noised   verdict                    interaction, denoised and noised
    AND         0       -1     necessary only                  1    1
    OR          1        0     redundant (sufficient only)    -1   -1
    alone       1       -1     necessary and sufficient        0    0

The toy ``gates`` is wired by hand to give exactly these numbers, with prompts for each gate: the last word, *both*,
*either* or *first*, says which. In the third, only the first input counts. Exchanging clean and corrupted turns an AND
into an OR, so these pairs have one role. For other models the prompts state a truth table and ask for one of its rows;
there is no telling beforehand which gates they are made of inside: heads of real models give shares between these.
Attention, which looks for the row whose inputs are both the same, is an AND of two matches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import combinations
from operator import add

import xarray as xr

import tracepatch as tp

TOYS = ("gates",)
GATES = {"AND": "and_gate", "OR": "or_gate", "one input": "one_input"}
SHARE = 0.2  # of clean − corrupted: the least that counts as sufficient, or as necessary
STATES = (("on", "off"), ("hot", "cold"), ("up", "down"), ("open", "closed"), ("full", "empty"), ("light", "dark"))
TABLES: dict[str, tuple[str, Callable[[bool, bool], bool]]] = {
    "AND": ("and", lambda one, other: one and other),
    "OR": ("or", lambda one, other: one or other),
    "one input": ("then", lambda one, other: one),
}


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """As many pairs for each gate, one gate after the other: both inputs are on in the clean prompt, off corrupted."""
    if len(tp.one_token(tokenizer, ["both", "either", "first", "wet", "dry"])) == 5:
        return reduce(add, (tp.toys.pairs(name, count, seed=seed) for name in GATES.values()))
    return reduce(add, (truth_table(gate, count, seed) for gate in GATES))


def truth_table(gate: str, count: int, seed: int) -> tp.Pairs:
    """Pairs that state the table of a gate, its rows in any order, and ask for the row of two equal inputs."""
    rng, (word, result) = random.Random(seed), TABLES[gate]
    clean, corrupted = [], []
    for _ in range(count):
        on, off = rng.choice(STATES)
        rows = [(one, other) for one in (True, False) for other in (True, False)]
        told = [
            f"{on if one else off} {word} {other_name} gives {'yes' if result(one, other) else 'no'}."
            for one, other in rng.sample(rows, 4)
            for other_name in [on if other else off]
        ]
        for side, state in ((clean, on), (corrupted, off)):
            side.append(" ".join([*told, f"{state} {word} {state} gives"]))
    return tp.Pairs(clean, corrupted, " yes", " no", name=f"truth tables, {gate}", seed=seed)


def by_gate(pairs: tp.Pairs) -> dict[str, tp.Pairs]:
    """The pairs of each gate: thirds, as ``prompts`` makes them."""
    each = len(pairs) // len(GATES)
    return {gate: pairs[each * i : each * (i + 1)] for i, gate in enumerate(GATES)}


def beside(results: Iterable[xr.Dataset]) -> xr.Dataset:
    """The results of each gate with the dim gate; pair is the number among those of a gate."""
    bare = [
        one.drop_vars(["clean_prompt", "corrupted_prompt"]).assign_coords(pair=range(one.sizes["pair"]))
        for one in results
    ]
    return xr.concat(bare, xr.DataArray(list(GATES), dims="gate", name="gate"), data_vars="all")


def split(result: xr.Dataset) -> xr.Dataset:
    """A result of all pairs with the dim gate."""
    each = result.sizes["pair"] // len(GATES)
    return beside(result.isel(pair=slice(each * i, each * (i + 1))) for i in range(len(GATES)))


def in_both_directions(model, pairs, metric=tp.logit_diff, **options) -> xr.Dataset:
    """Each head alone, at each gate, denoised and noised, with verdicts."""
    options = {"sufficient": SHARE, "necessary": SHARE, **options}
    return beside(tp.sweeps.both_directions(model, some, "z", metric, **options) for some in by_gate(pairs).values())


def inputs(model, pairs, most: int = 4) -> list[str]:
    """Heads that do something in some direction at some gate, two at least: "L0H1" and the like."""
    found = in_both_directions(model, pairs)["normalized"].mean("pair")
    sizes = abs(found).max(("gate", "direction")).to_series().nlargest(most)
    return [f"L{layer}H{head}" for layer, head in sorted(sizes.index[: max(2, int((sizes >= SHARE).sum()))])]


def two_by_two(heads: list[str]) -> dict[str, list[tuple]]:
    """Each two heads, and the places to patch."""
    places = {name: ("z", *map(int, name[1:].split("H"))) for name in heads}
    places = {name: (z, layer, slice(None), head) for name, (z, layer, head) in places.items()}
    return {f"{one}, {other}": [places[one], places[other]] for one, other in combinations(heads, 2)}


@tp.study
def denoising(model, pairs, metric=tp.logit_diff, **options):
    """Denoise each head alone."""
    return split(tp.patch(model, pairs, "z", metric, **options))


@tp.study
def noising(model, pairs, metric=tp.logit_diff, **options):
    """Noise each head alone."""
    return split(tp.patch(model, pairs, "z", metric, direction="noising", **options))


@tp.study
def two_denoised(model, pairs, metric=tp.logit_diff, **options):
    """Denoise two heads together, of those that do anything."""
    return split(tp.sweeps.together(model, pairs, two_by_two(inputs(model, pairs)), metric, **options))


@tp.study
def two_noised(model, pairs, metric=tp.logit_diff, **options):
    """Noise two heads together, of those that do anything."""
    sets = two_by_two(inputs(model, pairs))
    return split(tp.sweeps.together(model, pairs, sets, metric, direction="noising", **options))


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """The verdict on each head that does anything, and what each two of them do beyond the sum of both."""
    both, heads = in_both_directions(model, pairs), inputs(model, pairs)
    lines = [f"  {'':<22}denoised  noised"]
    for gate in GATES:
        for name in heads:
            layer, head = map(int, name[1:].split("H"))
            one = both.sel(gate=gate, layer=layer, head=head)
            back, lost = one["normalized"].mean("pair").values
            lines.append(f"  {gate:<10}{name:<12}{back:8.2f}  {lost:6.2f}  {tp.sweeps.VERDICTS[int(one['verdict'])]}")
        for name in two_by_two(heads):
            back, lost = (
                float(results[way]["interaction_normalized"].sel(gate=gate, set=name).mean())
                for way in ("two_denoised", "two_noised")
            )
            lines.append(f"  {gate:<10}{name:<12}{back:8.2f}  {lost:6.2f}  interaction")
    sides = results["denoising"], results["noising"]
    figure = tp.plots.quadrants(*sides, sufficient=SHARE, necessary=SHARE, title="heads as inputs of gates")
    figure.savefig(f"{path}.verdicts.png", dpi=110)
    return [*lines, f"  picture {path}.verdicts.png"]
