"""``make compiled``: what the compilers made of the GPU kernels, read from the machine code.

Needs no GPU. Fails where a kernel spills registers or uses local memory, and where a kernel that
walks over rows does so by less than 16 bytes at a time.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import kdkernels
from kdkernels.bench import cases
from kdkernels.bench.machine_code import Kernel, kernels
from kdkernels.ops.kd_loss.spec import LISTED, LISTED_ENTROPY

LIBRARY = Path(kdkernels.__file__).parent / "_native_cuda.so"
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
VECTOR_BITS = 128
# Bytes a thread and accesses by (backend, op). ptxas parks a scalar over a whole loop to fit one
# more program of Triton's, with a list up to four of them; a spilled block of a row would be stored
# and loaded in every loop.
PARKED = {("triton", ""): (8, 2), ("triton", "topk_kd_loss"): (16, 10)}
LISTED_ROWS = re.compile(rf"kd_loss_rows<\w+, ({LISTED}|{LISTED_ENTROPY}),")

TABLE_WIDTH = 120

Json = Annotated[Path | None, typer.Option("--json", help="Write all kernels to this file.")]
Full = Annotated[bool, typer.Option("--full", help="Show every kernel, not the ops' extremes.")]


@dataclass(frozen=True)
class Entry:
    """A kernel, where it comes from, and what is wrong with it."""

    op: str
    backend: str  # native or triton
    call: str  # what a Triton kernel was compiled for
    walks_rows: bool  # over contiguous rows of 16 bytes and more
    kernel: Kernel
    fused: bool = False  # products into sums, where the case forbids it
    narrow: bool = False  # what it stores is no row
    list_loops: int = 0  # loops over something else than the row

    def faults(self) -> list[str]:
        """In words; empty for a good kernel."""
        kernel, found = self.kernel, []
        stack, accesses = PARKED.get(
            (self.backend, self.op), PARKED.get((self.backend, ""), (0, 0))
        )
        if kernel.stack > stack or kernel.local > 0:
            found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory")
        if kernel.local_accesses > accesses:
            found.append(f"{kernel.local_accesses} accesses to local memory")
        if self.fused:
            found.append("products fused into sums: terms that cancel leave a rest")
        if self.walks_rows:
            # A loop that only stores may fill what lies behind the classes of a row.
            narrow = [
                f"a loop that loads only {loop.widest_load} bits at a time"
                for loop in kernel.loops
                if 0 < loop.widest_load < VECTOR_BITS
            ]
            found += narrow[self.list_loops :]
            if kernel.widest_load < VECTOR_BITS:
                found.append(f"no load wider than {kernel.widest_load} bits")
            # 32 bits are the losses of rows, where no gradient is written.
            if not self.narrow and 32 < kernel.widest_store < VECTOR_BITS:
                found.append(f"no store wider than {kernel.widest_store} bits")
        return found


def cuda_entries(library: Path = LIBRARY) -> list[Entry]:
    """The kernels of the CUDA library.

    Raises:
        FileNotFoundError: it was not built.
        ValueError: it was not built for every architecture of the report.
    """
    if not library.exists():
        raise FileNotFoundError(
            f"compiled: {library.name} must have been built, which needs nvcc (make build)"
        )
    found = kernels(library)
    missing = set(CUDA_ARCHITECTURES) - {kernel.architecture for kernel in found}
    if missing:
        raise ValueError(f"compiled: {library.name} must hold {', '.join(sorted(missing))}")
    walking = {op: cases.load(op).row_kernels for op in cases.names()}
    entries = []
    for kernel in found:
        name = kernel.name.split("<")[0]
        op = next((op for op, names in walking.items() if name in names), "")
        narrow = bool(op) and name in getattr(cases.load(op), "narrow_stores", ())
        # Ids are read once, logits and log-probabilities for the sums and for the gradient.
        loops = 3 if LISTED_ROWS.match(kernel.name) else 0
        loops += getattr(cases.load(op), "search_loops", 0) if op else 0
        entries.append(Entry(op or name, "native", "", bool(op), kernel, False, narrow, loops))
    return entries


def triton_entries() -> list[Entry]:
    """The kernels of the Triton launchers over the calls that each op's case lists."""
    from kdkernels.bench.compiled_triton import compile_all

    entries = []
    for found in compile_all():
        case = cases.load(found.op)
        walks = found.wide and found.kernel.name in case.row_kernels
        fused = found.fusion and found.kernel.name in case.unfused_kernels
        narrow = found.kernel.name in getattr(case, "narrow_stores", ())
        entries.append(Entry(found.op, "triton", found.call, walks, found.kernel, fused, narrow))
    return entries


def compiled(json_path: Json = None, full: Full = False) -> None:
    """Report registers, spills, shared memory and the widest accesses of every GPU kernel."""
    console = Console(width=TABLE_WIDTH)
    try:
        entries = cuda_entries() + triton_entries()
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    if json_path is not None:
        text = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        fresh = json_path.with_suffix(json_path.suffix + ".new")
        fresh.write_text(text)
        fresh.replace(json_path)
    console.print(_table(_rows(entries, full)))
    faults = [(entry, fault) for entry in entries for fault in entry.faults()]
    for entry, fault in faults:
        kernel = entry.kernel
        console.print(
            f"{kernel.name} {entry.call} for {kernel.architecture}: {fault}",
            style="red",
            markup=False,
        )
    console.print(f"{len(entries)} kernels, {len(faults)} faults")
    if faults:
        raise typer.Exit(1)


def _rows(entries: Iterable[Entry], full: bool) -> list[dict[str, Any]]:
    groups = defaultdict(list)
    for entry in entries:
        name = entry.kernel.name if full else entry.kernel.name.split("<")[0]
        call = entry.call if full else ""
        groups[entry.backend, name, call, entry.kernel.architecture].append(entry.kernel)
    return [
        {
            "backend": backend,
            "kernel": f"{name} {call}".strip(),
            "for": architecture,
            "kernels": len(group),
            "registers": _span(kernel.registers for kernel in group),
            "stack": _span(kernel.stack for kernel in group),
            "shared": _span(kernel.shared for kernel in group),
            "load bits": _span(kernel.widest_load for kernel in group),
            "store bits": _span(kernel.widest_store for kernel in group),
        }
        for (backend, name, call, architecture), group in groups.items()
    ]


def _span(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for title in rows[0]:
        numeric = title not in ("backend", "kernel", "for")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


if __name__ == "__main__":
    typer.run(compiled)
