"""Hugging Face directories, in and out."""

from hadamax.hf.adapters.peft import load_adapter, save_adapter
from hadamax.hf.export import save_pretrained
from hadamax.hf.load import load_pretrained

__all__ = ["load_adapter", "load_pretrained", "save_adapter", "save_pretrained"]
