"""The machine: holding every library of a process to an instruction set, and its peak.

What each library looks at (and traps):

- oneDNN, in PyTorch and as the fork inside OpenVINO, obeys ONEDNN_MAX_CPU_ISA, read once, at its
  first primitive. AVX2 leaves out AVX-VNNI, AVX512_CORE_VNNI leaves out AMX.
- OpenVINO's own kernels (reduce, reorder, pooling) ask the CPU themselves and stay at AVX-512 with
  ONEDNN_MAX_CPU_ISA=AVX2; they are a few per cent of a network's time at most.
- ONNX Runtime's MLAS has no setting: it reads CPUID when it is imported, and asks Linux for AMX's
  tiles at once. Linux grants them for the asking, to the whole process: one library that asks has
  them for all. So a seccomp filter refuses the request, and with it AMX is off for every library,
  whatever it reads. Nothing holds MLAS to AVX2 (the table says so, and ratios leave it out). Its
  convolutions take the same time with AMX and without.
- FBGEMM has no AMX kernel; FBGEMM_ENABLE_INSTRUCTIONS=AVX2 holds it, ATEN_CPU_CAPABILITY=avx2
  PyTorch's own kernels and what Inductor generates, MKL_ENABLE_INSTRUCTIONS=AVX2 MKL. torch.ao's
  engine x86 is oneDNN on a CPU with VNNI and FBGEMM on others, by the CPU and not by the cap.
- All are read when a library starts, so they are set in the parent of the measuring process.
- A core of a virtual machine may be half of a real one: next to a busy neighbour the peak itself
  fell by half. So the peak takes turns with the candidates, and shares are of that.
- torchao: torch.compile's INT8 code is compiled again, in float, when it is called with gradients
  enabled; time it under no_grad.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

ISAS = ("native", "avx512vnni", "avx2")

_ENVIRONMENT = {
    "native": {},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def environment(isa: str, threads: int) -> dict[str, str]:
    """The variables of a process held to `isa` and `threads`, to be set before it starts."""
    count = str(threads)
    return {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, **_ENVIRONMENT[isa]}


def refuse_amx() -> None:
    """From now on Linux refuses AMX's tiles to this process. Before any library is imported."""
    arch_prctl, request_permission = 158, 0x1023  # x86-64; ARCH_REQ_XCOMP_PERM
    load, jump_if_equal, give_back = 0x20, 0x15, 0x06  # classic BPF
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
    program = [
        (load, 0, 0, 0),  # the system call's number
        (jump_if_equal, 0, 3, arch_prctl),
        (load, 0, 0, 16),  # its first argument
        (jump_if_equal, 0, 1, request_permission),
        (give_back, 0, 0, refuse),
        (give_back, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_ = Filter(len(program), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        set_seccomp, mode_filter, ctypes.byref(filter_), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "this system allows no seccomp filter")


def amx_granted() -> bool:
    """Whether this process has asked for AMX's tiles and may use them."""
    arch_prctl, get_permission, tile_data = 158, 0x1022, 1 << 18
    granted = ctypes.c_ulong(0)
    status = ctypes.CDLL(None).syscall(arch_prctl, get_permission, ctypes.byref(granted))
    return status == 0 and bool(granted.value & tile_data)


def load_peak() -> Callable[[str, int, float], float]:
    """peak.cpp's function: (path, threads, seconds) -> int8 multiply-adds a second of all threads
    together, 0 where this process cannot run the path's instruction."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("peak.cpp needs a C++ compiler: set CXX")
    here = Path(__file__).parent
    sources = [str(here / "peak.cpp"), str(here / "kernels" / "peak.cpp")]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        options = ["-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{here.parent / 'csrc'}"]
        subprocess.run([compiler, *options, *sources, "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).peak_macs
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_double]
    return lambda path, threads, seconds: function(path.encode(), threads, seconds)
