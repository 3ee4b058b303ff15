"""The settings of the training loop, for every kind of model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import Monitor
from tiltflow.flows.precision import MixedPrecision
from tiltflow.rewards import NonFiniteRewards
from tiltflow.settings import Labels, Pattern, Settings

Count = Annotated[int, Field(ge=1)]
GuidanceMode = Literal["none", "rollout", "full"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]

BATCH_SIZE, PROMPTS, GENERATIONS = 64, 4, 4
"""The sizes of a batch where a recipe says nothing."""
OF_PROMPTS = ("prompts_per_step", "num_generations", "guidance_mode", "per_prompt_normalization", "decode_batch_size")
"""Settings that mean something only for a model with prompts."""


class Training(Settings):
    """The loop, in global numbers; the optimizer has settings of its own, `tiltflow.Optimizer`."""

    max_train_steps: Count = 100
    """Optimizer steps."""
    train_batch_size: Count | None = None
    """Samples in an iteration: 64 by default; with prompts, prompts_per_step x num_generations."""
    prompts_per_step: Count | None = None
    """Different prompts in an iteration, 4 by default."""
    num_generations: Count | None = None
    """Pictures of each of them, 4 by default."""
    micro_batch_size: Count | None = None
    """How many samples a network sees at once; changes the memory needed, not the result."""
    decode_batch_size: Count | None = None
    """How many pictures are decoded at once, with their gradient; as many as the network sees by default. Changes the memory
    needed, not the result: at 512 pixels and in float32 a picture of Stable Diffusion needs more than 5 GB."""
    classes: Labels = ()
    """Of a class-conditional model: the classes whose samples are tuned, as many of one as of another; all by default. Each has
    a target law of its own."""
    guidance_mode: GuidanceMode | None = None
    """none: pictures are drawn and learned from without guidance. rollout, the default of models with negative prompts: drawn
    with it, learned from without: works best for Stable Diffusion, but no law is known that it aims at. full: both with it:
    aims at the tilt of the guided law, and the adjoint of a strongly guided flow grows large."""
    per_prompt_normalization: Annotated[int, Field(ge=2)] | None = None
    """Pictures of the base for each prompt, drawn when it first comes, that say what its rewards are like: the reward is then
    (r - mean) / std of its prompt. The temperature is in these units."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the moving average of the weights, which draws the trajectories and is what is saved; 0 for none."""
    trainable: Pattern = re.compile("")
    """Train only the parameters in whose name this regular expression is found, "^middle" for example."""
    calibration_samples: Annotated[int, Field(ge=0)] = 0
    """From how many base samples the mean reward of the target law is estimated, to which the working temperature is then
    adapted (see `tiltflow.training.calibration`); 0 to run at the method's beta throughout."""
    mixed_precision: MixedPrecision = "no"
    """How the network is evaluated, in training and in the evaluation: "bf16", "no", or "auto": bf16 where the hardware
    multiplies it."""
    use_8bit_adam: bool = False
    """Keep the state of the optimizer in 8 bits, by bitsandbytes, on a GPU: a quarter of its memory."""

    checkpointing_steps: Annotated[int, Field(ge=0)] = 50
    """A checkpoint is written after so many steps, and when training ends or is asked to stop; 0 for only then."""
    checkpoints_total_limit: Count | None = 2
    """How many are kept; null for all."""
    resume_from_checkpoint: str | None = None
    """latest, or the name of a checkpoint, such as step-00000100: resume from there, in the same folder, as if the run had
    never stopped. With `latest`, a run that has none yet begins."""
    deterministic: bool = False
    """Use kernels that add in the same order each time, and stop where a GPU has none: slower. CPUs do so anyway."""
    report_to: TrackerName | None = None
    """Report metrics and pictures to tensorboard (in `logs/` of the run), trackio or wandb too, by accelerate's trackers."""
    monitor: Monitor | None = None
    """Look at the model while it trains, and raise an alarm if the reward rises at the cost of what it does not see."""
    non_finite_rewards: NonFiniteRewards = "error"
    """What happens where a reward is NaN or infinite: error stops the run; drop leaves these samples out, in training,
    calibration and evaluation alike, and counts them in the metrics (`dropped`)."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    """How many batches in a row may be left out because a loss, a reward or a gradient in them is not finite; 0 stops at the
    first."""

    @property
    def samples_per_step(self) -> int:
        """Samples in an iteration, once `for_samples` or `for_prompts` has filled the sizes in."""
        assert self.train_batch_size is not None
        return self.train_batch_size

    def for_samples(self) -> Training:
        """The settings with the defaults of a model without prompts.

        Raises InputError for a setting that such a model gives no meaning.
        """
        for name in OF_PROMPTS:
            if (value := getattr(self, name)) not in (None, "none"):
                raise InputError(f"training.{name} ({value!r}): this model has no prompts; leave it out")
        sizes = {"train_batch_size": self.train_batch_size or BATCH_SIZE, "guidance_mode": "none"}
        return self.model_copy(update=sizes)

    def for_prompts(self) -> Training:
        """The settings with the defaults of a model with prompts.

        Raises InputError for a setting that such a model gives no meaning, and for sizes that contradict each other.
        """
        if self.classes:
            raise InputError("training.classes: this model has prompts; name them there, and leave classes out")
        prompts, generations = self.prompts_per_step or PROMPTS, self.num_generations or GENERATIONS
        size, part = prompts * generations, self.micro_batch_size
        made = f"{prompts} prompts x {generations} generations = {size} pictures"
        if self.train_batch_size not in (None, size):
            raise InputError(f"training.train_batch_size {self.train_batch_size}: there are {made}; leave it out")
        if part is not None and size % part:
            raise InputError(f"training: {made} do not divide into micro-batches of {part}")
        sizes: dict[str, Any] = {"train_batch_size": size, "prompts_per_step": prompts, "num_generations": generations}
        return self.model_copy(update=sizes | {"guidance_mode": self.guidance_mode or "rollout"})


NEED_A_FOLDER = ("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to", "monitor")


def refuse_what_needs_a_folder(training: Training) -> None:
    """Raise InputError for a setting that means nothing where nothing is written, unless it is the default."""
    for name in NEED_A_FOLDER:
        if (value := getattr(training, name)) != Training.model_fields[name].default:
            raise InputError(f"training.{name} ({value!r}) needs a folder to write to: give tune(.., output=..)")
