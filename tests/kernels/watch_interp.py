"""Watch what interpreted kernels do to memory: reads and writes outside the tensors of the launch, races of programs.

A GPU forgives both silently. `watch()` patches Triton's interpreter: a launch raises if a load or a store with its mask
set leaves the storage of the launch's tensors, if two programs write one address, or if one reads what another writes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor


@contextlib.contextmanager
def watch() -> Iterator[None]:
    launch: dict[str, Any] = {}
    load, store, call = Builder.create_masked_load, Builder.create_masked_store, Executor.__call__

    def note(self: Any, pointers: Any, mask: Any, access: str) -> None:
        at, chosen = np.broadcast_arrays(pointers.data, mask.data)
        at = at[chosen.astype(bool)].astype(np.int64).ravel()
        if not at.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        starts, ends = launch["starts"], launch["ends"]
        place = np.searchsorted(starts, at, "right") - 1
        wrong = (place < 0) | (at + size > ends[place])
        assert not wrong.any(), f"{access} outside the tensors of {launch['name']}, program {self.grid_idx}"
        launch[access].append((at, np.full(at.size, _number(self))))

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(self, pointers, mask, "read")
        return load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(self, pointers, mask, "write")
        return store(self, pointers, value, mask, *rest)

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        storages = {
            (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            for x in (*args, *kwargs.values())
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes()
        }
        starts, lengths = np.array(sorted(storages), np.int64).T
        launch.update(name=self.fn.__name__, starts=starts, ends=starts + lengths, read=[], write=[])
        call(self, *args, **kwargs)
        _check_races(launch)

    Builder.create_masked_load, Builder.create_masked_store, Executor.__call__ = masked_load, masked_store, watched
    try:
        yield
    finally:
        Builder.create_masked_load, Builder.create_masked_store, Executor.__call__ = load, store, call


def _number(builder: Any) -> int:
    (x, y, z), (width, height, _) = builder.grid_idx, builder.grid_dim
    return int(x + width * (y + height * z))


def _check_races(launch: dict[str, Any]) -> None:
    if not launch["write"]:
        return
    at, program = (np.concatenate(x) for x in zip(*launch["write"], strict=True))
    order = np.argsort(at, kind="stable")
    at, program = at[order], program[order]
    same = at[1:] == at[:-1]
    assert not (same & (program[1:] != program[:-1])).any(), f"two programs of {launch['name']} write one address"
    for read_at, reader in launch["read"]:
        place = np.minimum(np.searchsorted(at, read_at), at.size - 1)
        race = (at[place] == read_at) & (program[place] != reader)
        assert not race.any(), f"a program of {launch['name']} reads what another writes"
