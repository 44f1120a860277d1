"""Writes docs/gallery.md: every recipe, what it asks, the command that runs it, what it says, and one of its pictures.

``python tests/gallery.py --write`` runs all recipes on their default toys, which takes some minutes, and writes the page
and docs/images/gallery; names of recipes after that run these alone. Without the option the text is printed. A test
compares what does not depend on runs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from PIL import Image

from tracepatch.catalogue import bundled, headline, opened

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
PICTURES = ROOT / "docs" / "images" / "gallery"
WIDEST = 1200  # of a picture, in pixels
SHOWN = {  # the picture of each recipe, among those that its run draws
    "across_architectures": "by_depth.png",
    "and_or_gates": "toy-gates.verdicts.png",
    "attention_attribution": "toy-gpt2.arcs.png",
    "attribution_vs_patching": "toy-gpt2.estimates_over_effects.png",
    "backup_heads": "toy-backup_heads.compensation.png",
    "factual_recall": "toy-many_tasks.tracing.png",
    "gender_bias": "toy-many_tasks.together.png",
    "greater_than": "toy-many_tasks.years.png",
    "induction": "toy-gpt2.scores.png",
    "ioi": "heads.png",
    "mlp_neurons": "neurons.toy-gpt2.png",
    "necessity_sufficiency": "heads.toy-gpt2.png",
    "prompt_corruptions": "toy-gpt2.corruptions.png",
    "steering_and_features": "subspaces.png",
}
HEAD = """\
# Gallery

The experiments of the field that come with tracepatch. Each is a file that reads like a methods section and runs on any model: `tracepatch run NAME` on the
bundled ones, `--model PATH` on yours, `--report` for one page with prompts, checks, pictures and caveats. Copy a file, change it, and run the copy:
`tracepatch run my_copy.py`. This page is written by `python tests/gallery.py --write`, from what the recipes say and draw on small bundled models: the
pictures show what to look at, not what GPT-2 does.
"""


def section(name: str) -> str:
    """What the page says of a recipe, but for what a run gives."""
    module = opened(name)
    title, _, rest = (module.__doc__ or "").partition("\n")
    about = textwrap.fill(" ".join(rest.strip().split("\n\n")[0].split()), 160, break_long_words=False)
    about = about.replace("``", "`")
    return "\n".join(
        [
            f"## {title.rstrip('.')}",
            "",
            about,
            "",
            f"`tracepatch run {name}` · [the file](../recipes/{name}.py)",
            "",
            f"![{headline(module)}](images/gallery/{name}.png)",
            "",
        ]
    )


def page() -> str:
    """The text of the page."""
    return "\n".join([HEAD, *map(section, bundled())])


def draw(name: str, folder: Path) -> None:
    """Runs a recipe on its default models, and keeps its picture."""
    command = [sys.executable, "-m", "tracepatch", "run", name, "--out", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    keep(name, folder)


def keep(name: str, folder: Path) -> None:
    """Keeps the picture of a recipe that was run, small enough for a page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with Image.open(folder / name / SHOWN[name]) as drawn:
        picture = drawn.convert("RGB")
        picture.thumbnail((WIDEST, WIDEST))
        picture.save(PICTURES / f"{name}.png", optimize=True)


def main() -> None:
    """Prints the page, or writes it and its pictures."""
    if "--write" not in sys.argv:
        print(page())
        return
    chosen = [name for name in sys.argv[1:] if name != "--write"] or bundled()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            draw(name, Path(folder))
            print(f"{name}: {SHOWN[name]}", flush=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
