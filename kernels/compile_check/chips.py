"""What the architectures are like that kernels are compiled for; a number is a compute capability, 90 for 9.0."""

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may opt in to
MULTIPROCESSORS = 132  # of an H100; launchers split work by it, kernels do not depend on it
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
LATEST = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}  # the instruction that reaches the full rate
