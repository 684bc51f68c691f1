"""What `python -m benchmarks.parity` prints beside the models' own cases, and its summary."""

import pytest

from benchmarks.parity import ADAPTERS, Row, adapter_parity, worst


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks it
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_equal_pefts_in_both_directions(name, tmp_path):
    assert max(adapter_parity(ADAPTERS[name], tmp_path)) < 1e-4


def test_a_family_is_as_bad_as_its_worst_case():
    rows = [Row("a", "a, x", 1.0, 2.0, 0), Row("a", "a, y", 3.0, 1.0, 2), Row("b", "b", 0.5, 0.5, None)]
    assert list(worst(rows)) == [Row("a", "a (2 cases)", 3.0, 2.0, 2), Row("b", "b", 0.5, 0.5, None)]
