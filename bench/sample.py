"""The families that stand for all in a quick census."""

from __future__ import annotations

SAMPLE = """
torch:mha-weights torch:mha-padding torch:mha-bias-kv torch:encoder-layer-padding torch:decoder-layer-causal
llama qwen3 gemma2 gemma3_text mistral cohere2 gpt_oss bloom mpt falcon gpt2 gptj gpt_neox phi olmo2 stablelm
deepseek_v3 minicpm3 mixtral qwen3_next lfm2 mamba2
t5 umt5 bart pegasus marian led longt5 prophetnet fsmt
bert albert roberta electra mpnet modernbert deberta-v2 deberta longformer big_bird xlnet funnel squeezebert convbert
vit swin swinv2 beit dinov2 hiera pvt_v2 levit sam groupvit
clip siglip blip bridgetower flava
detr conditional_detr rt_detr owlvit
wav2vec2 wav2vec2-conformer whisper speecht5 wavlm seamless_m4t audio-spectrogram-transformer
perceiver decision_transformer time_series_transformer qwen2_vl llava paligemma
""".split()
