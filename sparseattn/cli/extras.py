"""What a command needs besides the package, said in one sentence."""

from importlib.util import find_spec

NEEDED = {
    "accelerate": "accelerate",
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "monai": "monai",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
}


def explain_missing() -> None:
    """Raise ImportError if what training needs is not installed."""
    missing = [name for name, module in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}; pip install "sparseattn[train]"')
