"""Hugging Face directories, in and out."""

from hadamax.hf.export import save_pretrained
from hadamax.hf.load import load_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
