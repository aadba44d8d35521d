"""Towers of other modalities, and projectors between them: which modules of a multi-modal model they are."""

from __future__ import annotations

import re

from mols_ds.core.group_layouts import config_value

_FRONT = r"^(?:model\.|thinker\.|vlm\.|git\.)*"

TOWERS: tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (tower, re.compile(rf"{_FRONT}(?:{names})(?=\.|$)"), families)
    for tower, names, families in (
        ("vision", r"encoder", ("vision-encoder-decoder", "pp_formulanet", "pix2struct")),
        ("audio", r"encoder", ("speech-encoder-decoder", "granite_speech", "granite_speech_plus")),
        (
            "projector",
            r"(?:encoder\.)?multi_modal_projector|mm_projector|projector|connector|aligner|\w+_aligner|"
            r"\w+_connector|resampler_model|qformer|query_tokens|language_projection|enc_to_dec_proj|"
            r"image_to_text_projection|vision_projection|visual_projection|text_projection|audio_projection|"
            r"merger|vision_adapter|encoder_projector|embedding_proj_layer|high_res_vision_(?:neck|proj|alpha)",
            (),
        ),
        (
            "vision",
            r"(?:encoder\.)?vision_tower|vision_model|visual|vision_encoder|image_tower|video_tower|video_model|"
            r"image_encoder|image_model|img_processor|high_res_vision_model|vqmodel|visual_\w+|generation_\w+|"
            r"embed_tokens_extend\.image_embed|vision_embed_tokens|image_newline",
            (),
        ),
        (
            "audio",
            r"audio_tower|audio_model|audio_encoder|speech_encoder(?:_model)?|codec_model|depth_decoder|"
            r"\w+_tokenizer_encoder|talker|token2wav|diffusion_head|flow_head|vocoder|audio_lm_head|"
            r"embed_tokens_extend\.audio_embed|word_timestamp_\w+|audio_prompt_proj|audio_latent_proj|eos_head|"
            r"loss_weighting|num_speakers_\w+|duration_delta_proj",
            (),
        ),
        ("protein", r"protein_encoder", ()),
        ("action", r"dit|embed_action_time|action_out_proj", ("pi0",)),
        # Megatron-core's LLaVA and MIMO, Megatron-Bridge; "modality" is a submodule of MIMO with another name.
        ("projector", r"sound_projection|embed_(?:vision|audio)|modality_submodules\.\w+\.\w+put_projections", ()),
        ("vision", r"modality_submodules\.(?:images?|videos?|vision)", ()),
        ("audio", r"sound_model|modality_submodules\.(?:audios?|sounds?|speech)", ()),
        ("modality", r"modality_submodules\.\w+", ()),
    )
)
"""(tower of another modality or projector, regex of its modules, model_types; no model_types = all). Groups of a tower
have its name as prefix (`vision.qk`). They are measured, not scaled, unless a user's rule scales them."""
TOWER_NAMES = tuple(dict.fromkeys(tower for tower, _, _ in TOWERS))


def tower_of(name: str, config: object | None = None) -> str | None:
    """Return the tower that contains a canonical name; None outside of towers."""
    family = str(config_value(config, "model_type"))
    found = (tower for tower, regex, families in TOWERS if (not families or family in families) and regex.search(name))
    return next(found, None)
