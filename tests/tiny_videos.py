"""A small text-to-video pipeline of the real classes, with random weights: Wan."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tiny_pipelines import t5
from transformers import UMT5Config, UMT5EncoderModel

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""Of the scheduler of Wan; its steps are of the second order unless `FIRST` is added."""
FIRST = {"solver_order": 1, "disable_corrector": list(range(1000))}


def wan(scheduler: Any = None, *, ti2v: bool = False, **options: Any) -> WanPipeline:
    """With the scheduler of Wan, in steps of the first order, unless another is given. A latent is 8 x 8 pixels of 2 frames.

    Args:
        ti2v: as Wan 2.2-TI2V-5B: another autoencoder, whose latents are 16 x 16 pixels, and times of tokens.
        options: of the pipeline.
    """
    patches: dict[str, Any] = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, config = t5()[0], UMT5Config(vocab_size=200, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
        pipeline = WanPipeline(
            tokenizer=tokenizer, text_encoder=UMT5EncoderModel(config).eval(),
            transformer=WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                text_dim=config.d_model, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
            ),
            vae=AutoencoderKLWan(
                base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, False, True],
                latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0], scale_factor_temporal=2,
                scale_factor_spatial=16 if ti2v else 8, **(patches if ti2v else {}),
            ),
            scheduler=scheduler or UniPCMultistepScheduler(**FLOW, **FIRST), expand_timesteps=ti2v, **options,
        )  # fmt: skip
        for parameter in pipeline.transformer.parameters():
            if parameter.ndim > 1:  # so large that prompts matter, and not so that rounding does
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
