"""Recorded figures: sections of a Markdown file that programs write, and the machine that the figures are of."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from seuf_ray.artifacts import write_text

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "safetensors")


def write_section(path: Path, section: str, text: str) -> None:
    """Put the section in place of its last recording, or at the end of the file."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Recorded figures\n"
    block = f"<!-- {section} -->\n{text}\n<!-- /{section} -->"
    pattern = re.compile(rf"<!-- {section} -->.*?<!-- /{section} -->", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    write_text(path, new)


def machine(packages: Sequence[str] = PACKAGES) -> str:
    """Processor, memory and packages: enough to judge figures by, nothing that names a host."""
    import torch

    load = os.getloadavg()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    named = ", ".join(f"{name} {found}" for name in packages if (found := _version(name)))
    device = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB{device}; load average {load:.1f} at the end; "
        f"Python {platform.python_version()}, {named}."
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
