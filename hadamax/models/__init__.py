"""Transformers in linen, named and laid out for adapters."""

from hadamax.models.config import DecoderConfig, Llama3Rope
from hadamax.models.decoder import Cache, Decoder

__all__ = ["Cache", "Decoder", "DecoderConfig", "Llama3Rope"]
