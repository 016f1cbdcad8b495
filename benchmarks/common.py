"""What the benchmark scripts share."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

RESULTS = Path(__file__).resolve().parent / "results"


def machine(*packages: str) -> str:
    """Names the processor and the versions that the figures were measured with."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    names = ("keras", "tensorflow", *packages)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    gpus = len(tf.config.list_physical_devices("GPU"))
    hardware = f"{os.cpu_count()} cores of {model}, {gpus} GPU"
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(stem: Path, markdown: str, numbers: dict[str, Any]) -> None:
    """Writes `stem`.md and `stem`.json, and prints the first."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(markdown.rstrip() + "\n")
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{markdown}\n\nWritten to {stem}.md and .json")
