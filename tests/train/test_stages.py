"""When the next stage comes."""

import jax
import pytest

from jaxrl_llm.train import PlateauStages


def test_goes_on_when_the_value_has_not_grown():
    stages = PlateauStages((8, 16, 32), patience=2)
    state, limits = stages.init(), []
    advance = jax.jit(stages.advance)
    for value in [3.0, 5.0, 5.0, 4.0, 4.0, 6.0, 6.5, 6.5, 6.5, 1.0, 1.0, 1.0]:
        state = advance(state, value)
        limits.append(int(stages.limit(state)))
    assert limits == [8, 8, 8, 16, 16, 16, 16, 16, 32, 32, 32, 32]


@pytest.mark.parametrize(
    ("limits", "patience", "words"),
    [
        ((), 1, "must grow"),
        ((8, 8), 1, "must grow"),
        ((16, 8), 1, "must grow"),
        ((8,), 0, "patience must be at least 1"),
    ],
)
def test_bad_stages(limits, patience, words):
    with pytest.raises(ValueError, match=words):
        PlateauStages(limits, patience)
