"""Where in this model does that behaviour live? Exact, planned and labelled activation patching on Hugging Face models.

::

    import tracepatch as tp

    model = tp.load("openai-community/gpt2")
    pairs = tp.Pairs(
        clean=["When John and Mary went to the store, John gave the bag to"],
        corrupted=["When John and Mary went to the store, Mary gave the bag to"],
        answer=[" Mary"],
        wrong=[" John"],
    )
    effects = tp.patch(model, pairs, "resid_pre", metric=tp.logit_diff)
    tp.plots.heatmap(effects)

The modules are a pipeline and import only upwards in this order: ``errors``, ``norms``, ``writing``, ``masks``,
``taps``, ``trace``, ``heads``, ``differences``, ``attention_weights``, ``contractions``, ``backward``, ``program``,
``weights``, ``models``, ``requests``, ``sites``, ``tokens``, ``checklist``, ``prompts``, ``sources``, ``metrics``,
``calls``, ``modules``, ``probe``, ``experiments``, ``experts``, ``factors``, ``attention``, ``twins``,
``architecture``, ``rows``, ``trials``, ``worlds``, ``recording``, ``jobs``, ``table``, ``costs``, ``plan``, ``reach``,
``lowering``, ``entrance``, ``packing``, ``planner``, ``climb``, ``layout``, ``shadows``, ``firing``, ``meter``,
``traced``, ``steps``, ``remote``, ``identity``, ``shipping``, ``entries``, ``journal``, ``executors``, ``forms``,
``checks``, ``literals``, ``readings``, ``spelling``, ``forwards``, ``scripts``, ``results``, ``combining``,
``resampling``, ``saves``, ``archive``, ``progress``, ``slopes``, ``estimators``, ``sides``, ``rowwise``, ``cells``,
``estimates``, ``recipe``, ``studies``, ``attribution``, ``sampling``, ``agreement``, ``doubts``, ``population``,
``findings``, ``auditing``, ``verifying``, ``drilling``, ``attending``, ``direct``, ``shelf``, ``saved_gradients``,
``capture``, ``graph``, ``edge_attribution``, ``panels``, ``canvas``, ``heatmaps``, ``marks``, ``scatters``,
``attention_pictures``, ``curves``, ``plots``, ``caveats``, ``report``, ``catalogue``, ``toys``, ``__main__``.
"""

__version__ = "0.1.0"  # before the imports: provenance records it

from tracepatch import errors, models, plots, toys
from tracepatch.architecture import Architecture, adopt
from tracepatch.archive import open_result, save_result
from tracepatch.attending import attention_attribution, value_flow
from tracepatch.attribution import attribute
from tracepatch.auditing import audit
from tracepatch.capture import gradients, open_gradients
from tracepatch.combining import concat, over_pairs
from tracepatch.direct import direct_attribution
from tracepatch.drilling import drill
from tracepatch.edge_attribution import edge_rows, edges
from tracepatch.estimators import AtP, AtPStar, IntegratedGradients, RelP
from tracepatch.findings import Audit
from tracepatch.metrics import Metric, cross_entropy, kl, log_prob, logit, logit_diff, metric, prob, rank
from tracepatch.models import load
from tracepatch.plan import Plan, Status
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching, Recipe, patch, patching, recipe
from tracepatch.report import write_report
from tracepatch.resampling import intervals
from tracepatch.saved_gradients import Gradients
from tracepatch.sites import COMPONENTS
from tracepatch.studies import Study, study
from tracepatch.tokens import one_token
from tracepatch.verifying import verified_top

__all__ = [
    "COMPONENTS",
    "Architecture",
    "AtP",
    "AtPStar",
    "Audit",
    "Gradients",
    "IntegratedGradients",
    "Metric",
    "Pairs",
    "Patching",
    "Plan",
    "Recipe",
    "RelP",
    "Status",
    "Study",
    "adopt",
    "attention_attribution",
    "attribute",
    "audit",
    "concat",
    "cross_entropy",
    "direct_attribution",
    "drill",
    "edge_rows",
    "edges",
    "errors",
    "gradients",
    "intervals",
    "kl",
    "load",
    "log_prob",
    "logit",
    "logit_diff",
    "metric",
    "models",
    "one_token",
    "open_gradients",
    "open_result",
    "over_pairs",
    "patch",
    "patching",
    "plots",
    "prob",
    "rank",
    "recipe",
    "save_result",
    "study",
    "toys",
    "value_flow",
    "verified_top",
    "write_report",
]
