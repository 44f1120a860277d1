"""Factual recall: where does a model keep that the capital of France is Paris? Causal tracing.

Meng et al. (2022), *Locating and Editing Factual Associations in GPT* (arXiv:2202.05262): the embeddings of the subject
get Gaussian noise, so that the answer is lost, and clean states are restored in that run, one at a time, to see which
of them bring it back. The noise has three standard deviations of the embeddings and is drawn ten times; effects are
averaged over draws and facts.

A single restored MLP or attention output does little in a deep model. They are restored in windows of neighbouring
layers, ten of GPT-2 XL's 48 in the paper and the same share of other models' here. *Severed*: a state is restored while
the MLPs above it, at the same token, stay as they are in the noised run. What is lost by that had to pass through them.

What to expect. States carry the fact at the subject's last token in early and middle layers, the *early site*, and at
the end of the prompt in late ones, where it has to be. In GPT-2 XL the MLPs do it at the early site, in the middle
layers, and attention at the end; without MLPs, low states there lose their effect. Noise throws the stream off what the
model ever sees, and detects other sites than replacing the subject by another one does, which Zhang & Nanda (2023,
arXiv:2309.16042) recommend: ``replaced`` does that, for comparison. They also find that windows make peaks look larger
and sharper than single layers do, and recommend the logit difference; the paper's own metric is ``--metric prob``.
"""

from __future__ import annotations

from matplotlib.figure import Figure

import tracepatch as tp

TOYS = ("many_tasks",)
DRAWS = 10
PLACES = {"first subject token": "subject[0]", "last subject token": "subject[-1]", "last token": -1}


def prompts(tokenizer, count: int = 8, seed: int = 0) -> tp.Pairs:
    """Capitals; there are no corrupted prompts, as noise takes their place."""
    return tp.tasks.facts(tokenizer, count, seed).without_corrupted()


def noised(p, draws: int = DRAWS):
    """The clean run with noise on the subject: three standard deviations of the embeddings, drawn several times."""
    world = p.world("noised", of=p.clean)
    world.embed["subject"] += p.gaussian(3, of="embed", draws=draws)
    return world


def window(p, name: str, middle: int, width: int | None = None) -> list[int]:
    """The layers of a window around one; by default a fifth of all layers, two at least."""
    width = max(2, round(len(p.architecture) * 10 / 48)) if width is None else width
    first = middle - width // 2
    return [layer for layer in p.grid(name, by="layer") if first <= layer < first + width]


@tp.recipe
def states(p, draws: int = DRAWS):
    """Restore single states, what leaves a layer at a token, with the subject noised."""
    world = noised(p, draws)
    for layer in p.grid("resid_post", by="layer"):
        for place, pos in PLACES.items():
            with p.row(layer=layer, place=place):
                world.resid_post[layer, pos] = p.clean.resid_post[layer, pos]


@tp.recipe
def severed(p, draws: int = DRAWS):
    """Restore single states while the MLPs above, at the same token, stay as in the noised run."""
    world = noised(p, draws)
    layers = p.grid("mlp_out", by="layer")
    for layer in p.grid("resid_post", by="layer"):
        for place, pos in PLACES.items():
            with p.row(layer=layer, place=place):
                world.resid_post[layer, pos] = p.clean.resid_post[layer, pos]
                for above in layers:
                    if above > layer:
                        world.mlp_out[above, pos] = world.mlp_out[above, pos]


@tp.recipe
def mlp_windows(p, width: int | None = None, draws: int = DRAWS):
    """Restore what MLPs of neighbouring layers add at a token, with the subject noised."""
    restore(p, noised(p, draws), "mlp_out", width)


@tp.recipe
def attention_windows(p, width: int | None = None, draws: int = DRAWS):
    """Restore what attention of neighbouring layers adds at a token, with the subject noised."""
    restore(p, noised(p, draws), "attn_out", width)


def restore(p, world, name: str, width: int | None) -> None:
    """Rows that restore a component in a window of layers, at each place."""
    for middle in p.grid(name, by="layer"):
        for place, pos in PLACES.items():
            with p.row(layer=middle, place=place):
                for layer in window(p, name, middle, width):
                    getattr(world, name)[layer, pos] = getattr(p.clean, name)[layer, pos]


@tp.study
def replaced(model, pairs, metric=tp.logit_diff, **options):
    """Restore single states in the run of another subject, instead of a noised one, for the same facts."""
    others = tp.tasks.facts(model.tokenizer, len(pairs), pairs.seed or 0)
    with tp.patching(model, others, metric, **options) as p:
        for layer in p.grid("resid_post", by="layer"):
            for place, pos in PLACES.items():
                with p.row(layer=layer, place=place):
                    p.corrupted.resid_post[layer, pos] = p.clean.resid_post[layer, pos]
    return p.run()


def conclude(model, pairs, metrics, results, path) -> list[str]:
    """What the noise takes away, and where restoring brings most of it back; drawn over layers."""
    means = {name: tp.over_pairs(tp.over_draws(one)) for name, one in results.items()}
    lines = [
        f"  clean {float(means['states']['clean'].mean()):+.2f}, subject noised "
        f"{float(means['states']['base'].mean()):+.2f}, subject replaced {float(means['replaced']['base'].mean()):+.2f}"
    ]
    figure = Figure(figsize=(4.4 * len(means), 2.6), layout="constrained")
    for part, (name, mean) in zip(figure.subfigures(1, len(means)), means.items(), strict=True):
        share = mean["normalized"].sel(place=["last subject token", "last token"])
        peaks = [share.isel(place=i).to_series() for i in (0, 1)]
        told = [f"{peak.max():.2f} in layer {peak.idxmax()}" for peak in peaks]
        lines.append(f"  {name.replace('_', ' '):<20}last subject token {told[0]}, last token {told[1]}")
        tp.plots.heatmap(mean, x="layer", y="place", limit=1.0, title=name.replace("_", " "), figure=part)
    figure.savefig(f"{path}.tracing.png", dpi=110)
    return [*lines, f"  picture {path}.tracing.png"]
