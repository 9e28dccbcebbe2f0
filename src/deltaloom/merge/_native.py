"""Loops that numba has compiled once, started without numba.

Importing numba takes 0.3 CPU seconds, a third of what a plain merge of gigabytes takes in all;
llvmlite, on which numba is built, takes a tenth of that. So the loops of `_loops.py` are compiled
when they are first asked for, kept as machine code where numba keeps its own (NUMBA_CACHE_DIR, or
beside the source, or the user's cache) and loaded from there. A hash of the source, of llvmlite and
of the processor is in the file's name, and one of the code before it: other or damaged code is made
again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from deltaloom.core.atomic import new_file

SOURCE = Path(__file__).with_name("_loops.py")
TILE = 1024
"""As `_loops.py` has it."""
HASH = hashlib.sha256().digest_size
POINTERS, LENGTHS = (ctypes.c_void_p,), (ctypes.c_int64,)
ARGUMENTS = {
    "narrow": POINTERS * 2 + LENGTHS,
    "add_float32": POINTERS * 6 + LENGTHS * 3 + POINTERS,
    "add_float64": POINTERS * 6 + LENGTHS * 3 + POINTERS,
    "add_bfloat16": POINTERS * 4 + LENGTHS * 3 + POINTERS * 4,
    "gram_bfloat16": POINTERS + LENGTHS * 3 + POINTERS * 3,
    "combine_bfloat16": POINTERS * 2 + LENGTHS * 2 + POINTERS * 5,
    "count_high_bfloat16": POINTERS * 2 + LENGTHS + POINTERS * 3,
    "count_low_bfloat16": POINTERS * 2 + LENGTHS * 2 + POINTERS * 3,
    "elect_bfloat16": POINTERS * 6 + LENGTHS * 3 + POINTERS * 4,
}
"""As the signatures in `_loops.py` have them."""


def narrow(values: np.ndarray, raw: np.ndarray) -> None:
    """raw (n,) uint16 = the bfloat16 nearest to values (n,) float32; ties go to the even one."""
    _loops()["narrow"](values.ctypes.data, raw.ctypes.data, values.size)


def add_models(
    plus: np.ndarray | None,
    base: np.ndarray,
    models: np.ndarray,
    changes: list[bool],
    factors: list[float],
    common: float,
    out: np.ndarray,
) -> None:
    """out (n,) = plus (n,) + common * sum_k factors (k,) (models (k, n) - base (n,)).

    All float32 or all float64, contiguous. Nothing is taken off the models that are `changes` (k,)
    already, and base is read for the others only.
    """
    given = np.array(changes, np.uint8)
    weights = np.array([common, *factors], out.dtype)
    _loops()[f"add_{out.dtype}"](
        (out if plus is None else plus).ctypes.data,
        base.ctypes.data,
        models.ctypes.data,
        given.ctypes.data,
        weights.ctypes.data + out.itemsize,
        weights.ctypes.data,
        plus is not None,
        len(models),
        out.size,
        out.ctypes.data,
    )


def add_bfloat16(
    base: np.ndarray | None,
    models: np.ndarray,
    factors: list[float],
    common: float,
    out: np.ndarray,
) -> bool:
    """out (n,) = base (n,) + common * sum_k factors (k,) (models (k, n) - base (n,)), bfloat16.

    As bits, uint16; summed in float32 and rounded once. Without a base it is the models' own sum.
    Returns whether a NaN is among `out`.
    """
    weights = np.array([common, *factors], np.float32)
    scratch, nan = np.empty(3 * TILE, np.float32), np.zeros(1, np.uint8)
    _loops()["add_bfloat16"](
        (out if base is None else base).ctypes.data,
        models.ctypes.data,
        weights.ctypes.data + weights.itemsize,
        weights.ctypes.data,
        base is not None,
        len(models),
        out.size,
        scratch.ctypes.data,
        scratch.ctypes.data,
        nan.ctypes.data,
        out.ctypes.data,
    )
    return bool(nan[0])


def gram_bfloat16(models: np.ndarray, start: int, lanes: np.ndarray) -> None:
    """Add to lanes (k (k + 1) / 2, 16) float64 the inner products of models (k, n), bfloat16 as
    uint16, from the tensor's element `start` on: pairs i <= j in order, element e in lane e % 16.
    """
    k, n = models.shape
    scratch = np.empty((k, TILE), np.float32)
    at = scratch.ctypes.data
    _loops()["gram_bfloat16"](models.ctypes.data, start, k, n, at, at, lanes.ctypes.data)


def combine_bfloat16(models: np.ndarray, factors: np.ndarray, out: np.ndarray) -> bool:
    """out (n,) = sum_k factors (k,) float64 models (k, n), all bfloat16 as uint16, in float64.

    A model at zero has no part. Returns whether a NaN is among `out`.
    """
    k, n = models.shape
    scratch, totals = np.empty((2, TILE), np.float32), np.empty(TILE)
    nan, at = np.zeros(1, np.uint8), scratch.ctypes.data
    _loops()["combine_bfloat16"](
        models.ctypes.data,
        factors.ctypes.data,
        k,
        n,
        at,
        at,
        totals.ctypes.data,
        nan.ctypes.data,
        out.ctypes.data,
    )
    return bool(nan[0])


def count_bfloat16(
    base: np.ndarray, model: np.ndarray, high: int | None, counts: np.ndarray
) -> None:
    """Add to counts the magnitude bits of the float32 changes of model (n,) over base (n,), both
    bfloat16 as uint16: the upper 16 of 31, or, of those whose upper ones are `high`, the lower 15.
    """
    scratch = np.empty((3, TILE), np.float32)
    at = scratch.ctypes.data
    first, last = (base.ctypes.data, model.ctypes.data), (base.size, at, at, counts.ctypes.data)
    if high is None:
        _loops()["count_high_bfloat16"](*first, *last)
    else:
        _loops()["count_low_bfloat16"](*first, high, *last)


def elect_bfloat16(
    base: np.ndarray,
    models: np.ndarray,
    limits: np.ndarray,
    equals: np.ndarray,
    weights: np.ndarray,
    scale: float,
    normalize: bool,
    out: np.ndarray,
) -> bool:
    """out (n,) = base (n,) + scale * sum of the weighted changes of models (k, n) that agree in
    sign, all bfloat16 as uint16, in float32 and rounded once; with `normalize` divided by their
    weights (k,) float32.

    Of the changes those stay whose magnitude bits are above limits (k,) int64, and the first equals
    (k,) int64 at them; equals becomes what is left. Returns whether a NaN is among `out`.
    """
    scratch, nan = np.empty((len(models) + 6, TILE), np.float32), np.zeros(1, np.uint8)
    by, at = np.array([scale], np.float32), scratch.ctypes.data
    _loops()["elect_bfloat16"](
        base.ctypes.data,
        models.ctypes.data,
        limits.ctypes.data,
        equals.ctypes.data,
        weights.ctypes.data,
        by.ctypes.data,
        normalize,
        len(models),
        out.size,
        at,
        at,
        nan.ctypes.data,
        out.ctypes.data,
    )
    return bool(nan[0])


_lock = threading.Lock()
_loaded: dict[str, Callable[..., None]] = {}


def _loops() -> dict[str, Callable[..., None]]:
    """The loops by name; they take addresses and release the GIL."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.update(_load())
    return _loaded


def _load() -> dict[str, Callable[..., None]]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(_code()))
    engine.finalize_object()
    return {name: _function(engine, name) for name in ARGUMENTS}


def _function(engine: llvm.ExecutionEngine, name: str) -> Callable[..., None]:
    # numba's own convention: places for a result and an error, then the arguments
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, *POINTERS * 2, *ARGUMENTS[name])
    call, nowhere = kind(engine.get_function_address(name)), (ctypes.c_void_p * 2)()
    first = ctypes.addressof(nowhere)

    def loop(*arguments: int) -> None:
        _ = engine, nowhere  # live as long as the function
        call(first, first + ctypes.sizeof(ctypes.c_void_p), *arguments)

    return loop


def _machine() -> llvm.TargetMachine:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def _code() -> bytes:
    """The object file, from a cache or compiled now."""
    source = SOURCE.read_bytes()
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    about = f"{llvmlite.__version__} {llvm.get_process_triple()} {processor}"
    key = hashlib.sha256(source + about.encode()).hexdigest()[:16]
    name = f"deltaloom-loops-{key}.o"
    own = os.environ.get("NUMBA_CACHE_DIR")
    beside, users = SOURCE.parent / "__pycache__", Path.home() / ".cache" / "deltaloom"
    places = [Path(own)] if own else [beside, users]
    for place in places:
        with suppress(OSError):
            kept = (place / name).read_bytes()
            if hashlib.sha256(kept[HASH:]).digest() == kept[:HASH]:
                return kept[HASH:]
    code = _compiled()
    for place in places:
        with suppress(OSError):  # where nothing can be written it is compiled every time
            place.mkdir(parents=True, exist_ok=True)
            with new_file(place / name) as part:
                part.write_bytes(hashlib.sha256(code).digest() + code)
            break
    return code


def _compiled() -> bytes:
    from numba import cfunc

    from deltaloom.merge._loops import LOOPS

    machine, whole = _machine(), llvm.parse_assembly("")
    for name, (loop, signature) in LOOPS.items():
        made = cfunc(signature, error_model="numpy")(loop)
        module = llvm.parse_assembly(made.inspect_llvm())
        # Only the loop itself: what numba puts around it calls back into numba.
        wanted = made.native_name.removeprefix("cfunc.")
        for function in module.functions:
            if function.name == wanted:
                function.name = name
            elif not function.is_declaration:
                function.linkage = "internal"
        for variable in module.global_variables:
            variable.linkage = "internal"
        passes = llvm.create_new_module_pass_manager()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(module, llvm.create_pass_builder(machine, llvm.PipelineTuningOptions()))
        outside = [f.name for f in module.functions if f.is_declaration]
        assert all(f.startswith("llvm.") for f in outside), f"{name} calls {outside}"
        whole.link_in(module)
    return machine.emit_object(whole)
