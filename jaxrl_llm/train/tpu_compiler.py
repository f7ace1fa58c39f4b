"""What libtpu makes of a program, without a TPU, and without waiting for what a plan does not read.

libtpu optimizes a program, divides it among devices, orders its instructions and places its buffers; then it writes
machine code for each instruction, which takes ten times as long as all before. What it has by then, it writes down
(`xla_dump_to`). That is read here: also where jaxlib cannot read the result (0.10.2 refuses those with parts for v5p's
sparse cores: "async-update instruction should have 1 operands"), and where the compiler refuses a program as too large.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Compiled(NamedTuple):
    """Of one device: the text of the program, bytes of arguments, results and temporaries together, whether that is
    more than the compiler lets it have."""

    text: str
    total_bytes: int
    refused: bool


def compile_ahead(lowered: jax.stages.Lowered, *, machine_code: bool, options: Mapping[str, Any]) -> Compiled:
    """Compiles a program that was lowered for the devices of a topology.

    Args:
      machine_code: to the end; the text then has the cycles of instructions. Otherwise it is read as soon as buffers
        are placed, and the compiler, which cannot be stopped, goes on in a thread: call it from a process that ends
        soon.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    failed: list[jax.errors.JaxRuntimeError] = []

    def run() -> None:
        try:
            lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            failed.append(error)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        # the last that is written before machine code is made
        while machine_code or not list(Path(folder).glob("*.after_optimizations_after_buffer_assignment.txt")):
            thread.join(0.05)
            if not thread.is_alive():
                break
        if failed and not re.search(r"RESOURCE_EXHAUSTED.*(on HBM|memory space hbm)", str(failed[0]), re.DOTALL):
            raise failed[0]
        written = {file.name.split(".", 2)[-1].split(".", 1)[-1]: file for file in Path(folder).glob("*.txt")}
        text = written.get("after_codegen.txt", written["after_optimizations.txt"]).read_text()
        total = allocated_bytes(written["after_optimizations-buffer-assignment.txt"].read_text())
    return Compiled(text, total, bool(failed))


def allocated_bytes(assignment: str) -> int:
    """Bytes of the device's main memory, from what libtpu writes about its placing of buffers.

    Those in other memory have a "color". "Thread-local" are those of computations inside an instruction: they are the
    buffers of whoever calls it, and only the report on memory, beside, counts them again (1.4 GB for exchanges on v5p).

    Raises:
      ValueError: no buffer is found.
    """
    sizes = re.findall(r"^allocation \d+: size (\d+), page(?!.*thread-local)", assignment, re.MULTILINE)
    if not sizes:
        raise ValueError(f"libtpu writes of buffers in another form than 0.0.52 does: {assignment[:200]!r}")
    return sum(map(int, sizes))
