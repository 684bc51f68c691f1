"""Between a kernel's own layout and [batch..., in, out]."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadamax import ViewError, views

letters = st.lists(st.sampled_from("bio"), min_size=2, max_size=5).map("".join).filter(lambda v: "i" in v and "o" in v)


@given(letters, st.data())
def test_restore_is_the_inverse_of_canonical(view, data):
    shape = tuple(data.draw(st.integers(1, 3)) for _ in view)
    axes, kernel = views.parse(view), np.arange(math.prod(shape)).reshape(shape)
    flat = views.canonical(kernel, axes)
    batch = [n for n, role in zip(shape, view, strict=True) if role == "b"]
    n_in = math.prod(n for n, role in zip(shape, view, strict=True) if role == "i")
    assert flat.shape == (*batch, n_in, kernel.size // n_in // math.prod(batch))
    assert (views.restore(flat, axes, shape) == kernel).all()
    for own in views.bias_layouts(axes):
        bias_shape = views.sizes(shape, axes, list(own))
        bias = np.arange(math.prod(bias_shape)).reshape(bias_shape)
        assert views.canonical(bias, own).shape == (*batch, flat.shape[-1])
        assert (views.restore(views.canonical(bias, own), own, bias_shape) == bias).all()


def test_axes_of_one_role_are_flattened_in_their_order():
    kernel = np.arange(24).reshape(2, 3, 4)
    assert (views.canonical(kernel, views.parse("ioo")) == kernel.reshape(2, 12)).all()
    assert (views.canonical(kernel, views.parse("oio")) == kernel.transpose(1, 0, 2).reshape(3, 8)).all()
    assert (views.canonical(kernel, views.parse("oib")) == kernel.transpose(2, 1, 0)).all()


@pytest.mark.parametrize("view", ["", "i", "bo", "bi", "xio", "IO", "i o"])
def test_a_view_without_in_or_out_or_with_other_letters_is_refused(view):
    with pytest.raises(ViewError, match="must name each axis"):
        views.parse(view)
