"""Small text-to-image pipelines of the real classes, with random weights."""

# ruff: noqa: E501
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTH = 16


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """One token for each character."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def clip_text(tokenizer: CLIPTokenizer, *, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> tuple[Any, Any]:
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    config = T5Config(vocab_size=len(words) + 100, d_model=2 * WIDTH, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    return T5Tokenizer(vocab=words), T5EncoderModel(config)


def gemma() -> tuple[Any, Any]:
    """One token for each letter. Its first version, which is quick with the 1500 letters of SANA's instruction."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = GemmaConfig(
        vocab_size=len(words), hidden_size=2 * WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, attn_implementation="sdpa",
    )  # fmt: skip
    return GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]), GemmaModel(config)


def vae(channels: int = 4, blocks: int = 2, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8,) * blocks, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **options,
    )  # fmt: skip


def unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **options,
    )  # fmt: skip


def stable_diffusion(folder: Path, **scheduler: Any) -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        unet=unet(cross_attention_dim=WIDTH), vae=vae(), text_encoder=clip_text(tokenizer), tokenizer=tokenizer,
        scheduler=DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, **scheduler}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path, **scheduler: Any) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8, use_linear_projection=True,
        ),
        vae=vae(), text_encoder=clip_text(tokenizer), text_encoder_2=clip_text(tokenizer, projection=True), tokenizer=tokenizer,
        tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(**{**STABLE_DIFFUSION, "timestep_spacing": "leading", **scheduler}),
        add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path, **scheduler: Any) -> StableDiffusion3Pipeline:
    tokenizer, (t5_tokenizer, t5_encoder) = clip_tokenizer(folder), t5()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH,
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(tokenizer, projection=True), text_encoder_2=clip_text(tokenizer, projection=True),
        text_encoder_3=t5_encoder, tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )  # fmt: skip


def flux(folder: Path, *, guidance_embeds: bool = True, **scheduler: Any) -> FluxPipeline:
    tokenizer, (t5_tokenizer, t5_encoder) = clip_tokenizer(folder), t5()
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(tokenizer), text_encoder_2=t5_encoder, tokenizer=tokenizer, tokenizer_2=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**dynamic, **scheduler}),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def flux_kontext(folder: Path, **scheduler: Any) -> FluxKontextPipeline:
    pipeline = FluxKontextPipeline(**flux(folder, **scheduler).components)
    pipeline.default_sample_size = 8
    for parameter in pipeline.transformer.parameters():
        if parameter.ndim > 1:  # so large that the picture that is edited matters, and not so that rounding does
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return pipeline


def pixart_sigma(folder: Path, **scheduler: Any) -> PixArtSigmaPipeline:
    tokenizer, encoder = t5()
    return PixArtSigmaPipeline(
        tokenizer, encoder, vae(), pixart_transformer(sample_size=8),
        DDIMScheduler(**{"beta_schedule": "linear", "clip_sample": False, "steps_offset": 1, **scheduler}),
    )  # fmt: skip


def pixart_transformer(**options: Any) -> PixArtTransformer2DModel:
    """It predicts the variance too."""
    return PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=24,
        patch_size=2, caption_channels=2 * WIDTH, **options,
    )  # fmt: skip


def sana(folder: Path, **scheduler: Any) -> SanaPipeline:
    """Its scheduler is that of the published ones, with steps of the first order."""
    tokenizer, encoder = gemma()
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 1}
    return SanaPipeline(
        tokenizer, encoder,
        AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8), encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
            encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3, scaling_factor=0.6,
        ),
        SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=2 * WIDTH,
            sample_size=8,
        ),
        DPMSolverMultistepScheduler(**{**options, **scheduler}),
    )  # fmt: skip


def sana_sprint(folder: Path, **scheduler: Any) -> SanaSprintPipeline:
    parts = sana(folder).components
    config = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    transformer = SanaTransformer2DModel(**{**config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"})
    pipeline = SanaSprintPipeline(**{**parts, "transformer": transformer, "scheduler": SCMScheduler(**scheduler)})
    for parameter in pipeline.transformer.parameters():
        if parameter.ndim > 1:  # so large that the guidance matters
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return pipeline


def lumina2(folder: Path, **scheduler: Any) -> Lumina2Pipeline:
    """Its decoder enlarges by 8, which the pipeline takes for granted."""
    tokenizer, encoder = gemma()
    return Lumina2Pipeline(
        Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 16, 16), cap_feat_dim=2 * WIDTH,
        ),
        FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **scheduler}),
        vae(blocks=4, layers_per_block=1, shift_factor=0.06, scaling_factor=1.5), encoder, tokenizer,
    )  # fmt: skip


def with_safety_checker(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save a Stable Diffusion pipeline with all that those on the hub have, and some of them."""
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=WIDTH)),
        feature_extractor=CLIPImageProcessor(),
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=WIDTH)),
    )
    pipeline.register_to_config(requires_safety_checker=True)
    pipeline.save_pretrained(folder)


PIPELINES = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "pixart-sigma": pixart_sigma,
    "sana": sana,
    "lumina2": lumina2,
}


OTHERS = {"flux-kontext": flux_kontext, "sana-sprint": sana_sprint}
"""One that edits pictures, and one of few steps, which have tests of their own."""
NEWER = ("pixart-sigma", "sana", "lumina2")
"""Those of which the fast tests ask a little less; `test_families.py` is theirs."""


def tiny_pipeline(name: str, folder: Path, **options: Any) -> Any:
    """A pipeline by the name of its family, the same for every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = (PIPELINES | OTHERS)[name](folder / "tokenizer", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
