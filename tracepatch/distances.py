"""How far a patch throws the stream off the distribution that a model has in real prompts, as a metric beside others.

What lies far from anything that the model computes by itself says little about what it does by itself: a later layer
may answer to the strangeness of a patch and not to what was patched (Zhang & Nanda 2023; Heimersheim & Nanda 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tracepatch.errors import MetricError
from tracepatch.metrics import Metric, metric
from tracepatch.models import Model
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching

LEAST = 8  # prompts
FOLDS = 8
FLOOR = 1e-9  # of the mean variance, below which nothing is taken to vary


def off_distribution(
    model: Model,
    prompts: Pairs | Sequence[Any],
    component: str = "logits_in",
    index: Any = -1,
    name: str = "off_distribution",
) -> Metric:
    """A metric: how far an activation lies from what it is in real prompts, in units of how far those lie apart.

    The distance is Mahalanobis's, from the mean of the prompts, with their covariance shrunk towards a multiple of the
    identity (Ledoit & Wolf 2004), as prompts are fewer than dims. It is divided by the typical (root mean square)
    distance of prompts that were left out when mean and covariance were fitted, an eighth at a time. So 1 is how far an
    unseen prompt of this kind lies off, and a patch of 3 or more has made a stream that such prompts do not have. Far
    below 1 it stands nearer to the mean than prompts do, as after an ablation of all that tells them apart. Like any
    metric it is read in patched runs: compare ``value`` with ``clean`` and ``corrupted``.

    Args:
        model: From ``tp.load``; the prompts are run at once.
        prompts: At least 8, and better many times more, of the kind that is patched: pairs, of which the clean prompts
            count, or a list.
        component: What is looked at: by default the stream that the final norm and the unembedding read.
        index: Where, as in the brackets of the component: one position, and one head where there are heads.
        name: Its name in results.

    Raises:
        MetricError: There are fewer prompts, some lack the position, the index picks no vector, or nothing varies.
    """
    pairs = prompts if isinstance(prompts, Pairs) else Pairs(prompts)
    if len(pairs) < LEAST:
        raise MetricError(f"{name!r} learns from prompts what is usual: pass {LEAST} or more, not {len(pairs)}.")

    def something(live: torch.Tensor) -> torch.Tensor:
        return live.flatten(1)[:, 0]

    looked = metric(something, component=component, index=index)
    alone = Pairs(pairs.clean, bos=pairs.bos, decoder=pairs.decoder)
    with Patching(model, alone, looked, checks=False) as p, p.row(name="prompts"):
        seen = p.save(getattr(p.clean, component)[index])
    p.run(progress=False)
    values = torch.tensor(seen.values.values, dtype=torch.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise MetricError(f"{name!r} takes one vector a prompt: pick one position, and one head where there are heads.")
    if bool(values.isnan().any()):
        raise MetricError(f"Some of the prompts of {name!r} have no position {index!r}; pass others, or index=-1.")
    usual = Usual.of(values)
    unseen = [Usual.of(values[fold]).squared(values[~fold]) for fold in folds(len(values))]
    typical = torch.cat(unseen).mean().sqrt()

    def distance(live: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (usual.squared(live.double()).clamp(min=0).sqrt() / typical.to(live.device)).float()
        return found

    found = metric(distance, name, "typical distances", component=component, index=index)
    return replace(found, note=f"distance from {len(pairs)} prompts, 1 for an unseen one of their kind")


def folds(count: int) -> list[torch.Tensor]:
    """Which of so many prompts are fitted to, leaving every eighth out in turn."""
    return [torch.arange(count) % FOLDS != fold for fold in range(FOLDS)]


@dataclass(frozen=True)
class Usual:
    """The mean and the shrunk covariance of vectors.

    Attributes:
        mean: ``[d]``.
        along: Orthonormal directions in which the vectors vary, ``[k, d]``.
        less: By how much less squares count along these, ``[k]``.
        width: The variance in all other directions.
    """

    mean: torch.Tensor
    along: torch.Tensor
    less: torch.Tensor
    width: float

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Usual:
        """Of vectors ``[n, d]``.

        Raises:
            MetricError: They are all the same.
        """
        count, d = vectors.shape
        mean = vectors.mean(0)
        apart = vectors - mean
        _, singular, along = torch.linalg.svd(apart, full_matrices=False)
        variances = singular.square() / count
        middle = float(variances.sum()) / d
        if middle <= 0:
            raise MetricError("All prompts have the same value there, so that nothing is unusual.")
        spread = float(variances.square().sum()) / d - middle**2  # of the variances, around their mean
        noise = float(apart.square().sum(1).square().sum() - count * variances.square().sum()) / count**2 / d
        shrunk = min(1.0, noise / spread) if spread > 0 else 1.0
        width = max(shrunk, FLOOR) * middle
        less = 1 / width - 1 / (width + (1 - shrunk) * variances)
        return cls(mean, along, less, width)

    def squared(self, vectors: torch.Tensor) -> torch.Tensor:
        """Squared distances ``[n]`` of vectors ``[n, d]``."""
        apart = vectors - self.mean.to(vectors.device)
        inside = (apart @ self.along.T.to(vectors.device)).square() @ self.less.to(vectors.device)
        found: torch.Tensor = apart.square().sum(1) / self.width - inside
        return found
