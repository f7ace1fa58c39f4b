"""When the next stage comes, and stages that start from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import train
from jaxrl_llm.train import PlateauStages, Stage, run_stages

OPTIMIZER = train.make_optimizer(train.optimizer_config(0.1))
TARGETS = {"first": jnp.array([1.0, 2.0, 3.0]), "second": jnp.array([-1.0])}


def fit(state, targets):
    """A step towards a target that is drawn; `distance` is that to the reference, where there is one."""
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    target = jax.random.choice(key, targets)
    loss, grads = jax.value_and_grad(lambda params: (params["w"] - target) ** 2)(state.params)
    distance = jnp.nan if state.ref_params is None else state.params["w"] - state.ref_params["w"]
    state, norms = train.apply_gradients(state, grads, OPTIMIZER, loss)
    return state, {"loss": loss, "drawn": target, "distance": distance, **norms}


def run(workdir, seed=0, reference="start"):
    stages = [
        Stage("first", fit, TARGETS["first"], 3, OPTIMIZER),
        Stage("second", fit, TARGETS["second"], 4, OPTIMIZER, reference=reference),
    ]
    config = {"seed": seed, "checkpoint_every": 1}
    with train.RunLog(workdir, config, quiet=True) as log:
        params, table = run_stages(
            {"w": jnp.float32(0)}, stages, log=log, evaluate=lambda state: {"w": state.params["w"]}
        )
    return jax.device_get(params), table, train.read_metrics(workdir)


def lines_of(lines, stage, name):
    return [line[name] for line in lines if line["stage"] == stage and line["step"] > 0]


def test_each_stage_starts_from_the_weights_of_the_one_before(tmp_path):
    params, table, lines = run(tmp_path)
    assert list(table) == ["start", "first", "second"]
    assert table["start"] == {"w": 0} and table["second"]["w"] == params["w"]
    # Adam's first step is the learning rate, up to 1 - b2 in float32; an old optimizer would step otherwise
    np.testing.assert_allclose(lines_of(lines, "second", "update_norm")[0], 0.1, rtol=1e-5)
    np.testing.assert_allclose(
        lines_of(lines, "second", "param_norm")[0],
        abs(table["first"]["w"] - 0.1),
        rtol=1e-5,  # of the update above
    )
    assert lines_of(lines, "first", "distance") == [None, None, None]
    assert lines_of(lines, "second", "distance")[0] == 0


def test_the_reference_may_be_the_start_of_the_stage_before(tmp_path):
    _, table, lines = run(tmp_path, reference="previous")
    assert lines_of(lines, "second", "distance")[0] == table["first"]["w"] - table["start"]["w"] != 0


def test_goes_on_in_the_middle_of_a_stage(tmp_path):
    write = train.RunLog.metrics

    def crash(self, stage, step, *arguments):
        if (stage, step) == ("second", 2):
            raise RuntimeError("as asked")
        write(self, stage, step, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="as asked"):
        patch.setattr(train.RunLog, "metrics", crash)
        run(tmp_path / "crashed")
    again, table, lines = run(tmp_path / "crashed")
    whole, whole_table, whole_lines = run(tmp_path / "whole")
    assert again == whole and table == whole_table
    assert lines_of(lines, "second", "loss") == lines_of(whole_lines, "second", "loss")
    assert run(tmp_path / "whole")[:2] == (whole, whole_table)  # nothing left to do


def test_seeds_at_once_are_seeds_one_by_one(tmp_path):
    both, table, lines = run(tmp_path / "both", seed=(0, 1))
    alone, own_table, own_lines = run(tmp_path / "alone", seed=1)
    np.testing.assert_array_equal(both["w"][1], alone["w"])
    assert [table[row]["w"][1] for row in table] == [own_table[row]["w"] for row in own_table]
    by_seed = [lines_of([line for line in lines if line["seed"] == seed], "first", "drawn") for seed in (0, 1)]
    assert by_seed[1] == lines_of(own_lines, "first", "drawn") != by_seed[0]


def test_stages_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="stage 'facts' has no data"):
        Stage("facts", fit, {}, 1, OPTIMIZER)
    with pytest.raises(ValueError, match="stage 'facts' has no data"):
        Stage("facts", fit, jnp.zeros((0, 3)), 1, OPTIMIZER)
    with pytest.raises(ValueError, match="reference='first'"):
        Stage("facts", fit, TARGETS["first"], 1, OPTIMIZER, reference="first")
    stage = Stage("facts", fit, TARGETS["first"], 1, OPTIMIZER)
    with train.RunLog(tmp_path, {}, quiet=True) as log:
        for stages in ([], [stage, stage]):
            with pytest.raises(ValueError, match="names that are all different"):
                run_stages({"w": jnp.float32(0)}, stages, log=log)


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
