"""What a checkpoint is, what memory it takes and whether it will load: `python -m jaxrl_llm.models.inspect PATH`.

Headers alone are read, no tensor; of a hub id, nothing but the headers and the small files is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table

from jaxrl_llm.models.checkpoint import Stored, Tensor, compare, read_headers, rename, stored_shapes
from jaxrl_llm.models.download import fetch, hub_error
from jaxrl_llm.models.hub import build, parameter_shapes, read_config

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def inspect_checkpoint(path_or_hub_id: str | Path) -> dict[str, Any]:
    """What `load` would find, as a dict that JSON can hold.

    Keys, as far as one gets: `path`; `family`; `config`, the fields of our config that are not at their defaults;
    `parameters` and, with experts, `active_parameters` (those that work on one token); `bytes` by type, without the
    scales of int8; `stored`, the number of tensors by type; `missing`, `surplus`, `misshapen` and `unreadable` tensors;
    `problem`, which keeps it from loading, or None; `loads`.
    """
    report: dict[str, Any] = {"path": str(path_or_hub_id), "problem": None}
    try:
        folder = fetch(path_or_hub_id, weights=False)
        source = read_config(folder)
        report["family"], family, model = build(source)
        report["config"] = _changed_fields(model.config)
        stored, shapes = family.stored(model.config), parameter_shapes(model)
        report["parameters"] = sum(_sizes(shapes).values())
        if (active := _active(stored, shapes, source)) != report["parameters"]:
            report["active_parameters"] = active
        report["bytes"] = {name: report["parameters"] * size for name, size in ITEM_BYTES.items()}
        tensors = read_headers(folder) if Path(path_or_hub_id).expanduser().is_dir() else _hub_headers(path_or_hub_id)
        report["stored"] = dict(Counter(tensor.dtype for tensor in tensors.values()))
        differences = compare(stored_shapes(stored, shapes), rename(tensors, family.renamed), family.ignored)
        report.update(differences._asdict())
        if any(differences):
            report["problem"] = f"the tensors are not those of config.json: {differences.describe()}"
    except ValueError as error:
        report["problem"] = str(error)
    return {**report, "loads": report["problem"] is None}


def _hub_headers(hub_id: str | Path) -> dict[str, Tensor]:
    """The tensors of a hub model, from the first bytes of its files."""
    import huggingface_hub

    try:
        metadata = huggingface_hub.HfApi().get_safetensors_metadata(str(hub_id))
    except Exception as error:  # the client's versions use other HTTP libraries, whose errors share no class
        raise hub_error(str(hub_id), error) from error
    return {
        name: Tensor(Path(file), info.dtype, tuple(info.shape), info.data_offsets[0])
        for file, header in metadata.files_metadata.items()
        for name, info in header.tensors.items()
    }


def _changed_fields(config: Any) -> dict[str, Any]:
    """Fields of a config that differ from their defaults, tuples by how often each entry comes."""
    changed = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            several = isinstance(value, tuple) and len(value) > 1
            changed[field.name] = {str(entry): count for entry, count in Counter(value).items()} if several else value
    return changed


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: int(np.prod(shape)) for name, shape in shapes.items()}


def _active(stored: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, Any]) -> int:
    """Parameters that work on one token: of stacked experts, those that the router picks."""
    active = 0
    for name, size in _sizes(shapes).items():
        experts = len(stored[name].names)
        active += size if experts == 1 else size // experts * int(source.get("num_experts_per_tok") or experts)
    return active


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def print_report(report: Mapping[str, Any], console: rich.console.Console) -> None:
    """The report as a table, on a console that takes no markup."""
    table = rich.table.Table("", str(report["path"]), show_edge=False, title_justify="left")
    for key in ("family", "config"):
        if key in report:
            value = report[key]
            fields = value if isinstance(value, str) else ", ".join(_short(f"{k}={v}") for k, v in value.items())
            table.add_row(key, fields)
    for key in ("parameters", "active_parameters"):
        if key in report:
            table.add_row(key.replace("_", " "), f"{report[key]:,}")
    if "bytes" in report:
        table.add_row("memory", ", ".join(f"{name} {_size(size)}" for name, size in report["bytes"].items()))
    if "stored" in report:
        table.add_row("stored", ", ".join(f"{count} tensors of {name}" for name, count in report["stored"].items()))
    table.add_row("loads", "yes" if report["loads"] else f"no: {report['problem']}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a report; 1 if the checkpoint will not load."""
    parser = argparse.ArgumentParser(prog="python -m jaxrl_llm.models.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="folder of a checkpoint, or a model of the Hugging Face hub")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, every tensor named")
    options = parser.parse_args(arguments)
    report = inspect_checkpoint(options.path)
    if options.json:
        print(json.dumps(report, indent=2, default=str))
    else:
        print_report(report, rich.console.Console(markup=False))  # the lists in a problem are no markup
    return 0 if report["loads"] else 1


if __name__ == "__main__":
    sys.exit(main())
