"""What people get wrong in Python is one line, InputError, like the command line's: no traceback from inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiltflow
from tiltflow import AdjointMatching, Flow, Model, OrwCfmW2, Sampling, ScoreAsAction, TiltflowError, Training, tune
from tiltflow.errors import InputError, SettingsError
from tiltflow.rewards.ink import Ink


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.cat([x, t[:, None]], 1))
        return out


def reward(x: Tensor) -> Tensor:
    return -x.square().sum(1)


SHORT, METHOD = Training(max_train_steps=1, train_batch_size=4), AdjointMatching(num_inference_steps=3)


def base() -> Model:
    return Model(Flow(Net()), (2,))


def rewarded(function: Any) -> Any:
    return lambda: tune(base(), function, METHOD, SHORT)


any_tune: Any = tune
any_model: Any = Model
any_flow: Any = Flow
any_load: Any = tiltflow.load

MISTAKES: dict[str, tuple[Any, str]] = {
    # tune
    "method by name": (
        lambda: any_tune(base(), reward, "adjoint-matching"),
        "tune: method must be the settings of one, such as AdjointMatching(beta=1.0), is 'adjoint-matching'",
    ),
    "method as a class": (lambda: any_tune(base(), reward, AdjointMatching), "is the class AdjointMatching"),
    "training as a dict": (
        lambda: any_tune(base(), reward, METHOD, {"max_train_steps": 1}),
        "tune: training must be a Training(max_train_steps=.., ..), is {'max_train_steps': 1}",
    ),
    "model is a flow": (lambda: any_tune(Flow(Net()), reward, METHOD), "tune: model must be Model(flow, event_shape), is Flow"),
    "model is a network": (
        lambda: any_tune(Net(), reward, METHOD),
        "tune: model must be Model(Flow(network), event_shape), is Net",
    ),
    "model by name": (
        lambda: any_tune("digits-flow", reward, METHOD),
        "tune: model must be tiltflow.load('digits-flow'), is str",
    ),
    "callbacks is no list": (
        lambda: any_tune(base(), reward, METHOD, SHORT, callbacks=print),
        "tune: callbacks must be a list of functions of a record, is <built-in function print>",
    ),
    "progress is a word": (
        lambda: any_tune(base(), reward, METHOD, SHORT, progress="bar"),
        "tune: progress must be True, False or None, is 'bar'",
    ),
    "negative seed": (
        lambda: tune(base(), reward, METHOD, SHORT, seed=-1),
        "tune: seed must be an integer >= 0, is -1",
    ),
    "seed with a fraction": (
        lambda: any_tune(base(), reward, METHOD, SHORT, seed=1.5),
        "tune: seed must be an integer >= 0, is 1.5",
    ),
    "prompts for vectors": (
        lambda: any_tune(base(), reward, METHOD, SHORT, conditions=["a"]),
        "tune: conditions: this model has none; leave them out",
    ),
    "no such parameters": (
        lambda: tune(base(), reward, METHOD, Training(trainable="zz")),
        "no parameter name matches 'zz'",
    ),
    "resume without a folder": (
        lambda: tune(base(), reward, METHOD, Training(resume_from_checkpoint="latest")),
        "needs a folder to write to",
    ),
    # rewards
    "reward by name": (rewarded("ink"), "the reward must be a function of samples [batch, ..] -> [batch], is str"),
    "reward as settings": (rewarded(Ink()), "give what they build: Ink(..).build()"),
    "one float": (rewarded(lambda x: 1.0), "the reward must return a tensor, got float"),
    "the mean of the batch": (rewarded(lambda x: x.mean()), "one number per sample, shape [4], got []"),
    "a column": (rewarded(lambda x: x.sum(1, keepdim=True)), "shape [4], got [4, 1]"),
    "an array": (rewarded(lambda x: x.detach().numpy().sum(1)), "got ndarray; torch.as_tensor(values) makes one"),
    "a list": (rewarded(lambda x: x.sum(1).tolist()), "got list; torch.as_tensor(values) makes one"),
    "integers": (rewarded(lambda x: (x > 0).sum(1)), "must return floats, got int64"),
    "without a gradient": (rewarded(lambda x: x.detach().sum(1)), "the reward has no gradient with respect to the sample"),
    "an if on a batch": (
        rewarded(lambda x: x.sum(1) if x > 0 else x),
        "the reward raised RuntimeError: Boolean value of Tensor",
    ),
    "prompts that are not there": (rewarded(lambda images, prompts: images.sum(1)), "the reward asks for prompts"),
    "other arguments": (
        rewarded(lambda x, y: x.sum(1)),
        "it can have the images, under any name, or `latents`, and `prompts`, `metadata`, `labels` and `sources`",
    ),
    # models and flows
    "shape as a text": (
        lambda: any_model(Flow(Net()), "2"),
        "Model: event_shape must be the sizes of one sample, as in (3, 32, 32) or (2,), got '2'",
    ),
    "shape as a number": (lambda: any_model(Flow(Net()), 2), "as in (3, 32, 32) or (2,), got 2"),
    "negative shape": (lambda: Model(Flow(Net()), (-2,)), "got (-2,)"),
    "shape of floats": (lambda: any_model(Flow(Net()), (2.0,)), "got (2.0,)"),
    "no flow": (lambda: any_model(Net(), (2,)), "Model: flow must be a Flow(network), got Net"),
    "sampling by name in a model": (
        lambda: any_model(Flow(Net()), (2,), "euler"),
        "Model: sampling must be a Sampling(solver=.., ..), got 'euler'",
    ),
    "another shape than the network's": (
        lambda: Model(Flow(Net()), (3,)).sample(2),
        "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    ),
    "network as a class": (lambda: any_flow(Net), "Flow: the network is a class; give an instance, Net(..)"),
    "prediction with a typo": (lambda: any_flow(Net(), "eps"), "Flow: there is no prediction 'eps', did you mean 'epsilon'?"),
    "network without time": (lambda: Model(Flow(lambda x: x), (2,)).sample(2), "takes 1 positional argument but 2 were given"),
    "network with labels": (
        lambda: Model(Flow(lambda x, t, y: x), (2,)).sample(2),
        "missing 1 required positional argument: 'y'",
    ),
    "network returns nothing": (lambda: any_model(Flow(lambda x, t: None), (2,)).sample(2), "and returns NoneType"),
    "unknown network saved": (lambda: base().save("m"), "save its state_dict() instead"),
    # sampling
    "solver with a typo": (
        lambda: Sampling(solver="eular"),
        "Sampling: solver: there is no solver 'eular', did you mean 'euler'?",
    ),
    "no steps": (
        lambda: Sampling(num_inference_steps=0),
        "Sampling: num_inference_steps must be greater than or equal to 1 (got 0)",
    ),
    "setting with a typo": (
        lambda: Sampling(num_inference_step=3),
        "Sampling: num_inference_step is not a setting, did you mean 'num_inference_steps'?",
    ),  # type: ignore[call-arg]
    "setting by position": (lambda: Sampling("euler"), "Sampling: settings are given by name, as in Sampling(solver=..)"),  # type: ignore[call-arg]
    "negative count": (lambda: base().sample(-2), "num_samples must be an integer >= 1, is -2"),
    "no count": (lambda: base().sample(0), "num_samples must be an integer >= 1, is 0"),
    "count as a float": (
        lambda: any_model(Flow(Net()), (2,)).sample(4.0),
        "num_samples must be an integer >= 1, is 4.0",
    ),
    "noise for a count": (
        lambda: any_model(Flow(Net()), (2,)).sample(torch.zeros(3, 2)),
        "num_samples must be an integer >= 1, is Tensor",
    ),
    "no batch": (lambda: base().sample(2, batch_size=0), "batch_size must be an integer >= 1, is 0"),
    "negative seed of samples": (lambda: base().sample(2, seed=-1), "seed must be an integer >= 0, is -1"),
    "sampling by name": (
        lambda: any_model(Flow(Net()), (2,)).sample(2, sampling="euler"),
        "sampling must be a Sampling(solver=.., num_inference_steps=..), is 'euler'",
    ),
    "solver from nowhere": (
        lambda: base().sample(2, sampling=Sampling(solver="nowhere:solve")),
        "there is no module 'nowhere'",
    ),
    # settings
    "negative temperature": (lambda: AdjointMatching(beta=-1), "AdjointMatching: beta must be greater than 0 (got -1)"),
    "temperature as a text": (lambda: AdjointMatching(beta="a"), "AdjointMatching: beta must be a valid number (got 'a')"),  # type: ignore[arg-type]
    "method's typo": (lambda: AdjointMatching(bta=1), "AdjointMatching: bta is not a setting, did you mean 'beta'?"),  # type: ignore[call-arg]
    "settings that do not fit": (
        lambda: AdjointMatching(pairing="right"),
        "AdjointMatching: pairing 'right' is the paper's recursion",
    ),
    "training's typo": (
        lambda: Training(max_train_step=3),
        "Training: max_train_step is not a setting, did you mean 'max_train_steps'?",
    ),  # type: ignore[call-arg]
    "negative steps": (
        lambda: Training(max_train_steps=-3),
        "Training: max_train_steps must be greater than or equal to 1 (got -3)",
    ),
    "method's solver": (
        lambda: ScoreAsAction(solver="huen"),
        "ScoreAsAction: solver: there is no solver 'huen', did you mean 'heun'?",
    ),
    "solver with noise": (lambda: OrwCfmW2(solver="memoryless"), "OrwCfmW2: solver 'memoryless' has noise"),
    "critic's typo": (
        lambda: ScoreAsAction(critic={"los": "td"}),
        "ScoreAsAction: critic.los is not a setting, did you mean 'loss'?",
    ),  # type: ignore[arg-type]
    # loading
    "name with a typo": (lambda: tiltflow.load("digits-flw"), "there is no model 'digits-flw', did you mean 'digits-flow'?"),
    "nothing to load": (lambda: any_load(None), "load: give the name of a model or its folder, not None"),
    "a classifier": (lambda: tiltflow.load("digits-classifier"), "is a classifier; must be a flow"),
    "no such device": (
        lambda: tiltflow.load("digits-flow", device="gpu"),
        "device 'gpu': torch has no such device here; 'cpu' always works",
    ),
    "data as an array": (
        lambda: tiltflow.examine_model(base(), np.zeros((64, 2))),
        "data must be 32 or more samples of shape [2], got ndarray",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(TiltflowError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # what user code raises is told as such where it shows in the first batch
    assert isinstance(caught.value, InputError) or name == "an if on a batch"


def test_wrong_settings_are_a_value_error_too() -> None:
    """As pydantic's own error is, which they stand for: also where they are a part of others."""
    with pytest.raises(ValueError, match="Training: max_train_steps"):
        Training(max_train_steps=0)
    with pytest.raises(SettingsError):
        Sampling(eta=2)


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    model = Model(Flow(Net()), [2])  # type: ignore[arg-type]
    assert model.event_shape == (2,)
    assert model.sample(np.int64(3), seed=np.int64(1)).shape == (3, 2)  # type: ignore[arg-type]
    assert Sampling(num_inference_steps=np.int64(3)).num_inference_steps == 3  # type: ignore[arg-type]


def test_pipelines() -> None:
    from_diffusers: Any = pytest.importorskip("diffusers") and tiltflow.from_diffusers
    for make, message in (
        (
            lambda: from_diffusers(None),
            "pipeline NoneType is not known; known: Flux2KleinPipeline, Flux2Pipeline, FluxKontextPipeline, FluxPipeline,",
        ),
        (lambda: from_diffusers(Net()), "pipeline Net is not known"),
        (lambda: from_diffusers("/nowhere"), "/nowhere"),
        (lambda: from_diffusers("tiles-pipeline", device="gpu"), "device 'gpu': torch has no such device here"),
        (
            lambda: from_diffusers("tiles-pipeline").sample("a red cat"),
            """prompts must be a list of texts, as in ["a red cat"], is 'a red cat'""",
        ),
        (lambda: from_diffusers("tiles-pipeline").sample([]), "prompts must be a list of texts"),
        (lambda: from_diffusers("tiles-pipeline").sample(["a"], seed=-1), "seed must be an integer >= 0, is -1"),
        (lambda: from_diffusers("tiles-pipeline").sample(["a"], sampling="euler"), "sampling must be a Sampling"),
    ):
        with pytest.raises(InputError) as caught:
            make()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
