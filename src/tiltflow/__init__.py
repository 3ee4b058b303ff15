"""Fine-tune flow-matching and diffusion models so that they sample p_base(x) exp(r(x) / beta), and see how close it came.

>>> import tiltflow
>>> sorted(tiltflow.__all__)[:3]
['Adapter', 'AdjointMatching', 'Adrpo']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tiltflow.api import compare, evaluate, load, report, steer, steps, tune
    from tiltflow.errors import CollapseError, InputError, NonFiniteError, TiltflowError, UserCodeError
    from tiltflow.evaluation.settings import Evaluation
    from tiltflow.flows.flow import Flow
    from tiltflow.methods.adjoint_matching import AdjointMatching
    from tiltflow.methods.adrpo import Adrpo
    from tiltflow.methods.awm import Awm
    from tiltflow.methods.ddpo import Ddpo
    from tiltflow.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
    from tiltflow.methods.diffusion_dpo import DiffusionDpo
    from tiltflow.methods.diffusion_nft import DiffusionNft
    from tiltflow.methods.dpok import Dpok
    from tiltflow.methods.draft import Draft
    from tiltflow.methods.dxmi import Dxmi
    from tiltflow.methods.endpoint_adjoint_matching import EndpointAdjointMatching
    from tiltflow.methods.flow_grpo import FlowGrpo
    from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
    from tiltflow.methods.path_reweighted import PathReweighted
    from tiltflow.methods.raft import Raft
    from tiltflow.methods.ram import Ram
    from tiltflow.methods.refl import Refl
    from tiltflow.methods.rwr import Rwr
    from tiltflow.methods.score_as_action import ScoreAsAction
    from tiltflow.methods.tilt_matching import TiltMatching
    from tiltflow.methods.vgg_flow import VggFlow
    from tiltflow.models.from_diffusers import from_diffusers
    from tiltflow.models.model import Model
    from tiltflow.models.trainable import Adapter
    from tiltflow.plugins import allow_code
    from tiltflow.runs.doctor.network import examine_model
    from tiltflow.runs.fingerprints import accept_changes
    from tiltflow.runs.run import load_text_to_image
    from tiltflow.runs.staged.of_law import OfLaw
    from tiltflow.runs.staged.outer_loop import stages
    from tiltflow.runs.staged.settings import Stop
    from tiltflow.samplers.sampling import Sampling
    from tiltflow.steering.best_of_n import BestOfN
    from tiltflow.steering.gradient_guidance import GradientGuidance
    from tiltflow.steering.importance_resampling import ImportanceResampling
    from tiltflow.steering.smc import Smc
    from tiltflow.training.optimizer import Optimizer
    from tiltflow.training.settings import Training

# Where each public name lives; it is imported when first used, so that `import tiltflow` costs nothing.
_HOME = {
    "Adapter": "models.trainable",
    "AdjointMatching": "methods.adjoint_matching",
    "Adrpo": "methods.adrpo",
    "Awm": "methods.awm",
    "BestOfN": "steering.best_of_n",
    "CollapseError": "errors",
    "Ddpo": "methods.ddpo",
    "DeterministicAdjointMatching": "methods.deterministic_adjoint_matching",
    "DiffusionDpo": "methods.diffusion_dpo",
    "DiffusionNft": "methods.diffusion_nft",
    "Dpok": "methods.dpok",
    "Draft": "methods.draft",
    "Dxmi": "methods.dxmi",
    "EndpointAdjointMatching": "methods.endpoint_adjoint_matching",
    "Evaluation": "evaluation.settings",
    "Flow": "flows.flow",
    "FlowGrpo": "methods.flow_grpo",
    "GradientGuidance": "steering.gradient_guidance",
    "ImportanceResampling": "steering.importance_resampling",
    "InputError": "errors",
    "Model": "models.model",
    "NonFiniteError": "errors",
    "OfLaw": "runs.staged.of_law",
    "Optimizer": "training.optimizer",
    "OrwCfmW2": "methods.orw_cfm_w2",
    "PathReweighted": "methods.path_reweighted",
    "Raft": "methods.raft",
    "Ram": "methods.ram",
    "Refl": "methods.refl",
    "Rwr": "methods.rwr",
    "Sampling": "samplers.sampling",
    "ScoreAsAction": "methods.score_as_action",
    "Smc": "steering.smc",
    "Stop": "runs.staged.settings",
    "TiltMatching": "methods.tilt_matching",
    "TiltflowError": "errors",
    "Training": "training.settings",
    "UserCodeError": "errors",
    "VggFlow": "methods.vgg_flow",
    "accept_changes": "runs.fingerprints",
    "allow_code": "plugins",
    "compare": "api",
    "evaluate": "api",
    "examine_model": "runs.doctor.network",
    "from_diffusers": "models.from_diffusers",
    "load": "api",
    "load_text_to_image": "runs.run",
    "report": "api",
    "stages": "runs.staged.outer_loop",
    "steer": "api",
    "steps": "api",
    "tune": "api",
}

__all__ = [
    "Adapter",
    "AdjointMatching",
    "Adrpo",
    "Awm",
    "BestOfN",
    "CollapseError",
    "Ddpo",
    "DeterministicAdjointMatching",
    "DiffusionDpo",
    "DiffusionNft",
    "Dpok",
    "Draft",
    "Dxmi",
    "EndpointAdjointMatching",
    "Evaluation",
    "Flow",
    "FlowGrpo",
    "GradientGuidance",
    "ImportanceResampling",
    "InputError",
    "Model",
    "NonFiniteError",
    "OfLaw",
    "Optimizer",
    "OrwCfmW2",
    "PathReweighted",
    "Raft",
    "Ram",
    "Refl",
    "Rwr",
    "Sampling",
    "ScoreAsAction",
    "Smc",
    "Stop",
    "TiltMatching",
    "TiltflowError",
    "Training",
    "UserCodeError",
    "VggFlow",
    "accept_changes",
    "allow_code",
    "compare",
    "evaluate",
    "examine_model",
    "from_diffusers",
    "load",
    "load_text_to_image",
    "report",
    "stages",
    "steer",
    "steps",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tiltflow' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tiltflow.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
