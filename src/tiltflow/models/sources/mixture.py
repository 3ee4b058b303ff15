"""A Gaussian mixture in a few dimensions, with its exact velocity field: a base for experiments whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model, load
from tiltflow.models.trainable import Adapter
from tiltflow.networks.gaussian_mixture import GaussianMixture, MixtureSettings
from tiltflow.streams import new_network


class Mixture(MixtureSettings):
    """A Gaussian mixture in a few dimensions; what is tuned is a perceptron that corrects its field, zero at the start."""

    name: Literal["mixture"] = "mixture"
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the perceptron's first weights."""

    prompted: ClassVar[bool] = False
    adapter: ClassVar[Adapter | None] = None

    @property
    def title(self) -> str:
        """Name of the model in a report."""
        count = len(self.means)
        return f"{'a Gaussian' if count == 1 else f'{count} Gaussians'} in {self.dimension}-d"

    def load(self, device: str) -> Model:
        """Make the untuned model."""
        own = {key: getattr(self, key) for key in MixtureSettings.model_fields}
        network = GaussianMixture(**cast(Any, own))
        return Model(Flow(new_network(network, self.seed).to(device).eval()), (self.dimension,), network_settings=network)

    def load_tuned(self, base: Model, folder: Path, seed: int) -> tuple[Model, Model]:
        """Return (base, tuned) of a run with its tuned model in `folder`. Raises InputError if it cannot be loaded."""
        return base, load(folder, base.device)

    def keep(self, folder: Path) -> None:
        """No-op: the settings are all that it is made of."""

    def bytes_to_keep(self, folder: Path) -> int:
        """Return 0: `keep` writes nothing."""
        return 0

    def kept_in(self, folder: Path) -> Mixture:
        """Return these settings: `keep` writes nothing."""
        return self
