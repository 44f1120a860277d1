"""Steering and features: is a behaviour a direction, a subspace, or a few features of a dictionary?

Praise or blame in a movie review sets what the model concludes, and Tigges et al. (2023), *Linear Representations of
Sentiment in Large Language Models* (arXiv:2310.15154), find it along one direction of the residual stream. Everything
here is fitted on other prompts than it is tried on: at the last token, what leaves each layer after praise less what
leaves it after blame.

* *Steering* (Turner et al. 2023, arXiv:2308.10248; Rimsky et al. 2024, arXiv:2312.06681): the mean difference is added
  to the stream of a prompt that blames, times a coefficient. 1 adds as much as the two kinds of prompt differ by.
* *Subspaces* (Geiger et al. 2024, arXiv:2303.02536): of the clean value only the projection onto some directions is
  written: that of the mean difference, the first principal components, and, to compare with, chance.
* *Features* (Marks et al. 2024, arXiv:2403.19647): of a dictionary, some features are written and the rest stays live,
  with what the dictionary does not explain. The dictionary is made here of principal components, each of them two
  features, its positive and its negative part. ``dictionary`` is where to put a sparse autoencoder of your own.

What to expect. The mean difference alone restores most of what the whole stream does from the layer on where the
information has come to the last token, and nothing before. A random direction restores about 1/d of it. A few features
do most; all of them do what the stream does, as far as the dictionary explains it. A coefficient of 1 turns the answer,
and beyond, effects grow less than in proportion. Restoring along a fitted direction does not show that the model uses
it: a subspace can be found that works by moving the stream where it never is (Makelov et al. 2023, arXiv:2311.17030).
The mean difference is not fitted to the effect, which is what makes it worth comparing.
"""

from __future__ import annotations

import torch
import xarray as xr

import tracepatch as tp

TOYS = ("many_tasks",)
COEFFICIENTS = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """Reviews that praise and reviews that blame, in both roles: in the first half the clean prompts praise."""
    return tp.tasks.sentiment(tokenizer, count, seed)


def streams(model, pairs: tp.Pairs) -> xr.DataArray:
    """What leaves each layer at the last token of the prompts, ``[layer, side, pair, d_model]``."""
    with tp.patching(model, pairs, checks=False) as p:
        for layer in p.grid("resid_post", by="layer"):
            for side in ("clean", "corrupted"):
                with p.row(layer=layer, side=side):
                    p.save(getattr(p, side).resid_post[layer, -1])
    p.run(progress=False)
    return p.saved["resid_post"].transpose("layer", "side", "pair", "d_model")


def fitted(model, pairs, count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Of other prompts: how praise differs from blame, ``[layer, pair, d_model]``, and the streams of both."""
    others = prompts(model.tokenizer, count, (pairs.seed or 0) + 1)
    praise, blame = torch.tensor(streams(model, others[: len(others) // 2]).values).unbind(1)
    return praise - blame, torch.cat([praise, blame], 1)


def components(streams: torch.Tensor, count: int) -> torch.Tensor:
    """The first principal components of some streams ``[prompt, d_model]``."""
    return torch.linalg.svd(streams - streams.mean(0), full_matrices=False)[2][:count]


def dictionary(streams: torch.Tensor, count: int = 12) -> tp.Dictionary:
    """Two features for each of the first principal components of some streams: how far a stream goes each way."""
    one_way = components(streams, count)
    both = torch.stack([one_way, -one_way], 1).flatten(0, 1)
    return tp.Dictionary.of_weights(both.T, both, pre_bias=streams.mean(0), name="principal components")


@tp.study
def steering(model, pairs, metric=tp.logit_diff, **options):
    """Add the mean difference to prompts that blame, times a coefficient, layer by layer."""
    differences, _ = fitted(model, pairs)
    with tp.patching(model, pairs[: len(pairs) // 2], metric, **options) as p:
        for layer in p.grid("resid_post", by="layer"):
            praise = tp.vector(differences[layer].mean(0), "praise")
            for coefficient in COEFFICIENTS:
                with p.row(layer=layer, coefficient=coefficient):
                    p.corrupted.resid_post[layer, -1] += coefficient * praise
    return p.run()


@tp.study
def subspaces(model, pairs, metric=tp.logit_diff, **options):
    """Denoise the last token's stream along few directions, layer by layer."""
    differences, every = fitted(model, pairs)
    width = every.shape[-1]
    chance = torch.randn(8, width, generator=torch.Generator().manual_seed(pairs.seed or 0))
    with tp.patching(model, pairs, metric, **options) as p:
        for layer in p.grid("resid_post", by="layer"):
            directions = {
                "mean difference": differences[layer].mean(0),
                "1 component": components(every[layer], 1),
                "8 components": components(every[layer], 8),
                "1 by chance": chance[:1],
                "8 by chance": chance,
            }
            clean = p.clean.resid_post[layer, -1]
            for name, vectors in directions.items():
                with p.row(layer=layer, along=name):
                    p.corrupted.resid_post[layer, -1] = clean.along(vectors)
            with p.row(layer=layer, along="everything"):
                p.corrupted.resid_post[layer, -1] = clean
    return p.run()


@tp.study
def features(model, pairs, metric=tp.logit_diff, layer: int | None = None, **options):
    """Denoise single features of a dictionary, at the last token of a layer (the middle one), and all of them."""
    layer = len(tp.Architecture(model)) // 2 if layer is None else layer
    _, every = fitted(model, pairs)
    learned = dictionary(every[layer])
    with tp.patching(model, pairs, metric, **options) as p:
        clean = p.clean.resid_post[layer, -1]
        for number in range(learned.count(every.shape[-1])):
            with p.row(feature=f"{number}"):
                p.corrupted.resid_post[layer, -1] = clean.features(learned, number)
        with p.row(feature="all"):
            p.corrupted.resid_post[layer, -1] = clean.features(learned, slice(None))
        with p.row(feature="everything"):
            p.corrupted.resid_post[layer, -1] = clean
    return p.run()


def conclude(model, pairs, metrics, results: dict[str, xr.Dataset], path) -> list[str]:
    """How far the answer turns, what one direction restores of what the stream does, and which features matter."""
    share = {name: tp.over_pairs(one)["normalized"] for name, one in results.items()}
    lines = []
    for layer in share["subspaces"]["layer"].values:
        along, turned = share["subspaces"].sel(layer=layer), share["steering"].sel(layer=layer, coefficient=1.0)
        lines.append(
            f"  layer {layer}: everything {float(along.sel(along='everything')):.2f}, the mean difference "
            f"{float(along.sel(along='mean difference')):.2f}, a random direction "
            f"{float(along.sel(along='1 by chance')):.2f}; steering {float(turned):.2f}"
        )
    single = share["features"].drop_sel(feature=["all", "everything"]).to_series()
    told = ", ".join(f"{name} {value:.2f}" for name, value in single.nlargest(3).items())
    every = float(share["features"].sel(feature="all"))
    return [*lines, f"  features: {told}; all {len(single)} together {every:.2f}, one by one {single.sum():.2f}"]
