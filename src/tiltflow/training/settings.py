"""Settings of the training loop, for every kind of model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import Monitor
from tiltflow.flows.precision import MixedPrecision
from tiltflow.rewards import NonFiniteRewards
from tiltflow.samplers.stored import Storage
from tiltflow.settings import Labels, Pattern, Settings

Count = Annotated[int, Field(ge=1)]
GuidanceMode = Literal["none", "rollout", "full"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]

BATCH_SIZE, PROMPTS, GENERATIONS = 64, 4, 4
"""Default sizes of a batch."""
OF_PROMPTS = ("prompts_per_step", "num_generations", "prompt_order", "guidance_mode", "decode_batch_size")
"""Settings for models with prompts alone."""


class Training(Settings):
    """The training loop. Numbers are over all processes. The optimizer has settings of its own, `tiltflow.Optimizer`."""

    max_train_steps: Count = 100
    """Optimizer steps."""
    train_batch_size: Count | None = None
    """Samples in an iteration: 64 by default; with prompts, prompts_per_step x num_generations."""
    prompts_per_step: Count | None = None
    """Number of different prompts in an iteration, 4 by default."""
    num_generations: Count | None = None
    """Pictures of each prompt, 4 by default."""
    prompt_order: Literal["random", "epochs"] = "random"
    """random: the prompts of each iteration are drawn anew. epochs: all come once before any comes again, shuffled anew."""
    micro_batch_size: Count | None = None
    """Samples that a network sees at once. Changes the memory needed, not the result."""
    decode_batch_size: Count | None = None
    """Pictures that are decoded at once, with their gradient; by default as many as the network sees. Changes the memory
    needed, not the result: at 512 pixels and in float32 a picture of Stable Diffusion needs more than 5 GB."""
    offload: bool = False
    """Keep on the CPU what nothing needs at the moment: the decoder and the networks of rewards but while samples are scored,
    the frozen copy of a denoiser that is tuned as a whole but while the method needs it, and the frozen weights below an
    adapter while samples are scored. Changes the memory of the device and the time, not the result."""
    trajectory_dtype: Literal["bfloat16", "float16"] | None = None
    """Store trajectories in 16 bits: half of their memory. What is rounded is an error of the gradient, in proportion to the
    temperature (docs/memory.md); float16 has eight times less than bfloat16. null stores them as they are computed."""
    trajectory_device: Literal["cpu"] | None = None
    """Store trajectories on the CPU: no memory of a GPU but that of a step, with the same bits. Each step is then copied there
    and back."""
    classes: Labels = ()
    """Classes to tune, of a class-conditional model, all by default: samples of each in equal number. Each class has a target
    law of its own."""
    guidance_mode: GuidanceMode | None = None
    """none: draw pictures, and learn from them, without guidance. rollout, the default of models with negative prompts: draw
    with guidance and learn without; it works best for Stable Diffusion, but no law is known that it aims at. full: both with
    guidance; it aims at the tilt of the guided law, and the adjoint of a strongly guided flow grows large."""
    per_prompt_normalization: Annotated[int, Field(ge=2)] | None = None
    """Samples of the base for each prompt or class, drawn when it first comes, for the mean and std of its rewards: the reward
    is then (r - mean) / std, and the temperature in these units."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which draws the trajectories and is saved; 0 for none."""
    trainable: Pattern = re.compile("")
    """Train only the parameters whose names match this regular expression, such as "^middle"."""
    calibration_samples: Annotated[int, Field(ge=0)] = 0
    """Base samples for an estimate of the target law's mean reward, to which the working temperature is then adapted (see
    `tiltflow.training.calibration`); 0 to run at the method's beta throughout."""
    target_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """KL divergence from the base to spend, in nats per sample: the temperature is adapted to it until three quarters of the
    run, whatever the method's beta, and then held (see `tiltflow.training.kl_budget`). null to run at the method's beta."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the network, in training and in the evaluation: "bf16", "no", or "auto", which is bf16 where the hardware
    multiplies it."""
    compile: Literal["regional", "whole"] | None = None
    """Compile the networks by torch.compile while they train, which needs a C++ compiler, and Triton on a GPU. regional: the
    blocks that diffusers names as repeated in a pipeline's denoiser, once for all of them; whole: all of it, which takes
    longer to compile. The evaluation is not compiled."""
    allow_tf32: bool | None = None
    """Whether float32 is multiplied in TF32 on CUDA while training: faster, with 10 bits of mantissa instead of 23. true:
    matrices and convolutions; false: neither; null, PyTorch's default: convolutions alone."""
    use_8bit_adam: bool = False
    """Keep the state of the optimizer in 8 bits, by bitsandbytes, on a GPU: a quarter of its memory."""

    checkpointing_steps: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints. One is also written when training ends or is asked to stop; 0 for these alone."""
    checkpoints_total_limit: Count | None = 2
    """Checkpoints to keep, the latest ones; null for all."""
    resume_from_checkpoint: str | None = None
    """latest, or the name of a checkpoint, such as step-00000100: resume from there, in the same folder, bit for bit. With
    `latest`, a run that has no checkpoint yet begins anew."""
    deterministic: bool = False
    """Use kernels that add in the same order each time, and stop where a GPU has none. Slower; CPUs do so anyway."""
    report_to: TrackerName | None = None
    """Report metrics and pictures to tensorboard (in `logs/` of the run), trackio or wandb too, by accelerate's trackers."""
    monitor: Monitor | None = None
    """Evaluate the model while it trains, and raise an alarm if the reward rises at the cost of what it does not see."""
    non_finite_rewards: NonFiniteRewards = "error"
    """For samples whose reward is NaN or infinite: error stops the run; drop leaves them out, in training, calibration and
    evaluation alike, and counts them in the metrics (`dropped`)."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    """Batches in a row that may be skipped because a loss, a reward or a gradient in them is not finite; 0 stops at the
    first."""

    @model_validator(mode="after")
    def _check_precision(self) -> Training:
        if self.allow_tf32 and self.deterministic:
            raise ValueError("deterministic multiplies float32 in float32, and allow_tf32 in TF32; use one")
        return self

    @property
    def samples_per_step(self) -> int:
        """Samples in an iteration, once `for_samples` or `for_prompts` has filled in the sizes."""
        assert self.train_batch_size is not None
        return self.train_batch_size

    @property
    def storage(self) -> Storage:
        """How trajectories are stored."""
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        return Storage(None if self.trajectory_dtype is None else dtypes[self.trajectory_dtype], self.trajectory_device)

    def for_samples(self) -> Training:
        """The settings with the defaults of a model without prompts.

        Raises InputError for a setting that has no meaning for such a model.
        """
        for name in OF_PROMPTS:
            if (value := getattr(self, name)) not in (None, "none", "random"):
                raise InputError(f"training.{name} ({value!r}): this model has no prompts; leave it out")
        sizes = {"train_batch_size": self.train_batch_size or BATCH_SIZE, "guidance_mode": "none"}
        return self.model_copy(update=sizes)

    def for_prompts(self, *, guided: bool = True) -> Training:
        """The settings with the defaults of a model with prompts, or observations.

        Args:
            guided: whether it may have negative prompts, and samples with guidance.

        Raises InputError for a setting that has no meaning for such a model, and for sizes that contradict each other.
        """
        if self.classes:
            raise InputError("training.classes: this model has prompts; name them there, and leave classes out")
        prompts, generations = self.prompts_per_step or PROMPTS, self.num_generations or GENERATIONS
        size, part = prompts * generations, self.micro_batch_size
        made = f"{prompts} prompts x {generations} generations = {size} pictures"
        if self.train_batch_size not in (None, size):
            raise InputError(f"training.train_batch_size {self.train_batch_size}: there are {made}; leave it out")
        if part is not None and part < size and size % part:
            raise InputError(f"training: {made} do not divide into micro-batches of {part}")
        sizes: dict[str, Any] = {"train_batch_size": size, "prompts_per_step": prompts, "num_generations": generations}
        return self.model_copy(update=sizes | {"guidance_mode": self.guidance_mode or ("rollout" if guided else "none")})


NEED_A_FOLDER = ("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "report_to", "monitor")


def refuse_what_needs_a_folder(training: Training, evaluation: object = None) -> None:
    """Raise InputError for settings that mean nothing where nothing is written, unless they are the default."""
    if evaluation is not None:
        raise InputError("tune: evaluation needs a folder to write to: give tune(.., output=..)")
    for name in NEED_A_FOLDER:
        if (value := getattr(training, name)) != Training.model_fields[name].default:
            raise InputError(f"training.{name} ({value!r}) needs a folder to write to: give tune(.., output=..)")
