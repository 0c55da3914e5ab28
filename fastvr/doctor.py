"""What this machine has, which implementation of each op runs on it, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvr.models  # noqa: F401  (registers the ops)
from fastvr import backend, tuning
from fastvr.ops._op import OPS
from fastvr.ops.cpu import mkldnn

VARIABLES = (
    "FASTVR_BACKEND",
    "FASTVR_STRICT",
    "FASTVR_CACHE_DIR",
    "FASTVR_TUNING_TABLE",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
)
_PEERS = ("timm", "torchvision", "scikit-learn", "pillow", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as every measurement should carry them."""
    gpu: dict[str, Any] | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "architecture": backend.architecture(device),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "device": str(device),
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }


def report() -> dict[str, Any]:
    """Everything that ``fastvr doctor`` shows, JSON-ready: ``environment``, ``packages``, ``interpreter``,
    ``compiler``, ``onednn``, ``cache``, ``tuning``, ``variables``, ``ops`` and ``advice``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {
        "fastvr": importlib.metadata.version("fastvr"),
        "environment": environment(device),
        "packages": {name: _version(name) for name in _PEERS},
        "interpreter": backend.interpreting(),
        "compiler": next(filter(None, map(shutil.which, _compilers())), None),
        "onednn": _onednn(),
        "cache": _cache(),
        "tuning": _table(device),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "mode": backend.current_backend(),
        "unavailable": backend.unavailable(device),
        "ops": choices(device),
    }
    found["advice"] = _advice(found, device)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _compilers() -> list[str]:
    # Triton compiles its launcher with $CC, gcc or clang, in that order
    return [name for name in (os.environ.get("CC", ""), "gcc", "clang") if name]


def _onednn() -> dict[str, Any]:
    """``dtypes``: those in which a model prepared on this CPU may run in oneDNN's fused calls; ``ops``: its
    ops that may; ``missing``: why none does, or None."""
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if mkldnn.supports(dtype)]
    return {
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "ops": [name for name, op in OPS.items() if op.vendor is not None],
        "missing": mkldnn.missing() or (None if dtypes else "torch.backends.mkldnn is switched off"),
    }


def _cache() -> dict[str, Any]:
    path = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return {"path": str(path), "writable": os.access(there, os.W_OK)}


def _table(device: torch.device) -> dict[str, Any]:
    """``path``: where ``fastvr tune`` writes; ``tables``: those in use, the first asked first; ``entries``:
    how many shapes were measured on this very GPU. Without a GPU no table is in use."""
    if device.type != "cuda":
        return {"path": None, "tables": [], "entries": None}
    card = tuning.card(device)
    try:
        path: str | None = str(tuning.own_path(card.name))
    except tuning.TableError:
        path = None
    tables = [
        {
            "path": str(source.path),
            "gpu": source.table.gpu,
            "entries": len(source.table.entries),
            "exact": source.table.gpu == card.name,
        }
        for source in tuning.sources(card)
    ]
    return {"path": path, "tables": tables, "entries": len(tuning.measured(card))}


# ------------------------------------------------------------------------------ which op runs on what


def choices(device: torch.device) -> list[dict[str, str]]:
    """For each op, called as ViT-B/16 or ResNet-50 calls it at batch 8: ``op``, ``runs`` ("triton", "pytorch"
    or "error") and ``why``. Nothing is computed."""
    found = []
    for name, args in _arguments(device, torch.bfloat16).items():
        runs, why = _choice(name, args, device)
        found.append({"op": name, "runs": runs, "why": why})
    return found


def _choice(name: str, args: tuple[Any, ...], device: torch.device) -> tuple[str, str]:
    mode, op = backend.current_backend(), OPS[name]
    if mode == "reference":
        return "pytorch", "the mode is 'reference'"
    reason = backend.unavailable(device) or op.unsupported(*args)
    if reason is not None:
        return ("error", f"the mode is 'triton', but {reason}") if mode == "triton" else ("pytorch", reason)
    if mode == "triton":
        return "triton", "the mode is 'triton'"
    if device.type == "cpu":
        return "pytorch", "the interpreter is for checking kernels: it runs them in the mode 'triton' only"
    if op.measured(*args) == "reference":
        return "pytorch", "the vendor's kernel: nothing faster was measured on this GPU"
    return "triton", "this op's default, or the tuning table's choice"


def _arguments(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """By op, the arguments of its schema."""

    def t(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    d, tokens = 768, t(8, 197, 768)
    pixels = t(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    patches = (t(8, 3, 224, 224), t(d, 3, 16, 16), t(d), t(197, d), t(1, d), None, None)
    # a LayerNorm's statistics, in chunks of 64
    stats = torch.empty((8 * 197, d // 64, 2), device=device)
    norm = (t(64), t(64), t(64), t(64))
    attention, class_token = (t(8, 197, 3 * d), 12, 0.125), (t(8, 1, d), t(8, 197, 2 * d), 12, 0.125)
    lse = torch.empty((8, 12, 197), device=device)
    # what BatchNorm in training leaves for its gradient
    moments = torch.empty(64, device=device)
    mlp = (t(4 * d, d), t(4 * d), t(d, 4 * d), t(d))
    windows = t(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    conv2, conv3 = (pixels, windows, *norm, 1e-5), (t(64, 64, 1, 1), *norm, 1e-5)
    pool, taps = ([3, 3], [2, 2], [1, 1]), pixels[..., :28, :28].to(torch.uint8)
    trained = (pixels, *(windows, t(64), t(64)) * 2, *[None] * 6, [1e-5] * 4, [1] * 4, [1] * 4)
    block = (*conv2, *conv3, [1, 1], pixels, *[None] * 6, 1e-5, [1, 1])
    return {
        "patch_embed": patches,
        "patch_embed_stats": patches,
        "layer_norm": (tokens, t(d), t(d), 1e-6, None),
        "layer_norm_backward": (tokens, tokens, t(d), tokens, 1e-6, True, True),
        "dropout": (t(8 * 197, d), 0.1, torch.zeros(2, dtype=torch.int64, device=device)),
        "swiglu": (t(8, 197, 4 * d),),
        "swiglu_backward": (t(8, 197, 2 * d), t(8, 197, 4 * d)),
        "linear": (tokens, t(3 * d, d), t(3 * d), None, None, "none"),
        "linear_stats": (tokens, t(d, d), t(d), None, tokens, "none"),
        "norm_linear": (tokens, stats, t(d, d), torch.empty(d, device=device), t(d), 1e-6, "none"),
        "attention": attention,
        "attention_kv": class_token,
        "attention_training": attention,
        "attention_kv_training": class_token,
        "attention_backward": (tokens, attention[0], tokens, lse, *attention[1:]),
        "attention_kv_backward": (
            *(class_token[0], *class_token[:2], class_token[0], lse[:, :, :1]),
            *(*class_token[2:], True, True),
        ),
        "layernorm_mlp": (tokens, t(d), t(d), *mlp, None, tokens, 1e-6, "gelu"),
        "layernorm_mlp_training": (tokens, t(d), t(d), *mlp, None, tokens, 1e-6, "gelu"),
        "layernorm_attention_training": (
            *(tokens, t(d), t(d), t(3 * d, d), t(3 * d), t(d, d), t(d), None, tokens),
            *(12, 0.125, 1e-6),
        ),
        "transformer_block_training": (
            *(tokens, t(d), t(d), t(3 * d, d), t(3 * d), t(d, d), t(d), None, t(d), t(d), *mlp, None),
            *(12, 0.125, 1e-6, 1e-6, "gelu"),
        ),
        "linear_weight_backward": (t(8 * 197, d), t(8 * 197, d), None, None, None, True, None),
        "linear_act_backward": (t(8 * 197, d), t(d, 4 * d), t(8 * 197, 4 * d), "gelu", True),
        "conv_bn_relu": (pixels, t(64, 64, 3, 3), *norm, 1e-5, [1, 1], [1, 1], 1, "relu", None, None, None),
        "conv_bn_relu_backward": (
            *(pixels, pixels, pixels, list(pixels.shape), t(64, 64, 3, 3), t(64), t(64), moments + 1, 1e-5),
            *([1, 1], [1, 1], 1, None, None, [True] * 4),
        ),
        "dual_conv_bn_relu": (
            *(pixels, t(64, 64, 1, 1), *norm, 1e-5),
            *(pixels, t(64, 64, 1, 1), *norm, 1e-5, [1, 1], "relu"),
        ),
        "batch_norm_act": (pixels, t(64), t(64), 1e-5, pixels, "relu", None, None),
        "batch_norm_act_backward": (
            *(pixels, pixels, pixels, moments, moments, t(64), None, 1e-5),
            *(True, True, True, False),
        ),
        "batch_norm_act_max_pool": (pixels, t(64), t(64), 1e-5, *pool),
        "batch_norm_act_max_pool_backward": (
            *(pixels[..., :28, :28], pixels, t(64), t(64), moments, moments, taps, 1e-5),
            *(*pool, True),
        ),
        "residual_block": trained,
        "residual_block_backward": (
            *(pixels, None, moments.repeat(4), pixels, pixels, t(0), t(0), t(0).to(torch.uint8)),
            *(*trained, [isinstance(value, Tensor) for value in trained]),
        ),
        "bottleneck": block,
        "bottleneck_chain": (*block, *conv3),
        "conv_bn_relu_max_pool": (
            *(t(8, 3, 224, 224), t(64, 3, 7, 7), *norm, 1e-5, [2, 2], [3, 3]),
            *([3, 3], [2, 2], [1, 1], None, None),
        ),
        "max_pool": (t(8, 64, 112, 112), [3, 3], [2, 2], [1, 1]),
        "max_pool_training": (t(8, 64, 112, 112), *pool),
        "max_pool_backward": (pixels[..., :28, :28], taps, *pool, [56, 56]),
        "avg_pool_linear": (t(8, 2048, 7, 7), t(1000, 2048), t(1000)),
        "avg_pool_linear_training": (t(8, 2048, 7, 7), t(1000, 2048), t(1000)),
        "avg_pool_linear_backward": (t(8, 1000), t(1000, 2048), [7, 7]),
    }


# ------------------------------------------------------------------------------------------- advice


def _advice(found: dict[str, Any], device: torch.device) -> list[str]:
    advice = []
    missing_triton = backend.triton_missing()
    if missing_triton:
        advice.append(f"{missing_triton}: without it fastvr runs PyTorch. On Linux: pip install triton")
    if device.type == "cpu":
        advice.append(
            "PyTorch sees no GPU, so fastvr runs PyTorch's own operators. "
            + (
                "This PyTorch is built without GPU support."
                if _cpu_build()
                else "Check the driver: nvidia-smi."
            )
        )
        if found["onednn"]["missing"] is None:
            advice.append(
                "fastvr.prepare(model, x) is the faster way here: oneDNN's fused calls in "
                f"{' and '.join(found['onednn']['dtypes'])}, its weights laid out once."
            )
        if not missing_triton and not found["interpreter"]:
            advice.append(
                "To run the kernels themselves here, slowly, as a check: fastvr compare does; "
                "or TRITON_INTERPRET=1 with FASTVR_BACKEND=triton."
            )
    else:
        if found["interpreter"]:
            advice.append("Unset TRITON_INTERPRET: with it no kernel runs on the GPU.")
        if not found["compiler"]:
            advice.append("Install a C compiler (gcc or clang): Triton builds its launcher with it.")
        if not found["unavailable"] and found["tuning"]["entries"] == 0:
            name, near = found["environment"]["gpu"]["name"], found["tuning"]["tables"]
            meanwhile = (
                f"the choices of {near[0]['gpu']} serve"
                if near
                else "the vendor's matrix products and convolutions run"
            )
            advice.append(
                f"Nothing was measured on {name}: {meanwhile}. fastvr tune MODEL measures, and writes "
                f"{found['tuning']['path'] or 'a table where FASTVR_CACHE_DIR says'}."
            )
    if not found["cache"]["writable"]:
        advice.append(
            f"{found['cache']['path']} is not writable: set TRITON_CACHE_DIR to a directory that is."
        )
    if found["mode"] == "triton" and found["unavailable"]:
        advice.append("FASTVR_BACKEND=triton raises on every call here; unset it, or take auto.")
    return advice


def _cpu_build() -> bool:
    return torch.version.cuda is None and torch.version.hip is None
