"""The version of this library; pyproject.toml says the same."""

__version__ = "0.1.0"
