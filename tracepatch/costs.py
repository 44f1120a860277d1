"""What a run costs, in seconds and bytes, from its shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tracepatch.architecture import Architecture
from tracepatch.jobs import Job, Read
from tracepatch.sites import component
from tracepatch.table import Table
from tracepatch.tokens import EncodedPairs

REQUEST_ROWS, REQUEST_STEPS, REQUEST_BYTES = 20_000, 1000, 1 << 24  # what is sent to a server at once, at most
SENT, SENT_TOKEN = 38_500, 0.9  # bytes of a request: of code, and of a token of a row
RETURNED = 1_800  # bytes of an answer beside its numbers
TOKENS = 1024  # tokens a table beyond which nothing is gained on the processors tried
FLAT_TOKENS = 4096  # the same of whole prompts
FAST_TOKENS = 16384  # the same of tables on accelerators
SPEED, FAST = 1e11, 5e13  # multiplications and additions a second of a core, and of an accelerator


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of runs on one model.

    Attributes:
        run: Seconds of a traced run, whatever is in it.
        layer: Seconds of a layer of a run, whatever is in it.
        token: Seconds of a token in a layer.
        attend: Seconds for a token to look at a key in a layer.
        copy: Seconds to bring a key of the cache to a lane in a layer.
        row: Seconds of the unembedding of a token that is read.
        row_bytes: Peak memory of one whole prompt in a flat run.
        tokens: Tokens of a table beyond which nothing is gained.
        flat_tokens: The same of a flat run.
    """

    run: float
    layer: float
    token: float
    attend: float
    copy: float
    row: float
    row_bytes: int
    tokens: int = TOKENS
    flat_tokens: int = FLAT_TOKENS

    def seconds(self, shape: Sequence[tuple[int, int]], prefix: int, rows: int) -> float:
        """Of one run of a table: lanes and slots of the layers that are computed, cached positions, rows."""
        total = self.run + self.row * rows
        for lanes, slots in shape:
            keys = prefix + slots
            total += self.layer + lanes * (self.token * slots + (self.attend * slots + self.copy) * keys)
        return total

    def flat_seconds(self, rows: int, length: int, depth: int) -> float:
        """Of one run of whole prompts."""
        tokens = rows * length
        return self.run + self.row * rows + depth * (self.layer + tokens * (self.token + self.attend * length))


@dataclass(frozen=True)
class Estimate:
    """What a plan costs.

    Attributes:
        forwards: Whole forwards, counted in tokens and layers.
        bytes: Of the largest run, at its peak.
        seconds: Wall time.
        pace: What the seconds that such models usually take were multiplied with, as a run of this model here took
            longer or shorter; ``None`` where there was none.
    """

    forwards: float
    bytes: int
    seconds: float
    pace: float | None = None


NOTHING = Estimate(0, 0, 0)


@dataclass(frozen=True)
class Traffic:
    """What goes to a server and comes back.

    Attributes:
        requests: How often.
        up: Bytes that are sent.
        down: Bytes that come back.
    """

    requests: int
    up: int
    down: int


def traffic(jobs: Sequence[Job], lengths: Sequence[int], columns: int, steps: int, beside: int = 0) -> Traffic:
    """What measuring some jobs sends and brings home: indices up, numbers down.

    Args:
        jobs: What is measured.
        lengths: Per pair, its tokens.
        columns: Numbers of a row.
        steps: Runs, the worlds' and those of the checks among them.
        beside: Tokens of other prompts that are sent.
    """
    tokens = beside + sum(lengths[job.pair] - job.start for job in jobs) + 2 * sum(lengths)
    tensors = {id(w.constant): w.constant.tensor.numel() for job in jobs for w in job.writes if w.constant is not None}
    saved = sum(read.size for job in jobs for read in job.reads)
    numbers = 4 * (columns * (len(jobs) + 2 * len(lengths)) + saved)
    inside = SENT_TOKEN * tokens + 4 * sum(tensors.values())
    requests = max(1, *(-(-n // most) for n, most in ((len(jobs), REQUEST_ROWS), (steps, REQUEST_STEPS))))
    requests = max(requests, -int(-inside // REQUEST_BYTES))
    up = requests * SENT + inside
    return Traffic(requests, round(up), requests * RETURNED + numbers)


def default_costs(architecture: Architecture, row_bytes: int, device: str = "cpu", *, unembeds: bool = True) -> Costs:
    """What a model of this size usually costs on a device of this type.

    Args:
        architecture: Of the model.
        row_bytes: Peak memory of one whole prompt in a flat run.
        device: Its type.
        unembeds: Whether logits are computed.
    """
    speed, tokens = (SPEED, TOKENS) if device == "cpu" else (FAST, FAST_TOKENS)
    d_model, width = architecture.d_model, max(layer.width for layer in architecture.layers)
    per_layer = 4 * d_model**2 + 2 * d_model * max(width, d_model)
    return Costs(
        run=18e-3,
        layer=2e-3,
        token=2 * per_layer / speed,
        attend=5 * d_model / speed,
        copy=16 * d_model / speed,
        row=2 * d_model * architecture.vocab / speed * unembeds,
        row_bytes=row_bytes,
        tokens=tokens,
        flat_tokens=max(tokens, FLAT_TOKENS),
    )


def flat_bytes(architecture: Architecture, length: int, reads: int) -> int:
    """Peak memory of one whole prompt: the widest activations of a layer, attention scores, logits that are read."""
    size = architecture.dtype.itemsize
    wide, heads = _widest(architecture)
    return length * (wide + heads * length * 2) * size + reads * architecture.vocab * (size + 8)


def table_bytes(architecture: Architecture, table: Table, logits: int) -> int:
    """Peak memory of a table: the widest activations, scores and masks of its last layer, its cache, logits."""
    size = architecture.dtype.itemsize
    lanes, slots = table.shape[-1]
    wide, heads = _widest(architecture)
    keys = table.prefix + slots
    activations = lanes * slots * (wide + heads * keys * 2 + keys)
    cache = sum(
        kept_bytes(architecture, name, i, lanes * keys)
        for name in ("keys", "values")
        for i in range(len(table.shape) - 1)
    )
    return activations * size + (cache if table.prefix else 0) + len(table.jobs) * logits * (size + 8)


def _widest(architecture: Architecture) -> tuple[int, int]:
    """Numbers of a token that a layer holds at once beside attention's, and the most heads that a layer has."""
    width = max(layer.width for layer in architecture.layers)
    heads = max((architecture.units("z", i) for i in range(len(architecture))), default=0)
    return 6 * architecture.d_model + 3 * width, heads


def backward_bytes(architecture: Architecture, length: int) -> int:
    """What a backward keeps of all layers of one prompt of so many tokens."""
    found = 0
    for layer in architecture.layers:
        heads = architecture.units("z", layer.index)
        found += length * (14 * architecture.d_model + 4 * layer.width + 3 * heads * length)
    return found * architecture.dtype.itemsize


def kept_bytes(architecture: Architecture, name: str, layer: int, length: int) -> int:
    """What is kept of a world: a component's value at every position of a prompt, or its keys or values."""
    size, inside = architecture.dtype.itemsize, min(layer, len(architecture) - 1)
    if name in ("keys", "values"):
        attention = architecture.attention(inside)
        seen = attention and attention.attended
        widths = {"keys": seen.keys.shape, "values": seen.values.shape} if seen else {}
        return int(length * attention.kv_heads * widths[name][-1] * size) if attention and seen else 0
    kind = component(name)
    count = architecture.units(name, inside) if kind.unit and kind.unit != kind.dims[-1] else 1
    width = length if kind.attends else architecture.width(name, inside)
    return int(length * count * width * size)


def saved_bytes(architecture: Architecture, reads: Sequence[Read], length: int) -> int:
    """What is saved of a row, or read by metrics, while it is computed: in the model's dtype and in float32."""
    found = sum(read.size * (architecture.dtype.itemsize + 4) for read in reads)
    # Of head_out every head is made at every position, twice where it is edited.
    layers = [read.layer for read in reads if read.component == "head_out"]
    return found + 2 * sum(kept_bytes(architecture, "head_out", layer, length) for layer in layers)


def seen_bytes(architecture: Architecture, table: Table, seen: Sequence[Read]) -> int:
    """What metrics read of a table, while it is computed."""
    numbers = sum(read.size for read in seen) * len(table.jobs)
    made = [replace(read, size=0) for read in seen]  # heads of all tokens
    return numbers * (architecture.dtype.itemsize + 4) + saved_bytes(architecture, made, table.tokens)


def encoder_bytes(architecture: Architecture, encoded: EncodedPairs) -> int:
    """What an encoder reads: its activations are taken to be as wide as the decoder's."""
    longest = max((len(ids) for side in encoded.encoder for ids in side), default=0)
    return flat_bytes(architecture, longest, 0) if longest else 0
