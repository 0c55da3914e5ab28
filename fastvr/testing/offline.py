"""Compile a kernel for a named GPU without having one, and read what the compiler made of it.

``triton.compile`` needs no driver, only the specialisation of a launch's arguments does: ``warmup`` under a
stub driver gives exactly the binary that such a launch would. Compiling never checks whether the result fits
the GPU; :func:`inspect` does. Triton's own cache (``TRITON_CACHE_DIR``) holds what was compiled.
"""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor


@dataclass(frozen=True)
class Architecture:
    """A compilation target and its limits; shared memory in bytes."""

    target: Any
    shared_per_block: int
    shared_per_sm: int | None = None  # with what follows: None where occupancy is not modelled (AMD)
    threads_per_sm: int = 0
    blocks_per_sm: int = 0


def _nvidia(capability: int, block: int, sm: int, threads: int, blocks: int) -> Architecture:
    return Architecture(GPUTarget("cuda", capability, 32), block, sm, threads, blocks)


# Limits: "Technical Specifications per Compute Capability" of the CUDA programming guide, and the
# LDS size of CDNA 3.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_80": _nvidia(80, 166_912, 167_936, 2048, 32),
    "sm_86": _nvidia(86, 101_376, 102_400, 1536, 16),
    "sm_89": _nvidia(89, 101_376, 102_400, 1536, 24),
    "sm_90": _nvidia(90, 232_448, 233_472, 2048, 32),
    "sm_100": _nvidia(100, 232_448, 233_472, 2048, 32),
    "sm_120": _nvidia(120, 101_376, 102_400, 1536, 24),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65_536),
}
_REGISTERS_PER_SM = 65_536
_REGISTER_UNIT = 8  # per thread: a warp gets multiples of 256
_TENSOR_MEMORY = 512  # columns of an SM, sm_100
_SHARED_RESERVED = 1024  # bytes that CUDA keeps for itself in every block, since sm_80


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    ``spills`` counts the instructions that move registers to local memory and back (on AMD the spilled
    registers); Triton keeps no arrays in local memory, so that every such access is a spill.
    ``loop_spills`` are those inside a loop (on AMD all), where they cost time. ``mma`` counts matrix
    instructions by mnemonic, ``tma`` bulk tensor copies. ``ctas_per_sm`` is None on AMD and 0 where the
    kernel does not fit.
    """

    name: str
    arch: str
    registers: int
    spills: int
    loop_spills: int
    stack: int
    shared: int
    num_warps: int
    mma: dict[str, int] = field(hash=False)
    tma: int
    tf32: bool
    fits: bool
    ctas_per_sm: int | None


class _StubDriver(DriverBase):  # type: ignore[misc]  # triton has no type stubs
    """Enough of a driver for ``warmup``: a target, no device, no launch."""

    def __init__(self, target: Any) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("there is no device to launch on")

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return repr(self.target)  # the key of a kernel's cache in memory: one for every target

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is no device to measure on")


def _architecture(arch: str) -> Architecture:
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    return ARCHITECTURES[arch]


@contextlib.contextmanager
def _target(arch: str) -> Iterator[None]:
    previous = driver._active
    driver.set_active(_StubDriver(_architecture(arch).target))
    try:
        yield
    finally:
        driver._active = previous


def compile_kernel(
    fn: Any,
    kwargs: Mapping[str, Any],
    *,
    arch: str,
    num_warps: int = 4,
    num_stages: int | None = None,
    **options: Any,
) -> Any:
    """The binary that launching ``fn[grid](**kwargs)`` would build on ``arch``.

    Args:
        fn: a ``@triton.jit`` function.
        kwargs: every argument, as the launch would pass it: numbers, bools, None and constexpr values
            themselves, a host ``TensorDescriptor`` (its tensor may be on the meta device), and for pointers
            a ``torch.dtype`` (16-byte aligned, as PyTorch allocates) or any tensor.
        arch: a key of :data:`ARCHITECTURES`.
        num_warps, num_stages, options: launch options (``maxnreg``, ``enable_fp_fusion``, ...); None is
            Triton's default for the architecture.

    Returns:
        Triton's ``CompiledKernel``; ``.asm`` holds every stage.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: kernels are interpreted in this process.
    """
    _architecture(arch)
    if not isinstance(fn, JITFunction):
        raise RuntimeError(
            f"{getattr(fn, '__name__', fn)} is no compiled kernel: it must be a @triton.jit function, "
            "decorated in a process without TRITON_INTERPRET"
        )
    arguments = {
        name: MockTensor(value) if isinstance(value, torch.dtype) else value for name, value in kwargs.items()
    }
    if num_stages is not None:
        options["num_stages"] = num_stages
    with _target(arch):
        return fn.warmup(**arguments, grid=(1,), num_warps=num_warps, **options)


def inspect(compiled: Any) -> Resources:
    """Registers, spills, shared memory and instructions of what :func:`compile_kernel` returned.

    Raises:
        FileNotFoundError: NVIDIA's disassemblers are neither in the Triton wheel nor on the PATH.
        ValueError: the kernel was compiled for a target outside :data:`ARCHITECTURES`.
    """
    target = compiled.metadata.target
    for arch, limits in ARCHITECTURES.items():
        if (limits.target.backend, limits.target.arch) == (target.backend, target.arch):
            read = _inspect_amd if target.backend == "hip" else _inspect_nvidia
            return read(compiled, arch, limits)
    raise ValueError(f"no limits are known for {target}")


def _inspect_amd(compiled: Any, arch: str, limits: Architecture) -> Resources:
    text = compiled.asm["amdgcn"]

    def count(what: str) -> int:
        found = re.search(rf"\.{what}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"the assembly of {compiled.metadata.name} does not state its {what}")
        return int(found[1])

    mnemonics = collections.Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE))
    mma = {name: n for name, n in mnemonics.items() if name.startswith(("v_mfma", "v_smfmac"))}
    return Resources(
        name=compiled.metadata.name,
        arch=arch,
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count"),
        loop_spills=count("vgpr_spill_count"),
        stack=count("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        mma=mma,
        tma=0,
        tf32=any("xf32" in name for name in mma),  # AMD's name for the same 10 bits
        fits=compiled.metadata.shared <= limits.shared_per_block,
        ctas_per_sm=None,
    )


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L_\w+):")
_SPILLS = ("STL", "LDL")
_TF32_PTX = re.compile(r"^\s*(?:@\S+\s+)?(?:wgmma|mma|tcgen05\.mma)\S*tf32", re.MULTILINE)


def _inspect_nvidia(compiled: Any, arch: str, limits: Architecture) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _RESOURCES.search(_run("cuobjdump", "--dump-resource-usage", file.name))
        sass = _run("nvdisasm", "-c", file.name)
    if usage is None:
        raise ValueError(f"cuobjdump states no registers for {compiled.metadata.name}")
    registers, stack = int(usage[1]), int(usage[2])
    mnemonics, loop_spills = _read_sass(sass)
    count = collections.Counter(name.split(".")[0] for name in mnemonics)
    ptx = compiled.asm["ptx"]
    # with warp specialisation more warps run than num_warps says
    launched = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    threads = int(launched[1]) if launched else 32 * compiled.metadata.num_warps
    shared = compiled.metadata.shared
    per_block = -(-registers // _REGISTER_UNIT) * _REGISTER_UNIT * threads
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    fits = shared <= limits.shared_per_block and per_block <= _REGISTERS_PER_SM and columns <= _TENSOR_MEMORY
    assert limits.shared_per_sm is not None
    resident = min(
        _REGISTERS_PER_SM // per_block,
        limits.shared_per_sm // (shared + _SHARED_RESERVED),
        limits.threads_per_sm // threads,
        limits.blocks_per_sm,
        _TENSOR_MEMORY // columns if columns else limits.blocks_per_sm,
    )
    return Resources(
        name=compiled.metadata.name,
        arch=arch,
        registers=registers,
        spills=sum(count[name] for name in _SPILLS),
        loop_spills=loop_spills,
        stack=stack,
        shared=shared,
        num_warps=threads // 32,
        mma={name: n for name, n in sorted(count.items()) if name.endswith("MMA")},
        tma=count["UTMALDG"] + count["UTMASTG"] + count["UTMAREDG"],
        tf32=any("TF32" in name for name in mnemonics) or bool(_TF32_PTX.search(ptx)),
        fits=fits,
        ctas_per_sm=resident if fits else 0,
    )


def _read_sass(sass: str) -> tuple[list[str], int]:
    """Every instruction's mnemonic, and how many instructions inside loops spill."""
    mnemonics: list[str] = []
    labels: dict[str, int] = {}
    in_loop: set[int] = set()
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(mnemonics)
        elif instruction := _INSTRUCTION.match(line):
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                in_loop.update(range(labels[target[1]], len(mnemonics)))
            mnemonics.append(instruction[1])
    return mnemonics, sum(mnemonics[index].split(".")[0] in _SPILLS for index in in_loop)


def _run(tool: str, *arguments: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    path = str(bundled) if bundled.exists() else shutil.which(tool)
    if path is None:
        raise FileNotFoundError(
            f"{tool} is neither at {bundled}, where Triton's wheel has it, nor on the PATH"
        )
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
