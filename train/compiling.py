"""One compilation for each step function, asserted; and compilations kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

import hadamax as hx


class RecompilationError(hx.HadamaxError):
    """A compiled step was called with other shapes, dtypes or shardings than those it was compiled for."""


def once(name: str, function: Any) -> Callable[..., Any]:
    """A jitted function that is compiled at its first call and, since its arguments keep their forms, never again.

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
    # Not compiled ahead of time: on CPU, such a function refuses four-bit arrays for a layout that is theirs.
    first: tuple[Any, list[_Form]] | None = None

    def call(*args: Any) -> Any:
        nonlocal first
        leaves, tree = jax.tree.flatten(args)
        forms = [_form(leaf) for leaf in leaves]
        if first is None:
            first = tree, forms
        elif first[0] != tree or not all(map(_alike, first[1], forms)):
            was, now = _texts(*first), _texts(tree, forms)
            path = next((path for path in was | now if was.get(path) != now.get(path)), "")
            found = f"{was.get(path, 'nothing')} and called with {now.get(path, 'nothing')}" if path else "another tree"
            message = f"{name} was compiled for argument {path} {found}" if path else f"{name} was called with {found}"
            raise RecompilationError(f"{message}; it would compile again, so keep one shape for a run")
        return function(*args)

    return call


class _Form(NamedTuple):
    """Shape and dtype of an argument, and where it lies; None where it is not on a device yet."""

    shape: tuple[int, ...]
    dtype: Any
    weak: bool
    sharding: Any


def _form(leaf: Any) -> _Form:
    aval = jax.typeof(leaf)  # whose own sharding is not where the array lies
    return _Form(aval.shape, aval.dtype, aval.weak_type, getattr(leaf, "sharding", None))


def _alike(one: _Form, other: _Form) -> bool:
    if one[:3] != other[:3]:
        return False
    a, b = one.sharding, other.sharding
    return a is None or b is None or a == b or a.is_equivalent_to(b, len(one.shape))


def _texts(tree: Any, forms: list[_Form]) -> dict[str, str]:
    """Each argument's form by its path, with the sharding where it spans devices."""

    def text(form: _Form) -> str:
        array = f"{form.dtype.name}{list(form.shape)}".replace(" ", "")
        one = form.sharding is None or len(form.sharding.device_set) == 1
        return array if one else f"{array} {getattr(form.sharding, 'spec', form.sharding)}"

    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(tree, map(text, forms)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def cache(directory: str | Path) -> None:
    """Keeps every compilation of this process in a directory, and takes those of earlier processes from it.

    JAX's own defaults keep only what took a second to compile.

    Raises:
        ConfigError: a file.
        OSError: the directory cannot be made.
    """
    if Path(directory).is_file():
        raise hx.ConfigError(f"run.compilation_cache: {directory} is a file; give a directory")
    Path(directory).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # one that was opened before does not look at the settings again
