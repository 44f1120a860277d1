"""Who writes to a model's residual stream, who reads it, and who reads what whom has written.

The stream is a sum. Every writer adds to it: what enters the first block, each head, each MLP. Every reader takes the
sum as it stands: the queries, keys and values of each head, each MLP, the unembedding. An *edge* leads from a writer to
a reader that comes after it: the part of what the reader reads that is the writer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tracepatch.architecture import Architecture
from tracepatch.direct import name_of
from tracepatch.errors import ComponentError, SiteError, listing, plural
from tracepatch.layout import Key
from tracepatch.probe import Sublayer
from tracepatch.sites import SPLIT_READERS, component


@dataclass(frozen=True)
class Node:
    """Someone who writes to the stream, or who reads it.

    Attributes:
        name: What it is called: ``embed``, ``L3H4``, ``MLP 2``; of readers ``L5H1.q``, ``MLP 2``, ``logits``.
        component: What it writes or reads.
        layer: Its layer; of ``embed`` 0, of ``logits`` one more than the last.
        unit: Its head, or its key and value head; ``None`` where it is a whole component.
        moment: When it reads, and then writes: in which sum of the stream, counted from 0, that of ``embed``.
    """

    name: str
    component: str
    layer: int
    unit: int | None
    moment: int

    @property
    def key(self) -> Key:
        """Component and layer."""
        return self.component, self.layer

    def index(self, pos: Any) -> tuple[Any, ...]:
        """How its component is indexed, at some positions."""
        given = {"layer": self.layer, "pos": pos, "head": self.unit, "kv_head": self.unit}
        index = (given[dim] for dim in component(self.component).index)
        return tuple(i for i in index if i is not None)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Graph:
    """The writers and readers of one model, each in the order of a forward.

    Attributes:
        writers: Of them, those of one component and layer stand together.
        readers: Likewise.
        missing: What also writes or reads, but has no component of its own: edges from or to it are not there.
    """

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    missing: tuple[str, ...]

    @staticmethod
    def joined(writer: Node, reader: Node) -> bool:
        """Whether the reader reads what the writer has written."""
        return writer.moment < reader.moment

    def ends(self, edges: Sequence[tuple[str, str]]) -> list[tuple[Node, Node]]:
        """The writer and the reader of each edge, by their names.

        Raises:
            SiteError: There is no such writer or reader, or a reader comes before its writer.
        """
        writers = _found("writer", self.writers, [writer for writer, _ in edges])
        readers = _found("reader", self.readers, [reader for _, reader in edges])
        found = list(zip(writers, readers, strict=True))
        bad = [f"{reader} reads before {writer} writes" for writer, reader in found if not self.joined(writer, reader)]
        if bad:
            raise SiteError(f"{len(bad)} of {plural(len(found), 'edge')} do not exist.\n{listing(bad)}")
        return found

    def chosen(self, side: str, names: Any) -> tuple[Node, ...]:
        """Some writers or readers, in the order of a forward.

        Args:
            side: ``"writer"`` or ``"reader"``.
            names: One or several of their names, or components for all who have them; ``None`` for all.

        Raises:
            SiteError: One of them is none.
        """
        nodes = self.writers if side == "writer" else self.readers
        if names is None:
            return nodes
        kinds = {kind: [n for n in nodes if n.component == kind] for kind in _kinds(nodes)}
        picked = set(_found(side, nodes, [names] if isinstance(names, str) else list(names), kinds))
        return tuple(node for node in nodes if node in picked)


def _found(
    what: str, nodes: Sequence[Node], names: Sequence[Any], kinds: Mapping[str, Sequence[Node]] | None = None
) -> list[Node]:
    """The nodes of some names."""
    known = {**(kinds or {}), **{node.name: [node] for node in nodes}}
    lines = []
    for name in names:
        if not isinstance(name, str) or name not in known:
            close = get_close_matches(str(name), known, 1)
            lines.append(f"{name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if lines or not names:
        examples = [next(n.name for n in nodes if n.component == kind) for kind in _kinds(nodes)]
        told = f"Its {what}s are called {', '.join(examples)}"
        told += f"; all of a kind are {', '.join(kinds)}" if kinds else ""
        raise SiteError(f"This model has no such {what}.\n{listing(lines or ['none is named'])}\n{told}.")
    return [node for name in names for node in known[name]]


def _kinds(nodes: Sequence[Node]) -> list[str]:
    return list(dict.fromkeys(node.component for node in nodes))


def graph_of(architecture: Architecture) -> Graph:
    """The writers and readers of a model.

    Args:
        architecture: Of the model.

    Raises:
        ComponentError: Its stream is no sum of what is written to it, or was not proved to be.
    """
    _require_sum(architecture)
    writers, readers = [Node(name_of(("resid_pre", 0), -1), "resid_pre", 0, None, 0)], []
    missing: list[str] = []
    moment = 1
    for layer in architecture.layers:
        for branch in layer.sublayers:
            read, written = _nodes(architecture, layer.index, branch, moment + branch.turn)
            missing += [f"what {branch.path} {does}" for does, of in (("reads", read), ("writes", written)) if not of]
            readers += read
            writers += written
        moment += 1 + max((branch.turn for branch in layer.sublayers), default=-1)
    readers.append(Node("logits", "logits_in", len(architecture), None, moment))
    return Graph(tuple(writers), tuple(readers), tuple(missing))


def _require_sum(architecture: Architecture) -> None:
    bad = []
    for layer in architecture.layers:
        normed = {branch.stream_norm for branch in layer.sublayers if branch.stream_norm}
        if normed:
            bad.append(f"layer {layer.index}: on the stream itself stand norms ({', '.join(sorted(normed))})")
        elif layer.form == "unproved":
            bad.append(f"layer {layer.index}: the residual sum does not close")
    if bad:
        raise ComponentError(
            "An edge is a part of what is read of the stream, so the stream must be the sum of what is written to it. "
            f"In this {architecture.model_type} it is not:\n{listing(bad)}\nEstimate components instead: "
            "tp.attribute(model, pairs, 'attn_out')."
        )


def _nodes(architecture: Architecture, at: int, branch: Sublayer, moment: int) -> tuple[list[Node], list[Node]]:
    """Who reads, and who writes, in a branch of a layer; nobody where it has no components."""

    def whole(kind: str) -> list[Node]:
        name = name_of((kind.replace("_in", "_out"), at), -1)
        return [Node(name, kind, at, None, moment)] if architecture.offers(kind, at) else []

    if branch is architecture.mlp(at):
        return whole("mlp_in"), whole("mlp_out")
    if branch is architecture.cross(at):
        return [], whole("cross_attn_out")
    if branch is not architecture.attention(at):
        return [], []
    read, written = whole("attn_in"), whole("attn_out")
    if all(architecture.offers(part, at) for part in SPLIT_READERS):
        grouped = branch.heads != branch.kv_heads
        read = [
            Node(f"L{at}{'KV' if grouped and part != 'q_in' else 'H'}{unit}.{made}", part, at, unit, moment)
            for part, made in SPLIT_READERS.items()
            for unit in range(architecture.units(part, at))
        ]
    if architecture.offers("head_out", at):
        heads = range(architecture.units("head_out", at))
        written = [Node(name_of(("head_out", at), head), "head_out", at, head, moment) for head in heads]
    return read, written
