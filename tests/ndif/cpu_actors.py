"""What the server runs models with here: on CPUs, trusted or in the sandbox as the API key says.

Imported by the server's own processes only, from its own environment. ndif 0.1.2 expects accelerators and nnsight 0.8.0;
what is changed about it is here, and none of it is in the way of a request.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import ndif.services.ray.sandbox.host as sandbox
import ray
import torch
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable

TRUSTED = "trusted"  # the API key of requests that run in the model's process


def _without_trust(name: str) -> classmethod[Any, Any, Any]:
    """A question about a checkpoint, without an argument that nnsight 0.8.1 takes from the model's key."""
    asked = getattr(Remotable, name).__func__

    def answer(cls: Any, *args: Any, trust_remote_code: Any = None, **kwargs: Any) -> Any:
        return asked(cls, *args, **kwargs)

    return classmethod(answer)


for _name in ("describe_checkpoint", "max_tp_size"):
    if "kwargs" not in inspect.signature(getattr(Remotable, _name)).parameters:
        setattr(Remotable, _name, _without_trust(_name))

# Sandboxes get few variables; without this one they would ask the real model hub.
sandbox.RUNNER_ENV += ("HF_ENDPOINT",)


class _OnCPU(SandboxModelDeployment):
    """A model in this process, and a pool of others for code that is not trusted."""

    CACHEABLE = False  # moving weights aside is for accelerators

    def load_from_disk(self) -> Any:
        """The model, with frozen weights, as on an accelerator."""
        torch.cuda.synchronize = lambda *_, **__: None  # asked for after every request
        torch.set_num_threads(1)
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    async def run(self, request: Any) -> None:
        """One request; the time limit is what a test says it is now, where a server has one for good."""
        limit = Path(os.environ["TRACEPATCH_NDIF_TIME_LIMIT"])
        self.execution_timeout = float(limit.read_text()) if limit.exists() else None
        request.trusted = request.api_key == TRUSTED
        await super().run(request)


@ray.remote(num_cpus=1, max_restarts=-1)
class ModelActor(_OnCPU):
    """One deployed model."""


class _Controller(_ControllerActor):
    """Of an undecorated name: Ray pickles it by reference, so its process imports this module, and what it changes."""


Controller = ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})(_Controller)
