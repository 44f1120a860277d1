"""The experiments of the field, as files that read like a methods section.

``from tracepatch.recipes import ioi`` gives the parts of a file, to be applied to any model; ``tracepatch run ioi``
runs its experiment. A file that the command line can run has

* a docstring: the paper, the question, and what to expect;
* ``prompts(tokenizer, count, seed) -> tp.Pairs``;
* parts: recipes, functions of a recording context decorated with ``@tp.recipe``, and studies, functions ``(model,
  pairs, metric) -> result`` decorated with ``@tp.study``, for what is more than rows of patches;
* if it has more to say than their results, ``conclude(model, pairs, metrics, results, path) -> list[str]``, which gives
  lines for the summary and may draw pictures, named from ``path`` on; and ``conclude_all(results, folder)``, which says
  what all models together show. ``results`` are those of each part by its name, at the first metric;
* where the four toys of ``ioi`` are not the models to try it on, ``TOYS``, the names of those that are; and where the
  logit difference is not what to read, ``METRIC``: a metric such as ``tp.prob_diff``, one of your own, or several.

A model without the behaviour is left out, with the check of the prompts that it fails (``pairs.check(model)``), unless
``--anyway`` is passed; so is a part for which a model lacks a component.
"""
