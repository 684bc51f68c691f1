"""One compilation for each step function, asserted; and compilations kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

import hadamax as hx


class RecompilationError(hx.HadamaxError):
    """A compiled step was called with other shapes, dtypes or shardings than those it was compiled for."""


def once(name: str, function: Any) -> Callable[..., Any]:
    """A jitted function that is compiled at its first call, ahead of time, and never again.

    Raises:
        RecompilationError: a later call of other shapes, dtypes or shardings, with the first argument that differs.

    Example:
        >>> double = once("doubling", jax.jit(lambda batch: 2 * batch))
        >>> double(jax.numpy.ones(2)), double(jax.numpy.zeros(2))
        (Array([2., 2.], dtype=float32), Array([0., 0.], dtype=float32))
        >>> try:
        ...     double(jax.numpy.ones(3))
        ... except RecompilationError as error:
        ...     print(str(error).split(";")[0])
        doubling was compiled for argument 0 float32[2] and called with float32[3]
    """
    compiled: Any = None
    first: dict[str, str] = {}

    def call(*args: Any) -> Any:
        nonlocal compiled, first
        if compiled is None:
            first, compiled = _forms(args), function.lower(*args).compile()
        try:
            return compiled(*args)
        except (TypeError, ValueError) as error:  # what a compiled function says to other arguments
            now = _forms(args)
            differing = [path for path in first | now if first.get(path) != now.get(path)]
            if not differing:
                raise
            was, found = (forms.get(differing[0], "nothing") for forms in (first, now))
            message = f"{name} was compiled for argument {differing[0]} {was} and called with {found}"
            raise RecompilationError(f"{message}; it would compile again, so keep one shape for a run") from error

    return call


def _forms(args: Any) -> dict[str, str]:
    """Shape and dtype of every array of the arguments by its path, and its sharding where it spans devices."""

    def form(leaf: Any) -> str:
        text = f"{jax.numpy.result_type(leaf).name}{list(jax.numpy.shape(leaf))}".replace(" ", "")
        sharding = getattr(leaf, "sharding", None)
        one = sharding is None or len(sharding.device_set) == 1
        return text if one else f"{text} {getattr(sharding, 'spec', sharding)}"

    leaves = jax.tree_util.tree_flatten_with_path(args)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): form(leaf) for path, leaf in leaves}


def cache(directory: str | Path) -> None:
    """Keeps every compilation of this process in a directory, and takes those of earlier processes from it.

    JAX's own defaults keep only what took a second to compile.

    Raises:
        OSError: the directory cannot be made.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # one that was opened before does not look at the settings again
