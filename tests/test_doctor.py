from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fedtune import cli, doctor, plugins
from fedtune.executors.processes import num_workers
from fedtune.operating_system import NO_WORKERS


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """What `fedtune doctor` prints, by the name at the head of each line, with a client program of this function."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))

    def ask(compile_model=None):
        program = SimpleNamespace(compile_model=compile_model) if compile_model else SimpleNamespace()
        monkeypatch.setattr(plugins, "load_client_program", lambda name: program)
        done = CliRunner().invoke(cli.app, ["doctor"])
        assert (done.exit_code, done.exception) == (0, None)
        lines = done.stdout.splitlines()
        start = next(place for place, letter in enumerate(lines[0]) if place > len("engine") and letter != " ")
        assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)  # aligned
        return {line[:start].strip(): line[start:] for line in lines}

    return ask


def test_the_engine_is_the_kernel_with_what_it_was_built_from(shown):
    kernel = SimpleNamespace(digest="0123456789abcdef zig 0.15.2", train=print, measure=print)
    assert shown(lambda *_: kernel)["engine"] == "compiled kernel, built from 0123456789abcdef zig 0.15.2"


def test_without_a_kernel_the_engine_is_torch_with_the_reason(shown):
    assert shown(lambda *_: "there is no kernel")["engine"] == "torch: there is no kernel"
    assert shown()["engine"].startswith("torch: the client program 'local_sgd' has no compile_model")


def test_every_thing_has_a_line(shown):
    lines = shown()
    assert lines["workers"].startswith(f"{num_workers(0)},")
    assert lines["torch"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in lines["processor"]
    assert {"BLAS", "cores", "system", "Python", "fedtune", "flwr", "data sets"} <= lines.keys()


def test_a_system_without_worker_processes_has_a_line(shown, monkeypatch):
    monkeypatch.setattr(doctor, "has_workers", lambda: False)
    assert shown()["workers"] == f"none: {NO_WORKERS}"


@pytest.mark.parametrize(
    ("built", "line"),
    [
        ("  - OpenMP\n  - Build settings: BLAS_INFO=open, BUILD_TYPE=Release", "open"),
        ("  - Intel(R) Math Kernel Library Version 1 \n  - Build settings: BLAS_INFO=mkl", "mkl, Intel(R) Math Kernel"),
        ("  - OpenMP", "not named by torch"),
    ],
)
def test_blas_is_what_torch_was_built_with(shown, monkeypatch, built, line):
    monkeypatch.setattr(torch.__config__, "show", lambda: built)
    assert shown()["BLAS"].startswith(line)


def test_each_gpu_has_a_line(shown, monkeypatch):
    assert torch.cuda.is_available() or shown()["CUDA"] == "no device"
    gpus = [SimpleNamespace(name=f"H{number}", total_memory=number * 2**30, major=number) for number in (7, 9)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])
    lines = shown()
    assert lines["cuda:0"] == "H7, 7 GiB, without instructions for bf16"
    assert lines["cuda:1"] == "H9, 9 GiB, with instructions for bf16"


def test_a_data_set_that_was_downloaded_has_a_line(shown, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "images").write_bytes(bytes(2_000_000))
    lines = shown()
    assert lines["data sets"] == str(tmp_path)
    assert lines["mnist"] == "2.0 MB"
    assert "shakespeare" not in lines


def test_an_older_torch_knows_no_capabilities(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert any("without instructions for bf16" in line for line in doctor.doctor_lines())
