"""Networks, one file each: a class of settings named after the file, with `build()`. A new network is a new file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class ClassConditional(Protocol):
    """Settings of a network that is called with labels too, network(x, time, labels), unless `num_classes` is None."""

    @property
    def num_classes(self) -> int | None: ...


@runtime_checkable
class WithFeatures(Protocol):
    """Classifier whose features [batch, width] can be compared by the Fréchet distance."""

    def features(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Projected(Protocol):
    """Network whose noise is N(0, P), P an orthogonal projection for each sample, such as on the atoms that it has."""

    def project(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The part P of standard normal noise [batch, *event], of samples with these labels [batch]."""
        ...
