"Networks by name, and their weights. Written by hand; the modules are exported from nbs/method."

from . import mobile, resnet, vgg  # noqa: F401, each registers its networks
from .registry import (
    create_model,
    export_weights,
    list_models,
    list_weights,
    load_checkpoint,
    load_weights,
    network,
    save_weights,
)

__all__ = [
    "create_model",
    "export_weights",
    "list_models",
    "list_weights",
    "load_checkpoint",
    "load_weights",
    "network",
    "save_weights",
]
