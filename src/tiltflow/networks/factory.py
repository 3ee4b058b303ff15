"""A network of your own, built by your function."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from tiltflow.errors import InputError
from tiltflow.plugins import import_function
from tiltflow.settings import FunctionOrName, Settings
from tiltflow.user_code import explained


class Factory(Settings):
    """The module that your function returns, called with `arguments` by name; its weights are not looked at."""

    name: Literal["factory"] = "factory"
    path: FunctionOrName
    """`package.module:function`, or a class, from the Python path or the current directory."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the function, by name: numbers, text, and lists and mappings of them."""

    def build(self) -> nn.Module:
        """Call the function. Raises InputError if it cannot be imported or returns no torch module,
        UserCodeError if it raises."""
        function = import_function(self.path, "the network's factory")
        with explained(f"the network's factory {self.path}"):
            network: Any = function(**self.arguments)
        if not isinstance(network, nn.Module):
            raise InputError(
                f"the network's factory {self.path} must return a torch module, and returns {type(network).__name__}"
            )
        return network
