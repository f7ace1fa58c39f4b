"""Times of every kernel on the platform this runs on, beside whatever else does the same work on the same inputs.

    python -m jaxrl_kernels.bench [KERNEL ...] [--torch] [--repeats 20] [--json PATH] [--markdown] [--small]
    python -m jaxrl_kernels.bench --compile v5e:2x2,v5p:2x2x1,v6e:2x2,h100

A table per kernel and shape. FLOP/s and bytes/s count the least that a pass must do (each array moved once, nothing
computed twice), so that no version looks good by doing more; their shares are of a matmul and a copy that are measured
first. Temporary memory is what the compiled program holds beside its inputs and outputs. "Difference" is the largest
distance from our result over the largest number. All alternatives take turns and the median is taken.

`--compile` needs no accelerator: it compiles the kernels for the named chips, TPUs where libtpu is installed and an
H100 where the packages of `jax[cuda12]` are, and lowers the Triton kernels.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from jaxrl_kernels.bench import aot, attention, cases
from jaxrl_kernels.bench.timing import Case, Row, measure, measure_ceilings

MAKERS: dict[str, Callable[..., Case]] = {
    "fused_logprob": cases.logprob_case,
    "flash_attention": attention.attention_case,
    "decode_attention": attention.decode_case,
    "discounted_scan": cases.scan_case,
    "fused_policy_loss": cases.policy_loss_case,
    "sample_tokens": cases.sampling_case,
}
HEADS = {"heads": 32, "num_kv": 8, "width": 128, "dtype": "bfloat16"}
ALL_FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.05}
# Shapes by kernel, for tests ("small") and by JAX's name of the platform.
SHAPES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "small": {
        "fused_logprob": [{"rows": 64, "width": 32, "vocab": 300, "dtype": "float32"}],
        "flash_attention": [
            {"batch": 1, "length": 64, "heads": 4, "num_kv": 2, "width": 32, "dtype": "float32", "segments": 3},
        ],
        "decode_attention": [
            {"slots": 4, "tokens": 1, "heads": 4, "num_kv": 2, "width": 32, "context": 256, "page": 128}
            | {"dtype": "float32"},
        ],
        "discounted_scan": [{"rows": 4, "length": 200}],
        "fused_policy_loss": [{"rows": 4, "length": 200}],
        "sample_tokens": [{"rows": 4, "vocab": 300, "filters": ALL_FILTERS}],
    },
    "cpu": {
        "fused_logprob": [
            *({"rows": 8192, "width": width, "vocab": 8192, "dtype": "float32"} for width in (256, 512, 896)),
            {"rows": 2048, "width": 512, "vocab": 152064, "dtype": "float32"},
        ],
        "flash_attention": [
            {"batch": 4, "length": 1024, "heads": 8, "num_kv": 2, "width": 64, "dtype": "float32", "segments": segments}
            for segments in (0, 4)
        ],
        "decode_attention": [
            {"slots": 64, "tokens": 1, "heads": 8, "num_kv": 2, "width": 32, "context": 256, "page": page}
            | {"dtype": "float32"}
            for page in (None, 128)
        ],
        "discounted_scan": [{"rows": 64, "length": 8192}],
        "fused_policy_loss": [{"rows": 64, "length": 8192}],
        "sample_tokens": [
            {"rows": 64, "vocab": 8192, "filters": {}, "with_logprob": False},
            {"rows": 64, "vocab": 8192, "filters": {}},
            {"rows": 64, "vocab": 8192, "filters": ALL_FILTERS},
        ],
    },
    "gpu": {
        "fused_logprob": [{"rows": 16384, "width": 3584, "vocab": 152064, "dtype": "bfloat16"}],
        "flash_attention": [
            *({"batch": 16384 // length, "length": length} | HEADS for length in (4096, 8192, 16384)),
            {"batch": 2, "length": 8192, "causal": False} | HEADS,
            {"batch": 2, "length": 8192, "segments": 8} | HEADS,
        ],
        "decode_attention": [
            {"slots": 64, "tokens": tokens, "context": 8192, "page": page} | HEADS
            for tokens, page in ((1, 128), (8, 128), (1, None))
        ],
        "discounted_scan": [{"rows": rows, "length": 8192} for rows in (64, 4096)],
        "fused_policy_loss": [{"rows": rows, "length": 8192} for rows in (64, 2048)],
        "sample_tokens": [
            {"rows": 64, "vocab": 8192, "filters": {}},
            {"rows": 256, "vocab": 152064, "filters": {}},
            {"rows": 256, "vocab": 152064, "filters": ALL_FILTERS},
        ],
    },
    "tpu": {
        "fused_logprob": [{"rows": 8192, "width": 3584, "vocab": 152064, "dtype": "bfloat16"}],
        "flash_attention": [
            {"batch": 1, "length": 8192} | HEADS,
            {"batch": 1, "length": 8192, "segments": 8} | HEADS,
        ],
        "decode_attention": [
            {"slots": 64, "tokens": tokens, "context": 8192, "page": 128} | HEADS for tokens in (1, 8)
        ],
        "discounted_scan": [{"rows": rows, "length": 8192} for rows in (64, 1024)],
        "fused_policy_loss": [{"rows": rows, "length": 8192} for rows in (64, 1024)],
        "sample_tokens": [
            {"rows": 64, "vocab": 152064, "filters": {}},
            {"rows": 64, "vocab": 152064, "filters": ALL_FILTERS},
        ],
    },
}
COLUMNS = ("implementation", "pass", "ms", "GFLOP/s", "of matmul", "GB/s", "of copy", "temporary MB", "difference")


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
      SystemExit: an unknown kernel or option.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(MAKERS)}; default all")
    parser.add_argument("--torch", action="store_true", help="time PyTorch and Liger too, where installed")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in which all alternatives take turns")
    parser.add_argument(
        "--seconds", type=float, default=60, help="no new round after these, per table, once 3 are done"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--compile", metavar="CHIP,...", help="compile ahead of time for chips: v5e:2x2, h100")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.kernels if name not in MAKERS]
    if unknown:
        parser.error(f"there is no kernel {', '.join(unknown)}; take some of {', '.join(MAKERS)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def table_lines(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as text, in the order of COLUMNS."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        [
            row.implementation,
            row.passes,
            number(1e3 * row.seconds, ".4g" if row.seconds < 1 else ".0f"),
            number(row.flops_per_second and row.flops_per_second / 1e9, ".4g"),
            number(row.share_of_matmul, ".0%"),
            number(row.bytes_per_second / 1e9, ".3g"),
            number(row.share_of_copy, ".0%"),
            number(None if row.temporary_bytes is None else row.temporary_bytes / 1e6, ".3f"),
            number(row.difference, ".1e"),
        ]
        for row in rows
    ]


def print_table(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool) -> None:
    """A heading and a table, aligned or in Markdown; columns in which nothing stands are left out."""
    print(f"\n{'### ' if markdown else ''}{heading}\n")
    kept = [index for index in range(len(columns)) if any(line[index] for line in lines)] or list(range(len(columns)))
    names = [columns[index] for index in kept]
    cells = [[line[index] for index in kept] for line in lines]
    alignment = ["left" if name in ("implementation", "pass", "program") else "right" for name in names]
    form = "github" if markdown else "simple"
    print(tabulate(cells, names, tablefmt=form, disable_numparse=True, colalign=alignment), flush=True)


def run_case(
    kernel: str, shape: dict[str, Any], args: argparse.Namespace, ceilings: dict[str, float]
) -> tuple[dict[str, Any], bool]:
    """Measures and prints one table. Returns its figures, and whether every version of ours ran."""
    case = MAKERS[kernel](args.torch, **shape)
    rows, not_run = measure(case, ceilings, args.repeats, args.seconds)
    print_table(f"{kernel}: {case.shape}", COLUMNS, table_lines(rows), args.markdown)
    if not_run:
        print("\nNot run:" + "".join(f"\n- {name}: {reason}" for name, reason in not_run.items()), flush=True)
    broken = [name for name, why in not_run.items() if name.startswith(cases.OURS) and why.startswith("failed")]
    figures = {"kernel": kernel, "shape": case.shape, "rows": [asdict(row) for row in rows], "not_run": not_run}
    return figures, not broken


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 if a version of ours failed."""
    args = parse_args(arguments)
    # So that PyTorch, which shares the GPU, finds memory; read when the backend starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    kernels = args.kernels or list(MAKERS)
    if args.compile:
        return aot.main(kernels, args.compile.split(","), functools.partial(print_table, markdown=args.markdown))
    platform = jax.default_backend()
    device = jax.devices()[0].device_kind
    dtype = "float32" if platform == "cpu" else "bfloat16"
    ceilings = measure_ceilings(args.small, dtype)
    print(f"{platform} ({device}, {os.cpu_count()} host cores), jax {jax.__version__}, {datetime.date.today()}")
    print(
        f"ceilings: matmul {ceilings['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s in {dtype}, "
        f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written"
    )
    report: dict[str, Any] = {"platform": platform, "device": device, "jax": jax.__version__}
    report |= {"date": str(datetime.date.today()), "ceilings": ceilings, "tables": []}
    good = True
    for kernel, shape in _selected(kernels, SHAPES["small" if args.small else platform]):
        figures, whole = run_case(kernel, shape, args, ceilings)
        report["tables"].append(figures)
        good = good and whole
        if args.json:  # after every table, so that an interrupted run leaves what it has
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if good else 1


def _selected(kernels: Sequence[str], shapes: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kernel in kernels:
        for shape in shapes[kernel]:
            yield kernel, shape


if __name__ == "__main__":
    sys.exit(main())
