"""Writes the policy of a run's newest checkpoint as a folder that `models.load`, transformers and vLLM read.

    python -m experiments.export --workdir=out/search_r1-small --to=out/policy

The model is the decoder that `model` in the run's config describes. Only the newest whole checkpoint of the stage is
read (`--stage`, default train); `--step` takes another of those there are.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm import models
from jaxrl_llm.train import CheckpointError, finished_steps, read_arrays


def read_policy(checkpoint: Path) -> dict[str, Any]:
    """`params["policy"]` of a training state, or all of its parameters where they have no such part.

    Raises:
      CheckpointError: the checkpoint is damaged.
    """
    params: dict[str, Any] = {}
    for name, array in read_arrays(checkpoint).items():
        if name.startswith(".params["):
            *parents, last = [str(ast.literal_eval(key)) for key in re.findall(r"\[([^\]]+)\]", name)]
            inner = params
            for key in parents:
                inner = inner.setdefault(key, {})
            inner[last] = array
    return params.get("policy", params)


def export(workdir: str | Path, to: str | Path, *, stage: str = "train", step: int | None = None) -> int:
    """Writes the folder `to`, and returns the step that its parameters are from.

    Raises:
      ValueError: the workdir has no such checkpoint, or no config of a decoder; parameters of several seeds, or of
        another model than the config's; `models.save` refuses the folder or the model.
      CheckpointError: the checkpoint is damaged.
    """
    workdir = Path(workdir)
    steps = finished_steps(workdir / "checkpoints" / stage)
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"{workdir} has no checkpoint of stage {stage!r}{'' if step is None else f' at step {step}'}; "
            f"finished ones: {steps or 'none'}"
        )
    step = steps[-1] if step is None else step
    config = json.loads((workdir / "config.json").read_text())
    if "model" not in config:
        raise ValueError(f"{workdir / 'config.json'} has no entry 'model' with the sizes of a decoder")
    params = read_policy(workdir / "checkpoints" / stage / str(step))
    embedding = params.get("embedding")
    if embedding is None or embedding.ndim != 2:
        raise ValueError(
            f"the parameters at step {step} are not those of one decoder (embedding: "
            f"{'absent' if embedding is None else list(embedding.shape)}); a run of several seeds has one of each"
        )
    model = models.make_decoder(models.DecoderConfig(embedding.shape[0], **config["model"]))
    models.save(model, params, to)
    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 written, 1 the checkpoint is damaged, 2 bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument("--stage", default="train")
    parser.add_argument("--step", type=int, help="default: the newest")
    options = parser.parse_args(arguments)
    try:
        step = export(options.workdir, options.to, stage=options.stage, step=options.step)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.to}: the policy of {options.workdir} at step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
