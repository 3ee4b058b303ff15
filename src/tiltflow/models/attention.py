"""The implementation of attention in a denoiser, by diffusers' names: `native`, `_native_cudnn`, `flash`, `xformers`, .."""

from __future__ import annotations

from typing import Any

from tiltflow.errors import InputError, did_you_mean
from tiltflow.user_code import refused


def set_attention_backend(network: Any, backend: str) -> None:
    """Let a denoiser of diffusers compute its attention by another implementation; other networks keep theirs.

    Raises InputError, of one line, for a name that diffusers does not know, an implementation that is not installed, has no
    gradient, or whose code diffusers would fetch from the hub, and a denoiser whose attention has one implementation alone.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    where, known = f"model.attention_backend {backend}", [each.value for each in AttentionBackendName]
    if backend not in known:
        raise InputError(f"{where}: diffusers knows none of this name{did_you_mean(backend, known)}")
    if backend.endswith("_hub"):
        raise InputError(f"{where}: diffusers would run code that it fetches from the hub; install the package")
    if "sage" in backend:
        raise InputError(f"{where}: it has no gradient, and training needs one")
    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise InputError(f"{where}: the attention of {type(network).__name__} cannot be changed; leave it out")
    with refused(f"{where}: cannot be used here"), attention_backend(backend):  # in a context: other networks keep theirs
        network.set_attention_backend(backend)
