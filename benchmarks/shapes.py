"""Published sizes of the models that the benchmarks compile. Nothing is loaded."""

from hadamax.models import DecoderConfig
from hadamax.models.config import Llama3Rope


def _llama(width: int, ffn: int, layers: int, heads: int, factor: float, *, head_dim: int = 128, tied: bool = False):
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Rope(factor, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 32.0, head_dim=64, tied=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 32.0, tied=True),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8.0),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8.0),
    "Mistral-7B": DecoderConfig(  # v0.1, with its sliding window
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        sliding_window=4096,
        model_type="mistral",
    ),
    "Gemma-2-9B": DecoderConfig(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        post_norms=True,
        norm_unit_offset=True,
        scale_embeddings=True,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        sliding_layers=tuple(layer % 2 == 0 for layer in range(42)),
        model_type="gemma2",
    ),
}
