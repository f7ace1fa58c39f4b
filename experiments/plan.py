"""Says what an experiment's steps cost on TPUs that are not there, and what to change where they do not fit.

    python -m experiments.plan --config=search_r1:paper --topology=v5e:8x8 --compare=v5p:4x4x4,v6e:8x8
    python -m experiments.plan --model=qwen2.5-7b --context=32768 --topology=v5p:4x4x4 --json
    python -m experiments.plan --table

The train step and the decode step are compiled ahead of time with libtpu; jaxrl_llm/train/planning.py says where each
number comes from. `--config` takes what `experiments.run` takes; the page must have `programs(config)` or
`build(config)`. `--model` plans GRPO itself with a known model: 1,024 sequences a step, bfloat16 weights. Without a
mesh in the config the axes are chosen. `--quick` lets the compiler optimize little and write no machine code: seconds
instead of a minute or two, and a time that is the least possible instead of the compiler's estimate. `--table` plans so
all models at 4k and 32k tokens on four topologies, two at a time, and writes results/plan/.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs.policy_optimization._base import MODELS
from experiments import ROOT, load_page, split_name
from experiments.policy_optimization import _training
from jaxrl_llm.models import DecoderConfig, make_decoder
from jaxrl_llm.train import load_config, parse_overrides
from jaxrl_llm.train.planning import (
    GIB,
    Program,
    chip_of,
    choose_mesh,
    choose_slots,
    plan,
    rollout_programs,
    topology_devices,
)

TOPOLOGIES = {"v5e-64": "v5e:8x8", "v5p-64": "v5p:4x4x4", "v6e-64": "v6e:8x8", "v5p-1024": "v5p:8x8x16"}
CONTEXTS = (4096, 32768)
TABLE_MODELS = ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-32b", "qwen3-30b-a3b")
ROWS = 1024  # sequences of a step, and at most side by side in the sampler
QWEN3_MOE: dict[str, Any] = {
    "width": 2048,
    "num_layers": 48,
    "num_heads": 32,
    "num_kv_heads": 4,
    "head_dim": 128,
    "ffn_width": 6144,
}
QWEN3_MOE |= {"qk_norm": "head", "num_experts": 128, "experts_per_token": 8, "expert_width": 768}
COLUMNS = ("weights", "optimizer", "reference", "activations", "cache", "sampler_activations", "total")


def model_config(name: str, **options: Any) -> DecoderConfig:
    """The sizes of a model that `--model` names, with layers scanned and computed again unless `options` say otherwise.

    Raises:
      ValueError: there is no such model; those there are, are named.
    """
    if name == "qwen3-30b-a3b":
        options = {"remat": "full", "scan_layers": True, "rope_theta": 1e6, **options}
        return DecoderConfig(151936, **QWEN3_MOE, tie_embeddings=False, **options)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there is {', '.join([*MODELS, 'qwen3-30b-a3b'])}")
    sizes: dict[str, Any] = {key.removeprefix("model."): value for key, value in MODELS[name].items()}
    return DecoderConfig(**(sizes | options))


def grpo_programs(
    config: DecoderConfig, *, context: int, micro_batches: int, rows: int = ROWS, slots: int = ROWS
) -> dict[str, Program]:
    """GRPO with a KL to the reference: an update on `rows` sequences, and a step of the sampler."""
    settings = ConfigDict(
        {
            **{"agg": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "kl_coefficient": 0.001},
            **{"max_turn_tokens": context, "micro_batches": micro_batches, "mini_batches": 1, "steps": 1},
            **{"decoding": {"temperature": 1.0}, "optimizer": {"learning_rate": 1e-6, "max_grad_norm": 1.0}},
        }
    )
    model, optimizer = make_decoder(config), _training.make_optimizer(settings)
    step, init = _training.make_clip_step(settings, model, optimizer), _training.init_policy(settings, optimizer)
    return rollout_programs(
        model, step, init, rows=rows, length=context, num_slots=slots, reference=True, dtype=jnp.bfloat16
    )


def plan_model(name: str, context: int, topology: str, *, thorough: bool = True) -> dict[str, Any]:
    """The report on GRPO with a known model; a chip has one row, or a part of one, of each micro-batch."""
    config, chip, chips = model_config(name), chip_of(topology), len(topology_devices(topology))
    mesh = choose_mesh(config, chip, chips, length=context, rows=ROWS)
    micro_batches = max(1, ROWS * mesh.get("sequence", 1) // chips)
    slots = choose_slots(config, chip, mesh, length=context, most=ROWS)
    programs = grpo_programs(config, context=context, micro_batches=micro_batches, slots=slots)
    chosen = {"model": name, "context": context, "micro_batches": micro_batches, "slots": slots}
    return chosen | plan(programs, topology, mesh, thorough=thorough)


def page_programs(page: ModuleType, config: ConfigDict) -> dict[str, Program]:
    """What a page would run: its `programs(config)`, or what follows from its `build(config)`.

    Raises:
      ValueError: it has neither.
    """
    if hasattr(page, "programs"):
        return page.programs(config)
    if hasattr(page, "build"):
        return _training.programs(config, page.build(config))
    raise ValueError(
        f"{page.__name__} defines neither programs(config), which says what to compile and which search_r1 has, nor "
        "build(config), which the pages of policy_optimization have"
    )


def plan_config(name: str, overrides: dict[str, Any], topology: str, *, thorough: bool = True) -> dict[str, Any]:
    """The report on a page, with the mesh of its config, or where that is of one device, with one that is chosen.

    Raises:
      ValueError: no such page, or one that says nothing of its programs; a mesh that does not fit.
    """
    files, arm = split_name(name)
    config, page = load_config(f"{ROOT / files.config}:{arm}", overrides), load_page(files)
    programs = page_programs(page, config)
    mesh, chips = dict(config.mesh), len(topology_devices(topology))
    if math.prod(mesh.values()) == 1:
        rows = config.prompts * config.group_size // config.mini_batches // config.micro_batches
        sizes = DecoderConfig(config.get("vocab_size") or 2, **config.model)
        mesh = choose_mesh(sizes, chip_of(topology), chips, length=config.max_length, rows=rows)
    return {"config": name} | plan(programs, topology, mesh, thorough=thorough)


def describe(report: dict[str, Any]) -> str:
    """A report in lines."""
    title = report.get("config") or f"GRPO, {report['model']}, {report['context']} tokens"
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [f"{title} on {report['topology']} ({report['chips']} chips, {mesh}): {report['parameters']:,} parameters"]
    memory = {kind: size for kind, size in report["memory_per_chip"].items() if size}
    lines.append("  GiB a chip: " + ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in memory.items()))
    for name, found in report["programs"].items():
        rates = f"{found['tokens_per_second']:,.0f} tokens/s, model FLOP utilization {found['mfu']:.1%}"
        lines.append(
            f"  {name}: {found['step_seconds']:.3g} s, {rates}, limited by {found['limit']}; a chip does "
            f"{found['flops']:.3g} FLOP and moves {found['bytes']:.3g} bytes"
        )
    return "\n".join([*lines, *(f"  {line}" for line in report["advice"])])


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """The table of `--table`."""
    from tabulate import tabulate

    head = [
        "model",
        "context",
        "topology",
        "mesh",
        "micro-batches",
        "slots",
        *COLUMNS,
        "fits",
        "step s",
        "tokens/s",
        "MFU",
    ]
    rows = []
    for entry in entries:
        mesh = " ".join(f"{axis} {size}" for axis, size in entry["mesh"].items())
        memory = [f"{entry['memory_per_chip'][kind] / GIB:.2f}" for kind in COLUMNS]
        ends = [f"{entry['step_seconds']:.1f}", f"{entry['tokens_per_second']:,.0f}", f"{entry['mfu']:.0%}"]
        decode = entry["programs"]["decode"]
        ends += [entry["limit"], f"{1e3 * decode['step_seconds']:.1f}", decode["limit"]]
        name = next(name for name, topology in TOPOLOGIES.items() if topology == entry["topology"])
        start = [entry["model"], entry["context"], name, mesh, entry["micro_batches"], entry["slots"]]
        rows.append([*start, *memory, "yes" if entry["fits"] else "no", *ends])
    return tabulate(rows, [*head, "limited by", "decode ms", "limited by"], tablefmt="github", disable_numparse=True)


def in_child(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The call's result from a process of its own, which ends with it, whatever its threads still do.

    Raises:
      ValueError: the call did. Another exception is printed by that process.
    """
    context = multiprocessing.get_context("spawn")  # a process that has jax must not be forked
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments, options))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        raise RuntimeError("the process that planned ended without a result; what it printed says why") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise ValueError(error)
    return result


def _send_result(sender: Any, function: Callable[..., Any], arguments: Any, options: Any) -> None:
    try:
        result = function(*arguments, **options)
    except ValueError as error:
        sender.send((None, str(error)))
    else:
        sender.send((result | {"cpu_seconds": round(time.process_time(), 1)}, ""))


def write_table(folder: Path) -> None:
    """Plans every entry, two at a time, and writes table.json and table.md in `folder`."""
    every = [(model, context, place) for model in TABLE_MODELS for context in CONTEXTS for place in TOPOLOGIES.values()]
    began, entries = time.time(), []
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for entry in pool.map(lambda key: in_child(plan_model, *key, thorough=False), every):
            entries.append(entry)
            print(f"{describe(entry)}\n  planned in {entry['cpu_seconds']} s of CPU", flush=True)
    (folder / "table.json").write_text(json.dumps(entries, indent=1) + "\n")
    spent = f"{len(entries)} entries, {sum(entry['cpu_seconds'] for entry in entries):.0f} s of CPU in all"
    (folder / "table.md").write_text(f"{markdown(entries)}\n\n{spent}\n")
    print(f"{spent}, {time.time() - began:.0f} s by the clock")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done (whether it fits is in the report), 2 bad arguments or no libtpu."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="config file or slug, with :arm")
    parser.add_argument("--model", help="a model to plan GRPO for, in place of --config")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a sequence, with --model")
    parser.add_argument("--topology", default="v5e:8x8", help="chips to compile for, such as v5p:4x4x4")
    parser.add_argument("--compare", help="more of them, with commas")
    parser.add_argument("--json", action="store_true", help="print a JSON list, a report for each topology")
    parser.add_argument("--quick", action="store_true", help="compile fast, and give the least time")
    parser.add_argument("--table", action="store_true", help="write results/plan")
    try:
        overrides, rest = parse_overrides(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(rest)
        if options.table:
            write_table(ROOT / "results" / "plan")
            return 0
        if (options.config is None) == (options.model is None):
            raise ValueError("give --config=... for a page, or --model=... for GRPO with a known model")
        reports = []
        for topology in [options.topology, *filter(None, (options.compare or "").split(","))]:
            if options.config:
                call = functools.partial(plan_config, options.config, overrides, topology)
            else:
                call = functools.partial(plan_model, options.model, options.context, topology)
            reports.append(in_child(call, thorough=False) if options.quick else call())
            if not options.json:
                print(describe(reports[-1]), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(reports if len(reports) > 1 else reports[0], indent=2))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes of a table
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
