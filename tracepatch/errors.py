"""What tracepatch raises on purpose.

Every error names what is wrong, what would be right and the next step, lists all offenders at once, and is raised at
the call that was wrong::

    TracepatchError
    ├── ModelError          the model cannot be loaded, or cannot be patched as it is
    │   └── ArchitectureError   the probe could not prove where an activation lives
    ├── PromptError         pairs that cannot be compared, answers that are not one token
    ├── SiteError           a component, layer, position, head or neuron that does not exist here
    │   └── ComponentError      the component is unknown, or not offered on this model (also an AttributeError)
    ├── RecipeError         an edit outside a row, a label that contradicts its edits, an empty recipe
    ├── MetricError         a metric of the wrong shape, or without what it needs
    ├── MeasurementError    a forward gave NaN or inf, or an edit never fired
    ├── ServerError         a server cannot be reached, or does not do what it is asked
    └── ResultError         a file that is not a result, results that do not fit together

``MeasurementWarning`` is for numbers that may be right but should be looked at: patches that change nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 12  # offenders listed in full; the rest are counted


class TracepatchError(Exception):
    """Everything tracepatch raises on purpose."""


class ModelError(TracepatchError):
    """The model cannot be loaded, or cannot be patched in its present state."""


class ArchitectureError(ModelError):
    """The probe could not prove where the activations of a layer live."""


class PromptError(TracepatchError):
    """Prompts that cannot be compared, or answers that are not one token."""


class SiteError(TracepatchError):
    """A layer, position, head or neuron that does not exist here."""


class ComponentError(SiteError, AttributeError):
    """An unknown component, or one that this model does not have."""


class RecipeError(TracepatchError):
    """A recipe that does not say what it seems to say."""


class MetricError(TracepatchError):
    """A metric of the wrong shape, or one that lacks what it reads."""


class MeasurementError(TracepatchError):
    """A measurement that must not be trusted: NaN, inf, or an edit that never fired."""


class ServerError(TracepatchError):
    """A server that cannot be reached, does not run the model, or does not do what it is asked."""


class MeasurementWarning(UserWarning):
    """Numbers that should be looked at before they are believed."""


class ResultError(TracepatchError):
    """A file that is not a result, or results that do not fit together."""


def plural(count: int, word: str) -> str:
    """A count with its noun: ``1 token``, ``2 tokens``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def listing(offenders: Sequence[str]) -> str:
    """The offenders, one to an indented line; beyond the first dozen they are counted."""
    lines = [f"  {line}" for line in offenders[:SHOWN]]
    if len(offenders) > SHOWN:
        lines.append(f"  … and {len(offenders) - SHOWN} more")
    return "\n".join(lines)
