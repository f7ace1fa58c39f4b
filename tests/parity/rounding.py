"""What a model of transformers computes in float64, and how far float32 may stand from it."""

import copy

import numpy as np
import torch

UNIT = 2.0**-23  # the relative spacing of float32


def exact(model, run):
    """`run(model)` in float64, and the tolerance for float32: ten times what one rounding of the weights moves.

    A random checkpoint can be badly conditioned (a tiny vector before a norm, routing weights near a tie), so one
    number serves no two of them. The yardstick is the largest change of a result when every weight moves by up to one
    float32 spacing, the largest of three draws. Over 13 families and 13 seeds the float32 errors of transformers
    were 0.4 to 2.3 times one draw of it and ours 0.4 to 6; an error of arithmetic is thousands of times as large.
    `run` takes a model to a numpy array.
    """
    model = copy.deepcopy(model).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        # torch's grouped product has no float64
        getattr(model, "base_model", model).set_experts_implementation("eager")
    expected = run(model)
    changes = []
    for seed in range(3):
        moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in moved.parameters():
                weight.mul_(1 + UNIT * (2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1))
        changes.append(np.abs(run(moved) - expected).max())
    return expected, 10 * max(changes)


def assert_same(found, model, run):
    """`found` is what the model gives, as near as float32 can tell."""
    expected, tolerance = exact(model, run)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
