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

The modules are a pipeline and import only upwards in this order: ``errors``, ``norms``, ``replacing``, ``writing``,
``masks``, ``taps``, ``tallies``, ``trace``, ``heads``, ``differences``, ``attention_weights``, ``contractions``,
``backward``, ``program``, ``weights``, ``models``, ``requests``, ``alignment``, ``sites``, ``shapes``, ``tokens``,
``spans``, ``checklist``, ``given``, ``prompts``, ``templates``, ``words``, ``tasks``, ``corruptions``,
``continuations``, ``constants``, ``portions``, ``sources``, ``references``, ``metrics``, ``measures``, ``calls``,
``modules``, ``probe``, ``experiments``, ``experts``, ``factors``, ``attention``, ``twins``, ``architecture``, ``rows``,
``fitting``, ``trials``, ``worlds``, ``draws``, ``grids``, ``recording``, ``jobs``, ``table``, ``costs``, ``plan``,
``reach``, ``profiles``, ``lowering``, ``entrance``, ``cautions``, ``packing``, ``surveys``, ``planner``, ``climb``,
``layout``, ``shadows``, ``firing``, ``meter``, ``traced``, ``surveying``, ``steps``, ``remote``, ``identity``,
``shipping``, ``entries``, ``journal``, ``executors``, ``forms``, ``checks``, ``literals``, ``readings``, ``spelling``,
``forwards``, ``averages``, ``scripts``, ``results``, ``combining``, ``resampling``, ``saves``, ``archive``,
``progress``, ``slopes``, ``estimators``, ``sides``, ``rowwise``, ``cells``, ``places``, ``estimates``, ``recipe``,
``studies``, ``joint``, ``verdicts``, ``knocking``, ``sweeps``, ``attribution``, ``sampling``, ``agreement``,
``doubts``, ``population``, ``findings``, ``auditing``, ``verifying``, ``drilling``, ``attending``, ``direct``,
``shelf``, ``saved_gradients``, ``capture``, ``graph``, ``edge_attribution``, ``panels``, ``canvas``, ``heatmaps``,
``marks``, ``points``, ``scatters``, ``verdict_pictures``, ``attention_pictures``, ``curves``, ``plots``, ``caveats``,
``report``, ``toys``, ``catalogue``, ``__main__``.
"""

__version__ = "0.1.0"  # before the imports: provenance records it

from tracepatch import corruptions, errors, models, plots, sweeps, tasks, toys
from tracepatch.architecture import Architecture, adopt
from tracepatch.archive import open_result, save_result
from tracepatch.attending import attention_attribution, value_flow
from tracepatch.attribution import attribute
from tracepatch.auditing import audit
from tracepatch.capture import gradients, open_gradients
from tracepatch.combining import agreement_over, by_corruption, concat, over_draws, over_pairs
from tracepatch.continuations import continued
from tracepatch.direct import direct_attribution
from tracepatch.drilling import drill
from tracepatch.edge_attribution import edge_rows, edges
from tracepatch.estimators import AtP, AtPStar, IntegratedGradients, RelP
from tracepatch.findings import Audit
from tracepatch.measures import (
    accuracy,
    attention,
    basket,
    continuation,
    direct_logit_diff,
    direction,
    duplicate_token,
    neuron,
    prefix_matching,
    previous_token,
    prob_diff,
)
from tracepatch.metrics import Metric, cross_entropy, kl, log_prob, logit, logit_diff, metric, prob, rank
from tracepatch.models import load
from tracepatch.plan import Plan, Status
from tracepatch.portions import Dictionary
from tracepatch.prompts import Pairs
from tracepatch.recipe import Patching, Recipe, patch, patching, recipe
from tracepatch.references import mean, resample
from tracepatch.report import write_report
from tracepatch.resampling import intervals
from tracepatch.saved_gradients import Gradients
from tracepatch.sites import COMPONENTS
from tracepatch.sources import vector
from tracepatch.studies import Study, study
from tracepatch.templates import Template
from tracepatch.tokens import one_token
from tracepatch.verifying import verified_top

__all__ = [
    "COMPONENTS",
    "Architecture",
    "AtP",
    "AtPStar",
    "Audit",
    "Dictionary",
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
    "Template",
    "accuracy",
    "adopt",
    "agreement_over",
    "attention",
    "attention_attribution",
    "attribute",
    "audit",
    "basket",
    "by_corruption",
    "concat",
    "continuation",
    "continued",
    "corruptions",
    "cross_entropy",
    "direct_attribution",
    "direct_logit_diff",
    "direction",
    "drill",
    "duplicate_token",
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
    "mean",
    "metric",
    "models",
    "neuron",
    "one_token",
    "open_gradients",
    "open_result",
    "over_draws",
    "over_pairs",
    "patch",
    "patching",
    "plots",
    "prefix_matching",
    "previous_token",
    "prob",
    "prob_diff",
    "rank",
    "recipe",
    "resample",
    "save_result",
    "study",
    "sweeps",
    "tasks",
    "toys",
    "value_flow",
    "vector",
    "verified_top",
    "write_report",
]
