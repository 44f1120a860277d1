"""A Hugging Face model, wrapped for tracing by nnsight: loading, and what the rest of tracepatch asks of a model.

Facts about nnsight 0.8 and transformers 5 that loading has to respect, all of them handled here and nowhere else:

* With transformers 5.23 nnsight cannot look up a tokenizer by repo id when it builds a model without weights. So
  weights and tokenizer are loaded with transformers, and nnsight wraps the finished module.
* A module from ``from_config`` starts in training mode, where dropout makes every measurement noise.
* ``from_pretrained`` fills weights that a folder lacks with random numbers and only logs it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import nnsight
import torch
import transformers
from nnsight import TransformersModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tracepatch.errors import ModelError, listing
from tracepatch.weights import bringer_of, brought, require_dtype, untied, weightless

Model: TypeAlias = Any  # an nnsight TransformersModel; nnsight ships no types

_NAMES: WeakKeyDictionary[Model, str] = WeakKeyDictionary()
_REMOTE: WeakKeyDictionary[Model, bool | str] = WeakKeyDictionary()
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_REPO_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def load(
    model: str | os.PathLike[str] | torch.nn.Module | Model,
    tokenizer: Any = None,
    *,
    remote: bool | str = False,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    name: str = "",
    **options: Any,
) -> Model:
    """A model that tracepatch can patch, and that you can trace with nnsight.

    Args:
        model: A Hugging Face repo id, a folder with a model, a Hugging Face module, or an nnsight model.
        tokenizer: The tokenizer, or its repo id or folder. Needed with a Hugging Face module; otherwise it comes with
            the model.
        remote: Run on a server instead of here: ``True`` for NDIF, or the URL of a server of your own. The model is
            then a repo id; only its config and tokenizer are loaded.
        dtype: ``"float32"``, ``"bfloat16"``, … or a torch dtype. Without it, the checkpoint's own.
        device_map: As in transformers: ``"auto"``, ``"cuda"``, … (needs accelerate).
        name: What to call the model in results; its repo id or folder otherwise.
        options: Anything else ``from_pretrained`` takes (``revision``, ``attn_implementation``, ``trust_remote_code``,
            …).

    Returns:
        An nnsight ``TransformersModel`` in eval mode.

    Raises:
        ModelError: No model there, no such dtype, no next-token logits, weights missing, or no tokenizer.
    """
    remote = _server(remote)
    require_dtype(dtype)
    if isinstance(model, TransformersModel):
        loaded = model
    elif isinstance(model, torch.nn.Module):
        loaded = _wrap(model, tokenizer)
    elif remote:
        source = os.fspath(model)
        if _reads_and_writes(_config(source, options)):
            raise ModelError(
                f"{source!r} is an encoder–decoder model, and those run here only: load it without remote=."
            )
        loaded = TransformersModel(
            source,
            task="text-generation",
            tokenizer=_tokenizer(tokenizer or source, options),
            **({} if dtype is None else {"dtype": dtype}),
            **options,
        )
    else:
        loaded = _from_pretrained(os.fspath(model), tokenizer, dtype, device_map, options)
    if remote:
        _REMOTE[loaded] = remote
    if name:
        _NAMES[loaded] = name
    module_of(loaded).eval()
    return loaded


def _server(remote: bool | str) -> bool | str:
    """Where to run, as nnsight takes it."""
    if isinstance(remote, bool) or remote == "ndif":
        return bool(remote)
    if not isinstance(remote, str) or not remote.startswith(("http://", "https://")):
        raise ModelError(f"remote is True for NDIF, or the URL of a server ('http://host:8001'), not {remote!r}.")
    return remote.rstrip("/")


def _from_pretrained(source: str, tokenizer: Any, dtype: Any, device_map: Any, options: dict[str, Any]) -> Model:
    config = _config(source, options)
    both = _reads_and_writes(config)
    if not both:
        _refuse_encoders(config, source)
    auto = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
    given = {"dtype": dtype, "device_map": device_map}
    try:
        with _quiet_bars():
            module, info = auto.from_pretrained(
                source, output_loading_info=True, **{k: v for k, v in given.items() if v is not None}, **options
            )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source!r} could not be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{source!r} lacks {len(missing)} weights of {type(module).__name__}; transformers would fill them with "
            f"random numbers.\n{listing(missing)}\nLoad a checkpoint that was saved with its language-model head."
        )
    return _wrap(module, tokenizer or _tokenizer(source, options))


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without transformers' progress bars where nobody watches a terminal."""
    hide = not sys.stderr.isatty() and transformers.utils.logging.is_progress_bar_enabled()
    if hide:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers.utils.logging.enable_progress_bar()


def _config(source: str, options: dict[str, Any]) -> Any:
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        kind = "a folder without config.json" if path.is_dir() else "a file"
        raise ModelError(
            f"{source!r} is not a model: it is {kind}. Pass a folder written by save_pretrained (config.json, weights, "
            "tokenizer) or a Hugging Face repo id."
        )
    if not path.exists() and not _REPO_ID.fullmatch(source):
        raise ModelError(f"There is no folder {source!r}, and it is no Hugging Face repo id ('organisation/name').")
    try:
        return AutoConfig.from_pretrained(
            source, **{k: v for k, v in options.items() if k in ("revision", "trust_remote_code", "token", "cache_dir")}
        )
    except (OSError, ValueError, KeyError) as error:
        what = "the folder" if path.exists() else "the repo id (there is no such folder)"
        hint = "" if path.exists() else " Offline, load a folder, or one of the bundled toys: tp.toys.load('gpt2')."
        raise ModelError(f"No model could be read from {what} {source!r}: {_first_line(error)}{hint}") from error


def _refuse_encoders(config: Any, source: str) -> None:
    kind, names = config.model_type, list(getattr(config, "architectures", None) or [])
    decoders = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not any(name in decoders for name in names):
        raise ModelError(
            f"{source!r} is an encoder ({', '.join(names) or kind}): it has no next-token logits to read a "
            "metric from. "
            "Load a causal language model."
        )


def _reads_and_writes(config: Any) -> bool:
    """Whether a checkpoint is an encoder–decoder model: a type may have both kinds, as Bart has."""
    kind, names = config.model_type, getattr(config, "architectures", None) or []
    known = kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder
    return known and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) not in names


def _tokenizer(source: Any, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    path = Path(source)
    # Without these files transformers makes up an empty tokenizer for some model types.
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"The folder {str(source)!r} holds no tokenizer: pass tokenizer= (a tokenizer, a repo id or a folder)."
        )
    try:
        return AutoTokenizer.from_pretrained(
            source, **{k: v for k, v in options.items() if k in ("revision", "trust_remote_code", "token", "cache_dir")}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"No tokenizer could be read from {source!r}: {_first_line(error)} Pass tokenizer=."
        ) from error


def _wrap(module: torch.nn.Module, tokenizer: Any) -> Model:
    if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
        raise ModelError(
            f"{type(module).__name__} has no language-model head, so it gives no logits to read a metric from. "
            "Pass a causal language model, such as AutoModelForCausalLM gives."
        )
    encodes = module.config.is_encoder_decoder
    if encodes and not {"input_ids", "decoder_input_ids"} <= set(inspect.signature(module.forward).parameters):
        raise ModelError(
            f"{type(module).__name__} is an encoder–decoder model that does not take input_ids and decoder_input_ids; "
            "tracepatch patches language models that read and write tokens."
        )
    if tokenizer is None:
        name = getattr(module, "name_or_path", "")
        if not name:
            raise ModelError(f"A {type(module).__name__} module comes without a tokenizer: pass tokenizer=.")
        tokenizer = name
    if bringer_of(module.get_input_embeddings()) is not None:
        raise ModelError(
            "device_map leaves the token embedding on a disk or a CPU, to be brought whenever it is needed: give it a "
            "place of its own. Any other module may stand elsewhere."
        )
    if lost := untied(module):
        raise ModelError(
            f"device_map parts weights that are one: {', '.join(lost)} shares the token embedding's, and would not be "
            "found on the disk where it is left. Give both the same place."
        )
    # Without weights it would be moved off the meta device, which fails.
    device = {"device": "meta"} if weightless(module) else {}
    # The task decides which preprocessors nnsight keeps, no more; "text-generation" complains about encoders.
    task = "feature-extraction" if encodes else "text-generation"
    return TransformersModel(module, task=task, tokenizer=_tokenizer(tokenizer, {}), **device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def module_of(model: Model) -> PreTrainedModel:
    """The Hugging Face module inside an nnsight model."""
    return model._module


def device_of(model: Model) -> torch.device:
    """Where tokens go in; for a model without weights here, an accelerator, as servers have."""
    module = module_of(model)
    return torch.device("cuda") if weightless(module) else module.get_input_embeddings().weight.device


def room_of(model: Model) -> int | None:
    """Bytes that plans for a model may take: half of what its accelerator has besides it; ``None`` elsewhere.

    It counts what there is, not what is free just now, so that the same sweep is the same plan tomorrow.
    """
    device = device_of(model)
    if weightless(module_of(model)) or device.type != "cuda":
        return None
    own = sum(p.numel() * p.element_size() for p in module_of(model).parameters() if p.device == device)
    return max(1 << 28, int(torch.cuda.get_device_properties(device).total_memory - own) // 2)


def remote_of(model: Model) -> bool | str:
    """Where the model runs: ``False`` for here, ``True`` for NDIF, or the URL of a server."""
    return _REMOTE.get(model, False)


def require_ready(model: Model) -> None:
    """Refuses a model whose measurements would be noise.

    Raises:
        ModelError: It is not an nnsight model, or some module is in training mode.
    """
    if not isinstance(model, TransformersModel):
        hint = (
            "the model comes first, then the pairs" if hasattr(model, "both_roles") else "pass it through tp.load first"
        )
        raise ModelError(f"{type(model).__name__} is not a traced model: {hint}.")
    training = [name or type(module_of(model)).__name__ for name, m in module_of(model).named_modules() if m.training]
    if training:
        raise ModelError(
            f"{len(training)} modules are in training mode (the first: {training[0]}), so dropout and the "
            "like may make "
            "every forward different. Call model.eval()."
        )


def require_weights(model: Model) -> None:
    """Refuses to run a model that has no weights here and is on no server.

    Raises:
        ModelError: So it is.
    """
    if weightless(module_of(model)) and not remote_of(model):
        raise ModelError(
            f"{type(module_of(model)).__name__} has no weights here: it can be planned on, not run. Load it with its "
            "weights, or run it on a server with tp.load(…, remote=True)."
        )


def name_of(model: Model) -> str:
    """What to call the model in results: the name it was given, else its repo id or folder, else its class."""
    if model in _NAMES:
        return _NAMES[model]
    module, name = module_of(model), source_of(model)
    return Path(name).name if name and Path(name).is_dir() else name or type(module).__name__


def source_of(model: Model) -> str:
    """The repo id or folder that the model came from; empty if it was made in memory."""
    return str(getattr(module_of(model), "name_or_path", "") or "")


def limits(model: Model) -> tuple[int, int, int | None]:
    """Ids that the model takes, ids that it scores, and positions that it has; ``None`` where they are not a table."""
    module = module_of(model)
    taken, scored = module.get_input_embeddings(), module.get_output_embeddings()
    longest = getattr(module.config, "max_position_embeddings", None)
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding) and m is not taken]
    # OPT's table has two rows more than it has positions.
    bounded = longest is not None and any(m.num_embeddings - longest in (0, 2) for m in tables)
    return len(taken.weight), len(scored.weight), longest if bounded else None


def fingerprint(model: Model) -> str:
    """A short hash of the weights: names, shapes, dtypes and 256 evenly spaced values of every parameter."""
    digest = hashlib.blake2b(digest_size=8)
    module = module_of(model)
    for name, tensor in sorted((module.state_dict() | brought(module)).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type == "meta":
            continue
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)]
        digest.update(picked.to("cpu", torch.float64).numpy().tobytes() if not picked.is_complex() else b"complex")
    return digest.hexdigest()


def start_token(model: Model) -> int | None:
    """The id that a decoder's text starts with where an encoder reads the prompts; ``None`` where there is none.

    Raises:
        ModelError: The model has an encoder, and its config does not say what the decoder starts with.
    """
    module = module_of(model)
    if not module.config.is_encoder_decoder:
        return None
    configs = (module.config, getattr(module, "generation_config", None))
    found = next((i for c in configs if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if found is None:
        raise ModelError(
            f"{type(module).__name__} does not say what its decoder starts with: set "
            "model.config.decoder_start_token_id before passing the module to tp.load."
        )
    return int(found)


@contextmanager
def eager_attention(module: PreTrainedModel) -> Iterator[None]:
    """The module with its attention computed step by step, where transformers can switch it; put back afterwards."""
    before = module.config._attn_implementation
    switched = module._can_set_attn_implementation() and before != "eager"
    if switched:
        module.set_attn_implementation("eager")
    try:
        yield
    finally:
        if switched:
            module.set_attn_implementation(before)


def versions() -> dict[str, str]:
    """The versions that decide a result, for its provenance."""
    import tracepatch

    return {
        "tracepatch": tracepatch.__version__,
        "nnsight": nnsight.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
