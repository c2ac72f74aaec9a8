"""What the compiler made of a kernel, and what of it is a fault."""

import re
from dataclasses import dataclass

from .chips import LATEST, SHARED_MEMORY, TENSOR_CORE
from .sass import Code

# Kernels that are little but a matrix product: without the newest instructions they reach half of the chip's rate.
NEED_LATEST = ("_contrastive_fwd_kernel", "_contrastive_bwd_kernel")
# What spills all the same: the call, kernel and architecture, and at most how many bytes. It costs speed, no more. None
# is a call of the model, which has its LayerNorm before the first block instead of folded into every one.
KNOWN_SPILLS = {
    ("slot_attention norm entropy", "slot_attention_bwd_kernel", 80): 56,
    ("slot_attention norm entropy", "slot_attention_bwd_kernel", 90): 144,
    ("slot_attention norm normalize=mean bias mask map entropy mass", "slot_attention_bwd_kernel", 90): 92,
}
# A product in Triton's IR: how exact it is (where it is not said: "ieee"), and the dtype of its operands.
_PRODUCT = re.compile(r"tt\.dot(?:_scaled)? (?:.*?inputPrecision = (\w+))?.*? : tensor<(?:\d+x)+(\w+)[,>]")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of one kernel."""

    registers: int
    spilled: int
    """Bytes stored and loaded."""
    shared: int
    """Bytes a block."""
    code: Code
    products: frozenset[str]
    """"half" of fp16 or bf16 operands, "full" of fp32 ones that keep all their bits, "tf32"."""
    seconds: float
    serialised: bool = False
    """ptxas could not let Hopper's products run ahead (its remark C7514 and the like)."""

    def spills(self) -> list[str]:
        local = self.code.total("local")
        return [f"spills {self.spilled} bytes ({local} local-memory instructions)"] if self.spilled or local else []

    def remarks(self) -> list[str]:
        """What costs speed, a fault or not."""
        return self.spills() + ["products wait for each other"] * self.serialised

    def faults(self, call: str, kernel: str, arch: int, *, random: bool = False) -> list[str]:
        """Why `kernel`, as `call` launches it, must not be so; empty if it may. A `random` call may spill."""
        may_spill = random or self.spilled <= KNOWN_SPILLS.get((call, kernel, arch), -1)
        found = [] if may_spill else self.spills()
        if self.shared > SHARED_MEMORY[arch]:
            found.append(f"shared memory {self.shared} exceeds sm_{arch}'s {SHARED_MEMORY[arch]}")
        tensor = sum(self.code.total(name) for name in TENSOR_CORE)
        if "half" in self.products and not tensor:
            found.append("no tensor-core instruction")
        if "half" in self.products and kernel in NEED_LATEST and not self.code.total(LATEST[arch]):
            found.append(f"no {LATEST[arch]}")
        if self.products == {"full"} and tensor:
            found.append("products at full precision run on the tensor cores, in TF32")
        return found


def products(ttir: str) -> frozenset[str]:
    """Kinds of the products in Triton's IR of a kernel."""
    return frozenset(
        "half" if dtype in ("f16", "bf16") else "full" if precision in ("", "ieee") else "tf32"
        for precision, dtype in _PRODUCT.findall(ttir)
    )
