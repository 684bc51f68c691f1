"""Walking through a program's equations."""

import jax


def equations(jaxpr):
    """Every equation of a jaxpr, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"))
        for value in inner:
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)
            elif hasattr(value, "eqns"):
                yield from equations(value)
