"""Writes docs/architectures.md: what the probe proves about every architecture type that the tests build.

``python tests/architecture_page.py --write`` writes the page, without the option it is printed. A test makes the page
again and compares, so that every mark in it comes from a model that was measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tiny_models import ALL, build, tokenizer

import tracepatch as tp

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QK_NORM = re.compile(r"(^|\.)(q|k|query|key)_(layer)?norm$")

HEAD = """\
# Architectures

There is no table of models in `tracepatch`: where activations live is measured on the model that you load, and what cannot be proved is not offered
([concepts](concepts.md#components-and-sites)). This page is such a table all the same. It is written by `python tests/architecture_page.py --write`,
which measures a small model of every type with random weights, and a test compares.

## What is proved

A layer *closes bitwise* if the stream entering it, plus what was found to be added to it, is the stream leaving it to the last bit. The numbers are
layers that do, in three dtypes, and the largest error anywhere. Heads are those of the small models; norms stand before (*pre*) or after (*post*) a
branch, or on queries and keys (*qk*).
"""

OFFERED = """
## What is offered

✓ stands for every layer. A number says why not; the reasons follow the table.
"""

TWIN = """
## Models whose weights are not here

Paths depend on a model's code and on the choices in its config, not on its widths. For a model that runs on a server (`tp.load(…, remote=True)`), or
whose module is on torch's meta device, everything is proved on a *twin*: a model of the same class, from the same config with small sizes, with random
weights in float32. The sizes are then read from the shapes of the real model's parameters; where those do not confirm them, there is an error. So
plans can be made, and printed, without weights.

```python
import torch
import transformers
import tracepatch as tp

config = transformers.LlamaConfig(  # as Llama 3.1 70B
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
with torch.device("meta"):
    module = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
words = tp.toys.load("gpt2").tokenizer  # nothing is run, so any will do
print(tp.Architecture(tp.load(module, words)))
```

```text
{printed}
```
"""


class Notes:
    """Footnotes, numbered as they come; the same text has the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def __str__(self) -> str:
        return "\n".join(f"{i}. {text[0].upper()}{text[1:]}." for i, text in enumerate(self.texts, 1))


def page() -> str:
    """The whole page."""
    notes, proved, offered = Notes(), [], []
    for model_type in ALL:
        facts, marks = rows(model_type, notes)
        proved.append([f"`{model_type}`", *facts])
        offered.append([f"`{model_type}`", *marks])
    columns = ["type", "float32", "bf16", "fp16", "largest error", "block", "heads", "norms", "MLP"]
    first = table(columns, proved)
    second = table(["type", *(f"`{name}`" for name in tp.COMPONENTS)], offered)
    return f"{HEAD}\n{first}\n{OFFERED}\n{second}\n\n{notes}\n{TWIN.format(printed=printed_twin())}"


def table(columns: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines))


def rows(model_type: str, notes: Notes) -> tuple[list[str], list[str]]:
    """One type's cells in both tables."""
    try:
        found = [tp.Architecture(tp.load(build(model_type, dtype=dtype), tokenizer())) for dtype in DTYPES]
    except tp.errors.TracepatchError as error:
        number = notes.number(str(error).split("\n")[0].rstrip("."))
        return ["—"] * 8, [str(number)] * len(tp.COMPONENTS)
    single = found[0]
    closing = [f"{sum(layer.error == 0 for layer in a.layers)} of {len(a)}" for a in found]
    worst = max(layer.error for a in found for layer in a.layers)
    facts = [*closing, f"{worst:.1g}", several(form(layer) for layer in single.layers), heads(single)]
    facts += [norms(single, build(model_type)), several(mlp(layer) for layer in single.layers)]
    return facts, [mark(single, name, notes) for name in tp.COMPONENTS]


def several(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(v for v in values if v)) or "—"


def form(layer: Any) -> str:
    scales = {s.out.scale for s in layer.sublayers if s.out} - {1.0}
    return ", ".join([layer.form, *(f"adds × {scale:.4g}" for scale in sorted(scales))])


def heads(architecture: tp.Architecture) -> str:
    def kind(layer: int) -> str:
        attention = architecture.attention(layer)
        if attention is None:
            return ""
        if not attention.heads:
            return "no softmax attention"
        many, few = attention.heads, attention.kv_heads
        return f"MHA {many}" if many == few else f"MQA {many}/1" if few == 1 else f"GQA {many}/{few}"

    return several(kind(i) for i in range(len(architecture)))


def norms(architecture: tp.Architecture, module: Any) -> str:
    branches = [s for layer in architecture.layers for s in layer.sublayers]
    found = ["pre"] if any(s.pre_norm for s in branches) else []
    found += ["post"] if any(s.post_norm for s in branches) else []
    attentions = [module.get_submodule(s.path) for s in branches if s.kind == "attn"]
    found += ["qk"] if any(QK_NORM.search(name) for a in attentions for name, _ in a.named_modules()) else []
    return several(found)


def mlp(layer: Any) -> str:
    found = layer.sublayer("mlp", "moe")
    return "" if found is None else {"mlp": "dense", "moe": "experts"}[found.kind]


def mark(architecture: tp.Architecture, name: str, notes: Notes) -> str:
    """✓, the number of the reason why not, or both where layers differ."""
    layers = range(len(architecture) if tp.COMPONENTS[name].layered else 1)
    why = {i: architecture.why_not(name, i) for i in layers}
    reasons = dict.fromkeys(w for w in why.values() if w)
    numbers = " ".join(str(notes.number(reason)) for reason in reasons)
    if not reasons:
        return "✓"
    return numbers if all(why.values()) else f"✓ layer {spans(i for i in layers if not why[i])}, else {numbers}"


def spans(layers: Iterable[int]) -> str:
    found = []
    for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        members = [layer for _, layer in group]
        found.append(str(members[0]) if len(members) == 1 else f"{members[0]}–{members[-1]}")
    return ", ".join(found)


def printed_twin() -> str:
    """What the code in the page prints, without its last line, which differs between machines."""
    code = re.search(r"```python\n(.*?)```", TWIN, re.S)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].replace("print(", "shown = str("), scope)
    return str(scope["shown"]).rsplit("\n", 1)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
