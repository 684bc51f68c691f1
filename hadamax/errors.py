"""Errors that a user can mend. Each message is one line: what is wrong, where, what was found, what to do."""

import difflib
from collections.abc import Iterable


class HadamaxError(ValueError):
    """Base of every error that hadamax raises for a user's mistake."""


class NoMatchError(HadamaxError):
    """A pattern, an exclusion or a layer list that selects nothing."""


class NotAMatrixError(HadamaxError):
    """A rule that selects a parameter which is no matrix (a norm's scale, a bias)."""


class ViewError(HadamaxError):
    """A kernel whose axes have no roles, or a view that does not fit its kernel."""


class ConfigError(HadamaxError):
    """A hyper-parameter, name or option that is unknown or out of range."""


class MergeError(HadamaxError):
    """An adapter that cannot be folded into the weights it adapts."""


class CheckpointError(HadamaxError):
    """A file or directory of parameters that is missing, damaged or of another shape."""


class BaseMismatchError(HadamaxError):
    """Adapters that were trained on another base than the one at hand."""


class ConversionError(HadamaxError):
    """An update that has no form in the method asked for."""


class DataError(HadamaxError):
    """A data file or record that cannot be used."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """`"; nearest: 'a', 'b'"`, or an empty string where nothing is near.

    Example:
        >>> nearest("q_prj", ["q_proj", "k_proj", "norm"], n=1)
        "; nearest: 'q_proj'"
    """
    near = difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.5)
    return "; nearest: " + ", ".join(map(repr, near)) if near else ""
