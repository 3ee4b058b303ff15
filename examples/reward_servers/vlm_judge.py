"""A vision-language model says how well a picture shows its prompt: a judge as a reward server.

In an environment of its own, with tiltflow, transformers, accelerate and pillow, from this folder:

    tiltflow serve-reward vlm_judge.yaml --port 8777

and in the recipe of the run:

    reward: {name: http, url: "http://127.0.0.1:8777/score", timeout: 300}
    training: {non_finite_rewards: drop}

The model is Qwen2.5-VL-3B from the hub, or what the variable VLM_JUDGE names: any model of transformers for images and text
with a chat template. Its answer is made without chance. An answer without a number is no score: the picture is left out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

QUESTION = (
    "Here is a picture that was made for the text: {prompt!r}. How well does it show the text, and how good is it as a picture?"
    " Give a score from 0 (not at all) to 10 (perfectly). Answer with the score alone, as: Score: 7"
)
MOST = 10.0
NUMBER = r"-?\d+(?:\.\d+)?"
SCORE = re.compile(rf"score\D{{0,12}}?({NUMBER})", re.IGNORECASE)


def score_in(answer: str) -> float:
    """The score of an answer, 0 to 1: the number after the last `score`, else the only number, where x/y and `x out of y` are
    one. NaN if there is none, if there are several, or if it is not on the scale.

    >>> score_in("Score: 7"), score_in("I would say 8/10."), score_in("a cat")
    (0.7, 0.8, nan)
    """
    text = re.sub(rf"({NUMBER})\s*(?:/|out of)\s*10(?:\.0+)?\b", r"\1", answer, flags=re.IGNORECASE)
    found = SCORE.findall(text)[-1:] or re.findall(NUMBER, text)
    value = float(found[0]) / MOST if len(found) == 1 else math.nan
    return value if 0 <= value <= 1 else math.nan


def judged(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The judge's score of each picture, 0 to 1."""
    ask = model(str(images.device))
    answers = [ask(image, QUESTION.format(prompt=prompt)) for image, prompt in zip(images, prompts, strict=True)]
    return torch.tensor([score_in(answer) for answer in answers], device=images.device)


@cache
def model(device: str) -> Callable[[Tensor, str], str]:
    """Asks the model a question about a picture [3, height, width] in [-1, 1]; loaded once."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = os.environ.get("VLM_JUDGE", "Qwen/Qwen2.5-VL-3B-Instruct")
    processor: Any = AutoProcessor.from_pretrained(name)
    network = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()

    @torch.no_grad()
    def ask(image: Tensor, question: str) -> str:
        picture = Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(device)
        written = network.generate(**inputs, max_new_tokens=24, do_sample=False)
        (answer,) = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(answer)

    return ask
