"""Print which GPU is here, and what stages of gpu.sh cannot import.

python benchmarks/gpu_imports.py attention training
gpu nvidia-h100-80gb-hbm3 sm_90
lacks training omegaconf
say missing import: omegaconf; training cannot run: WHEELS=FOLDER brings it
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.util import find_spec

EVERY = ("triton", "numpy", "tqdm", "safetensors")  # what all stages need beside torch
NEEDS = {  # what some stages need too
    "omegaconf": ("training", "sparse-8", "sparse-32", "loop-8k", "loop-32k"),  # configs, settings other than defaults
    "sentencepiece": ("training", "loop-8k", "loop-32k"),
    "tokenizers": ("training", "loop-8k", "loop-32k"),
    "deepspeed": ("loop-8k", "loop-32k"),
    "tensorboard": ("loop-8k", "loop-32k"),
}
OPTIONAL = {  # used where installed: for rows of another library, and for pictures
    "fla": ("rivals",),
    "matplotlib": ("attention", "rivals", "families", "sparse-16", "sparse-8", "sparse-32", "sparse-flex"),
}


def main() -> int:
    stages = sys.argv[1:]
    if missing("torch"):
        print("this Python has no torch")
        return 1
    import torch

    from lcpt.utils.provenance import git_commit

    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here")
        return 1
    gpu = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    major, minor = torch.cuda.get_device_capability()
    print(f"gpu {gpu} sm_{major}{minor}")
    lacks: dict[str, list[str]] = {}
    for name in (*EVERY, *NEEDS):
        of = [stage for stage in stages if stage in NEEDS.get(name, stages)]
        if of and (said := missing(name)):
            print(f"say missing import: {said}; {', '.join(of)} cannot run: WHEELS=FOLDER brings it")
            for stage in of:
                lacks.setdefault(stage, []).append(name)
    for name, stages_of in OPTIONAL.items():
        of = [stage for stage in stages if stage in stages_of]
        if of and find_spec(name) is None:
            print(f"say missing import: {name}; {', '.join(of)} can do less: WHEELS=FOLDER brings it")
    if git_commit() is None:
        print("say results name no commit: there is no .git here, and LCPT_COMMIT is not set")
    for stage, names in lacks.items():
        print("lacks", stage, ",".join(names))
    return 0


def missing(name: str) -> str | None:
    """Return a module's name if it cannot be imported, with the reason where it is installed."""
    try:
        import_module(name)
    except Exception as error:  # it may be built for another Python
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return name if absent else f"{name} ({type(error).__name__}: {error})".replace("\n", " ")
    return None


if __name__ == "__main__":
    sys.exit(main())
