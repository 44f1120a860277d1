"""A recorded row as a plain nnsight script, by which a user checks us and learns nnsight.

The text is made from the row's edits, not from a plan: it shares with the pipeline only where components live. Worlds
whose values are written run first, then the edits in the order of the forward, then the metric, each in the open.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TypeAlias, get_args

from tracepatch.architecture import Architecture
from tracepatch.errors import RecipeError, listing, plural
from tracepatch.metrics import Metric
from tracepatch.rows import Edit, Row
from tracepatch.sites import COMPONENTS, STAGES, Site
from tracepatch.sources import Function, Sum, Value, WorldName
from tracepatch.spelling import READINGS, STOPS, Read, Stop, along, joined, literal, number, plus
from tracepatch.tokens import EncodedPairs

WIDTH = 120
INLINE = 8  # numbers of a tensor that are written out
NAMED = 3  # positions whose tokens are named beside an edit
WORLDS: tuple[WorldName, ...] = get_args(WorldName)
Visit: TypeAlias = tuple[tuple[float, int, int, int], list[str]]
"""Lines of a trace with their moment: what passes by is edited first, then taken for later."""


def script(
    row: Row,
    pair: int,
    metric: str | None,
    *,
    architecture: Architecture,
    encoded: EncodedPairs,
    metrics: tuple[Metric, ...],
    model: str,
) -> str:
    """The script of a row on a pair; ``Row.as_nnsight`` describes it.

    Args:
        row: What is patched.
        pair: Number of the pair.
        metric: Name of the metric that is computed; the first one if ``None``.
        architecture: Where the components live.
        encoded: The pairs.
        metrics: What is read.
        model: What the model is called.

    Raises:
        RecipeError: There is no such pair or metric, the pair lacks the row's positions, or the row holds what no
            script is written for.
    """
    if type(pair) is not int or not 0 <= pair < len(encoded):
        raise RecipeError(f"There is no pair {pair!r}: pairs are numbered 0 to {len(encoded) - 1}.")
    names = [m.name for m in metrics]
    if metric is not None and metric not in names:
        raise RecipeError(f"There is no metric {metric!r} here; there is {', '.join(names)}.")
    _require_words(row)
    _require_present(row, pair, encoded)
    which = 0 if metric is None else names.index(metric)
    return _Script(row, pair, which, metrics[which], architecture, encoded).text(model)


def _require_words(row: Row) -> None:
    unknown = [e for e in row.edits if any(s.component not in STOPS for s in _sites(e))]
    if unknown:
        raise RecipeError(
            f"{plural(len(unknown), 'edit')} of this row cannot be written as a plain script.\n"
            f"{listing([str(e) for e in unknown])}\nScripts are written for {', '.join(STOPS)}."
        )
    worlds = {row.base, *(v.world for e in row.edits for v in _values(e))} - set(WORLDS)
    if worlds:
        raise RecipeError(
            f"The row uses {', '.join(sorted(worlds))}, which is no run of a prompt as it is. Scripts are written for "
            f"rows of the worlds {', '.join(WORLDS)}."
        )


def _require_present(row: Row, pair: int, encoded: EncodedPairs) -> None:
    sites = [site for edit in row.edits for site in _sites(edit)]
    absent = [[str(s) for s in sites if not s.pos.resolve(n)] for n in encoded.lengths]
    if absent[pair]:
        lacking, tokens = ", ".join(dict.fromkeys(absent[pair])), plural(encoded.lengths[pair], "token")
        having = ", ".join(str(i) for i, missing in enumerate(absent) if not missing) or "none"
        raise RecipeError(
            f"The row does not exist in pair {pair}: its prompts have {tokens}, which are too few for {lacking}. "
            f"Pairs that have all of the row's positions: {having}."
        )


@dataclass
class _Script:
    """One script in the making."""

    row: Row
    pair: int
    which: int
    metric: Metric
    architecture: Architecture
    encoded: EncodedPairs
    parameters: dict[str, str] = field(default_factory=dict)
    wanted: dict[tuple[WorldName, str, int], Stop] = field(default_factory=dict)
    defines: dict[str, None] = field(default_factory=dict)

    def text(self, model: str) -> str:
        """All of it; what the edits and the metric take from other runs is known only when they have been written."""
        patched, value = self._patched(), self._value()
        taken = [world for world in WORLDS if any(key[0] == world for key in self.wanted)]
        unpatched = [self._unpatched(world) for world in taken]
        body = [line for part in (*unpatched, patched, value) for line in (*part, "")][:-1]
        tokens = [self._tokens(world) for world in WORLDS if world in (*taken, self.row.base)]
        names = sorted(self.parameters)
        lines = [
            *self._header(model, names),
            *("", "import nnsight", "import torch", ""),
            *(line for part in tokens for line in part),
            *(line for text in self.defines for line in ("", "", *text.splitlines())),
            *("", "", f"def patched({', '.join(['model', *names])}):"),
            f'    """The {_safe(self.metric.name)} of the patched run, and its logits [pos, vocab]."""',
            *_indented([*body, "return value.item(), logits"]),
        ]
        return "\n".join(lines) + "\n"

    @property
    def length(self) -> int:
        """Tokens of the pair's prompts."""
        return self.encoded.lengths[self.pair]

    # ------------------------------------------------------------------------------------------------ what it is about

    def _header(self, model: str, names: list[str]) -> list[str]:
        row, file = self.row, f"row_{self.row.number}_pair_{self.pair}"
        call = ", ".join(["model", *(f"{name}={self.parameters[name]}" for name in names)])
        edits = listing([f"{row.base}.{_written(e)}" for e in row.edits])
        return [
            *_comment(
                f"Row {row.number} ({row.described or 'without labels'}) on pair {self.pair} in plain nnsight. The "
                f"model: {_safe(model)}, layers 0 to {len(self.architecture) - 1}."
            ),
            *(f"# {line}" for line in edits.splitlines()),
            *_comment(
                f"Save it as {file}.py: nnsight reads a trace from its file, and a file once in a session. Then run"
            ),
            f"#   from {file} import patched",
            f"#   value, logits = patched({call})  # what tracepatch measures",
        ]

    def _tokens(self, world: WorldName) -> list[str]:
        ids = list(self.encoded.world(world)[self.pair])
        return [
            *_comment(repr(self.encoded.tokenizer.decode(ids, clean_up_tokenization_spaces=False))),
            *textwrap.wrap(f"{world}_tokens = torch.tensor([{ids}])", WIDTH, subsequent_indent=" " * 4),
        ]

    # ------------------------------------------------------------------------------------------------ the forwards

    def _unpatched(self, world: WorldName) -> list[str]:
        """The run whose values are written, or compared with."""
        visits: list[Visit] = []
        for (_, name, layer), stop in ((key, stop) for key, stop in self.wanted.items() if key[0] == world):
            visits += _taken(stop)
            self.defines |= dict.fromkeys(stop.defines)
            keep = f"{_variable(world, name, layer)} = nnsight.save({stop.value})"
            visits.append(((stop.order, 0, layer, STAGES[name]), [*stop.before, keep]))
        return [
            f"# The unpatched {world} run. Values are cloned: a model may change in place what has passed by.",
            *_trace(world, visits),
        ]

    def _patched(self) -> list[str]:
        """The run with the edits."""
        visits: list[Visit] = []
        groups: dict[tuple[str, int], list[Edit]] = {}
        for edit in self.row.edits:
            groups.setdefault((edit.site.component, edit.site.layer), []).append(edit)
        for (name, layer), edits in groups.items():
            stop = STOPS[name](self.architecture, name, layer)
            visits += _taken(stop)
            self.defines |= dict.fromkeys(stop.defines)
            lines = [*stop.before, f"{name} = {stop.value}  # [{stop.dims}]"]
            lines += [line for edit in edits for line in self._edit(edit)]
            visits.append(((stop.order, 0, layer, STAGES[name]), [*lines, *stop.back]))
        last = "logits[0]" if ("logits", 0) in groups else "model.output.logits[0].clone()"
        visits.append(((float("inf"), 1, 0, 0), [f"logits = nnsight.save({last})"]))
        return [
            f"# The {self.row.base} run, edited: each activation where it passes by, in the order of the forward.",
            *_trace(self.row.base, visits),
        ]

    def _kept(self, world: WorldName, name: str, layer: int) -> str:
        """The variable with a value of an unpatched run, which is taken from now on."""
        self.wanted.setdefault((world, name, layer), STOPS[name](self.architecture, name, layer))
        return _variable(world, name, layer)

    # ------------------------------------------------------------------------------------------------ one edit

    def _edit(self, edit: Edit) -> list[str]:
        site, source, name = edit.site, edit.source, edit.site.component
        ids, positions, about = self.encoded.world(self.row.base)[self.pair], site.pos.resolve(self.length) or (), ""
        if len(positions) <= NAMED:
            words = self.encoded.words(ids[p] for p in positions)
            about = ": " + ", ".join(f"position {p} is {w!r}" for p, w in zip(positions, words, strict=True))
        if isinstance(source, Function):
            cells = self._index(site, ":")
            made = self._made(edit, source, cells)
        else:
            cells = self._index(site)
            made = self._sum(edit, source.terms())
        comment = _comment(f"{_written(edit)}{about}", WIDTH - 8)
        return [*comment, f"{name}[{cells}] {'+=' if edit.add else '='} {made}"]

    def _made(self, edit: Edit, source: Function, cells: str) -> str:
        """A call of a function with the live value, or with the worlds' as well; rows in front."""
        site, which = edit.site, [e is edit for e in self.row.edits if isinstance(e.source, Function)].index(True)
        self.parameters["functions"] = f"p.rows[{self.row.number}].functions"
        worlds = WORLDS[: source.arguments - 1]
        values = [
            "None"
            if world == "corrupted" and self.encoded.corrupted is None
            else f"{self._kept(world, site.component, site.layer)}[{cells}]"
            for world in worlds
        ]
        return f"functions[{which}]({', '.join([f'{site.component}[{cells}]', *values])})"

    def _sum(self, edit: Edit, source: Sum) -> str:
        found = ""
        for factor, value in source.values:
            kept = self._kept(value.world, value.site.component, value.site.layer)
            same = value.site == edit.site
            term = f"{kept}[{self._index(value.site) if same else self._aligned(value.site, edit.site)}]"
            found = plus(found, factor, term if abs(factor) == 1 else f"{number(abs(factor))} * {term}")
        constant, name = source.constant, edit.site.component
        if constant is None:
            return found
        tensor = constant.tensor
        if not tensor.shape:
            return plus(found, float(tensor), number(abs(float(tensor)))) if tensor or not found else found
        if tensor.numel() <= INLINE:
            return plus(found, 1, f"{name}.new_tensor({literal(tensor.tolist())})")
        self.parameters["tensors"] = f"p.rows[{self.row.number}].tensors"
        which = [e is edit for e in self.row.edits if e.tensor is not None].index(True)
        return plus(found, 1, f"tensors[{which}].to({name})")

    def _index(self, site: Site, rows: str = "0") -> str:
        """A site's cells, with the dims that the recorded index gives."""
        parts = [along(site.pos.resolve(self.length) or (), site.pos.scalar, self.length)]
        if COMPONENTS[site.component].unit:
            parts.append(self._units(site, site.unit.scalar))
        return joined(rows, parts)

    def _aligned(self, site: Site, target: Site) -> str:
        """A source's cells with its dims in line with the target's; single ones are left out, or broadcast."""
        positions = site.pos.resolve(self.length) or ()
        # Where the target has several heads, a dim for them has to stand behind the positions.
        behind = COMPONENTS[target.component].unit is not None and not target.unit.scalar and len(positions) > 1
        parts = [along(positions, len(positions) == 1, self.length)]
        if COMPONENTS[site.component].unit:
            count = self.architecture.units(site.component, site.layer)
            parts.append(self._units(site, len(site.unit.resolve(count) or ()) == 1 and not behind))
        elif behind:
            parts.append("None")
        return joined("0", parts)

    def _units(self, site: Site, scalar: bool) -> str:
        count = self.architecture.units(site.component, site.layer)
        return along(site.unit.resolve(count) or (), scalar, count)

    # ------------------------------------------------------------------------------------------------ the metric

    def _value(self) -> list[str]:
        """The metric, from ``logits [pos, vocab]``."""
        metric, positions = self.metric, self.metric.positions.resolve(self.length) or ()
        several, last = len(positions) > 1, positions == (self.length - 1,)
        if metric.function in READINGS:
            at = along(positions, not several, self.length)
            name = "last" if last else "read"
            read = Read(name, several, {need: self._given(need, positions, f"0, {at}") for need in metric.needs})
            return [
                f"{name} = logits[{-1 if last else at}].float()  # [{'position, ' if several else ''}vocab]",
                f"value = {READINGS[metric.function](read)}{self._named(metric)}",
            ]
        self.parameters["metric"] = f"p.metrics[{self.which}]"
        at, given = along(positions, False, self.length), []
        for need in metric.needs:
            what = self._given(need, positions, f":, {at}")
            given.append(
                f"{need!r}: {what if isinstance(what, str) else f'torch.tensor([{list(what)}]).to(logits.device)'}"
            )
        return [
            f"value = metric(logits[None, {at}].float(), {{{', '.join(given)}}})",
            "value = value.flatten()[0]  # of logits [row, position, vocab] it gives [row], or [row, 1 + parts]",
        ]

    def _named(self, metric: Metric) -> str:
        """Which tokens the ids of a metric are."""
        ids = [
            i for need in metric.needs if need in ("answer", "wrong") for i in getattr(self.encoded, need)[self.pair]
        ]
        words = [f"{i} is {word!r}" for i, word in zip(ids, self.encoded.words(ids), strict=True)]
        return f"  # {', '.join(words)}" if 0 < len(words) <= NAMED else ""

    def _given(self, need: str, positions: tuple[int, ...], at: str) -> tuple[int, ...] | str:
        """What a metric needs of the pair: ids, or another run's log-probabilities as code."""
        if need in WORLDS:
            return (
                f"{self._kept('clean' if need == 'clean' else 'corrupted', 'logits', 0)}[{at}].float().log_softmax(-1)"
            )
        found: tuple[int, ...] = getattr(self.encoded, "clean" if need == "next" else need)[self.pair]
        if need == "next":  # after the last token the answer
            follow = (*found[1:], *(self.encoded.answer[self.pair][:1] or (0,)))
            found = tuple(follow[p] for p in positions)
        return found


# ------------------------------------------------------------------------------------------------------ pieces of text


def _trace(world: WorldName, visits: list[Visit]) -> list[str]:
    lines = [line for _, part in sorted(visits, key=lambda visit: visit[0]) for line in part]
    return [f"with torch.no_grad(), model.trace(input_ids={world}_tokens, use_cache=False):", *_indented(lines)]


def _taken(stop: Stop) -> list[Visit]:
    return [((order, 1, 0, 0), [line]) for order, line in stop.asides]


def _variable(world: WorldName, name: str, layer: int) -> str:
    return f"{world}_{name}" + (f"_{layer}" if COMPONENTS[name].layered else "")


def _values(edit: Edit) -> list[Value]:
    return [] if isinstance(edit.source, Function) else [value for _, value in edit.source.terms().values]


def _sites(edit: Edit) -> list[Site]:
    return [edit.site, *(value.site for value in _values(edit))]


def _written(edit: Edit) -> str:
    return _safe(str(edit)).replace("·", " * ").replace("…", "...")


def _safe(text: str) -> str:
    """A name in one line that ends no string."""
    return " ".join(text.splitlines()).replace("\\", "/").replace('"', "'")


def _comment(text: str, width: int = WIDTH) -> list[str]:
    lines = textwrap.wrap(text, width - 2, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line if line else "" for line in lines]
