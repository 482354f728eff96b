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
from .sources import InputConfig, input_config
from .student import load_student, save_student, student_transform

__all__ = [
    "InputConfig",
    "create_model",
    "export_weights",
    "input_config",
    "list_models",
    "list_weights",
    "load_checkpoint",
    "load_student",
    "load_weights",
    "network",
    "save_student",
    "save_weights",
    "student_transform",
]
