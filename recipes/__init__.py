"""The experiments of the field, as files that read like a methods section.

``from tracepatch.recipes import ioi`` gives the recipes of a file, to be applied to any model; ``tracepatch run ioi``
runs its experiment. A file that the command line can run has

* a docstring: the paper, the question, and what to expect;
* ``prompts(tokenizer, count, seed) -> tp.Pairs``;
* recipes, functions of a recording context decorated with ``@tp.recipe``;
* if it has more to say than their effects, ``conclude(model, pairs, metrics, results, path) -> list[str]``, which gives
  lines for the summary and may draw pictures.
"""
