"""Transformers in linen, named and laid out for adapters."""

from hadamax.models.config import DecoderConfig, Llama3Rope
from hadamax.models.decoder import Cache, Decoder
from hadamax.models.encoder import Encoder
from hadamax.models.encoder_config import EncoderConfig

__all__ = ["Cache", "Decoder", "DecoderConfig", "Encoder", "EncoderConfig", "Llama3Rope"]
