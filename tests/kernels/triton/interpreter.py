"""Triton's interpreter keeps bfloat16 as raw bits and computes with those; here it computes with the numbers.

Products, sums and other operations of two operands, `dot` and casts: in fp32, rounded to nearest even. What else would
work on the bits is refused, so that no kernel is tested on wrong numbers.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def is_bfloat16(x) -> bool:
    return x.dtype.scalar == tl.bfloat16


def as_float(x: TensorHandle) -> TensorHandle:
    if not is_bfloat16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def as_bfloat16(data: np.ndarray) -> TensorHandle:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def mend_bfloat16(monkeypatch) -> None:
    dot, binary, unary, cast = (
        getattr(InterpreterBuilder, name) for name in ("create_dot", "binary_op", "unary_op", "cast_impl")
    )
    reduce = ReduceOps.apply_impl

    def create_dot(self, a, b, d, *options):
        return dot(self, as_float(a), as_float(b), d, *options)

    def binary_op(self, x, y, operation):
        result = binary(self, as_float(x), as_float(y), operation)
        if is_bfloat16(x) and result.data.dtype == np.float32:  # not of a comparison
            return as_bfloat16(result.data)
        return result

    def unary_op(self, x, operation):
        assert not is_bfloat16(x), f"{operation} of bfloat16 is not mended"
        return unary(self, x, operation)

    def cast_impl(self, x, to):
        if to.scalar == tl.bfloat16 and not is_bfloat16(x):
            return as_bfloat16(x.data.astype(np.float32))
        return cast(self, as_float(x), to) if to.scalar != x.dtype.scalar else x

    def apply_impl(self, inputs):
        assert not any(is_bfloat16(x) for x in inputs), "a reduction of bfloat16 is not mended"
        return reduce(self, inputs)

    for name, function in (
        ("create_dot", create_dot),
        ("binary_op", binary_op),
        ("unary_op", unary_op),
        ("cast_impl", cast_impl),
    ):
        monkeypatch.setattr(InterpreterBuilder, name, function)
    monkeypatch.setattr(ReduceOps, "apply_impl", apply_impl)


def hasten(monkeypatch) -> None:
    """The interpreter changes Triton's language for each module of device functions once a launch, not at each of their
    calls, and remembers which type of numpy is which."""
    patch, launch, numpy_type = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched, types = set(), {}

    def patch_lang(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def remembered(dtype):
        if dtype.name not in types:
            types[dtype.name] = numpy_type(dtype)
        return types[dtype.name]

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(interpreter, "_get_np_dtype", remembered)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
