"""What this machine offers to a run: `fedtune doctor`."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.data.sources import cache_folder
from fedtune.data.spec import DatasetSpec
from fedtune.executors.engine import compile_model
from fedtune.operating_system import NO_WORKERS, has_workers, num_cores
from fedtune.runs.environment import environment
from fedtune.settings import DEFAULT_CLIENT

Row = tuple[str, str]


def doctor_lines() -> Iterator[str]:
    """A line for each thing that a run depends on: its name, and what there is here."""
    found = environment()
    versions = {"Python": found["python"], **found["versions"]}
    rows = [_engine(), _blas(), *_cores(found["machine"]), *_gpus(), *versions.items(), *_data_sets()]
    width = max(len(name) for name, _ in rows)
    return (f"{name:<{width}}  {value}" for name, value in rows)


def _engine() -> Row:
    """Where clients train, tried with a model of one linear layer. Other models may not compile."""
    model, spec = FlatModel(nn.Linear(1, 2)), DatasetSpec((1,), "real", 2)
    compiled = compile_model(DEFAULT_CLIENT, model, spec, device="cpu", precision="fp32")
    if isinstance(compiled, str):
        return "engine", f"torch: {compiled}"
    return "engine", f"compiled kernel, built from {compiled.digest}"


def _blas() -> Row:
    """The library that multiplies matrices, as torch was built with it."""
    built = torch.__config__.show()
    name = re.search(r"\bBLAS_INFO=(\w+)", built)
    details = re.search(r"^ *- (.*\b(?:Math Kernel Library|OpenBLAS)\b.*)$", built, re.MULTILINE)
    return "BLAS", ", ".join(found[1].strip() for found in (name, details) if found) or "not named by torch"


def _cores(machine: Mapping[str, Any]) -> Iterator[Row]:
    # Older versions of torch do not have the function.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = any(there for name, there in capabilities.items() if "bf16" in name)
    yield "processor", f"{machine['processor']}, {machine['torch']}, {_with_or_without(bf16)}"
    yield "cores", str(machine["cores"])
    workers = f"{num_cores()}, unless the setting workers has another number"
    yield "workers", workers if has_workers() else f"none: {NO_WORKERS}"
    yield "system", str(machine["system"])


def _gpus() -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield "CUDA", "no device"
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        bf16 = _with_or_without(device.major >= 8)
        yield f"cuda:{number}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {bf16}"


def _with_or_without(bf16: bool) -> str:
    """Whether the precision bf16 can pay."""
    return f"{'with' if bf16 else 'without'} instructions for bf16"


def _data_sets() -> Iterator[Row]:
    """The folder of downloaded data sets, then what is there of each."""
    yield "data sets", str(cache_folder(""))
    for name in sorted(plugins.known("datasets")):
        files = [path for path in cache_folder(name).rglob("*") if path.is_file()]
        if files:
            yield f"  {name}", f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
