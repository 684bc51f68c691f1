"""What README and CONTRIBUTING show runs and does what they say."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np

import hadamax as hx
from tests.test_methods import layer, perturbed

ROOT = Path(__file__).parents[1]


def python_blocks(name):
    text = (ROOT / name).read_text()
    indented = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line[len(indent) :] for line in block.splitlines()) for indent, block in indented]


def test_the_ten_lines_of_the_readme_run():
    scope = {}
    exec(python_blocks("README.md")[0], scope)
    assert list(scope["adapters"]) == ["mlp/down/kernel", "mlp/up/kernel"]
    chex.assert_trees_all_equal_structs(scope["gradients"], scope["adapters"])
    chex.assert_trees_all_close(scope["merged"], scope["params"])


def test_adapters_by_vmap_as_the_readme_shows():
    blocks, scope = python_blocks("README.md"), {}
    exec("\n".join([blocks[0], next(block for block in blocks if "jax.vmap" in block)]), scope)
    chex.assert_shape(scope["losses"], (4,))


def test_the_worked_example_of_contributing_is_a_method(x64):
    scope = {"jax": jax, "jnp": jnp}
    exec(python_blocks("CONTRIBUTING.md")[0], scope)
    adapter, linear = scope["rankone"](), layer(0)
    factors = perturbed(adapter.init(jax.random.key(1), linear))
    x = jax.random.normal(jax.random.key(2), (5, 16), jnp.float64)
    dense = np.asarray(linear.kernel) * (1 + np.outer(factors["d"], factors["e"]))
    chex.assert_trees_all_close(adapter.merge(factors, linear).kernel, dense, rtol=1e-13)
    chex.assert_trees_all_close(adapter.dot(factors, linear, x), x @ dense, rtol=1e-12)


def test_every_public_name_has_a_docstring_and_every_method_a_row_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(getattr(hx, name).__doc__ for name in hx.__all__ if callable(getattr(hx, name)))
    assert all(f"hx.{name}(" in readme for name in [*hx.METHODS, "inject", "at"])
    assert all(f"hx.{name}`" in readme or f"hx.{name}(" in readme for name in ("add", "chain", "scaled", "split"))
