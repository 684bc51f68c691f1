"""One file per method."""

from hadamax.methods.abba import abba
from hadamax.methods.boha import boha
from hadamax.methods.dora import dora
from hadamax.methods.gralora import gralora
from hadamax.methods.hadamard import hadamard_adapter
from hadamax.methods.hira import hira
from hadamax.methods.ia3 import ia3
from hadamax.methods.loha import loha
from hadamax.methods.lora import lora

__all__ = ["abba", "boha", "dora", "gralora", "hadamard_adapter", "hira", "ia3", "loha", "lora"]
