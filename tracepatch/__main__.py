"""The command line: run a recipe file, explain its plan, list recipes, check prompts, plot a result."""

from __future__ import annotations

import inspect
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import xarray as xr
from rich.console import Console

import tracepatch as tp
from tracepatch import plots
from tracepatch.catalogue import (
    TABLES,
    bundled,
    first_line,
    headline,
    metrics_of,
    opened,
    parts_of,
    prompts_of,
    toys_of,
)
from tracepatch.caveats import checks_of
from tracepatch.checklist import Checklist
from tracepatch.combining import by_metric, in_words
from tracepatch.errors import ModelError, PromptError, RecipeError, ResultError, TracepatchError, plural
from tracepatch.models import name_of
from tracepatch.studies import Study

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
say = Console(highlight=False, soft_wrap=True).print

Recipe = Annotated[
    str, typer.Argument(help="A recipe's name (see `tracepatch recipes`), or a Python file.", show_default=False)
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A Hugging Face repo id, a folder, or a bundled toy "
        f"({', '.join(f'toy:{name}' for name in tp.toys.TRAINED + tp.toys.WIRED)}); may be repeated, and named as in "
        "NAME=PATH. [default: toys that have the behaviour]",
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="logit_diff, logit, log_prob, prob, prob_diff, kl, cross_entropy, accuracy or rank; may be repeated. "
        "[default: the recipe's own, logit_diff if it names none]",
    ),
]
Count = Annotated[int, typer.Option(help="How many pairs of prompts.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, …; the checkpoint's own otherwise.", show_default=False)
]
Remote = Annotated[
    str | None,
    typer.Option(
        help="Run on a server instead of here: 'ndif', or the URL of one; --model is then a repo id.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="As transformers' device_map: auto, cuda, cpu.", show_default=False)]


@app.command()
def run(
    recipe: Recipe,
    model: Models = None,
    out: Annotated[Path, typer.Option(help="Where results, pictures and the summary go.")] = Path("out"),
    metric: Metrics = None,
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
    remote: Remote = None,
    checks: Annotated[bool, typer.Option("--checks/--no-checks", help="Whether a run checks itself.")] = True,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="A folder for finished batches: the same command continues there after Ctrl-C, and repeats nothing.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write a report: one HTML page with all of it, and its caveats.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Run also where a check fails, such as on a model without the behaviour.")
    ] = False,
) -> None:
    """Run a recipe: netCDF results, pictures and a summary."""
    module, stem = opened(recipe), Path(recipe).stem
    metrics = metrics_of(module, metric)
    folder = out / stem
    found: dict[str, list[xr.Dataset | xr.DataTree]] = {}
    refused: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    checklists: dict[str, Checklist] = {}
    conclusions: dict[str, tuple[str, list[Path]]] = {}
    lines = [headline(module), ""]
    labelled = _labelled(model or toys_of(module))
    for label, source in labelled:
        loaded = _load(source, dtype, device_map, remote, label)
        try:
            pairs = prompts_of(module, loaded, count, seed)
        except PromptError as error:
            if len(labelled) == 1:
                raise  # with the line of the file
            refused[label] = _told(f"{label}: left out. {error}", lines)
            continue
        say(f"[bold]{label}[/bold]: {_counted(pairs)}")
        checklist = checklists[label] = pairs.check(loaded)
        for check in checklist.checks:
            if check.verdict == "note" or (check.verdict == "FAIL" and anyway):
                say(f"  {check.verdict}: {check.sentence}", markup=False)
        lines += [f"{label}: {_counted(pairs)}", str(checklist), ""]
        if not (checklist.passed or anyway):
            refused[label] = _told(f"{label}: left out, because {checklist.failure}", lines)
            continue
        own: dict[str, xr.Dataset | xr.DataTree] = {}
        for name, part in parts_of(module).items():
            options: dict[str, Any] = {"checks": checks, "directory": directory}
            if isinstance(part, Study):
                options = part.taken(**options)
            try:
                result = part(loaded, pairs, metrics, **options)
            except KeyboardInterrupt as error:
                notes = getattr(error, "__notes__", [])
                kept = notes[0] if notes and directory else "To keep what is finished, pass --directory."
                Console(stderr=True, highlight=False, soft_wrap=True).print(f"Interrupted. {kept}", markup=False)
                raise typer.Exit(130) from error
            except tp.errors.ComponentError as error:
                left_out.setdefault(name, []).append(f"Left out on {label}. {error}")
                _told(f"  {name}: left out. {error}", lines)
                continue
            path = tp.save_result(result, folder / f"{_safe(label)}.{name}.nc")
            result = tp.over_draws(result) if isinstance(result, xr.Dataset) else result
            found.setdefault(name, []).append(result)
            own[name] = result
            top = in_words(result) if isinstance(result, xr.Dataset) else []
            lines += [f"  {name}", *top]
            lines += [f"    checks: {result.attrs['checks']}"] if "checks" in result.attrs else []
            best = top[1].strip() if len(top) > 1 else ""
            say(f"  {name:<16} {best:<28} {result.attrs['seconds']:6.2f} s  {path}", markup=False)
        if checked := [result for result in own.values() if "checks" in result.attrs]:
            say(f"  {'checks':<16} {checks_of(checked)}", markup=False)
        if hasattr(module, "conclude") and own:
            given = {name: _first(result) for name, result in own.items() if isinstance(result, xr.Dataset)}
            began = time.time()
            try:
                text = "\n".join(module.conclude(loaded, pairs, metrics, given, folder / _safe(label)))
            except (tp.errors.ComponentError, KeyError) as error:
                if isinstance(error, KeyError) and error.args[0] not in left_out:
                    raise
                text = f"  no conclusion: it needs what is left out ({error})"
            conclusions[label] = _inside(_told(text, lines)), _drawn(folder, _safe(label), began)
        lines.append("")
    if len(refused) == len(labelled):
        raise RecipeError("\n".join([f"{stem} can be run on none of these models.", *refused.values()]))
    flat = {name: datasets for name, results in found.items() if (datasets := _datasets(results))}
    if hasattr(module, "conclude_all") and flat:
        began, joined = time.time(), {name: _first(tp.concat(results)) for name, results in flat.items()}
        text = "\n".join(module.conclude_all(joined, folder))
        conclusions["all models"] = _inside(_told(text, lines)), _drawn(folder, "all", began)
    for name, results in flat.items():
        for several in zip(*map(by_metric, results), strict=True):
            read, title = several[0][0], f"{stem}: {name.replace('_', ' ')}"
            try:
                figures = plots.pictures([one for _, one in several], title=title)
            except ResultError as error:  # the results are saved, and others may have pictures
                say(f"no picture of {name}. {error}", markup=False)
                continue
            for label, figure in figures.items():
                path = folder / f"{'.'.join(filter(None, (name, _safe(label), read)))}.png"
                figure.savefig(path, dpi=150)
                say(f"picture {path}", markup=False)
    summary = folder / "summary.txt"
    summary.write_text("\n".join(lines), encoding="utf-8")
    say(f"summary {summary}", markup=False)
    if report:
        for why in refused.values():
            for name in parts_of(module):
                left_out.setdefault(name, []).append(why)
        told_too = {"checklists": checklists, "left_out": left_out, "conclusions": conclusions}
        _report(folder / "report.html", module, stem, found, told_too)


@app.command()
def explain(
    recipe: Recipe,
    model: Models = None,
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
    remote: Remote = None,
    metric: Metrics = None,
) -> None:
    """Show what a recipe would trace on a model, what it would not, and why; nothing is patched."""
    module = opened(recipe)
    metrics = metrics_of(module, metric)
    for label, source in _labelled(model or toys_of(module)[:1]):
        loaded = _load(source, dtype, device_map, remote, label)
        say(str(tp.Architecture(loaded)), markup=False)
        pairs = prompts_of(module, loaded, count, seed)
        for name, part in parts_of(module).items():
            say(f"\n{name}: {first_line(part)}", markup=False)
            if isinstance(part, Study):
                say("  no plan: what it runs depends on what it finds", markup=False)
                continue
            try:
                say(part.plan(loaded, pairs, metrics).explain(), markup=False)
            except tp.errors.ComponentError as error:
                say(f"  left out. {error}", markup=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with tracepatch."""
    for name in bundled():
        module = opened(name)
        say(f"[bold]{name}[/bold]  {headline(module)}")
        for label, part in parts_of(module).items():
            say(f"    {label:<18} {first_line(part)}", markup=False)


@app.command()
def check(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, a Python file, or pairs as a .csv or .jsonl file.", show_default=False),
    ],
    model: Models = None,
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
    remote: Remote = None,
) -> None:
    """Check whether pairs of prompts can answer a question on a model."""
    passed, suffix = True, Path(recipe).suffix
    module = None if suffix in TABLES else opened(recipe)
    for label, source in _labelled(model or toys_of(module)[:1]):
        loaded = _load(source, dtype, device_map, remote, label)
        if module is not None:
            pairs = prompts_of(module, loaded, count, seed)
        elif suffix == ".csv":
            pairs = tp.Pairs.from_csv(recipe)
        else:
            pairs = tp.Pairs.from_jsonl(recipe)
        checklist = pairs.check(loaded)
        passed &= checklist.passed
        say(f"[bold]{name_of(loaded)}[/bold]")
        say(f"{pairs}\n{checklist}", markup=False)
    if not passed:
        raise typer.Exit(1)


@app.command()
def plot(
    result: Annotated[
        list[Path], typer.Argument(help="One or several .nc results; several are joined by model.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The picture; beside the result otherwise.", show_default=False)
    ] = None,
    variable: Annotated[str | None, typer.Option(help="normalized, effect, value, …", show_default=False)] = None,
    pair: Annotated[int | None, typer.Option(help="One pair instead of the mean.", show_default=False)] = None,
) -> None:
    """Draw a result as a heatmap."""
    found = [tp.open_result(path) for path in result]
    trees = [str(path) for path, r in zip(result, found, strict=True) if isinstance(r, xr.DataTree)]
    if trees:
        raise ResultError(
            f"{', '.join(trees)} holds rows with different labels; draw its parts with tp.plots in Python."
        )
    datasets = [r for r in found if isinstance(r, xr.Dataset)]
    figure = plots.picture(datasets[0] if len(datasets) == 1 else tp.concat(datasets), variable, pair=pair)
    # A picture of several results, of another variable or of one pair is not the picture of the first result.
    names, part = zip(*((p.stem.split(".")[0], p.stem.partition(".")[2]) for p in result), strict=True)
    words = ["+".join(dict.fromkeys(names)), part[0], variable or "", "" if pair is None else f"pair{pair}"]
    path = out or result[0].with_name(".".join(filter(None, words)) + ".png")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise ResultError(f"{path} cannot be a picture: its name ends in one of {', '.join(kinds)}.")
    figure.savefig(path, dpi=150)
    say(f"picture {path}", markup=False)


def main() -> None:
    """The console command: our own errors, and those of files, are printed, not raised."""
    try:
        app()
    except (TracepatchError, OSError) as error:  # such as a folder that cannot be written to
        files = {str(Path(argument).resolve()) for argument in sys.argv[1:] if argument.endswith(".py")}
        recipe = [f for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).resolve()) in files]
        where = f"{Path(recipe[-1].filename).name}:{recipe[-1].lineno}, in {recipe[-1].name}: " if recipe else ""
        text = f"{where}{type(error).__name__}: {error}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
        sys.exit(1)


def _labelled(models: Sequence[str]) -> list[tuple[str, str]]:
    """(label, source) of each model; labels are made different by the folders above."""
    given = [m.partition("=")[::2] if "=" in m and not Path(m).exists() else ("", m) for m in models]
    sources = [source for _, source in given]
    names = labels = [label or _own_name(source) for label, source in given]
    for depth in range(2, 12):
        twice = [label for label in labels if labels.count(label) > 1]
        if not twice:
            break
        labels = [
            "-".join(Path(source).resolve().parts[-depth:]) if label in twice and Path(source).exists() else label
            for label, source in zip(labels, sources, strict=True)
        ]
    same = sorted({name for name, label in zip(names, labels, strict=True) if labels.count(label) > 1})
    if same:
        raise RecipeError(f"Two models are called {', '.join(same)}. Name them: --model NAME=PATH.")
    return list(zip(labels, sources, strict=True))


def _own_name(source: str) -> str:
    return source.replace("toy:", "toy-") if source.startswith("toy:") else Path(source).name or source


def _load(source: str, dtype: str | None, device_map: str | None, remote: str | None, label: str) -> Any:
    if remote is not None and source.startswith("toy:"):
        raise ModelError(f"{source} is in this package, and runs here: leave out --remote, or pass --model ORG/NAME.")
    if remote is not None:
        return tp.load(source, remote=remote, dtype=dtype, name=label)
    if source.startswith("toy:"):
        return tp.toys.load(source.removeprefix("toy:"), dtype=dtype, device_map=device_map, name=label)
    return tp.load(source, dtype=dtype, device_map=device_map, name=label)


def _counted(pairs: tp.Pairs) -> str:
    return plural(len(pairs), "pair") + (f" ({pairs.name})" if pairs.name != "pairs" else "")


def _told(text: str, lines: list[str]) -> str:
    """Says something, and adds it to the summary."""
    lines.append(text)
    say(text, markup=False)
    return text


def _inside(text: str) -> str:
    """A conclusion as a report has it, with its pictures inside instead of where they are."""
    return "\n".join(line for line in text.splitlines() if not line.strip().startswith("picture "))


def _drawn(folder: Path, name: str, began: float) -> list[Path]:
    """The pictures of a conclusion, not those that an earlier run has left there."""
    return sorted(path for path in folder.glob(f"{name}.*.png") if path.stat().st_mtime >= began - 1)


def _datasets(results: Sequence[xr.Dataset | xr.DataTree]) -> list[xr.Dataset]:
    return [result for result in results if isinstance(result, xr.Dataset)]


def _first(result: xr.Dataset) -> xr.Dataset:
    """Of the first metric."""
    return next(by_metric(result))[1]


def _report(
    path: Path,
    module: ModuleType,
    name: str,
    results: dict[str, list[xr.Dataset | xr.DataTree]],
    options: dict[str, Any],
) -> None:
    if not results:
        say("no report: no part of the recipe could be run", markup=False)
        return
    headline, _, text = (inspect.getdoc(module) or name).partition("\n")
    texts = {name: inspect.getdoc(part.function) or "" for name, part in parts_of(module).items()}
    command = shlex.join(["tracepatch", *sys.argv[1:]])
    tp.write_report(path, results, title=headline, about=text, texts=texts, command=command, **options)
    say(f"report {path}", markup=False)


def _safe(name: str) -> str:
    return name.replace("/", "--")


if __name__ == "__main__":
    main()
