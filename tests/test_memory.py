"""The peak of a sweep stays under the budget that it was given, where all rows at once would need ten times as much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, tokenizer

import tracepatch as tp

EVERYTHING = tp.metric(lambda logits: logits.logsumexp(-1), name="all logits")


def wide() -> Any:
    """A small model whose logits are large."""
    return tp.load(build("gpt2", layers=4, vocab_size=40_000), tokenizer())


def long_pairs() -> tp.Pairs:
    """Pairs whose first token differs, so that every position has to be measured."""
    clean = torch.randint(60, (6, 40), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 0] = (corrupted[:, 0] + 1) % 60
    return tp.Pairs(clean.tolist(), corrupted.tolist())


SWEEP = """
import ctypes, gc, json, re, sys
from pathlib import Path
import torch
from test_memory import EVERYTHING, long_pairs, wide
import tracepatch as tp

memory, batch_size = int(sys.argv[1]), int(sys.argv[2]) or None
torch.set_num_threads(1)
model, pairs, metric = wide(), long_pairs(), EVERYTHING
kind, heads = {"progress": False, "form": sys.argv[3] or None}, ("layer", "head", "pos")
tp.patch(model, pairs[:1], "z", metric, only={"layer": [0]}, by=("layer", "head"), memory=memory, **kind)

def resident(which):
    return 1024 * int(re.search(rf"{which}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

with tp.patching(model, pairs, metric, memory=memory, batch_size=batch_size, form=kind["form"]) as p:
    for layer, head, pos in p.grid("z", by=heads):
        with p.row(layer=layer, head=head, pos=pos):
            p.corrupted.z[layer, pos, head] = p.clean.z[layer, pos, head]
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now, with all rows recorded and planned
before = resident("VmRSS")
result = p.run(progress=False)
print(json.dumps([resident("VmHWM") - before, p.plan.estimate.bytes, float(result["value"].sum())]))
"""


def peak(memory: int, batch_size: int = 0, form: str = "") -> list[float]:
    """Bytes that a sweep took on top of what there was before, what was estimated of its largest run, and a checksum."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(memory), str(batch_size), form],
        cwd=Path(__file__).parent,
        # An allocator that gives back what is freed, so that the peak is what was in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(n) for n in json.loads(done.stdout)]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process forget its peak")
@pytest.mark.parametrize("form", ["packed", "staggered", "flat"])
def test_a_sweep_stays_under_its_budget(form: str) -> None:
    budget = 40_000_000
    taken, estimated, total = peak(budget, form=form)
    assert 0 < taken <= budget
    assert estimated <= budget
    if form == "packed":
        unbounded, _, whole = peak(1 << 50, 1 << 30)
        assert unbounded >= 10 * budget
        assert abs(total - whole) <= 1e-5 * abs(whole)
