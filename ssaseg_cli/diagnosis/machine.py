"""The machine: system, processor, memory, threads, allocator, GPUs. What is not known is left out."""

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

from ssaseg.cli.device import calm_allocator, count_cores
from ssaseg.cli.diagnosis.finding import Finding, Report, one_line
from ssaseg.cli.scoring.limit import free_memory, kilobytes
from ssaseg.files.reading import read_text

# Of a processor, that PyTorch and runtimes have code for.
FLAGS = (
    *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
# Settings of threads, memory and devices; their values say nothing about the user.
SETTINGS = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "KMP_BLOCKTIME"),
    *("KMP_AFFINITY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "SSASEG_ALLOCATOR"),
    *("MALLOC_CONF", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("TORCH_CUDNN_V8_API_DISABLED", "NVIDIA_TF32_OVERRIDE"),
)
ALLOCATORS = re.compile(r"lib((?:je|tc|mi)malloc)[^/\s]*$", re.MULTILINE)
DRIVER = Path("/proc/driver/nvidia/version")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time, and of time
GIB = 2**30


def look_at_machine(report: Report) -> dict[str, str]:
    """System, processor and memory by name. Reports limits that slow down everything."""
    cores, quota, load = count_cores(), cpu_quota(), os.getloadavg()[0]
    found = {"system": platform.platform(), "processor": f"{cpu_name()} ({platform.machine()})"}
    with contextlib.suppress(OSError):
        words = re.search(r"^(?:flags|Features)\s*:(.*)$", read_text("/proc/cpuinfo"), re.MULTILINE)
        flags = set(words[1].split()) if words else set()
        found["instructions"] = " ".join(flag for flag in FLAGS if flag in flags) or "none of those that are used"
    of = f" of {os.cpu_count()}" if os.cpu_count() != cores else ""
    limit = "" if quota is None else f", processor time of {quota:.4g} of them"
    found["cores"] = f"{cores}{of} for this process{limit}"
    found["load"] = f"{load:.1f} processes at work in the last minute"
    total, free = kilobytes("/proc/meminfo", "MemTotal"), free_memory()
    if total is not None and free is not None:
        found["memory"] = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free for this process"
        if free < GIB:
            report(Finding(f"{free / GIB:.1f} GiB of memory are free", "end other programs", broken=False))
    if quota is not None and quota < cores:
        what = f"the container gives the time of {quota:.4g} cores, but threads are started for {cores}"
        report(Finding(what, f"set OMP_NUM_THREADS={max(int(quota), 1)}", broken=False))
    elif load > cores + 1:
        what = f"other programs are at work: {load:.1f} processes for {cores} cores"
        report(Finding(what, "wait until they end before you measure times", broken=False))
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE):
            return found[1]
    return platform.processor() or "not known"


def cpu_quota() -> float | None:
    """Cores whose time a container allows; None: no limit is known."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = map(int, read_text(QUOTA).split())
        return allowed / period
    return None


def look_at_threads(report: Report) -> dict[str, str]:
    """Threads, allocator and the settings of the environment that change them."""
    found = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    with contextlib.suppress(OSError):
        loaded = sorted(set(ALLOCATORS.findall(read_text("/proc/self/maps"))))
        kept = "glibc, which keeps freed memory" if calm_allocator() else "the system's"
        found["allocator"] = f"{', '.join(loaded)} (preloaded)" if loaded else kept
    with contextlib.suppress(Exception):  # what is wrong with PyTorch was reported
        import torch

        found["threads"] = f"{torch.get_num_threads()} in PyTorch"
        found["kernels"] = f"PyTorch's for {torch.backends.cpu.get_cpu_capability()}"
        if torch.get_num_threads() > count_cores():
            what = f"PyTorch starts {torch.get_num_threads()} threads for {count_cores()} cores"
            report(Finding(what, f"set OMP_NUM_THREADS={count_cores()}", broken=False))
    return found


def look_at_gpus(report: Report) -> dict[str, Any]:
    """GPUs by number, driver and CUDA. Reports a GPU that PyTorch cannot use."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        driver = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", read_text(DRIVER))
        found["driver"] = driver[0] if driver else "not known"
    try:
        import torch

        found["PyTorch"] = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index in range(count):
            found[f"GPU {index}"] = _gpu(index, report)
        if count:
            found["cuDNN"] = str(torch.backends.cudnn.version())
    except Exception as error:
        if "PyTorch" in found:  # otherwise it cannot be imported, which was reported
            fix = "update the driver, or install the PyTorch that is built for it"
            report(Finding(f"CUDA does not start: {one_line(error)}", fix))
        return found
    if "driver" in found and not count:
        if not torch.version.cuda:
            fix = "to use it, install a PyTorch that is built for CUDA"
            report(Finding("there is an NVIDIA GPU, but this PyTorch is built for the CPU only", fix, broken=False))
        elif os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            what = f"PyTorch finds no GPU, but the driver {found['driver']} is loaded"
            report(Finding(what, f"update the driver: this PyTorch needs one for CUDA {torch.version.cuda}"))
    return found


def _gpu(index: int, report: Report) -> str:
    """A GPU in a line. Reports one that this PyTorch has no code for."""
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    kinds = [int(found[1]) for each in torch.cuda.get_arch_list() if (found := re.match(r"(?:sm|compute)_(\d+)", each))]
    if kinds and facts.major * 10 + facts.minor < min(kinds):
        what = f"{facts.name} has compute capability {facts.major}.{facts.minor}, older than this PyTorch has code for"
        report(Finding(what, "install an older PyTorch, at least 2.6, that has it", broken=False))
    capability = f"compute capability {facts.major}.{facts.minor}"
    return f"{facts.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free, {capability}"
