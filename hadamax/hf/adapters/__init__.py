"""Adapters that others trained or will load: PEFT directories, LyCORIS files, checkpoints of ABBA's official code."""
