"""Make Triton's CPU interpreter compute in bf16.

Triton 3.6 keeps an interpreted bf16 tensor as uint16 bit patterns and runs integer arithmetic on them, silently.
`install` wraps the interpreter's builder: bf16 operands are widened to fp32, results rounded to nearest even.
Kernels should use bf16 for loads, dot operands and stores only; this covers those and ordinary arithmetic, not atomics.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return Handle((np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _narrow(handle: Any) -> Any:
    if handle.data.dtype == np.bool_:
        return Handle(handle.data, tl.int1)
    return Handle(_round(handle.data).reshape(np.shape(handle.data)), tl.bfloat16)


def _wrap(name: str, operands: int) -> None:
    original = getattr(Builder, name)

    def method(self: Any, *args: Any) -> Any:
        if not any(_is_bf16(a) for a in args[:operands]):
            return original(self, *args)
        return _narrow(original(self, *map(_widen, args[:operands]), *args[operands:]))

    setattr(Builder, name, method)


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "computes_bf16", False):
        return
    Builder.computes_bf16 = True
    _wrap("binary_op", 2)
    _wrap("create_fma", 3)
    for name in ("unary_op", "create_erf", "create_rsqrt"):
        _wrap(name, 1)
    ternary, dot, cast = Builder.ternary_op, Builder.create_dot, Builder.cast_impl

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where or not _is_bf16(other):  # selecting needs no arithmetic
            return ternary(self, lhs, rhs, other, op)
        return _narrow(ternary(self, _widen(lhs), _widen(rhs), _widen(other), op))

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), accumulator, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) == (target.scalar == tl.bfloat16):
            return cast(self, source, target)
        if _is_bf16(source):
            wide = _widen(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        return _narrow(source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32))

    Builder.ternary_op, Builder.create_dot, Builder.cast_impl = ternary_op, create_dot, cast_impl
