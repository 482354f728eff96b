"Distillation methods under one interface, by name. Written by hand; the modules are exported from nbs/method."

# importing a module registers its methods
from . import candidates, dense, features, features_recent, logits, logits_recent, relations
from .base import Method, Sum, create_method, list_methods, register
from .cka import FCKA, LCKA, PCKA, RCKA, fcka, lcka, pcka

__all__ = [
    "FCKA",
    "LCKA",
    "PCKA",
    "RCKA",
    "Method",
    "Sum",
    "create_method",
    "fcka",
    "lcka",
    "list_methods",
    "pcka",
    "register",
]

BUILT_IN = frozenset(list_methods())  # names of the methods of this package
FOR_CLASSIFIERS = BUILT_IN & {*list_methods(dense=False)}  # the others are for detectors and segmentation networks
