"""The device that a user names: of an evaluation, of a model that is loaded."""

import torch


def choose_device(name: torch.device | str) -> torch.device:
    """auto (a GPU when there is one), cpu, cuda or cuda:N. Raises ValueError for what this machine has not."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (number.isascii() and number.isdigit())):
        raise ValueError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        if int(number or 0):
            raise ValueError(f"--device {name}: all CPU cores are one device; use cpu")
        return torch.device("cpu")
    if not count:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no GPU here; use --device cpu")
    if int(number or 0) >= count:
        raise ValueError(f"--device {name}: the last GPU here is cuda:{count - 1}")
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())
