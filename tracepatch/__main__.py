"""The command line: run a recipe file, explain its plan, list recipes, check prompts, plot a result."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
import xarray as xr
from rich.console import Console

import tracepatch as tp
from tracepatch import plots
from tracepatch.errors import RecipeError, ResultError, TracepatchError
from tracepatch.models import name_of

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
say = Console(highlight=False, soft_wrap=True).print

Recipe = Annotated[
    str, typer.Argument(help="A recipe's name (see `tracepatch recipes`), or a Python file.", show_default=False)
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A Hugging Face repo id, a folder, or a bundled toy; may be repeated. [default: the bundled toys]",
    ),
]
Count = Annotated[int, typer.Option(help="How many pairs of prompts.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, …; the checkpoint's own otherwise.", show_default=False)
]
Device = Annotated[str | None, typer.Option(help="As transformers' device_map: auto, cuda, cpu.", show_default=False)]


@app.command()
def run(
    recipe: Recipe,
    model: Models = None,
    out: Annotated[Path, typer.Option(help="Where results, pictures and the summary go.")] = Path("out"),
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
) -> None:
    """Run a recipe: netCDF results, pictures and a summary."""
    module, folder = _module(recipe), out / Path(recipe).stem
    found: dict[str, list[xr.Dataset]] = {}
    lines = [_headline(module), ""]
    for source in model or tp.toys.NAMES:
        loaded = _load(source, dtype, device_map)
        label = name_of(loaded)
        pairs = _prompts(module, loaded, count, seed)
        say(f"[bold]{label}[/bold]: {len(pairs)} pairs ({pairs.name})")
        checklist = pairs.check(loaded)
        for check in checklist.checks:
            if check.verdict != "ok":
                say(f"  {check.verdict}: {check.sentence}", markup=False)
        lines += [f"{label}: {len(pairs)} pairs ({pairs.name})", str(checklist), ""]
        for name, chosen in _recipes(module).items():
            try:
                result = chosen(loaded, pairs)
            except tp.errors.ComponentError as error:
                say(f"  {name}: left out. {error}", markup=False)
                lines.append(f"  {name}: left out. {error}")
                continue
            path = tp.save_result(result, folder / f"{_safe(label)}.{name}.nc")
            if isinstance(result, xr.Dataset):
                found.setdefault(name, []).append(result)
                lines += [f"  {name}", *_top(result)]
            seconds = result.attrs["seconds"]
            say(f"  {name:<16} {seconds:6.2f} s  {path}", markup=False)
        lines.append("")
    for name, results in found.items():
        figure = plots.picture(
            results[0] if len(results) == 1 else tp.concat(results),
            title=f"{Path(recipe).stem}: {name.replace('_', ' ')}",
        )
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        say(f"picture {path}", markup=False)
    summary = folder / "summary.txt"
    summary.write_text("\n".join(lines), encoding="utf-8")
    say(f"summary {summary}", markup=False)


@app.command()
def explain(
    recipe: Recipe,
    model: Models = None,
    count: Count = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Device = None,
) -> None:
    """Show what a recipe would trace on a model, what it would not, and why; nothing is patched."""
    module = _module(recipe)
    for source in model or tp.toys.NAMES[:1]:
        loaded = _load(source, dtype, device_map)
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
) -> None:
    """Check whether pairs of prompts can answer a question on a model."""
    passed = True
    for source in model or tp.toys.NAMES[:1]:
        loaded = _load(source, dtype, device_map)
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
    path = out or result[0].with_suffix(".png")
    figure.savefig(path, dpi=150)
    say(f"picture {path}", markup=False)


def main() -> None:
    """The console command: our own errors are printed, not raised."""
    try:
        app()
    except TracepatchError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"{type(error).__name__}: {error}", markup=False)
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
        spec.loader.exec_module(module)
    else:
        package = importlib.import_module("tracepatch.recipes")
        names = [entry.name for entry in pkgutil.iter_modules(package.__path__)]
        if recipe not in names:
            raise RecipeError(f"There is no recipe {recipe!r}. Recipes: {', '.join(names)}; or pass a Python file.")
        module = importlib.import_module(f"tracepatch.recipes.{recipe}")
    if not _recipes(module) or not hasattr(module, "prompts"):
        raise RecipeError(
            f"{recipe} cannot be run: a recipe file has prompts(tokenizer, count, seed) and functions with @tp.recipe."
        )
    return module


def _recipes(module: ModuleType) -> dict[str, tp.Recipe]:
    return {name: value for name, value in vars(module).items() if isinstance(value, tp.Recipe)}


def _prompts(module: ModuleType, model: Any, count: int, seed: int) -> tp.Pairs:
    pairs = module.prompts(model.tokenizer, count, seed)
    assert isinstance(pairs, tp.Pairs)
    return pairs


def _load(source: str, dtype: str | None, device_map: str | None) -> Any:
    toy = source in tp.toys.NAMES and not Path(source).exists()
    return tp.load(tp.toys.folder(source) if toy else source, dtype=dtype, device_map=device_map)


def _headline(module: ModuleType) -> str:
    return (inspect.getdoc(module) or module.__name__).split("\n")[0]


def _first_line(recipe: tp.Recipe) -> str:
    return (inspect.getdoc(recipe.function) or "").split("\n")[0]


def _top(result: xr.Dataset, count: int = 5) -> list[str]:
    """The largest effects, averaged over pairs, in words."""
    mean = tp.over_pairs(result)
    name = "normalized" if "normalized" in mean else "effect"
    flat = mean[name].stack(site=[str(d) for d in mean[name].dims])
    order = abs(flat).fillna(-1).argsort().values[::-1][:count]
    lines = []
    for i in order:
        cell = flat[int(i)]
        site = ", ".join(f"{d} {v}" for d, v in zip(mean[name].dims, cell["site"].item(), strict=True))
        lines.append(f"    {float(cell):+.3f}  {site}")
    return [f"    largest {name} effects:", *lines]


def _safe(name: str) -> str:
    return name.replace("/", "--")


if __name__ == "__main__":
    main()
