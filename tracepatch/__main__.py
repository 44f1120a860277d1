"""The command line: run a recipe file, explain its plan, list recipes, check prompts, plot a result."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import xarray as xr
from rich.console import Console

import tracepatch as tp
from tracepatch import plots
from tracepatch.caveats import checks_of
from tracepatch.checklist import Checklist
from tracepatch.errors import MetricError, ModelError, RecipeError, ResultError, TracepatchError
from tracepatch.models import name_of

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
TOYS = tuple(f"toy:{name}" for name in tp.toys.NAMES)
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
        "NAME=PATH. [default: the first four toys]",
    ),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="logit_diff, logit, log_prob, prob, kl, cross_entropy or rank; may be repeated."),
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
) -> None:
    """Run a recipe: netCDF results, pictures and a summary."""
    module, folder, metrics = _module(recipe), out / Path(recipe).stem, _metrics(metric)
    found: dict[str, list[xr.Dataset | xr.DataTree]] = {}
    left_out: dict[str, list[str]] = {}
    checklists: dict[str, Checklist] = {}
    conclusions: dict[str, tuple[str, list[Path]]] = {}
    lines = [_headline(module), ""]
    for label, source in _labelled(model or TOYS):
        loaded = _load(source, dtype, device_map, remote, label)
        pairs = _prompts(module, loaded, count, seed)
        say(f"[bold]{label}[/bold]: {len(pairs)} pairs ({pairs.name})")
        checklist = checklists[label] = pairs.check(loaded)
        for check in checklist.checks:
            if check.verdict != "ok":
                say(f"  {check.verdict}: {check.sentence}", markup=False)
        lines += [f"{label}: {len(pairs)} pairs ({pairs.name})", str(checklist), ""]
        own: dict[str, xr.Dataset | xr.DataTree] = {}
        for name, chosen in _recipes(module).items():
            try:
                result = chosen(loaded, pairs, metrics, checks=checks, directory=directory)
            except KeyboardInterrupt as error:
                kept = "To keep what is finished, pass --directory." if directory is None else error.__notes__[0]
                Console(stderr=True, highlight=False, soft_wrap=True).print(f"Interrupted. {kept}", markup=False)
                raise typer.Exit(130) from error
            except tp.errors.ComponentError as error:
                say(f"  {name}: left out. {error}", markup=False)
                lines.append(f"  {name}: left out. {error}")
                left_out.setdefault(name, []).append(f"Left out on {label}. {error}")
                continue
            path = tp.save_result(result, folder / f"{_safe(label)}.{name}.nc")
            found.setdefault(name, []).append(result)
            own[name] = result
            top = _top(result) if isinstance(result, xr.Dataset) else []
            lines += [f"  {name}", *top, f"    checks: {result.attrs['checks']}"]
            best = top[1].strip() if len(top) > 1 else ""
            say(f"  {name:<16} {best:<28} {result.attrs['seconds']:6.2f} s  {path}", markup=False)
        if own:
            say(f"  {'checks':<16} {checks_of(list(own.values()))}", markup=False)
        if hasattr(module, "conclude"):
            datasets = {name: result for name, result in own.items() if isinstance(result, xr.Dataset)}
            told = module.conclude(loaded, pairs, metrics, datasets, folder / _safe(label))
            lines += told
            say("\n".join(told), markup=False)
            conclusions[label] = "\n".join(told), sorted(folder.glob(f"{_safe(label)}.*.png"))
        lines.append("")
    for name, results in found.items():
        flat = [result for result in results if isinstance(result, xr.Dataset)]
        for part, one in _by_metric(flat[0] if len(flat) == 1 else tp.concat(flat)) if flat else ():
            path = folder / f"{name}{part}.png"
            title = f"{Path(recipe).stem}: {name.replace('_', ' ')}"
            try:
                plots.picture(one, title=title).savefig(path, dpi=150)
            except ResultError as error:  # the results are saved, and others may have pictures
                say(f"no picture of {name}. {error}", markup=False)
                continue
            say(f"picture {path}", markup=False)
    summary = folder / "summary.txt"
    summary.write_text("\n".join(lines), encoding="utf-8")
    say(f"summary {summary}", markup=False)
    if report:
        told_too = {"checklists": checklists, "left_out": left_out, "conclusions": conclusions}
        _report(folder / "report.html", module, Path(recipe).stem, found, told_too)


@app.command()
def explain(
    recipe: Recipe,
    model: Models = None,
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
    remote: Remote = None,
) -> None:
    """Show what a recipe would trace on a model, what it would not, and why; nothing is patched."""
    module = _module(recipe)
    for label, source in _labelled(model or TOYS[:1]):
        loaded = _load(source, dtype, device_map, remote, label)
        say(str(tp.Architecture(loaded)), markup=False)
        pairs = _prompts(module, loaded, count, seed)
        for name, chosen in _recipes(module).items():
            say(f"\n{name}: {_first_line(chosen)}", markup=False)
            try:
                say(chosen.plan(loaded, pairs).explain(), markup=False)
            except tp.errors.ComponentError as error:
                say(f"  left out. {error}", markup=False)


@app.command()
def recipes() -> None:
    """List the recipes that come with tracepatch."""
    package = importlib.import_module("tracepatch.recipes")
    for entry in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"tracepatch.recipes.{entry.name}")
        say(f"[bold]{entry.name}[/bold]  {_headline(module)}")
        for name, chosen in _recipes(module).items():
            say(f"    {name:<18} {_first_line(chosen)}", markup=False)


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
    passed = True
    for label, source in _labelled(model or TOYS[:1]):
        loaded = _load(source, dtype, device_map, remote, label)
        suffix = Path(recipe).suffix
        if suffix == ".csv":
            pairs = tp.Pairs.from_csv(recipe)
        elif suffix in (".jsonl", ".json"):
            pairs = tp.Pairs.from_jsonl(recipe)
        else:
            pairs = _prompts(_module(recipe), loaded, count, seed)
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
    figure.savefig(path, dpi=150)
    say(f"picture {path}", markup=False)


def main() -> None:
    """The console command: our own errors are printed, not raised."""
    try:
        app()
    except TracepatchError as error:
        files = {str(Path(argument).resolve()) for argument in sys.argv[1:] if argument.endswith(".py")}
        recipe = [f for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).resolve()) in files]
        where = f"{Path(recipe[-1].filename).name}:{recipe[-1].lineno}, in {recipe[-1].name}: " if recipe else ""
        text = f"{where}{type(error).__name__}: {error}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
        sys.exit(1)


def _module(recipe: str) -> ModuleType:
    path = Path(recipe)
    if path.suffix == ".py":
        if not path.is_file():
            raise RecipeError(f"There is no file {recipe}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
            raise RecipeError(f"{recipe} cannot be imported: line {line}: {type(error).__name__}: {error}") from error
    else:
        package = importlib.import_module("tracepatch.recipes")
        names = [entry.name for entry in pkgutil.iter_modules(package.__path__)]
        if recipe not in names:
            raise RecipeError(f"There is no recipe {recipe!r}. Recipes: {', '.join(names)}; or pass a Python file.")
        module = importlib.import_module(f"tracepatch.recipes.{recipe}")
    missing = [] if _recipes(module) else ["a function with @tp.recipe"]
    missing += [] if hasattr(module, "prompts") else ["a function prompts(tokenizer, count, seed) -> tp.Pairs"]
    if missing:
        raise RecipeError(f"{recipe} cannot be run: it lacks {' and '.join(missing)}.")
    return module


def _recipes(module: ModuleType) -> dict[str, tp.Recipe]:
    return {name: value for name, value in vars(module).items() if isinstance(value, tp.Recipe)}


def _prompts(module: ModuleType, model: Any, count: int, seed: int) -> tp.Pairs:
    pairs = module.prompts(model.tokenizer, count, seed)
    assert isinstance(pairs, tp.Pairs)
    return pairs


def _labelled(models: Sequence[str]) -> list[tuple[str, str]]:
    """(label, source) of each model; labels are made different by the folders above."""
    given = [m.partition("=")[::2] if "=" in m and not Path(m).exists() else ("", m) for m in models]
    sources = [source for _, source in given]
    labels = [label or _own_name(source) for label, source in given]
    for depth in range(2, 12):
        twice = [label for label in labels if labels.count(label) > 1]
        if not twice:
            break
        labels = [
            "-".join(Path(source).resolve().parts[-depth:]) if label in twice and Path(source).exists() else label
            for label, source in zip(labels, sources, strict=True)
        ]
    same = sorted({label for label in labels if labels.count(label) > 1})
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


def _metrics(names: Sequence[str] | None) -> list[tp.Metric]:
    known = {m.name: m for m in (tp.logit_diff, tp.logit, tp.log_prob, tp.prob, tp.kl, tp.cross_entropy, tp.rank)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise MetricError(f"There is no metric {', '.join(unknown)}. Metrics: {', '.join(known)}.")
    return [known[name] for name in names or ("logit_diff",)]


def _by_metric(result: xr.Dataset) -> Iterator[tuple[str, xr.Dataset]]:
    if "metric" not in result.dims:
        yield "", result
        return
    for name in result["metric"].values.tolist():
        yield f".{name}", result.sel(metric=name)


def _headline(module: ModuleType) -> str:
    return (inspect.getdoc(module) or module.__name__).split("\n")[0]


def _first_line(recipe: tp.Recipe) -> str:
    return (inspect.getdoc(recipe.function) or "").split("\n")[0]


def _top(result: xr.Dataset, count: int = 5, least: float = 0.02) -> list[str]:
    """The largest effects of the first metric, averaged over pairs, in words; those near zero are left out."""
    mean = tp.over_pairs(next(iter(_by_metric(result)))[1])
    name = "normalized" if "normalized" in mean else "effect"
    flat = mean[name].stack(site=[str(d) for d in mean[name].dims])
    order = abs(flat).fillna(-1).argsort().values[::-1][:count]
    lines = []
    for i in order:
        cell = flat[int(i)]
        labels = dict(zip(map(str, mean[name].dims), cell["site"].item(), strict=True))
        if "pos" in labels and "token" in mean.coords and mean["token"].dims == ("pos",):
            labels["pos"] = f"{labels['pos']} ({str(mean['token'].sel(pos=labels['pos']).item()).strip()})"
        if abs(float(cell)) >= least:
            lines.append(f"    {float(cell):+.3f}  {', '.join(f'{d} {v}' for d, v in labels.items())}")
    base, written = mean.attrs["base"], mean.attrs["written"]
    return [f"    largest {name} effects ({written} into the {base} run):", *(lines or ["    none of note"])]


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
    texts = {part: inspect.getdoc(recipe.function) or "" for part, recipe in _recipes(module).items()}
    command = shlex.join(["tracepatch", *sys.argv[1:]])
    tp.write_report(path, results, title=headline, about=text, texts=texts, command=command, **options)
    say(f"report {path}", markup=False)


def _safe(name: str) -> str:
    return name.replace("/", "--")


if __name__ == "__main__":
    main()
