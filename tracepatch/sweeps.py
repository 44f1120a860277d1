"""Shapes of experiment beyond one site at a time.

Each function records rows, runs them and returns a labelled dataset, as ``tp.patch`` does. A *place* is a component
with its index, ``("z", 9, slice(None), 6)`` for ``z[9, :, 6]``. Places are given as a list, or as a mapping of names to
one or several: ``{"name movers": [("z", 9, -1, 9), ("z", 9, -1, 6)]}``.
"""

from __future__ import annotations

from tracepatch.joint import interactions, keep_only, leave_one_out, together, windows
from tracepatch.knocking import compensation, knock_outs
from tracepatch.verdicts import VERDICTS, both_directions

__all__ = [
    "VERDICTS",
    "both_directions",
    "compensation",
    "interactions",
    "keep_only",
    "knock_outs",
    "leave_one_out",
    "together",
    "windows",
]
