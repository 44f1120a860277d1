"""A report is one file that needs no other, says what was run with its own numbers, and which caveats apply."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import ioi_pairs, toy
from test_pictures import estimate
from test_plots import result

import tracepatch as tp
from tracepatch.caveats import SOURCES, caveats_of
from tracepatch.checklist import Check, Checklist
from tracepatch.errors import ResultError
from tracepatch.toys import tasks

VOID = ("meta", "img", "br", "link", "input", "hr")


class Page(HTMLParser):
    """The elements of a page, its text, and whether its tags close each other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(word for tag, word in self.words if tag != "style").split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [word for name, word in self.words if name == tag]


def abc(count: int = 10) -> tp.Pairs:
    made = tasks.ioi(count, templates=tasks.ABBA[:1], corruption="abc")
    return tp.Pairs(made.clean, made.corrupted, made.answer, made.wrong, name="three other names")


@pytest.fixture(scope="module")
def run() -> dict[str, list[xr.Dataset]]:
    """An experiment of two parts on two models."""
    return {
        "heads": [tp.patch(toy(name), abc(), "z") for name in ("gpt2", "llama")],
        "stream": [tp.patch(toy(name), abc(), "resid_pre") for name in ("gpt2", "llama")],
    }


@pytest.fixture(scope="module")
def page(run: dict[str, list[xr.Dataset]], tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    checklists = {f"toy-{name}": abc().check(toy(name)) for name in ("gpt2", "llama")}
    made = tp.write_report(
        path,
        run,
        title="Who is given <the bag>?",
        about="The *first* paragraph\nwith ``code``.\n\nThe second & last.",
        texts={"heads": "Each head.\n\nAt all positions."},
        checklists=checklists,
        left_out={"experts": ["Left out on toy-gpt2. There are none."]},
        command="tracepatch run mine.py --report",
    )
    assert made == path
    return Page(path)


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    images = page.all("img")
    assert len(images) == 2, "a picture for each part, of both models"
    for image in images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert image["alt"]
    style = "".join(page.inside("style"))
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    links = [str(link["href"]) for link in page.all("a")]
    assert all(link.startswith("#") or link in SOURCES.values() for link in links)
    anchors = {attrs.get("id") for _, attrs in page.tags}
    assert all(link[1:] in anchors for link in links if link.startswith("#"))
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    rest = re.sub(r"data:image/png;base64,[^\"]*", "", page.source)
    assert set(re.findall(r"https?://[^\s\"'<>]+", rest)) <= set(SOURCES.values())


def test_what_was_run_is_said(page: Page, run: dict[str, list[xr.Dataset]]) -> None:
    assert "Who is given <the bag>?" in page.inside("h1")[0]
    assert "first" in page.inside("em")
    assert "code" in page.inside("code")
    assert "The second & last." in page.inside("p")
    assert "At all positions." in page.inside("p")
    assert "Left out on toy-gpt2. There are none." in page.inside("p")
    for several in run.values():
        for one in several:
            assert one.attrs["plan"] in page.inside("pre")
            assert one.attrs["fingerprint"] in page.text
    assert "tracepatch run mine.py --report" in page.inside("pre")
    assert "denoising: clean into the corrupted run" in page.text
    assert "three other names (toy-gpt2, toy-llama)" in page.text
    for model in ("gpt2", "llama"):
        for check in abc().check(toy(model)).checks:
            assert check.sentence in page.text
    first = run["heads"][0]
    assert " ".join(str(first["clean_prompt"].values[9]).split()) in page.text.replace(" , ", ", ")
    marked = page.inside("mark")
    assert len(marked) == 10 * 2 * 3, "three names of each prompt differ"
    assert marked[:3] == re.findall(r"[A-Z][a-z]+", str(first["clean_prompt"].values[0]))[1:]
    means = [f"{float(first[world].mean()):+.2f}".replace("-", "−") for world in ("clean", "corrupted")]
    assert all(value in page.inside("td") or value[:5] in page.text for value in means)


def test_tables_have_the_results_own_numbers(page: Page, run: dict[str, list[xr.Dataset]]) -> None:
    cells = page.inside("td")
    for one in run["heads"]:
        sure = tp.intervals(one, correction="holm")
        strongest = abs(sure["normalized"]).stack(at=("layer", "head")).sortby(lambda a: -a)["at"].values[:3]
        for layer, head in strongest:
            cell = sure.sel(layer=layer, head=head)
            at = cells.index(f"L{layer}H{head}", cells.index(f"L{layer}H{head}"))
            rows = [cells[i : i + 5] for i, text in enumerate(cells) if text == f"L{layer}H{head}"]
            wanted = [
                f"L{layer}H{head}",
                signed(cell["normalized"]),
                f"[{signed(cell['normalized_low'])}, {signed(cell['normalized_high'])}]",
                signed(cell["effect"]),
                f"{float(cell['p_holm']):.2g}",
            ]
            assert wanted in rows, at
    best = tp.over_pairs(run["heads"][0])["normalized"]
    assert f": {signed(best.max())} [" in page.text


def signed(value: Any) -> str:
    number = float(value)
    return f"{number:+.{3 if abs(number) < 10 else 2}f}".replace("-", "−")


def test_texts_cannot_break_the_page(tmp_path: Path) -> None:
    gpt2 = toy("gpt2")
    pairs = tp.Pairs(
        ["When John and Mary went to the store, John gave the bag to"],
        ["When John and Mary went to the store, Mary gave the bag to"],
        [" Mary"],
        [" John"],
        name="<script>alert(1)</script> & 'co'",
    )
    one = tp.patch(gpt2, pairs, "z")
    one["clean_prompt"] = ("pair", ["<b>bold</b> & <i>"])
    found = Page(tp.write_report(tmp_path / "r.html", {"<x>": one}, command="a <b> c"))
    assert "<b>bold</b>" in found.text
    assert "<script>alert(1)</script> & 'co'" in found.text
    assert not found.all("script")
    assert not found.all("b")
    assert found.all("h2")
    assert "Few pairs" in found.text, "a single pair has no interval, and a report"
    assert "95 % interval" not in found.inside("th")


def test_several_metrics_a_tree_and_what_has_no_picture(tmp_path: Path) -> None:
    gpt2, pairs = toy("gpt2"), ioi_pairs(2)
    with tp.patching(gpt2, pairs) as p:
        with p.row(name="one"):
            p.corrupted.z[0, :, 1] = p.clean.z[0, :, 1]
        for layer in range(2):
            with p.row(layer=layer):
                p.corrupted.attn_out[layer] = p.clean.attn_out[layer]
    several = tp.patch(gpt2, pairs, "z", [tp.logit_diff, tp.prob])
    flat = several["effect"].isel(metric=0, drop=True)
    cube = several.isel(metric=0).assign(effect=flat.expand_dims(a=[0, 1], b=[0, 1]).transpose("pair", ...))
    cube = cube.drop_vars(["normalized", "status"])
    found = Page(tp.write_report(tmp_path / "r.html", {"tree": p.run(), "both": several, "cube": cube}))
    titles = " ".join(found.inside("h2"))
    assert "tree, by name" in titles
    assert "tree, by layer" in titles
    assert len(found.all("img")) == 4
    assert "toy-gpt2, prob: largest effects" in found.text
    assert "No picture of cube: 'effect' has the dims" in found.text


def test_several_corruptions_of_a_prompt_are_rows_of_their_own(tmp_path: Path) -> None:
    one = tp.tasks.ioi(toy("gpt2").tokenizer, 4, corruption="abc")
    own = tp.Pairs(one.clean, one.corrupted, one.answer, one.wrong, corruption="names")
    other = tp.Pairs(one.clean[:2], one.corrupted[2:], one.answer[:2], one.wrong[:2], corruption="others")
    effects = tp.by_corruption(tp.patch(toy("gpt2"), own + other, "attn_out", by="layer"))
    path = tp.write_report(tmp_path / "several.html", {"attention": [effects]}, title="Several")
    cells = r'<td class="number">(\d)</td><td class="prompt">(.*?)</td><td>.*?</td><td class="prompt">(.*?)</td>'
    rows = re.findall(cells, Page(path).source, re.S)
    said = [(n, *(re.sub("<[^>]+>", "", cell).strip() for cell in cells)) for n, *cells in rows]
    wanted = [(i, own.clean[i], own.corrupted[i]) for i in range(4)]  # type: ignore[index]
    wanted += [(i, own.clean[i], own.corrupted[2 + i]) for i in range(2)]  # type: ignore[index]
    assert {(int(n), clean, corrupted) for n, clean, corrupted in said} >= set(wanted)


def test_a_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no results"):
        tp.write_report(tmp_path / "r.html", {})
    with pytest.raises(ResultError, match="no tracepatch result"):
        tp.write_report(tmp_path / "r.html", {"a": [xr.Dataset()]})
    assert not (tmp_path / "r.html").exists()


# ------------------------------------------------------------------------------------------------------------ caveats


def told(*results: xr.Dataset, **checklists: Checklist) -> dict[str, str]:
    parts = {f"part {i}": [one] for i, one in enumerate(results)}
    return {caveat.about: caveat.text for caveat in caveats_of(parts, checklists)}


def many(count: int = 8, base: str = "corrupted", **attrs: Any) -> xr.Dataset:
    """A result of several pairs that share nothing."""
    data = result(("layer", "head"), (4, 6), base=base)
    data = xr.concat([data.isel(pair=[i % 3]) for i in range(count)], "pair", data_vars="all", coords="minimal")
    data["normalized"] = data["normalized"].clip(-0.9, 0.9).assign_attrs(data["normalized"].attrs)
    data["effect"] = (data["normalized"] * (data["clean"] - data["corrupted"])).assign_attrs(data["effect"].attrs)
    return data.assign_coords(pair=np.arange(count)).assign_attrs(attrs)


def test_caveats_of_the_direction() -> None:
    assert "Sufficient, not necessary" in told(many())
    assert "run noising too" in told(many())["One direction"]
    noising = told(many(base="clean"))
    assert "Necessary, not sufficient" in noising
    assert "Sufficient, not necessary" not in noising
    assert "run denoising too" in noising["One direction"]
    assert "One direction" not in told(many(), many(base="clean"))
    assert "sign turned" in told(many(pairs="set, both roles"))["One direction"]
    zero = told(many(base="clean", written="0"))
    assert "Zero is not neutral" in zero
    assert "One direction" not in zero
    assert "Zero is not neutral" not in told(many(base="clean", written="1.0"))
    assert "Noise" in told(many(plan="  world        noised: embed += gaussian(3.0)"))
    assert "Noise" not in told(many())


def test_caveats_of_pairs_and_numbers() -> None:
    assert "3 pairs" in told(many(3))["Few pairs"]
    assert "8 pairs: an odd one" in told(many(8))["Number of pairs"]
    assert not {"Few pairs", "Number of pairs"} & set(told(many(20)))
    roles = {"clean_prompt": ("pair", list("abcdefgh")), "corrupted_prompt": ("pair", list("badcfehg"))}
    assert "8 pairs in 4 clusters" in told(many(8).assign_coords(roles))["Few pairs"]
    assert "24 cells have a number" in told(many())["Many cells"]
    assert "Many cells" not in told(many(3))
    assert "Above 1" not in told(many())
    more = many()
    more["effect"][:, 1, 2] = 1.5 * (more["clean"] - more["corrupted"])
    assert "1.50 (part 0, toy)" in told(more)["Above 1"]
    assert "Ratio of means" in told(many())
    assert "Ratio of means" not in told(many().drop_vars("normalized"))
    floor = many(noise_floor='{"logit_diff": 0.000012, "logit_diff.answer": 9}')
    assert "1e-5 logits on toy." in told(floor)["Noise floor"]
    assert "in 2 pairs: 1, 4" in told(many(pairs_too_close="[1, 4]"))["No difference"]
    waiting = many()
    waiting["status"][0, 0, 0] = tp.Status.PENDING
    assert "1 cell of" in told(waiting)["Not complete"]
    assert "Unchecked" in told(many(checks="off"))
    assert "No effect at all" in told(many(checks="…; patches change nothing: all 8 rows unchanged"))


def test_caveats_of_the_metric() -> None:
    for name in ("logit_diff", "logit", "prob", "log_prob", "kl", "rank", "cross_entropy"):
        assert f"Metric {name}" in told(many(metrics=f'{{"{name}": ""}}'))
    assert "metric of your own" in told(many(metrics='{"mine": ""}'))["Metric mine"]
    unsure = many(metrics='{"prob": ""}')
    assert "probability of −" not in told(unsure).get("Near-zero baseline", "")
    low = unsure.assign(corrupted=unsure["corrupted"] * 0 + 0.003)
    assert "0.003" in told(low)["Near-zero baseline"]
    assert "Near-zero baseline" not in told(unsure.assign(corrupted=unsure["corrupted"] * 0 + 0.3))


def test_caveats_of_what_is_shown() -> None:
    assert "Estimates" in told(estimate(many()))
    assert "Estimates" not in told(many())
    stream = result().assign_attrs(component="resid_pre, attn_out")
    assert "By construction" in told(stream)
    assert "By construction" not in told(many())
    note = Checklist((Check("ok", "fine"), Check("note", "the model prefers the answer in 3 of 8 pairs")))
    assert told(many(), gpt2=note)["Prompts"] == "gpt2: the model prefers the answer in 3 of 8 pairs."
    assert "Prompts" not in told(many(), gpt2=Checklist((Check("ok", "fine"),)))
    found = caveats_of({"a": [many()], "b": [many(base="clean")]})
    parts = {caveat.about: caveat.parts for caveat in found}
    assert parts["Sufficient, not necessary"] == ("a",)
    assert parts["What patching shows"] == ("a", "b")
    assert all(source in SOURCES for caveat in found for source in caveat.sources)
