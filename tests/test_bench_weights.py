"""The benchmark of the weights' way, at toy sizes."""

import pytest

from gvpo_ray.bench import weights
from gvpo_ray.bench.gpu.models import TOY


@pytest.mark.parametrize(("learning_rate", "least", "most"), [(1e-6, 0.002, 0.05), (1e-4, 0.3, 0.9)])
def test_a_small_step_changes_few_words_and_a_large_one_many(
    learning_rate: float, least: float, most: float, capsys: pytest.CaptureFixture[str]
) -> None:
    found = weights.main(1.0, learning_rate, TOY)
    assert least < found["changed"] < most
    # 4 bytes for a word of 2, but the whole where that would be half of it
    assert found["sent"] == (1 if found["changed"] > 0.25 else pytest.approx(2 * found["changed"], rel=0.05))
    assert "of memcpy" in capsys.readouterr().out
