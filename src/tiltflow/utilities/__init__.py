r"""Utilities of the whole law, one file each: a class of settings named after the file. A new utility is a new file.

A reward is a number of each sample; a utility F(p) is one of the law p of all of them, higher is better: the reward of the
worst tenth, diversity, minus a distance to another law. Near p it is linear,

    F((1 - e) p + e q) = F(p) + e (E_q[dF] - E_p[dF]) + O(e^2),

and its slope there, the first variation dF(x), is a reward: what one stage of an outer loop tunes for. It is known up to a
constant, which no method sees. It is the influence function of F too, so the error of an estimate of F comes from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self, runtime_checkable

from pydantic import BeforeValidator

from tiltflow.evaluation.estimates import Estimate
from tiltflow.plugins import part_of
from tiltflow.settings import Settings
from tiltflow.utilities.estimation.first_variation import FirstVariation
from tiltflow.utilities.estimation.known import Known, Need


class Utility(Settings):
    """Settings of a utility. A new one has `name`, `words`, `_value` and `_first_variation`, and says what else is its own."""

    name: str

    @property
    def words(self) -> str:
        """What it prefers, in words."""
        raise NotImplementedError

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The rewards that it is made of, by what they are to it: `reward`, `cost`."""
        return ()

    @property
    def needs(self) -> tuple[Need, ...]:
        """What else must be known of a law for its first variation."""
        return ()

    @property
    def value_needs(self) -> tuple[Need, ...]:
        """What else must be known of a law for its value."""
        return self.needs

    @property
    def concave(self) -> bool:
        """True where F is concave in the law: what stages settle at is then the best of all laws."""
        return True

    def caveats(self, alpha: float) -> tuple[str, ...]:
        """What somebody must know who maximises F - alpha KL from the base, one sentence each."""
        if self.concave:
            return ()
        return (f"{self.name} is not concave in the law: stages may settle at a law that is not the best of all",)

    def after(self, at: Known) -> Self:
        """The utility of the next stage, for one that adapts to the law that a stage has reached."""
        return self

    def value(self, at: Known) -> Estimate:
        """F of the law, with its standard error. Raises InputError for what is not known, or has no value there."""
        at.check(self.name, self.reward_names, self.value_needs)
        return self._value(at)

    def first_variation(self, at: Known) -> FirstVariation:
        """dF at the law, up to a constant. Raises InputError for what is not known, or has no first variation there."""
        at.check(self.name, self.reward_names, self.needs)
        return self._first_variation(at)

    def _value(self, at: Known) -> Estimate:
        raise NotImplementedError

    def _first_variation(self, at: Known) -> FirstVariation:
        raise NotImplementedError


@runtime_checkable
class OneShot(Protocol):
    """A utility whose optimum at a price of the KL is one tilt of the base."""

    def one_shot(self, base: Known, alpha: float) -> FirstVariation:
        """The reward whose tilt of the base at the temperature alpha has the highest F - alpha KL."""
        ...


if TYPE_CHECKING:
    NamedUtility = Utility
else:
    NamedUtility = Annotated[Any, BeforeValidator(part_of("utilities"))]
"""The type of a setting that is a utility: its name, or a mapping with its name and settings."""
