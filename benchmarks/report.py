"""What benchmarks say of a measurement beside its numbers, and how they print them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

from configs.schema import ImageConfig
from runtime.allocator import release_freed_memory
from runtime.precision import Precision

_ROOT = Path(__file__).resolve().parents[1]
_SLOWER = 1 / 1.1


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far; on a CPU only where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes allocated on a GPU, or resident in this process, since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; getrusage there starts from the peak of the process that launched us
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def circumstances(config: ImageConfig, precision: Precision) -> dict[str, Any]:
    """What the result of a training step depends on beside the code's text."""
    return {
        **machine(precision.device),
        "precision": str(precision.dtype or torch.float32).removeprefix("torch."),
        "batch_size": config.train.batch_size,
        "size": list(config.size),
        "config": dataclasses.asdict(config),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """When, where and with which version a result was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(describe, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def step_table(result: dict[str, Any]) -> str:
    """The result of train_step.py as aligned text."""
    height, width = result["size"]
    lines = [_circumstances_line(result, f"{result['precision']}, {result['batch_size']} images of {height}x{width}")]
    for row in result["rows"]:
        low, high = row["step_ms_quartiles"]
        share = row["gflop_per_second"] / row["product_gflop_per_second"]
        lines += [
            "",
            f"ratio {row['ratio']:g}, {row['points']} points per image, {row['repeats']} steps",
            f"step           {row['step_ms']:9.1f} ms   quartiles {low:.1f} to {high:.1f}, "
            f"{row['images_per_second']:.1f} images/s",
        ]
        if "speedup" in row:
            lines.append(f"as published   {row['published_ms']:9.1f} ms   {row['speedup']:.2f} times as long")
        lines += [
            f"rate           {row['gflop_per_second']:9.1f} GFLOP/s   {share:.0%} of a matrix product's "
            f"{row['product_gflop_per_second']:.1f}",
            f"peak memory    {row['peak_memory_bytes'] / 1e6:9.1f} MB",
            *(f"tensors        {row[name] / 1e6:9.1f} MB" for name in ("tensor_bytes",) if name in row),
            *(f"  {part:<26}{spent:7.1f} ms" for part, spent in row["parts"].items()),
        ]
    return "\n".join(lines)


def operator_table(result: dict[str, Any]) -> str:
    """The result of operators.py as aligned text."""
    lines = [
        _circumstances_line(result, f"{result['dtype']}, batch {result['batch']}, {result['channels']} channels"),
        "",
        f"{'op':<16}{'size':>5}{'ratio':>7}{'ms':>10}  {'baseline':<34}{'ms':>10}{'speedup':>9}{'max error':>11}",
    ]
    lines += [
        f"{row['op']:<16}{row['size']:>5}{row['ratio']:>7g}{row['ms']:>10.2f}  {row['baseline']:<34}"
        f"{row['baseline_ms']:>10.2f}{row['speedup']:>8.1f}x{row['max_error']:>11.1e}"
        + ("  slower" if row["speedup"] < _SLOWER else "")
        for row in result["rows"]
    ]
    lines += [
        f"{row['op']} at ratio {row['ratio']:g}, side {row['sizes'][0]} to {row['sizes'][1]}, four times the points: "
        f"{row['ms'][0]:.2f} ms to {row['ms'][1]:.2f} ms, {row['growth']:.2f} times"
        for row in result["scaling"]
    ]
    return "\n".join(lines)


def sampling_table(result: dict[str, Any]) -> str:
    """The result of sampling.py as aligned text."""
    guided = "guided " if result["rows"][0]["guided"] else ""
    lines = [
        _circumstances_line(result, f"{result['precision']}, one {guided}evaluation"),
        "",
        f"{'size':<12}{'batch':>6}  {'backend':<14}{'ms':>10}{'MB':>9}  {'baseline':<14}{'ms':>10}{'MB':>9}"
        f"{'speedup':>9}{'max error':>11}",
    ]
    for row in result["rows"]:
        ours = f"{'{}x{}'.format(*row['size']):<12}{row['batch']:>6}  {row['backend']:<14}{row['ms']:>10.1f}"
        line = f"{ours}{row['peak_memory_bytes'] / 1e6:>9.0f}"
        if "baseline" in row:
            line += f"  {row['baseline']:<14}{row['baseline_ms']:>10.1f}{row['baseline_peak_memory_bytes'] / 1e6:>9.0f}"
            line += f"{row['speedup']:>8.1f}x{row['max_error']:>11.1e}"
        lines.append(line)
    return "\n".join(lines)


def _circumstances_line(result: dict[str, Any], setting: str) -> str:
    return (
        f"{result['device']}, {result['instructions'] or 'GPU'}, {result['threads']} threads, torch {result['torch']}, "
        f"{setting}, {result['date']}, commit {result['commit']}"
    )
