"""The memory of a pipeline's text encoders: freed once all prompts are encoded, on the CPU, or kept where they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from tiltflow.errors import InputError, Note, did_you_mean
from tiltflow.models.pipeline_adapter import loaded_adapters

Use = Literal["free", "cpu", "keep"]
"""What becomes of text encoders: they are freed once all prompts of a training are encoded, lie on the CPU, or are kept."""
Load = Callable[[Mapping[str, Any]], Any]
"""(the components that are there, None for those that there are not) -> a pipeline with these and all others, on the CPU."""


@dataclass
class TextEncoders:
    """The text encoders of a pipeline, and whether they are in memory.

    Args:
        load: loads those that were freed; None if they cannot be loaded again.
        freed: names of the components that are not in memory now.
        device: where they are used; None for where the pipeline is.
    """

    pipeline: Any
    use: Use = "keep"
    load: Load | None = None
    freed: tuple[str, ...] = ()
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if self.use not in get_args(Use):
            known = get_args(Use)
            raise InputError(f"text_encoders {self.use!r}: must be {', '.join(known)}{did_you_mean(str(self.use), known)}")
        if self.use == "free" and any(loaded_adapters(part) for part in self.parts.values()):
            self.use = "cpu"  # its layers would not come back with the weights of the pipeline
            warnings.warn(
                "a LoRA is loaded into the text encoders: they are not freed, they lie on the CPU", Note, stacklevel=4
            )

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Those that are in memory, by the names of their components."""
        components = self.pipeline.components.items()
        return {name: part for name, part in components if name.startswith("text_encoder") and isinstance(part, nn.Module)}

    def move(self, device: torch.device | str) -> None:
        """Move the pipeline to a device, but not text encoders that belong on the CPU, not even for a moment, or that are
        freed before the denoiser is needed."""
        self.device = torch.device("cpu" if self.use == "cpu" else device)
        held = {} if self.use == "keep" else self.parts
        self.pipeline.register_modules(**dict.fromkeys(held))
        self.pipeline.to(device)
        self.pipeline.register_modules(**{name: part.to("cpu") for name, part in held.items()})

    @contextmanager
    def alone(self, denoiser: nn.Module) -> Iterator[None]:
        """The denoiser makes room for text encoders that will be freed: it is on the CPU in this context."""
        before = next(denoiser.parameters()).device
        denoiser.to("cpu")
        try:
            yield
        finally:
            denoiser.to(before)

    def free(self) -> None:
        """Let go of the text encoders, if that is what becomes of them. No other reference to them is in tiltflow."""
        if self.use != "free" or not (names := tuple(self.parts)):
            return
        self.freed = names
        self.pipeline.register_modules(**dict.fromkeys(names))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def ready(self) -> Any:
        """Return the pipeline with its text encoders in memory, as if all of it were on their device. Those that were freed are
        loaded again, and stay until they are freed.

        Raises InputError if they cannot be loaded again.
        """
        if self.freed:
            self._load_again()
        elif self.use == "free":
            for part in self.parts.values():
                part.to(self.device or self.pipeline.device)
        first = next((parameter for part in self.parts.values() for parameter in part.parameters()), None)
        if first is None or first.device == self.pipeline.device:
            return self.pipeline
        return on(self.pipeline, first.device)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The pipeline as diffusers itself calls it, all of it in memory and on one device; afterwards it is as it was."""
        freed = self.freed
        self.ready()
        for part in self.parts.values():
            part.to(self.pipeline.device)
        try:
            yield self.pipeline
        finally:
            if freed:
                self.free()
            elif self.use == "cpu":
                for part in self.parts.values():
                    part.to("cpu")

    def _load_again(self) -> None:
        if self.load is None:
            raise InputError(
                "this prompt is new, and the text encoders were freed when all prompts of the training were encoded; load the"
                ' pipeline by its path, or with text_encoders="cpu" or "keep"'
            )
        device, there = self.pipeline.device, dict(self.pipeline.components)
        loaded = self.load({name: part for name, part in there.items() if name not in self.freed}).components
        again = {name: loaded[name].to(device).requires_grad_(False).eval() for name in self.freed}
        self.pipeline.register_modules(**again)
        self.freed = ()


def on(pipeline: Any, device: torch.device) -> Any:
    """Return a shallow copy of a pipeline that says that it is on `device`: inputs of its text encoders are made there."""
    kind, view = type(pipeline), copy.copy(pipeline)
    view.__class__ = type(kind.__name__, (kind,), {"device": device, "_execution_device": device})
    return view
