"""Plants faults one at a time, in a copy of the package, and shows which test kills each.

Run it with ``python tests/mutants.py``. A fault that survives every test is an error: the tests would not notice it.
``--minutes 20`` plants as many as fit, each day in another order. Words after that choose faults by their description.
The faults are those that make plausible pictures of wrong numbers.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds; the slowest fault is found in a fifth of them


@dataclass(frozen=True)
class Mutant:
    """A fault: in a module, some text becomes another; the test modules that are asked to notice."""

    fault: str
    module: str
    text: str
    becomes: str
    tests: tuple[str, ...] = ("test_planner.py", "test_laws.py", "test_oracle.py")


ENCODER = ("test_encoder_decoder.py",)
READERS = ("test_readers.py",)
WORLDS = ("test_worlds.py",)
FORMS = ("test_forms.py",)
LOOKS = ("test_activations.py",)
REMOTE = ("test_remote.py",)
GRADIENTS = ("test_attribution.py",)
ATTENDING = ("test_attending.py",)
SAVED = ("test_gradients.py",)
ROWWISE = ("test_rowwise.py",)
INTERVALS = ("test_intervals.py",)
PICTURES = ("test_pictures.py",)
DIVIDED = ("test_journal.py::test_what_was_divided_is_divided_again",)
AUDIT = ("test_audit.py",)
EDGES = ("test_edges.py",)
ALIGNED = ("test_alignment.py",)
TEMPLATES = ("test_templates.py",)
UNEVEN = ("test_uneven_estimates.py",)
REFERENCES = ("test_references.py",)
BY_SPAN = ("test_references_by_span.py",)
PORTIONS = ("test_portions.py",)
MEASURES = ("test_measures.py",)
SWEEPS = ("test_sweeps.py",)
ESTIMATED = ("test_estimated_sources.py",)
MUTANTS = (
    Mutant("rows are shifted by one", "layout", "            return number, position\n", "            return max(number - 1, 0), position\n"),
    Mutant("values belong to the row before", "executors", "zip(jobs, values, strict=True):\n            self.values", "zip(jobs, np.roll(values, 1, 0), strict=True):\n            self.values"),
    Mutant("one position is pruned too many", "lowering", "position < self.profile.first", "position <= self.profile.first"),
    Mutant("the first differing position is forgotten", "profiles", "return min(self.differing, default=self.alignment.clean.length)", "return max(self.differing, default=self.alignment.clean.length)"),
    Mutant("the stream entering the last layer is pruned", "reach", 'CARRIED = frozenset({"embed", "resid_pre", ', 'CARRIED = frozenset({"embed", '),
    Mutant("keys and values of the last layer are pruned", "reach", '"attn_in_scale", "k", "v"})', '"attn_in_scale"})'),
    Mutant("keys and queries are exchanged", "attention", 'found |= {name: (operation, "input", first + i) for i, name in enumerate("qkv")}', 'found |= {name: (operation, "input", first + i) for i, name in enumerate("kqv")}'),
    Mutant("a tensor is lost beside a value that has none", "layout", "                write.constant is None,\n", "", ("test_hunted.py",)),
    Mutant("later edits of single heads do not override", "writing", "            live[again] = live[again] + changed[cells]", "            pass", ("test_hunted.py",)),
    Mutant("what is read is pruned too", "reach", "return range(max(read.positions) + 1) if", "return range(max(read.positions)) if"),
    Mutant("an edit that an earlier one has reached counts as inert", "lowering", " if positions[i] >= live or positions", " if positions"),
    Mutant("rows with equal edits on other pairs are one row", "planner", "        seen: dict[Any, int] = {}\n        jobs[pair] = []", "        jobs[pair] = []\n        seen = locals().get('seen') or {}"),
    Mutant("a patch does nothing", "writing", "            x[at] = value", "            x[at] = x[at]"),
    Mutant("adding sets", "writing", "            x.index_put_(at, value.expand(x[at].shape), accumulate=True)", "            x[at] = value"),
    Mutant("setting adds", "writing", "            x[at] = value", "            x[at] = x[at] + value"),
    Mutant("a written value is not given back to the model", "trace", "        envoy.output = x if key is None else replaced(whole, key, x)", "        pass"),
    Mutant("clean and zero are exchanged", "writing", "value = table[on(table.device, cells)].to(like.device)", "value = table[on(table.device, cells)].to(like.device) * 0"),
    Mutant("factors are dropped", "writing", "value = value if factor == 1 else value * factor", "value = value"),
    Mutant("a head's bias counts for every head", "writing", "    found: torch.Tensor = project(flat) - project(torch.zeros_like(flat[..., :1, :] if flat.ndim > 2 else flat[:1]))", "    found: torch.Tensor = project(flat)"),
    Mutant("the post-norm after a head is ignored", "writing", "    return found if weight is None else found * weight", "    return found"),
    Mutant("the stream between attention and MLP leaves attention out", "writing", "        middle = entering + (x if scale == 1 else x * scale)", "        middle = entering + 0 * x"),
    Mutant("worlds are exchanged", "traced", "found = {run: i for i, run in enumerate(self.order(group))}", "found = {run: i ^ 1 for i, run in enumerate(self.order(group))}"),
    Mutant("pairs are exchanged", "layout", "found[0].append(seats.world_of[job.pair, term.world])", "found[0].append(seats.world_of[members[0][2].pair, term.world])"),
    Mutant("heads are exchanged", "layout", "cells[2].append(write.units[j])", "cells[2].append(write.units[-1 - j])"),
    Mutant("attention counts before its post-norm", "probe", "        self.candidates = list({id(c): c for c in pool}.values())", "        self.candidates = pool[:1]", ("test_architecture.py",)),
    Mutant("a sum that does not close is accepted", "probe", "        if gap <= resolution(start.dtype) * end.abs().max():", "        if True:", ("test_architecture.py",)),
    Mutant("causality is taken on trust", "experiments", "    causal = all(", "    causal = True or all(", ("test_architecture.py",)),
    Mutant("a twin's grouped heads are taken on trust", "twins", "any(pair in wanted for pair in self._dims_in(found))", "True", ("test_twins.py",)),
    Mutant("a twin's keys are as wide as its own", "twins", "sized(k, kv_heads, per_key)", "sized(k, kv_heads, k.shape[-1])", ("test_twins.py",)),
    Mutant("the effect is counted from the other run", "results", "base = np.stack([measured.baselines[row.base] for row in rows])", "base = np.stack([measured.baselines['clean'] for row in rows])", ("test_results.py", "test_laws.py")),
    Mutant("a mean of ratios", "combining", 'mean = mean.assign({name: (mean[of] / gap).transpose(*mean[of].dims)})', 'mean = mean.assign({name: effects[name].mean("pair").transpose(*mean[of].dims)})', ("test_results.py",)),
    Mutant("what was not measured is 0", "results", "out = np.full((plan.pairs, *shape), empty, values.dtype)", "out = np.zeros((plan.pairs, *shape), values.dtype)", ("test_results.py", "test_recording.py")),
    Mutant("a pair too close to divide by is divided by", "results", "normalized = main / gap.where(usable)", "normalized = main / gap", ("test_results.py",)),
    Mutant("wrong and right answers are exchanged", "metrics", "return torch.stack([right - wrong, right, wrong], 1)", "return torch.stack([wrong - right, right, wrong], 1)", ("test_metrics.py",)),
    Mutant("the metric reads one position too early", "metrics", "LAST = Select((-1,), scalar=True)", "LAST = Select((-2,), scalar=True)", ("test_metrics.py", "test_oracle.py")),
    Mutant("padding counts as an answer", "metrics", "    return picked * (ids >= 0)[:, None]", "    return picked", ("test_metrics.py",)),
    Mutant("the BOS token stands there twice", "tokens", "return ids if policy.prefix and ids[: len(policy.prefix)] == policy.prefix else policy.prefix + ids", "return policy.prefix + ids", ("test_prompts.py",)),
    Mutant("a script counts the bias for every head", "spelling", " - project(torch.zeros_like(alone).flatten(-2))", "", ("test_scripts.py",)),
    Mutant("a script forgets multipliers when it writes", "spelling", "    value += _over(scale or place.scale)\n", "", ("test_scripts.py",)),
    Mutant("a script sets where a row adds", "forwards", "{'+=' if edit.add and not together else '='}", "=", ("test_scripts.py",)),
    Mutant("a script visits places in the order of the edits", "forwards", "sorted(visits, key=lambda visit: visit[0])", "visits", ("test_scripts.py",)),
    Mutant("heads and positions of a source fall together in a script", "forwards", "not target.unit.scalar and several", "False", ("test_scripts.py",)),
    Mutant("a script writes masked keys", "spelling", "torch.where({allowed}, {name}, {found})", "{name}", ("test_scripts.py",)),
    Mutant("a script's norm keeps the mean", "spelling", "x = x - x.mean(-1, keepdim=True)", "pass", ("test_scripts.py",)),
    Mutant("a script reads all heads' streams in one row", "forwards", "None if same[i] else unit", "None", ("test_scripts.py",)),
    Mutant("the world below an edited one is forgotten", "rows", "*standing(here.of, edited), ", "", WORLDS),
    Mutant("the encoder of a row reads the clean prompt", "traced", "[self.encoded.encoded(self.root(row), row.pair) for row in rows]", "[self.encoded.encoded('clean', row.pair) for row in rows]", ENCODER),
    Mutant("worlds are kept in the order of their runs", "program", "    if order is not None:\n        gained", "    if False:\n        gained", ENCODER),
    Mutant("decoders with the same tokens count as the same", "profiles", "        if self.encoded:\n            return 0", "        if self.encoded:\n            return self.alignment.clean.length", ENCODER),
    Mutant("attention to an encoder is taken for attention", "probe", 'return "cross" if seen.keys.shape[-2] == ENCODED else "attn"', 'return "attn"', ENCODER),
    Mutant("norms on the stream are not looked for", "probe", "and _same(norm.entering, current):", "and False:", ENCODER),
    Mutant("the first layer is taken to see no encoder", "experiments", "streams(module, stack, first, other)", "streams(module, stack, first, encoder)", ENCODER),
    Mutant("what an encoder reads has no end", "tokens", "        ids += policy.suffix\n", "        pass\n", ENCODER),
    Mutant("a decoder starts without its start token", "tokens", "return ids if ids[:1] == (start,) else (start, *ids)", "return ids or (start,)", ENCODER),
    Mutant("both roles keep the old answers", "prompts", "            answer=(*self.answer, *self.wrong),\n            wrong=(*self.wrong, *self.answer),", "            answer=(*self.answer, *self.answer),\n            wrong=(*self.wrong, *self.wrong),", ("test_prompts.py",)),
    Mutant("a patch is a zero ablation", "cells", "getattr(given, kind.name)[site] if", "getattr(given, kind.name)[site] * 0 if", ("test_faults.py",)),
    Mutant("a zero ablation is a patch", "cells", "    if source is None:\n        return getattr(recorder, OTHER[base])\n    return recorder", "    return getattr(recorder, OTHER[base])\n    return recorder", ("test_faults.py",)),
    Mutant("a head is a slice after the output projection", "architecture", 'branch.out if name.endswith("_out") else branch.inner', 'branch.out if name.endswith("_out") or name == "z" else branch.inner', ("test_faults.py",)),
    Mutant("layers are read by one digit", "norms", "model = model[int(part)] if part.isdigit()", "model = model[int(part[0])] if part.isdigit()", ("test_faults.py",)),
    Mutant("what is held is left out", "lowering", "if positions[i] >= live or positions[i] not in inert]", "if positions[i] not in inert]", ("test_faults.py",)),
    Mutant("a mean over answers is divided by the padded number", "metrics", "/ (ids >= 0).sum(-1)[:, None]).mean(1)", "/ ids.shape[-1]).mean(1)", ("test_faults.py",)),
    Mutant("only the first row of a batch is written", "writing", "        at = on(x.device, cells)\n        value", "        at = on(x.device, (cells[0] * 0, *cells[1:]))\n        value", ("test_faults.py",)),
    Mutant("attention's module counts, with the residual that it adds", "probe", 'out = replace(self.chosen.place("output", rows), scale=self.scale)', 'out = replace(self.module.place("output", rows), scale=self.scale)', ("test_faults.py",)),
    Mutant("keys and values are swept over all heads", "architecture", 'heads = (attention.heads if unit == "head" else attention.kv_heads) if attention else 0', "heads = attention.heads if attention else 0", ("test_faults.py",)),
    Mutant("an edit of resid_mid misses the skip branch", "writing", "return torch.where(after == middle, x, needed / scale)", "return torch.where(after == middle, x, (x + needed / scale) / 2)", ("test_faults.py",)),
    Mutant("a row alone is compared with itself", "checks", "gap, proved = abs(value - known)", "gap, proved = abs(value - value)", ("test_checks.py",)),
    Mutant("drifting witnesses are overlooked", "checks", "if found > limit and", "if False and", ("test_checks.py",)),
    Mutant("a lost edit is overlooked", "firing", "        if written != count:", "        if False:", ("test_checks.py",)),
    Mutant("patches that change nothing are overlooked", "checks", "        if not count or count < total or", "        if True or", ("test_checks.py",)),
    Mutant("a module that runs twice is overlooked", "firing", "if count > 1]", "if count > 9]", ("test_checks.py",)),
    Mutant("masked keys are written", "writing", 'torch.where(kept["aside", allowed], edited(after, (write,), known), after)', "edited(after, (write,), known)", READERS),
    Mutant("a renormalized pattern keeps its new sum", "writing", "after * (wanted / found)", "after", READERS),
    Mutant("a reader's edit is not normed", "writing", "normed(model, norm, after[rows, slots][None])[0]", "after[rows, slots]", READERS),
    Mutant("a head's query is taken from the row itself", "writing", "x[rows, units, slots] = x[sources, units, slots]", "x[rows, units, slots] = x[rows, units, slots]", READERS),
    Mutant("destinations and heads are exchanged", "layout", "return ((i, j, k) for j, i, k in order)", "return ((i, j, k) for j, i, k in sorted(order, key=lambda c: c[1]))", ("test_readers.py", "test_oracle.py")),
    Mutant("standing edits are forgotten in rows", "lowering", "edits = [(edit, True) for edit in self.standing[row.base]] + edits", "pass", WORLDS),
    Mutant("an edited world agrees with its root", "lowering", "if position >= min(ends):", "if False:", WORLDS),
    Mutant("a row's pruned edit takes the standing one with it", "jobs", "if before.standing is not write.standing:", "if False:", WORLDS),
    Mutant("every pair has the same noise", "lowering", 'f"pair {self.profile.pair}, {site}"', 'f"{site}"', WORLDS),
    Mutant("shadow rows divide by their own norm", "writing", "for seat, owner in zip(seats, owners):", "for seat, owner in ():", ("test_freezes.py",)),
    Mutant("a scale forgets the mean", "writing", "entering - entering.mean(-1, keepdim=True) if centred else entering", "entering", ("test_freezes.py",)),
    Mutant("what a function carries is pruned", "reach", "    if carried:\n", "    if False:\n", ("test_functions.py",)),
    Mutant("what a function takes is dropped as overwritten", "jobs", "if not (write.add or _depends(write)):", "if not write.add:", ("test_functions.py",)),
    Mutant("what is saved is another row's", "layout", "whole_prompts(read, [number for number, _ in whose])", "whole_prompts(read, [whose[0][0] for number, _ in whose])", ("test_saves.py",)),
    Mutant("modules of the last layer count as beside the metric", "reach", "unknown = component(write.component).module or", "unknown = False or", ("test_modules.py",)),
    Mutant("a packed token sees the rows beside it", "masks", "sees = owner[:, :, None] == owner[:, None, :]", "sees = owner[:, :, None] <= owner[:, None, :]", FORMS),
    Mutant("a packed token sees its base where the row stands itself", "masks", "(pos[:, None, :] < starts[:, :, None])", "(pos[:, None, :] <= starts[:, :, None])", FORMS),
    Mutant("a row sees the cache where it stands itself", "masks", "cached = torch.arange(prefix) < starts[:, :, None]", "cached = torch.arange(prefix) <= starts[:, :, None]", FORMS),
    Mutant("a window is counted in seats", "masks", "keys = torch.cat([torch.arange(prefix).expand(len(pos), -1), pos], -1)", "keys = torch.arange(prefix + pos.shape[1]).clamp(max=standing[1] - 1).expand(len(pos), -1)", FORMS),
    Mutant("packed tokens have the positions of their seats", "masks", "torch.arange(start, end)", "torch.arange(end - start)", FORMS),
    Mutant("rows are born as the other world", "climb", "        return world_of[job.pair, job.base], position", "        return world_of[job.pair, job.base] ^ 1, position", FORMS),
    Mutant("positions before a row's start are read from it", "climb", "            if position >= job.start:\n                at.append", "            if position >= 0:\n                at.append", FORMS),
    Mutant("functions above the last MLP see tokens without it", "climb", "inside = inside or any(w[4] is not None", "inside = inside or any(False and w[4] is not None", FORMS),
    Mutant("a row takes a lane of the other world", "table", "number[job.pair, job.base])", "number.get((job.pair, 'clean'), number[job.pair, job.base]))", FORMS),
    Mutant("the second world of a pair starts late", "packing", "start = min((*self.encoded.differing(pair), end))", "start = max((*self.encoded.differing(pair), 0))", FORMS),
    Mutant("a source that has not passed by is written in the run that computes it", "packing", "or layer < w.layer for w in", "or True for w in", FORMS),
    Mutant("cached keys are those before an edit of them", "entrance", "    return write.component in CACHED or (", "    return (", FORMS),
    Mutant("standing edits before a staggered row are forgotten", "packing", "min(reads, default=length) if self.form == \"staggered\" else length\n", "length\n", FORMS),
    Mutant("what an MLP wrote before stays under a row born above it", "entrance", "taken = () if one.add else (", "taken = () if True else (", FORMS),
    Mutant("after the first half of a batch the second is left out", "packing", "jobs = tuple(itertools.islice(rest, size))", "jobs = batch.jobs[:size]", FORMS),
    Mutant("columns are given in the order of their ids", "traced", "picked = picked if few is None else torch.searchsorted(few, picked)", "picked = picked if few is None else torch.searchsorted(few, picked).sort().values", FORMS),
    Mutant("keys of a table stand where those of the cache do", "layout", "slot + self.table.prefix * (name in CACHED)", "slot", FORMS),
    Mutant("what has just passed by counts as over", "reach", "[0] > architecture.span", "[0] >= architecture.span", LOOKS),
    Mutant("a function carries to no other head", "reach", "if mixed or not apart else", "if not apart else", LOOKS),
    Mutant("the forward ends a layer too early", "reach", 'else 0 if name == "embed" else layer + 1', 'else 0 if name == "embed" else layer', LOOKS),
    Mutant("a metric reads other rows before a row's start", "climb", "if born and position >= job.start:", "if born:", LOOKS),
    Mutant("a metric reads keys where they would stand without a cache", "climb", "table.prefix + slot if own else slot", "slot", LOOKS),
    Mutant("worlds that memory divided are run whole again", "executors", ", self.journal.at_once(group))", ")", DIVIDED),
    Mutant("a batch that memory divided is run whole again for its worlds", "executors", ", self.journal.runs(riding))", ")", DIVIDED),
    Mutant("what is read does not count for what is kept in a folder", "journal", '{"row", "pair", "pairs", "lanes", "paths"}', '{"row", "pair", "pairs", "lanes", "paths", "site", "seen"}', LOOKS),
    Mutant("partners are exchanged with the positions that they are partners of", "alignment", "return self.aligned[counted.index(position)]", "return counted[counted.index(position)]", ALIGNED),
    Mutant("`:` is everywhere between prompts too", "sites", "return side.aligned if crossing and select.all else", "return", ALIGNED),
    Mutant("the other prompt counts as the row's own", "lowering", "self._cells(value.site, self.root(value.world), crossing)", "self._cells(value.site, root, crossing)", ALIGNED),
    Mutant("a longer prompt agrees with a shorter one whatever the model does", "lowering", "if counted and not self.profile.alignment.even:", "if False:", ALIGNED),
    Mutant("later sources decide whether weights are taken where they are", "lowering", "strict=True) if here <= dest)", "strict=True) if here > dest)", ALIGNED),
    Mutant("a metric reads the row's own positions of the other prompt", "traced", "side(need)", "side(self.root(rows[0]))", ALIGNED),
    Mutant("logits of shorter prompts stand where their positions would be in longer ones", "traced", "[longest] * (most - len(p.reads))", "[0] * (most - len(p.reads))", ALIGNED),
    Mutant("worlds of several lengths are cut to the shortest", "program", "found = values[0].new_zeros(sum(map(len, values)), *shape)", "return torch.cat([value[:, : min(len(v[0]) for v in values)] for value in values])", ALIGNED),
    Mutant("rotated queries are moved", "fitting", "if here and there and (here != there or moved):", "if False:", ALIGNED),
    Mutant("the loss after a position is on its own next token", "tokens", 'there = position if world == "clean" else', "there = position if True else", ALIGNED),
    Mutant("estimates take the other prompt's value of the same number", "differences", "return found[rows, agreeing.clamp(min=0).to(found.device)]", "return found[:, : agreeing.shape[1]]", UNEVEN),
    Mutant("what has no partner is estimated all the same", "profiles", "[-1 if other is None or position == other < same", "[0 if other is None or position == other < same", UNEVEN),
    Mutant("values kept with longer ones keep their length", "sides", "length = group.of(self.tracer.roots.get(world, world)).length if apart else None", "length = None", UNEVEN),
    Mutant("a span takes the token behind it", "spans", "if a < end and b > start]", "if a <= end and b > start]", TEMPLATES),
    Mutant("a span begins with the blank in front of it", "spans", "            while len(at) > 1 and not", "            while False and not", TEMPLATES),
    Mutant("the tokens in front of a prompt do not count for its spans", "spans", "first = len(ids) - len(offsets)", "first = 0", TEMPLATES),
    Mutant("slots stand where they do in the template", "templates", "(len(text), len(text) + len(given[name]))", "(len(text), len(text) + len(name))", TEMPLATES),
    Mutant("a grid of spans is one of positions", "cells", '(dim, SPAN) if dim == kind.place', '(dim,) if dim == kind.place', TEMPLATES),
    Mutant("a wrong year is a right one", "tasks", "[n for n in every if n > year[:width]]", "[n for n in every if n >= year[:width]]", ("test_tasks.py",)),
    Mutant("words of several tokens are answers", "tasks", 'one_token(tokenizer, (f" {word}" for word in given), after="the")', '[f" {word}" for word in given]', ("test_tasks.py",)),
    Mutant("the queries of induction are those of its keys", "tasks", '"A": drawn[a], "B": drawn[b]', '"A": drawn[b], "B": drawn[a]', ("test_tasks.py",)),
    Mutant("a token is replaced by itself", "corruptions", "if token != own[p]])", "if token == own[p]])", ("test_corruptions.py",)),
    Mutant("exchanged words leave the spans where they were", "corruptions", "(moved(start), moved(stop))", "(start, stop)", ("test_corruptions.py",)),
    Mutant("corruptions of one prompt are those of another", "combining", "grid[labels.index(name), prompt] = i", "grid[labels.index(name), prompt - 1] = i", ("test_corruptions.py",)),
    Mutant("opposite signs agree", "combining", ".where(~(up & down), 3)", "", ("test_corruptions.py",)),
    Mutant("a form that was not tried is taken", "forms", "    if wanted in found.refused:", "    if False:", FORMS),
    Mutant("worlds of the group before are still known", "program", "            del known[key]\n", "            pass\n", REMOTE),
    Mutant("equal tensors of other shapes are one", "requests", "        key = kind, tuple(value.shape), content", "        key = kind, content", REMOTE),
    Mutant("numbers do not fit in the bytes that are sent", "requests", "torch.iinfo(t).min <= low and high <= torch.iinfo(t).max", "torch.iinfo(t).min <= low", REMOTE),
    Mutant("an empty result counts as one", "requests", "if isinstance(found.get(\"result\"), dict) and", "if", REMOTE),
    Mutant("a job that nobody knows is waited for", "requests", "        if now - heard > SILENCE:", "        if False:", REMOTE),
    Mutant("what a request did not reach is lost", "remote", "waiting.extendleft(reversed(tasks[max(0, done - len(again)) :]))", "pass", REMOTE),
    Mutant("the wrong part is blamed", "remote", "at = next(i for i, end in enumerate(ends) if number < end)", "at = 0", REMOTE),
    Mutant("a server may run the model in any dtype", "remote", 'if ran["dtype"] != wanted:', "if False:", REMOTE),
    Mutant("leads are digested again and again", "remote", "        if self.read:\n            return True\n", "", REMOTE),
    Mutant("decorators are sent without a word", "shipping", 'elif hasattr(value, "__wrapped__"):', "elif False:", REMOTE),
    Mutant("what functions close over is not looked at", "shipping", "            yield from _reasons(cell.cell_contents, seen)", "            pass", REMOTE),
    Mutant("attention is not switched where the model runs", "remote", "eager_attention(module_of(self._model)) if self._eager else nullcontext()", "nullcontext()", REMOTE),
    Mutant("gradients are taken in the other run", "attribution", "self.base, self.source = self.wanted.base,", "self.base, self.source = OTHER[self.wanted.base],", GRADIENTS),
    Mutant("an estimate is of the base itself", "contractions", "    found = by * change\n", "    found = by * wide(known[value])\n", GRADIENTS),
    Mutant("the stream between attention and MLP forgets its skip branch", "backward", "        return kept[\"aside\", stream] + x * scale, slope / scale", "        return kept[\"aside\", stream] + x * scale, slope * 0.5 / scale", GRADIENTS),
    Mutant("norms are constant on the way back to the stream", "norms", "    if scale is not None:", "    if True:\n        scale = scale if scale is not None else stream.std(-1, keepdim=True)", GRADIENTS),
    Mutant("gradients of a norm's divisor are upside down", "backward", "return scale, -(slope *", "return scale, (slope *", GRADIENTS),
    Mutant("keys are fixed by the query's pattern", "attribution", 'self.sides.where(group, "k_fix")', 'self.sides.where(group, "q_fix" if "q_fix" in {w.name for w in self.edited} else self.base)', GRADIENTS),
    Mutant("the weights beside a key stay as they are", "attention_weights", "    found = after * g + (1 - after) * others - (p * g).sum(-1, keepdim=True)", "    found = (after - p) * g", GRADIENTS),
    Mutant("a dropped layer is not dropped", "backward", "    return torch.zeros_like(slope) if key in zeroed else slope", "    return slope", GRADIENTS),
    Mutant("GradDrop averages over all layers", "attribution", "/ (len(self.architecture) - 1)", "/ len(self.architecture)", GRADIENTS),
    Mutant("the line begins at the other run", "estimators", '{"midpoint": 0.5, "left": 0.0, "right": 1.0}', '{"midpoint": 0.5, "left": 1.0, "right": 0.0}', GRADIENTS),
    Mutant("the half rule is left out", "taps", "        return passing(x, x / 2)", "        return x", GRADIENTS),
    Mutant("the identity rule is the derivative", "taps", "        return passing(x, entering * ratio)", "        return x", GRADIENTS),
    Mutant("what is held is not", "taps", '    if kind == "hold":\n        return x.detach()', '    if kind == "hold":\n        return x', GRADIENTS),
    Mutant("a renormalized weight leaves the others", "attention_weights", "others * (ratio - 1) + ((p + change) * ratio - p) * g", "((p + change) * ratio - p) * g", GRADIENTS),
    Mutant("estimates of units stand one further", "estimates", "at = [label % size if -size <= label < size else -1 for label in cells.axes[dim]]", "at = [(label + 1) % size if -size <= label < size else -1 for label in cells.axes[dim]]", GRADIENTS),
    Mutant("attention attribution has the sign of zeroing", "attending", "{name: -found[name]", "{name: found[name]", ATTENDING),
    Mutant("values flow to all destinations alike", "attention_weights", "    return home(summed(wide(known[pattern]) * moved, dims))", "    return home(summed(moved, dims))", ATTENDING),
    Mutant("direct contributions follow the last norm's scale", "direct", 'held = frozenset({("logits_in_scale", 0)})', "held = frozenset()", ATTENDING),
    Mutant("an output bias counts for a writer of its own twice", "direct", "            column = column - parts", "            column = column - 0 * parts", ATTENDING),
    Mutant("gradients are saved of the other run", "capture", '("gradient", base, number, *key) for base in bases', '("gradient", bases[0], number, *key) for base in bases', SAVED),
    Mutant("directions are not of length 1", "saved_gradients", "unit = found / found.norm(dim=-1, keepdim=True)", "unit = found", SAVED),
    Mutant("a writer above the layer counts", "saved_gradients", "for below in range(layer)", "for below in range(min(layer + 1, len(self.architecture)))", SAVED),
    Mutant("rows of several edits count the last one only", "rowwise", "self.values[part[n].row, part[n].pair, number] += estimate", "self.values[part[n].row, part[n].pair, number] = estimate", ROWWISE),
    Mutant("intervals draw pairs, not clusters", "resampling", "            cluster = [new if label == old else label for label in cluster]", "            pass", INTERVALS),
    Mutant("intervals of a ratio divide by the mean difference", "resampling", "_ends(drawn, weights @ self.gaps[:, cells], tail)", "_ends(drawn, weights @ counts * (self.gaps[:, cells].sum(0) / counts.sum(0)), tail)", INTERVALS),
    Mutant("intervals are too narrow with few pairs", "resampling", "-math.sqrt(count / (count - 1)) * _student((1 + level) / 2, count - 1)", "-NormalDist().inv_cdf((1 + level) / 2)", INTERVALS),
    Mutant("intervals: equal sums are not equal", "resampling", "TIE = 1e-9", "TIE = -1e-9", INTERVALS),
    Mutant("intervals: a p-value of one side", "resampling", "abs(signs @ sums), abs(sums.sum(0))", "signs @ sums, abs(sums.sum(0))", INTERVALS),
    Mutant("intervals: random patterns without the observed one", "resampling", "(as_far + 1) / (len(signs) + 1)", "as_far / len(signs)", INTERVALS),
    Mutant("intervals: Holm's values fall", "resampling", "np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])", "(len(p) - np.arange(len(p))) * p[order]", INTERVALS),
    Mutant("intervals: proved zeros are tests", "resampling", 'mean["status"].isin([Status.MEASURED, Status.ESTIMATED]) if "status" in mean else mean[main].notnull()', "mean[main].notnull()", INTERVALS),
    Mutant("intervals: pairs without a number count", "resampling", "there = _there(effects)\n", "there = _there(effects) | True\n", INTERVALS),
    Mutant("intervals: all draws at once", "resampling", "BLOCK = 1 << 21", "BLOCK = 1 << 40", INTERVALS),
    Mutant("pictures: sites are matched by their place", "points", 'xr.align(*matched, join="inner")', 'x.data, y.data.assign_coords(x.data.coords), x.measured, y.measured.assign_coords(x.data.coords)', PICTURES),
    Mutant("pictures: proved zeros make a correlation", "scatters", "frame = pd.DataFrame(points.both[points.measured])", "frame = pd.DataFrame(points.both)", PICTURES),
    Mutant("pictures: points have the names of others", "points", "np.unravel_index(self.kept[i], shape)", "np.unravel_index(self.kept[i - 1], shape)", PICTURES),
    Mutant("pictures: what is lost counts as gained", "verdict_pictures", '(-lost["normalized"])', '(lost["normalized"] * 1)', PICTURES),
    Mutant("pictures: arcs from the attending token", "attention_pictures", "ends, share = np.stack([srcs[src], dests[dest]], 1)", "ends, share = np.stack([srcs[dest], dests[src]], 1)", PICTURES),
    Mutant("pictures: heads have the matrices of others", "attention_pictures", 'for i, dim in enumerate(("layer", "head"))}', 'for i, dim in enumerate(("head", "layer"))}', PICTURES),
    Mutant("pictures: windows stand at their end", "curves", "middle, colour = (start + stop) / 2", "middle, colour = stop", PICTURES),
    Mutant("pictures: all models are as deep as the deepest", "curves", 'part["depth"].isel(model=number, missing_dims="ignore").values', 'part["layer"].values / part["layer"].values.max()', PICTURES),
    Mutant("pictures: the largest number loses its sign", "curves", "found = stacked.isel(_all=strongest)", "found = abs(stacked).isel(_all=strongest)", PICTURES),
    Mutant("pictures: an interaction leaves one site out", "heatmaps", "apart = (joint - alone - alone.rename({down: across}))", "apart = joint - alone", PICTURES),
    Mutant("pictures: rings where the interval excludes 0", "panels", "(self.ends[0] <= 0) & (self.ends[1] >= 0)", "((self.ends[0] > 0) | (self.ends[1] < 0))", PICTURES),
    Mutant("the bound is one at another confidence", "sampling", "if likely(strata, middle, found) > 1 - confidence:", "if likely(strata, middle, found) > confidence:", AUDIT),
    Mutant("strata are drawn from as the densest of them is", "sampling", "chance = min(s.drawn / s.cells", "chance = max(s.drawn / s.cells", AUDIT),
    Mutant("a sample is drawn with return", "sampling", "random.choice(band, size, replace=False)", "random.choice(band, size)", AUDIT),
    Mutant("drawn cells that are large do not count against the bound", "findings", "large = int((sampled & patched & (sizes >= least)).sum())", "large = 0", AUDIT),
    Mutant("ranks of cells that stand for others end where they begin", "agreement", "(np.cumsum(of_value) - of_value / 2)[which]", "np.cumsum(of_value)[which]", AUDIT),
    Mutant("correlations forget for how many cells one stands", "agreement", "w = np.ones(len(x)) if weights is None else weights", "w = np.ones(len(x))", AUDIT),
    Mutant("signs that agree count as flips", "agreement", "(view.estimate * view.effect < 0)", "(view.estimate * view.effect > 0)", AUDIT),
    Mutant("recall goes by the order of the effects", "agreement", "place[order] = np.arange(1, len(order) + 1)", "place[ordered(view.effect)] = np.arange(1, len(ordered(view.effect)) + 1)", AUDIT),
    Mutant("an estimate is missed where it is above its effect", "agreement", "(estimate < MISSED * effect)", "(estimate > effect)", AUDIT),
    Mutant("exact effects stand at other cells", "population", "return rows, [among[label] for label in order]", "return rows, list(numbers)", AUDIT),
    Mutant("heads are proved by the position beside theirs", "population", "whole = np.array([known[tuple(label[i] for i in inside)] for label in labels], np.intp)", "whole = np.array([known[tuple(label[i] for i in inside)] for label in labels], np.intp) - 1", AUDIT),
    Mutant("the search compares with the largest effect", "verifying", "[: self.k].min(initial=np.inf)", "[: self.k].max(initial=-np.inf)", AUDIT),
    Mutant("the search ends at its first look", "verifying", "if count == len(rest) or self.bound <= self.allowed:", "if True:", AUDIT),
    Mutant("patches are measured against the other run", "sides", 'self.where(group, world), tuple(keys)', 'self.where(group, self.worlds[0]), tuple(keys)', AUDIT),
    Mutant("a key is seen by the destinations before it", "doubts", "np.flip(np.cumsum(np.flip(a, -1), -1), -1)", "np.cumsum(a, -1)", AUDIT),
    Mutant("a drill looks inside everything", "drilling", "one for one in labels if one[:width] in inside", "one for one in labels if True", AUDIT),
    Mutant("a drill splits what is small", "drilling", "(sizes >= limit)", "(sizes < limit)", AUDIT),
    Mutant("an edge leads to what was read before", "graph", "return writer.moment < reader.moment", "return writer.moment <= reader.moment", EDGES),
    Mutant("an MLP beside attention reads what its heads write", "probe", "_same(branch.reads, current), len(forms)", "_same(branch.reads, current), i", EDGES),
    Mutant("a column of several heads counts as one head's", "heads", "            if not bool((everything | nothing).all()):", "            if False:", EDGES),
    Mutant("heads are told apart by one bit of their numbers", "heads", "head += (everything & ~nothing).long() << bit", "head += (everything & ~nothing).long() << 0", EDGES),
    Mutant("columns of heads stand side by side", "heads", "(step * down, down, along)", "(at.shape[1] * down, down, along)", EDGES),
    Mutant("through one head goes the gradient of all", "heads", "    only[:, head] = slope[:, head]", "    only[:] = slope", EDGES),
    Mutant("heads write through the other run's post-norm", "contractions", "        elif heads[2]:  # each run", "        elif False:  # each run", EDGES),
    Mutant("writers count as the same where the worlds agree", "contractions", "apart(change, agreeing, 2)", "apart(change, agreeing, 1)", EDGES),
    Mutant("an edge carries all that is written", "contractions", "change = (other - mine).unsqueeze(1)", "change = other.unsqueeze(1)", EDGES),
    Mutant("steps of an integral are summed", "backward", "slope = slope.reshape(-1, count_of, *slope.shape[1:]).sum(1) * weight", "slope = slope.reshape(-1, count_of, *slope.shape[1:]).sum(1)", EDGES),
    Mutant("heads move along the line of the embeddings", "edge_attribution", 'line = ("attn_out", key[1]) if key[0] == "head_out" else key', 'line = ("resid_pre", 0)', EDGES),
    Mutant("an exact edge replaces what is read", "edge_attribution", "[read] += others - mine", "[read] = others", EDGES),
    Mutant("a file's own metric is not read", "catalogue", 'getattr(module, "METRIC", logit_diff)', "logit_diff", ("test_recipes_interventions.py",)),
    Mutant("pairs lose their spans with their corrupted prompts", "prompts", "corrupted=None, align=None, spans=self.spans[:1]", "corrupted=None, align=None, spans=()", ("test_recipes_interventions.py",)),
    Mutant("a model that guesses does the task", "checklist", "if right < chance + error:", "if right < chance:", ("test_recipes_run.py",)),
    Mutant("where there is no edge there is 0", "edge_attribution", "here = np.where(joined, here, np.nan)", "here = np.where(joined, here, 0.0)", EDGES),
    Mutant("a short prompt counts where it has no position", "tallies", "count.clamp(min=1).reshape", "count.max().expand_as(count).reshape", REFERENCES),
    Mutant("prompts line up at their end as at their start", "references", "(self.longest - length) * (along == \"end\") for p in range(length)", "0 for p in range(length)", REFERENCES),
    Mutant("every pair takes the prompt of the first", "traced", "(pair, world.name): world.row_of[pair] for pair", "(pair, world.name): world.row_of[0] for pair", REFERENCES),
    Mutant("a mean over positions counts one of them", "references", "[0] * len(here) if self.over", "[0] * len(here) if False", REFERENCES),
    Mutant("spans line up by their first tokens", "references", "first = self.room(along) - len(here) if along.span else 0", "first = 0", BY_SPAN),
    Mutant("a span called end is the end of a prompt", "references", "ways = (repr(self.along), ", "ways = (str(self.along), ", BY_SPAN),
    Mutant("tokens that a drawn prompt lacks are zeros", "references", "            if not wanted <= held:", "            if False:", BY_SPAN),
    Mutant("noise forgets its unit", "writing", "            value = factor.to(like.device) * table.to(like.device)", "            value = factor.to(like.device)", REFERENCES),
    Mutant("every draw is the first", "sources", 'seed = f"{self.seed}" if self.number == 0 else', 'seed = f"{self.seed}" if True else', REFERENCES),
    Mutant("drawn worlds stand on their first draw", "draws", "            of = self.world(here.of, draw)", "            of = here.of", REFERENCES),
    Mutant("worlds run beside those that they take values of", "plan", "if len(found) == 1 or taken & {job.base for job in found[-1]}:", "if len(found) == 1:", REFERENCES),
    Mutant("a directory does not look at references", "journal", "told = world.name, world.ids, world.encoder,", "told = world.name, world.encoder,", REFERENCES),
    Mutant("prefix matching looks at the same token", "measures", "return torch.nn.functional.pad(_same(tokens), (1, 0))[..., :-1]", "return _same(tokens)", MEASURES),
    Mutant("tokens without a target count as looked for", "measures", "/ has_one.sum(-1).clamp(min=1)", "/ has_one.shape[-1]", MEASURES),
    Mutant("what stands before a short answer is read too", "measures", "return (found * (ids >= 0)).sum(1)", "return found.sum(1)", MEASURES),
    Mutant("a continuation begins a token late", "metrics", "bounds=(-1 - max(encoded.appended), None, None)", "bounds=(-max(1, *encoded.appended), None, None)", MEASURES),
    Mutant("weights of a basket are exchanged", "measures", "float(weight) for weight in weights.values()", "float(weight) for weight in reversed(weights.values())", MEASURES),
    Mutant("direct contributions forget the norm's scale", "norms", "    scaled: torch.Tensor = found / scale", "    scaled: torch.Tensor = found", MEASURES),
    Mutant("direct contributions are not centred", "norms", "    found = found - found.mean(-1, keepdim=True) if centred else found\n", "", MEASURES),
    Mutant("direct contributions forget a multiplier of the logits", "norms", "shares.to(weight) @ weight * factor", "shares.to(weight) @ weight", MEASURES),
    Mutant("every pair is given the directions of the first", "traced", "self.root(row)) * count + row.pair for row in rows]", "self.root(row)) * count for row in rows]", MEASURES),
    Mutant("metrics of the other prompt's tokens", "traced", "return torch.tensor([self.encoded.world(self.root(row))[row.pair] for row in rows])", "return torch.tensor([self.encoded.world('clean')[row.pair] for row in rows])", MEASURES),
    Mutant("a ratio of means is given where there is nothing to divide by", "combining", "return mean.where(~nothing)", "return mean", ("test_results.py",)),
    Mutant("a portion replaces all", "writing", "            value = replaced(portion, x[at], value)", "            pass", PORTIONS),
    Mutant("a portion of what a head writes replaces all", "writing", "            value = replaced(portion, live, value)", "            pass", PORTIONS),
    Mutant("what a dictionary leaves out is lost", "replacing", "        return live + moved\n", "        return decode(after).to(live.dtype)\n", PORTIONS),
    Mutant("all features are taken", "replacing", "after[:, chosen] = encode(other)[:, chosen] if", "after[:, :] = encode(other) if", PORTIONS),
    Mutant("a later portion overrides what is there", "jobs", "or write.renormalize or write.portion is not None", "or write.renormalize", PORTIONS),
    Mutant("a portion of what an MLP adds is folded into the stream", "entrance", "or one.function or one.portion or", "or one.function or", PORTIONS),
    Mutant("rows with other portions are one write", "layout", "                write.portion,\n", "", PORTIONS),
    Mutant("a plan sends dictionaries unseen", "shipping", "yield from ((name, code) for code in", "yield from ((name, code) for code in () and", PORTIONS),
    Mutant("a reference ends a layer too low", "surveys", "until = max(1, *(layers_of(architecture, t.component, t.layer) for t in tallies))", "until = max(1, *(layers_of(architecture, t.component, t.layer) - 1 for t in tallies))", REFERENCES),
    Mutant("sweeps: windows begin at their layer", "joint", "range(middle - width // 2, middle - width // 2 + width)", "range(middle, middle + width)", SWEEPS),
    Mutant("sweeps: an interaction is the joint effect", "joint", 'interaction = (found["effect"] - singles)', 'interaction = (found["effect"] - 0 * singles)', SWEEPS),
    Mutant("sweeps: what is kept goes", "joint", "for key, place in every.items() if key not in left", "for key, place in every.items() if key in left or not left", SWEEPS),
    Mutant("sweeps: verdicts take one direction for the other", "verdicts", "(needed * 1 + enough * 2)", "(needed * 2 + enough * 1)", SWEEPS),
    Mutant("sweeps: knock-outs do not stay out", "knocking", 'write(p, "noising", source, *gone, *own)', 'write(p, "noising", source, *own)', SWEEPS),
    Mutant("sweeps: compensation is all that is lost", "knocking", '"compensation": total - own', '"compensation": total - 0 * own', SWEEPS),
    Mutant("distances are of the identity", "distances", "(1 - shrunk) * variances)", "0 * variances)", ("test_distances.py",)),
    Mutant("lines begin at nothing", "rowwise", "for key in _partly(w, 0.0, job.base).needed}", "for key in w.needed}", ESTIMATED),
)  # fmt: skip


def killer(mutant: Mutant) -> str | None:
    """The first test that fails with the fault planted; ``None`` if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("tracepatch", "recipes", "tests", "docs", "README.md", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif source.exists():
                shutil.copy(source, copy / name)
        path = copy / "tracepatch" / f"{mutant.module}.py"
        code = path.read_text(encoding="utf-8")
        if code.count(mutant.text) != 1:
            raise SystemExit(f"{mutant.fault}: {code.count(mutant.text)} places in {path.name} hold\n  {mutant.text}")
        path.write_text(code.replace(mutant.text, mutant.becomes), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "--no-header", "-p", "no:cacheprovider"]
        env = {**os.environ, "PYTHONPATH": str(copy)}
        try:
            done = subprocess.run(
                [*command, *(f"tests/{t}" for t in mutant.tests)],
                cwd=copy,
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:  # a fault that makes a test wait for ever is noticed too
            return f"a test that did not end in {PATIENCE} s"
        if done.returncode == 0:
            return None
        if done.returncode != 1:  # pytest's own trouble, such as no tests at all, notices nothing
            raise SystemExit(f"{mutant.fault}: {done.stdout[-500:]}{done.stderr[-500:]}")
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        return found[1] if found else done.stdout[-500:] + done.stderr[-500:]


def main() -> int:
    """Plants every fault, or those whose description holds the first word; as many as the minutes have room for."""
    words = sys.argv[1:]
    ends = float("inf")
    if "--minutes" in words:
        at = words.index("--minutes")
        ends = time.monotonic() + 60 * float(words[at + 1])
        del words[at : at + 2]
    chosen = [m for m in MUTANTS if not words or words[0] in m.fault]
    if ends < float("inf"):
        random.Random(str(date.today())).shuffle(chosen)
    survivors = left = 0

    def planted(mutant: Mutant) -> str | None:
        return killer(mutant) if time.monotonic() < ends else ""

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:  # each test run is a process of its own
        for mutant, test in zip(chosen, pool.map(planted, chosen), strict=True):
            survivors += test is None
            left += test == ""
            told = "SURVIVED" if test is None else "killed  "
            if test != "":
                print(f"{told}  {mutant.fault}\n              {test or 'by nothing'}", flush=True)
    tried = len(chosen) - left
    print(f"{tried - survivors} of {tried} faults are noticed" + (f"; no time for {left} more" if left else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
