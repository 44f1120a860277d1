"""Plants faults one at a time, in a copy of the package, and shows which test kills each.

Run it with ``python tests/mutants.py``. A fault that survives every test is an error: the tests would not notice it.
The faults are those that make plausible pictures of wrong numbers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """A fault: in a module, some text becomes another; the test modules that are asked to notice."""

    fault: str
    module: str
    text: str
    becomes: str
    tests: tuple[str, ...] = ("test_oracle.py", "test_laws.py", "test_planner.py")


MUTANTS = (
    Mutant("rows are shifted by one", "executors", "row_of=lambda number: number + 1", "row_of=lambda number: number"),
    Mutant("values belong to the row before", "executors", "zip(jobs, values[1:], strict=True):\n            self", "zip(jobs, values[:-1], strict=True):\n            self"),
    Mutant("one position is pruned too many", "lowering", "position < self.profile.first", "position <= self.profile.first"),
    Mutant("the first differing position is forgotten", "lowering", "return min(self.differing, default=self.length)", "return max(self.differing, default=self.length)"),
    Mutant("the stream entering the last layer is pruned", "lowering", 'CARRIED = frozenset({"embed", "resid_pre", "k", "v"})', 'CARRIED = frozenset({"embed", "k", "v"})'),
    Mutant("keys and values of the last layer are pruned", "lowering", 'CARRIED = frozenset({"embed", "resid_pre", "k", "v"})', 'CARRIED = frozenset({"embed", "resid_pre"})'),
    Mutant("keys and queries are exchanged", "architecture", "return Place(attention.path, \"input\", number + 1", "return Place(attention.path, \"input\", (2, 1, 3)[number]"),
    Mutant("a tensor is lost beside a value that has none", "layout", "                write.constant is None,\n", "", ("test_hunted.py",)),
    Mutant("later edits of single heads do not override", "trace", "            live[again] = live[again] + changed[cells]", "            pass", ("test_hunted.py",)),
    Mutant("what is read is pruned too", "lowering", "position <= reads[-1]", "position < reads[-1]"),
    Mutant("an edit that an earlier one has reached counts as inert", "lowering", "write.positions[i] >= live or not", "not"),
    Mutant("rows with equal edits on other pairs are one row", "planner", "        seen: dict[Any, int] = {}\n        jobs[pair] = []", "        jobs[pair] = []\n        seen = locals().get('seen') or {}"),
    Mutant("a patch does nothing", "trace", "            x[cells] = value", "            x[cells] = x[cells]"),
    Mutant("adding sets", "trace", "            x.index_put_(cells, value.expand(x[cells].shape), accumulate=True)", "            x[cells] = value"),
    Mutant("setting adds", "trace", "            x[cells] = value", "            x[cells] = x[cells] + value"),
    Mutant("a written value is not given back to the model", "trace", "        envoy.output = x if key is None else replaced(whole, key, x)", "        pass"),
    Mutant("clean and zero are exchanged", "trace", "        value = table[index].to(like.device)", "        value = table[index].to(like.device) * 0"),
    Mutant("factors are dropped", "trace", "value = value if factor == 1 else value * factor", "value = value"),
    Mutant("a head's bias counts for every head", "trace", "    found: torch.Tensor = project(flat) - project(torch.zeros_like(flat[..., :1, :] if flat.ndim > 2 else flat[:1]))", "    found: torch.Tensor = project(flat)"),
    Mutant("the post-norm after a head is ignored", "trace", "    return found if weight is None else found * weight", "    return found"),
    Mutant("the stream between attention and MLP leaves attention out", "trace", "        middle = entering + (x if scale == 1 else x * scale)", "        middle = entering + 0 * x"),
    Mutant("worlds are exchanged", "executors", "world_of={run: i for i, run in enumerate((p, w) for p in group.pairs for w in self.plan.worlds)}", "world_of={run: i ^ 1 for i, run in enumerate((p, w) for p in group.pairs for w in self.plan.worlds)}"),
    Mutant("pairs are exchanged", "layout", "worlds += [seats.world_of[job.pair, term.world]]", "worlds += [list(seats.world_of.values())[0] + (term.world == 'corrupted')]"),
    Mutant("heads are exchanged", "layout", "units += [write.units[j] for _, j in cells]", "units += [write.units[-1 - j] ^ 1 for _, j in cells]"),
    Mutant("attention counts before its post-norm", "probe", "        self.candidates = list({id(c): c for c in pool}.values())", "        self.candidates = pool[:1]", ("test_architecture.py",)),
    Mutant("a sum that does not close is accepted", "probe", "        if gap <= resolution(start.dtype) * end.abs().max().item():", "        if True:", ("test_architecture.py",)),
    Mutant("causality is taken on trust", "architecture", "        self.causal = all(", "        self.causal = True or all(", ("test_architecture.py",)),
    Mutant("the effect is counted from the other run", "results", "base = np.stack([measured.baselines[row.base] for row in rows])", "base = np.stack([measured.baselines['clean'] for row in rows])", ("test_results.py", "test_laws.py")),
    Mutant("a mean of ratios", "results", 'normalized=(mean["effect"] / gap).transpose(*mean["effect"].dims)', 'normalized=effects["normalized"].mean("pair").transpose(*mean["effect"].dims)', ("test_results.py",)),
    Mutant("what was not measured is 0", "results", "out = np.full((plan.pairs, *shape), empty, values.dtype)", "out = np.zeros((plan.pairs, *shape), values.dtype)", ("test_results.py", "test_recording.py")),
    Mutant("a pair too close to divide by is divided by", "results", "normalized = dataset[\"effect\"] / gap.where(usable)", "normalized = dataset[\"effect\"] / gap", ("test_results.py",)),
    Mutant("wrong and right answers are exchanged", "metrics", "return torch.stack([right - wrong, right, wrong], 1)", "return torch.stack([wrong - right, right, wrong], 1)", ("test_metrics.py",)),
    Mutant("the metric reads one position too early", "metrics", "LAST = Select((-1,), scalar=True)", "LAST = Select((-2,), scalar=True)", ("test_metrics.py", "test_oracle.py")),
    Mutant("padding counts as an answer", "metrics", "    return picked * (ids >= 0)[:, None]", "    return picked", ("test_metrics.py",)),
    Mutant("the BOS token stands there twice", "tokens", "return ids if policy.prefix and ids[: len(policy.prefix)] == policy.prefix else policy.prefix + ids", "return policy.prefix + ids", ("test_prompts.py",)),
    Mutant("a script counts the bias for every head", "spelling", " - project(torch.zeros_like(alone).flatten(-2))", "", ("test_scripts.py",)),
    Mutant("a script forgets multipliers when it writes", "spelling", "    value += _over(scale or place.scale)\n", "", ("test_scripts.py",)),
    Mutant("a script sets where a row adds", "forwards", "{'+=' if edit.add and not together else '='}", "=", ("test_scripts.py",)),
    Mutant("a script visits places in the order of the edits", "forwards", "sorted(visits, key=lambda visit: visit[0])", "visits", ("test_scripts.py",)),
    Mutant("heads and positions of a source fall together in a script", "forwards", " and len(positions) > 1", " and False", ("test_scripts.py",)),
    Mutant("a script writes masked keys", "spelling", "torch.where({allowed}, {name}, {found})", "{name}", ("test_scripts.py",)),
    Mutant("a script's norm keeps the mean", "spelling", "x = x - x.mean(-1, keepdim=True)", "pass", ("test_scripts.py",)),
    Mutant("a script reads all heads' streams in one row", "forwards", "None if same[i] else unit", "None", ("test_scripts.py",)),
    Mutant("a script forgets the world below an edited one", "forwards", "*self.standing(here.of), ", "", ("test_scripts.py",)),
    Mutant("both roles keep the old answers", "prompts", "            [*self.answer, *self.wrong],\n            [*self.wrong, *self.answer],", "            [*self.answer, *self.answer],\n            [*self.wrong, *self.wrong],", ("test_prompts.py",)),
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
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
        env = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(
            [*command, *(f"tests/{t}" for t in mutant.tests)],
            cwd=copy,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return None
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        return found[1] if found else done.stdout[-500:] + done.stderr[-500:]


def main() -> int:
    """Plants every fault, or those whose description holds the first argument."""
    chosen = [m for m in MUTANTS if len(sys.argv) < 2 or sys.argv[1] in m.fault]
    survivors = 0
    for mutant in chosen:
        test = killer(mutant)
        survivors += test is None
        print(
            f"{'SURVIVED' if test is None else 'killed  '}  {mutant.fault}\n              {test or 'by nothing'}",
            flush=True,
        )
    print(f"{len(chosen) - survivors} of {len(chosen)} faults are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
