"""A recorded row as a plain nnsight script, by which a user checks us and learns nnsight.

The text is made from the row's edits, not from a plan: it shares with the pipeline only where components live. Worlds
whose values are written run first, then the edits in the order of the forward, then the metric, each in the open.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tracepatch.architecture import Architecture
from tracepatch.averages import averages, prompts
from tracepatch.errors import RecipeError, listing, plural
from tracepatch.forwards import NAMED, PRISTINE, WIDTH, Common, Forward, comment, indented, safe, written
from tracepatch.literals import along
from tracepatch.metrics import Metric
from tracepatch.reach import scored_at
from tracepatch.readings import READINGS, Read
from tracepatch.references import ReferenceWorld
from tracepatch.rows import Edit, EditedWorld, Row
from tracepatch.sites import COMPONENTS, Site
from tracepatch.sources import Noise, Value, WorldName, summed
from tracepatch.spelling import STOPS
from tracepatch.tokens import EncodedPairs

EAGER = [
    "    usual = model._module.config._attn_implementation",
    '    model._module.set_attn_implementation("eager")  # step by step, where scores and patterns can be seen',
]
BACK = "    model._module.set_attn_implementation(usual)"


def script(
    row: Row,
    pair: int,
    metric: str | None,
    *,
    architecture: Architecture,
    encoded: EncodedPairs,
    metrics: tuple[Metric, ...],
    model: str,
    edited: Mapping[WorldName, EditedWorld],
    references: Mapping[WorldName, ReferenceWorld] | None = None,
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
        edited: The edited worlds.
        references: The reference worlds.

    Raises:
        RecipeError: There is no such pair or metric, the pair lacks the row's positions, or the row holds what no
            script is written for.
    """
    if row.raw is not None:
        raise RecipeError(f"{row} is plain nnsight already: the function that it was given.")
    if type(pair) is not int or not 0 <= pair < len(encoded):
        raise RecipeError(f"There is no pair {pair!r}: pairs are numbered 0 to {len(encoded) - 1}.")
    names = [m.name for m in metrics]
    if metric is not None and metric not in names:
        raise RecipeError(f"There is no metric {metric!r} here; there is {', '.join(names)}.")
    common = Common(row, pair, architecture, encoded, dict(edited), references=dict(references or {}))
    worlds = _worlds(common, {row.base, *_sources(row.edits)})
    every = [*row.edits, *(edit for world in worlds if world in edited for edit in edited[world].edits)]
    _require_words(every)
    _require_counted(common, every)
    _require_present(common, row)  # of edited worlds the plan has made sure
    which = 0 if metric is None else names.index(metric)
    read = metrics[which].site
    if read is not None and read.component not in STOPS:
        raise RecipeError(
            f"Metric {metrics[which].name!r} reads {read}, for which no plain script is written. Scripts are "
            f"written for {', '.join(STOPS)}."
        )
    return _Script(common, worlds, which, metrics[which]).text(model)


def _worlds(common: Common, given: Iterable[WorldName]) -> list[WorldName]:
    """Worlds with all that they rest on, each after those that it takes values of; clean and corrupted in front."""
    found = list(PRISTINE)

    def add(world: WorldName) -> None:
        if world not in found:
            taken = _sources(common.edited[world].edits) - {*common.references}
            for other in (common.edited[world].of, *sorted(taken)):
                add(other)
            found.append(world)

    for world in sorted({*given} - {*common.references}, key=[*PRISTINE, *common.edited].index):
        add(world)
    return found


def _require_words(edits: list[Edit]) -> None:
    unknown = [e for e in edits if any(s.component not in STOPS for s in _sites(e))]
    if unknown:
        raise RecipeError(
            f"{plural(len(unknown), 'edit')} of this row cannot be written as a plain script.\n"
            f"{listing([str(e) for e in unknown])}\nScripts are written for {', '.join(STOPS)}."
        )


def _require_counted(common: Common, edits: list[Edit]) -> None:
    """Refuses values of references where a pair's prompts, or the reference's, are not indexed by numbers alone."""
    mapped = common.encoded.alignments[common.pair].mapped
    values = [v for edit in edits for _, v in _values(edit) if v.world in common.references]
    units = [noise.unit for edit in edits for _, noise in _noise(edit) if noise.unit is not None]
    elsewhere = [v for v in values if mapped or v.site.pos.span or v.site.src.span]
    for value in elsewhere + [v for v in units if v.site.pos.span or v.site.pos.of]:
        raise RecipeError(
            f"No script is written for {value}: in pairs that are aligned, and by spans, prompts of a reference "
            "have positions of their own. Index the reference by positions, in pairs that correspond one by one."
        )


def _require_present(common: Common, row: Row) -> None:
    lacking = [_lacking(replace(common, pair=i), row) for i in range(len(common.encoded))]
    if lacking[common.pair]:
        tokens = plural(common.side(row.base).length, "token")
        having = ", ".join(str(i) for i, missing in enumerate(lacking) if not missing) or "none"
        raise RecipeError(
            f"The row does not exist in pair {common.pair}: its prompts have {tokens}, which are too few for "
            f"{', '.join(lacking[common.pair])}. Pairs that have all of the row's positions: {having}."
        )


def _lacking(common: Common, row: Row) -> list[str]:
    """The sites of a row's edits that a pair does not have."""
    found: dict[str, None] = {}
    for edit in row.edits:
        crossing = common.crosses(edit, row.base)
        values = [(v.world, v.site) for _, v in _values(edit) if v.world not in common.references]
        for world, site in ((row.base, edit.site), *values):
            side = common.side(world)
            if not (site.pos.on(side, crossing) and site.src.on(side, crossing)):
                found[str(site)] = None
    return list(found)


class _Script:
    """One script in the making."""

    def __init__(self, common: Common, worlds: list[WorldName], which: int, metric: Metric) -> None:
        self.common, self.worlds, self.which, self.metric = common, worlds, which, metric
        self.row, self.pair, self.encoded = common.row, common.pair, common.encoded
        self.side = common.side(common.row.base)

    def text(self, model: str) -> str:
        """All of it; what the edits and the metric take from other runs is known only when they have been written."""
        patched, value, common = self._patched(), self._value(), self.common
        runs = [self._run(world) for world in reversed(self.worlds) if common.wanted[world]]
        runs += [list(averages(common))] if common.averages else []
        body = [line for part in (*reversed(runs), patched) for line in (*part, "")]
        used = {
            common.root(world)
            for world in (self.row.base, *self.worlds)
            if world == self.row.base or common.wanted[world]
        }
        tokens = [self._tokens(world) for world in PRISTINE if world in used] + [list(prompts(common))]
        names = sorted(common.parameters)
        body = [*EAGER, "", *indented(body[:-1]), BACK] if self._eager() else indented(body[:-1])
        lines = [
            *self._header(model, names),
            *("", "import nnsight", "import torch", ""),
            *(line for part in tokens for line in part),
            *(line for text in common.defines for line in ("", "", *text.splitlines())),
            *("", "", f"def patched({', '.join(['model', *names])}):"),
            f'    """The {safe(self.metric.name)} of the patched run, and its logits [pos, vocab]."""',
            *body,
            "",
            *indented([*value, "return value.item(), logits"]),
        ]
        return "\n".join(lines) + "\n"

    def _eager(self) -> bool:
        """Whether attention must be computed step by step."""
        wanted = (name for keys in self.common.wanted.values() for name, _ in keys)
        edits = [*self.row.edits, *(edit for _, edit in self._standing())]
        read = () if self.metric.site is None else (self.metric.site.component,)
        return any(COMPONENTS[name].attends for name in (*wanted, *read, *(e.site.component for e in edits)))

    def _standing(self) -> list[tuple[WorldName, Edit]]:
        worlds = [world for world in self.worlds if world == self.row.base or self.common.wanted[world]]
        return [pair for world in worlds for pair in self.common.standing(world)]

    # ------------------------------------------------------------------------------------------------ what it is about

    def _header(self, model: str, names: list[str]) -> list[str]:
        row, file = self.row, f"row_{self.row.number}_pair_{self.pair}"
        call = ", ".join(["model", *(f"{name}={self.common.parameters[name]}" for name in names)])
        used = dict.fromkeys(world for world, _ in self._standing())
        edits = [f"{row.base}.{written(e)}" for e in row.edits]
        edits = [*edits, *(line for world in used for line in self._described(world))]
        return [
            *comment(
                f"Row {row.number} ({row.described or 'without labels'}) on pair {self.pair} in plain nnsight. The "
                f"model: {safe(model)}, layers 0 to {len(self.common.architecture) - 1}."
            ),
            *(f"# {line}" for line in listing(edits).splitlines()),
            *comment(
                f"Save it as {file}.py: nnsight reads a trace from its file, and a file once in a session. Then run"
            ),
            f"#   from {file} import patched",
            f"#   value, logits = patched({call})  # what tracepatch measures",
        ]

    def _tokens(self, world: WorldName) -> list[str]:
        found = {f"{world}_tokens": list(self.encoded.world(world)[self.pair])}
        if self.encoded.encoder:  # it reads the prompt, and the tokens are the decoder's
            found = {f"{world}_read": list(self.encoded.encoded(world, self.pair))} | found
        lines = []
        for name, ids in found.items():
            lines += comment(repr(self.encoded.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
            lines += textwrap.wrap(f"{name} = torch.tensor([{ids}])", WIDTH, subsequent_indent=" " * 4)
        return lines

    def _described(self, world: WorldName) -> list[str]:
        """What an edited world is."""
        here = self.common.edited[world]
        return [f"{world} is {here.of} with {written(edit)}" for edit in here.edits]

    # ------------------------------------------------------------------------------------------------ the forwards

    def _run(self, world: WorldName) -> list[str]:
        """The run whose values are written, or compared with."""
        about = f"The unpatched {world} run."
        if world in self.common.edited:
            about = f"The {world} run: {self.common.edited[world].of} with its standing edits."
        return [
            *comment(f"{about} Values are cloned: a model may change in place what has passed by.", WIDTH - 4),
            *Forward(self.common, world, self.common.standing(world)).lines(),
        ]

    def _patched(self) -> list[str]:
        """The run with the edits."""
        common, base = self.common, self.row.base
        edits = [*common.standing(base), *(("", edit) for edit in self.row.edits)]
        of_logits = any(edit.site.component == "logits" for _, edit in edits)
        last = "logits[0]" if of_logits else "model.output.logits[0].clone()"
        forward = Forward(common, base, edits)
        self.live = "" if self.metric.site is None else forward.live(self.metric.site)
        return [
            f"# The {base} run, edited: each activation where it passes by, in the order of the forward.",
            *forward.lines(f"logits = nnsight.save({last})", self.metric.site),
        ]

    # ------------------------------------------------------------------------------------------------ the metric

    def _value(self) -> list[str]:
        """The metric, from ``logits [pos, vocab]``, or from the live value that was kept."""
        if self.metric.site is not None:
            if "direct" in self.metric.needs:
                raise RecipeError(
                    f"No plain script is written for {self.metric.name!r}, which needs the unembedding's directions. "
                    "Ask for another metric: row.as_nnsight(pair, 'NAME')."
                )
            self.common.parameters["metric"] = f"p.metrics[{self.which}]"
            held = {need: list(self._given(need, (), "", False)) for need in self.metric.needs}
            of_pair = ", ".join(f"{need!r}: torch.tensor([{ids}])" for need, ids in held.items())
            return [f"value = metric({self.live}.float(), {{{of_pair}}})[0]  # of {self.metric.site}, [row, ...]"]
        metric, positions, length = self.metric, scored_at(self.metric, self.side) or (), self.side.length
        several, last = len(positions) > 1, positions == (length - 1,)
        if metric.function in READINGS:
            at = along(positions, not several, length)
            name = "last" if last else "read"
            read = Read(name, several, {need: self._given(need, positions, "0", not several) for need in metric.needs})
            return [
                f"{name} = logits[{-1 if last else at}].float()  # [{'position, ' if several else ''}vocab]",
                f"value = {READINGS[metric.function](read)}{self._named(metric)}",
            ]
        self.common.parameters["metric"] = f"p.metrics[{self.which}]"
        at, given = along(positions, False, length), []
        for need in metric.needs:
            what = self._given(need, positions, ":", False)
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

    def _given(self, need: str, positions: tuple[int, ...], rows: str, scalar: bool) -> tuple[int, ...] | str:
        """What a metric needs of the pair: ids, or another run's log-probabilities as code."""
        if need in PRISTINE:
            there = self.common.side(need)
            at = along(scored_at(self.metric, there) or (), scalar, there.length)
            return f"{self.common.kept(need, 'logits', 0)}[{rows}, {at}].float().log_softmax(-1)"
        if need == "tokens":
            return self.encoded.world(self.common.root(self.row.base))[self.pair]
        if need == "continuation":
            ids, appended = self.encoded.clean[self.pair], self.encoded.appended[self.pair]
            answer = (*ids[len(ids) - appended :], *self.encoded.answer[self.pair])
            return (-1,) * (len(positions) - len(answer)) + answer
        if need == "next":  # after the last token the answer
            return tuple(self.encoded.following(self.pair, self.side.world, p) or 0 for p in positions)
        found: tuple[int, ...] = getattr(self.encoded, need)[self.pair]
        return found


def _sources(edits: Iterable[Edit]) -> set[WorldName]:
    """The worlds whose values edits take."""
    return {v.world for e in edits for _, v in _values(e)}


def _sites(edit: Edit) -> list[Site]:
    return [edit.site, *(value.site for _, value in _values(edit))]


def _values(edit: Edit) -> tuple[tuple[float, Value], ...]:
    total = summed(edit.source)
    return () if total is None else total.values


def _noise(edit: Edit) -> tuple[tuple[float, Noise], ...]:
    total = summed(edit.source)
    return () if total is None else total.noise
