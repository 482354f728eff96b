"The networks on which the field compares distillation methods, by name. Written by hand; the modules are exported from nbs/method."
from . import mobile, resnet, vgg
from .registry import create_model, list_models, load_checkpoint, load_weights, network, save_weights

__all__ = ["create_model", "list_models", "load_checkpoint", "load_weights", "network", "save_weights"]
