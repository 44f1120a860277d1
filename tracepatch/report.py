"""One self-contained HTML page for an experiment: prompts, checks, plans, pictures, caveats and provenance.

The page has no scripts and loads nothing: its pictures are in it, and its policy lets a browser fetch nothing else.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from tracepatch import plots
from tracepatch.caveats import SOURCES, SURE, caveats_of
from tracepatch.checklist import Checklist
from tracepatch.combining import by_metric, datasets_of, labels_at, main_variable, over_pairs
from tracepatch.errors import ResultError, plural
from tracepatch.marks import site_words, tokens_of
from tracepatch.resampling import cluster_count, intervals
from tracepatch.results import Result

BOTH = "clean and corrupted", "corrupted and clean"  # what is edited, and what is written, in both directions
WRITTEN = ("clean_prompt", "answer", "corrupted_prompt", "wrong", "decoder_prompt")
FIRST, LARGEST = 8, 8  # prompts that are shown at once; sites in a table
PNG = "data:image/png;base64,"
NOTE = 0.02  # normalized effects below it are not worth a line


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Result | Sequence[Result]],
    *,
    title: str = "",
    about: str = "",
    texts: Mapping[str, str] | None = None,
    checklists: Mapping[str, Checklist] | None = None,
    left_out: Mapping[str, Sequence[str]] | None = None,
    conclusions: Mapping[str, tuple[str, Sequence[Path]]] | None = None,
    command: str = "",
) -> Path:
    """Writes the report of an experiment: one HTML file that needs no other, to read, print or send.

    Args:
        path: The file.
        results: Part of the experiment → its result, or its results on several models.
        title: Of the page; by default the names of the models.
        about: What the experiment is; paragraphs are parted by empty lines.
        texts: Part → what it does.
        checklists: Model → ``pairs.check(model)``.
        left_out: Part → lines on what was not run.
        conclusions: Model → what follows from its results: a text with its own lines, and pictures as PNG files.
        command: What made it, for the provenance.

    Returns:
        The path.

    Raises:
        ResultError: There are no results, or something else among them.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    datasets = _datasets(results)
    last = [_conclusion(model, *told) for model, told in (conclusions or {}).items()]
    page = _page(datasets, title, about, texts or {}, checklists or {}, left_out or {}, last, command)
    target.write_text(page, encoding="utf-8")
    return target


def _page(
    results: dict[str, list[xr.Dataset]],
    title: str,
    about: str,
    texts: Mapping[str, str],
    checklists: Mapping[str, Checklist],
    left_out: Mapping[str, Sequence[str]],
    conclusions: list[dict[str, Any]],
    command: str,
) -> str:
    every = [result for several in results.values() for result in several]
    models = list(dict.fromkeys(str(result.attrs["model"]) for result in every))
    names = dict.fromkeys([*results, *left_out])
    parts = [_part(name, results.get(name, []), texts.get(name, ""), left_out.get(name, ())) for name in names]
    worlds = list(dict.fromkeys(world for result in every for world in _worlds(result)))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    normalized = all("normalized" in result for result in every)
    whole = [
        {
            "about": caveat.about,
            "text": _inline(caveat.text),
            "links": [(name, SOURCES[name]) for name in caveat.sources],
            "parts": ", ".join(map(_spaced, caveat.parts)) if len(caveat.parts) < len(results) else "",
        }
        for caveat in caveats_of(results, checklists)
    ]
    return environment.get_template("report.html").render(
        title=title or ", ".join(models),
        about=_paragraphs(about),
        facts=_facts(every, models),
        models=models,
        parts=parts,
        quantity="normalized effect" if normalized else "effect",
        bracket=", with its 95 % interval" if any(cluster_count(result) > 1 for result in every) else "",
        prompts=list(_prompts(every)),
        worlds=worlds,
        baselines=list(_baselines(every, worlds)),
        checks=[_checks(model, checklist) for model, checklist in checklists.items()],
        conclusions=conclusions,
        caveats=whole,
        command=command,
        provenance=_provenance(every, models),
    )


def _datasets(results: Mapping[str, Result | Sequence[Result]]) -> dict[str, list[xr.Dataset]]:
    """The datasets of each part; those of a tree are parts of their own."""
    found: dict[str, list[xr.Dataset]] = {}
    if not isinstance(results, Mapping) or hasattr(results, "attrs"):  # a dataset is a mapping, too
        raise ResultError("Pass results by the names of their parts: tp.write_report(path, {'heads': result}).")
    for part, given in results.items():
        for result in [given] if isinstance(given, (xr.Dataset, xr.DataTree)) else given:
            for name, one in datasets_of(result).items():
                own = f"{part}, by {name.replace('_', ' and ')}" if name else part
                found.setdefault(own, []).append(one)
    if not found:
        raise ResultError("There are no results to report on.")
    return found


def _part(name: str, results: list[xr.Dataset], text: str, left_out: Sequence[str]) -> dict[str, Any]:
    tables, best = [], dict[str, str]()
    for result in results:
        model = str(result.attrs["model"])
        for metric, one in by_metric(result):
            heads, rows = _largest(_sure(one))
            where = f"{model}, {metric}" if metric else model
            tables.append(
                {
                    "title": f"{where}: largest effects" if rows else f"{where}: no effect of note",
                    "heads": heads,
                    "rows": rows,
                }
            )
            if rows:
                best.setdefault(model, " ".join([f"{rows[0][0]}:", *rows[0][1 : 3 if "interval" in heads[2] else 2]]))
    plans = [str(result.attrs.get("plan", "")) for result in results]
    return {
        "name": _spaced(name),
        "anchor": "part-" + re.sub(r"\W+", "-", name),
        "about": _paragraphs(text),
        "left_out": list(left_out),
        "pictures": list(_pictures(name, results)),
        "tables": tables,
        "best": best,
        "plans": [{"first": plan.split("\n")[0], "text": plan} for plan in plans if plan],
    }


def _sure(result: xr.Dataset) -> xr.Dataset:
    """Averaged over pairs, with intervals where pairs give any."""
    alone = [result.sel(model=name) for name in result["model"].values] if "model" in result.dims else [result]
    if "pair" in result.dims and all(cluster_count(one) > 1 for one in alone):
        return intervals(result, correction="holm")
    return over_pairs(result)


def _pictures(name: str, results: list[xr.Dataset]) -> Iterator[dict[str, Any]]:
    """The pictures of a part for each metric, one of all models where they fit into one."""
    parted: dict[str, list[xr.Dataset]] = {}
    for result in results:
        for metric, one in by_metric(result):
            parted.setdefault(metric, []).append(one)
    for metric, several in parted.items():
        told = f"{_spaced(name)}, {metric}" if metric else _spaced(name)
        models = ", ".join(str(one.attrs["model"]) for one in several)
        try:
            figures = plots.pictures(several, lambda one: one if "audited" in one else _sure(one))
        except ResultError as error:
            yield {"uri": "", "caption": f"No picture of {told}: {error}"}
            continue
        for model, figure in figures.items():
            alt = f"{told}: {model or models}. The largest numbers are in the tables below."
            yield {
                "uri": _embedded(figure),
                "width": round(figure.get_size_inches()[0] * 96),
                "alt": alt,
                "caption": ", ".join(filter(None, (model, metric))),
            }


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return PNG + base64.b64encode(buffer.getvalue()).decode()


def _conclusion(model: str, text: str, pictures: Sequence[Path]) -> dict[str, Any]:
    files = [{"uri": PNG + base64.b64encode(path.read_bytes()).decode(), "alt": path.stem} for path in pictures]
    return {"model": model, "text": text, "pictures": files}


def _largest(mean: xr.Dataset) -> tuple[list[str], list[list[str]]]:
    """The sites with the largest effects, in words and numbers: the heads of the columns, and the rows."""
    main = main_variable(mean)
    name = "normalized" if "normalized" in mean else main
    unit = str(mean[main].attrs.get("units", "")).split(", ")
    shown = [name, *([main] if name != main else [])]
    heads = ["site"]
    for variable in shown:
        heads += [f"{variable} [{unit[0]}]" if variable == main and len(unit) == 1 and unit[0] else variable]
        if variable == name and "low" in mean:
            heads.append(f"{100 * float(mean.attrs['interval_level']):g} % interval")
    tested = "p_holm" in mean and int(mean.attrs["clusters"]) >= SURE  # with fewer it says nothing
    heads += ["p (Holm)"] if tested else []
    dims, flat = [str(dim) for dim in mean[name].dims], np.nan_to_num(mean[name].values.ravel())
    least = NOTE * (1.0 if name == "normalized" else abs(flat).max(initial=0.0))
    order = [int(i) for i in np.argsort(-abs(flat), kind="stable")[:LARGEST] if abs(flat[i]) >= least and flat[i]]
    tokens, rows = tokens_of(mean), []
    for i in order:
        at = dict(zip(dims, map(int, np.unravel_index(i, mean[name].shape)), strict=True))
        cell, row = mean.isel(at), [site_words(labels_at(mean, at), tokens)]
        for variable in shown:
            row.append(_signed(float(cell[variable])))
            if variable == name and "low" in mean:
                ends = ("normalized_low", "normalized_high") if name == "normalized" else ("low", "high")
                row.append(f"[{', '.join(_signed(float(cell[end])) for end in ends)}]")
        rows.append([*row, *([f"{float(cell['p_holm']):.2g}"] if tested else [])])
    return heads, rows


def _signed(number: float) -> str:
    digits = 3 if abs(number) < 10 else 2
    return f"{number:+.{digits}f}".replace("-", "−")


def _facts(results: list[xr.Dataset], models: list[str]) -> list[tuple[str, str]]:
    metrics = {name: told for result in results for name, told in json.loads(result.attrs.get("metrics", "{}")).items()}
    ways = {
        ("corrupted", "clean"): "denoising: clean into the corrupted run",
        ("clean", "corrupted"): "noising: corrupted into the clean run",
        BOTH: "both: denoising, clean into the corrupted run, and noising, corrupted into the clean run",
    }
    directions = []
    for result in results:
        base, written = str(result.attrs.get("base", "")), str(result.attrs.get("written", ""))
        directions.append(ways.get((base, written), f"{written} into the {base} run"))
    made = max(str(result.attrs.get("time", "")) for result in results)
    facts = [
        ("Models", ", ".join(models)),
        ("Prompts", "; ".join(dict.fromkeys(str(result.attrs.get("pairs", "")) for result in results))),
        ("Metric", "; ".join(f"{name}: {told}" for name, told in metrics.items())),
        ("Direction", "; ".join(dict.fromkeys(directions))),
        ("Made", made.replace("T", " ").replace("+00:00", " UTC")),
    ]
    return [(name, value) for name, value in facts if value]


def _prompts(results: list[xr.Dataset]) -> Iterator[dict[str, Any]]:
    """The pairs of each set of prompts, with the models that read it."""
    groups: dict[tuple[Any, ...], list[xr.Dataset]] = {}
    for result in results:
        if "clean_prompt" in result.coords:
            groups.setdefault(_written(result), []).append(result)
    for key, members in groups.items():
        number, clean, answer, corrupted, wrong, decoder = key
        rows = []
        for i, text in enumerate(clean):
            other, written = (corrupted[i] if corrupted else text), f" ⟶ {decoder[i]}" if decoder else ""
            row = {"pair": number[i], "clean": _marked(text, other) + written}
            row |= {"corrupted": _marked(other, text) + written, "answer": answer[i].strip() if answer else ""}
            rows.append({**row, "wrong": wrong[i].strip() if wrong else ""})
        pairs, clusters = members[0].sizes["pair"], cluster_count(members[0])
        told = plural(pairs, "pair") + f", in {clusters} clusters that share no prompt" * (clusters != pairs)
        models = dict.fromkeys(str(result.attrs["model"]) for result in members)
        yield {
            "title": f"{members[0].attrs.get('pairs', 'pairs')} ({', '.join(models)})",
            "told": f"{told}. Words that differ between clean and corrupted are marked." if corrupted else f"{told}.",
            "both": bool(corrupted),
            "shown": rows[:FIRST],
            "more": rows[FIRST:],
        }


def _written(result: xr.Dataset) -> tuple[tuple[Any, ...], ...]:
    """The number, prompts and answers of each pair, column by column; of several corruptions one after the other."""
    known = {name: result[name] for name in WRITTEN if name in result.coords}
    number = xr.DataArray([str(i) for i in range(result.sizes["pair"])], dims="pair", name="number")
    every = [one.transpose("pair", ...).values.ravel() for one in xr.broadcast(number, *known.values())]
    there = every[1 + list(known).index("corrupted_prompt")] != "" if "corrupted_prompt" in known else slice(None)
    found = dict(zip(("number", *known), (tuple(column[there].tolist()) for column in every), strict=True))
    return tuple(found.get(name, ()) for name in ("number", *WRITTEN))


def _marked(text: str, other: str) -> Markup:
    """A text in which the words that another has not are marked."""
    words, others = (re.findall(r"\s*\S+|\s+", t) for t in (text, other))
    found = Markup()
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        piece = "".join(words[start:end])
        space = piece[: len(piece) - len(piece.lstrip())]
        found += (
            escape(piece)
            if kind == "equal" or not piece
            else escape(space) + Markup("<mark>{}</mark>").format(piece.lstrip())
        )
    return found


def _worlds(result: xr.Dataset) -> list[str]:
    """The worlds whose baselines a result has."""
    rest = {"base", *(dim for dim in result.dims)}
    return [
        str(name)
        for name, variable in result.data_vars.items()
        if set(variable.dims) <= {"pair", "metric"} and str(name) not in rest
    ]


def _baselines(results: list[xr.Dataset], worlds: list[str]) -> Iterator[dict[str, Any]]:
    """The metric of each model's unpatched runs."""
    seen = set()
    for result in results:
        for metric, one in by_metric(result):
            model, name = (
                str(result.attrs["model"]),
                metric or str(one.coords["metric"].item() if "metric" in one.coords else ""),
            )
            if (model, name) in seen:
                continue
            seen.add((model, name))
            values = {world: _signed(float(one[world].mean())) for world in worlds if world in one}
            yield {"model": model, "metric": name, "means": values}


def _checks(model: str, checklist: Checklist) -> dict[str, Any]:
    counts = {
        verdict: sum(check.verdict == verdict for check in checklist.checks) for verdict in ("ok", "note", "FAIL")
    }
    told = [f"{counts['ok']} ok", *(plural(counts[v], v) for v in ("note", "FAIL") if counts[v])]
    return {
        "model": model,
        "told": ", ".join(told),
        "open": counts["note"] + counts["FAIL"] > 0,
        "lines": checklist.checks,
    }


def _provenance(results: list[xr.Dataset], models: list[str]) -> dict[str, Any]:
    """What the results rest on: what is shared by all models, and what is each one's own."""
    names = ("source", "server", "fingerprint", "bos", "seed")
    known = {name: [_all(results, model, name) for model in models] for name in names}
    versions = [json.loads(_all(results, model, "versions") or "{}") for model in models]
    for package in dict.fromkeys(name for found in versions for name in found):
        known[package] = [str(found.get(package, "")) for found in versions]
    seconds = [sum(float(r.attrs.get("seconds", 0)) for r in results if r.attrs["model"] == model) for model in models]
    known["seconds"] = [f"{number:.2f}" for number in seconds]
    shared = [(name, values[0]) for name, values in known.items() if len(set(values)) == 1 and values[0]]
    heads = [name for name, values in known.items() if len(set(values)) > 1]
    own = [(model, [known[name][i] for name in heads]) for i, model in enumerate(models)] if heads else []
    return {"shared": shared, "heads": heads, "own": own}


def _all(results: list[xr.Dataset], model: str, name: str) -> str:
    """What the results of a model say of one thing, each answer once."""
    found = (str(result.attrs.get(name, "")) for result in results if result.attrs["model"] == model)
    return "; ".join(filter(None, dict.fromkeys(found)))


def _paragraphs(text: str) -> list[Markup]:
    return [_inline(part) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _inline(text: str) -> Markup:
    """A paragraph of a docstring, with its emphasis and code."""
    line = str(escape(" ".join(text.split())))
    line = re.sub(r"``([^`]+)``|`([^`]+)`", lambda m: f"<code>{m[1] or m[2]}</code>", line)
    return Markup(re.sub(r"(?<![\w*])\*([^*<>]+)\*(?![\w*])", r"<em>\1</em>", line))


def _spaced(name: str) -> str:
    return name.replace("_", " ")
