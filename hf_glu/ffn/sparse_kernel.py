"""Products with some rows of a matrix, read where they lie, so that nothing is copied.

- sums: y = sum of x_i W_i over the entries i whose score is above a threshold;
- dots: g_i (x . W_i + b_i) over the units i whose gate g_i isn't 0.

A compiler makes the kernels when one is first needed, in a second, and keeps them on disk (``HF_GLU_KERNELS``, else the
user's cache). Without a compiler torch's `embedding_bag` adds the rows, on one thread, and nobody asks for dots.

Shapes of sums: x ``[inputs]``, scale ``[inputs]``, W ``[inputs, outputs]`` (each input's weights next to each other), y
``[outputs]``. Of dots: x ``[H]``, W ``[W, H]`` (each unit's weights next to each other), g ``[W]``.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hf_glu.activation.kernels.compiled import has_compiler
from hf_glu.compat.of_torch import COMPILER

_log = logging.getLogger(__name__)
FOLDER = "HF_GLU_KERNELS"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-x", "c++")
SECONDS = 120
SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
struct bfloat { uint16_t bits; };
static inline float wide(float x) { return x; }
static inline float wide(bfloat x) { uint32_t u = (uint32_t)x.bits << 16; float r; memcpy(&r, &u, 4); return r; }
static inline void put(float v, float *y) { *y = v; }
static inline void put(float v, bfloat *y) {
  uint32_t u; memcpy(&u, &v, 4);
  y->bits = v != v ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <class T> static inline float score(const T *x, const float *scale, int64_t i) {
  return std::fabs(wide(x[i])) * (scale ? scale[i] : 1.0f);
}
template <int R, class T> static inline void add_rows(const T *w, const int64_t *at, const float *v, int64_t outputs,
                                                     float *s, int64_t begin, int64_t end) {
  const T *rows[R];
  for (int r = 0; r < R; r++) rows[r] = w + at[r] * outputs;
  for (int64_t j = begin; j < end; j++) {
    float sum = s[j];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum += v[r] * wide(rows[r][j]);
    s[j] = sum;
  }
}
template <class T> static int64_t sums(const T *x, int64_t inputs, float cut, int relative, const float *scale,
                                       const T *w, int64_t outputs, const T *bias, T *y, int threads) {
  static thread_local std::vector<int64_t> kept;
  static thread_local std::vector<float> factors, totals;
  kept.clear(); factors.clear(); totals.resize(outputs);
  if (relative) {
    double first = 0, second = 0;
    for (int64_t i = 0; i < inputs; i++) { double s = score(x, scale, i); first += s; second += s * s; }
    first /= inputs; second = second / inputs - first * first;
    cut = first + cut * std::sqrt(second > 0 ? second : 0);
  }
  for (int64_t i = 0; i < inputs; i++)
    if (!(score(x, scale, i) <= cut)) { kept.push_back(i); factors.push_back(wide(x[i])); }
  const int64_t n = kept.size(), *at = kept.data(), part = ((outputs + threads - 1) / threads + 31) / 32 * 32;
  const float *v = factors.data(); float *s = totals.data();
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t p = 0; p < threads; p++) {
    const int64_t begin = p * part, end = begin + part < outputs ? begin + part : outputs;
    for (int64_t j = begin; j < end; j++) s[j] = bias ? wide(bias[j]) : 0.0f;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) add_rows<8>(w, at + i, v + i, outputs, s, begin, end);
    for (; i < n; i++) add_rows<1>(w, at + i, v + i, outputs, s, begin, end);
    for (int64_t j = begin; j < end; j++) put(s[j], y + j);
  }
  return n;
}
template <class T> static int64_t dots(const T *x, int64_t inputs, const T *w, int64_t units, const T *bias, T *gates,
                                       int threads) {
  static thread_local std::vector<int64_t> open;
  open.clear();
  for (int64_t i = 0; i < units; i++)
    if (!(wide(gates[i]) == 0.0f)) open.push_back(i);
  const int64_t n = open.size(), *at = open.data();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < n; k++) {
    const T *row = w + at[k] * inputs; float parts[64] = {0}, sum = bias ? wide(bias[at[k]]) : 0.0f;
    int64_t j = 0;
    for (; j + 64 <= inputs; j += 64)
      for (int l = 0; l < 64; l++) parts[l] += wide(x[j + l]) * wide(row[j + l]);
    for (; j < inputs; j++) sum += wide(x[j]) * wide(row[j]);
    for (int l = 0; l < 64; l++) sum += parts[l];
    put(wide(gates[at[k]]) * sum, gates + at[k]);
  }
  return n;
}
#define ENTRIES(name, T) \
  extern "C" int64_t sums_##name(const T *x, int64_t h, float c, int r, const float *q, const T *w, int64_t n, \
                                 const T *b, T *y, int t) { return sums(x, h, c, r, q, w, n, b, y, t); } \
  extern "C" int64_t dots_##name(const T *x, int64_t h, const T *w, int64_t n, const T *b, T *g, int t) { \
    return dots(x, h, w, n, b, g, t); }
ENTRIES(float32, float)
ENTRIES(bfloat16, bfloat)
"""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SUMS, DOTS = "sums", "dots"
_TYPES = {
    SUMS: (_POINTER, _LONG, ctypes.c_float, _INT, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT),
    DOTS: (_POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT),
}


def multiply_kept(
    x: Tensor, rows: Tensor, bias: Tensor | None, cut: float, *, relative: bool, scale: Tensor | None
) -> Tensor:
    """Return the sum of x_i W_i over the i with |x_i| scale_i above the cut, and the bias.

    Args:
        x: ``[inputs]``, contiguous, float32 or bfloat16 like all others, on a CPU.
        rows: W, contiguous.
        bias: ``[outputs]``, or None.
        cut: the threshold; ``relative``: in standard deviations above the mean of the scores.
        relative: see there.
        scale: in float32; None: 1.
    """
    kernel = find_kernel(x.dtype)
    if kernel is None:
        return _by_bags(x, rows, bias, kept(x, cut, relative=relative, scale=scale))
    y = x.new_empty(rows.shape[1])
    places = [None if each is None else each.data_ptr() for each in (scale, rows, bias)]
    kernel(
        x.data_ptr(), len(x), cut, relative, *places[:2], rows.shape[1], places[2], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def multiply_open(gates: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply each gate that isn't 0 by x . W_i + b_i, in place; return the gates. There must be a kernel.

    Args:
        gates: g ``[W]``, contiguous, float32 or bfloat16 like all others, on a CPU.
        x: ``[H]``, contiguous.
        rows: W ``[W, H]``, contiguous.
        bias: ``[W]``, or None.
    """
    kernel = find_kernel(x.dtype, DOTS)
    assert kernel is not None
    added = None if bias is None else bias.data_ptr()
    kernel(x.data_ptr(), len(x), rows.data_ptr(), len(rows), added, gates.data_ptr(), torch.get_num_threads())
    return gates


def kept(x: Tensor, cut: float, *, relative: bool, scale: Tensor | None) -> Tensor:
    """Return which entries of ``x`` ``[..., inputs]`` are above the cut: booleans; NaN is."""
    score = x.detach().float().abs()
    score = score if scale is None else score * scale
    if not relative:
        return ~(score <= cut)
    mean = score.mean(-1, keepdim=True)
    return ~(score <= mean + cut * score.var(-1, keepdim=True, correction=0).sqrt())


def _by_bags(x: Tensor, rows: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    at = mask.nonzero().squeeze(1)
    y = functional.embedding_bag(at.unsqueeze(0), rows, per_sample_weights=x[at].unsqueeze(0), mode="sum").squeeze(0)
    return y if bias is None else y + bias


def find_kernel(dtype: torch.dtype, kind: str = SUMS) -> Callable[..., int] | None:
    """Return the kernel of a dtype; None: there is no compiler, or it can't make it."""
    library = _library()
    return None if library is None or dtype not in DTYPES else library[f"{kind}_{DTYPES[dtype]}"]


@cache
def _library() -> dict[str, Callable[..., int]] | None:
    if not has_compiler("cpu"):
        return None
    try:
        loaded = ctypes.CDLL(str(_build(COMPILER.find()())))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no kernel for sparse FFNs, which are slower without: %s", error)
        return None
    found = {}
    for kind, types in _TYPES.items():
        for dtype in DTYPES.values():
            kernel = getattr(loaded, f"{kind}_{dtype}")
            kernel.argtypes, kernel.restype = types, _LONG
            found[f"{kind}_{dtype}"] = kernel
    return found


def _build(compiler: str) -> Path:
    """Return the path of the library, compiled once for each processor and source."""
    made_of = "\n".join((SOURCE, *FLAGS, compiler, _processor()))
    folder = Path(os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_glu")
    path = folder / f"sparse-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *FLAGS, "-", "-o", str(made)]
            subprocess.run(command, input=SOURCE, text=True, check=True, capture_output=True, timeout=SECONDS)
            os.replace(made, path)  # whole or not there, whoever else builds it
    return path


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
