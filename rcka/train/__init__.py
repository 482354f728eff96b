"The trainer, its callbacks and its tasks. Written by hand; the modules are exported from nbs/method."

from .callbacks import EMA, Callback, KeepWeights, StopAfter
from .classification import Distiller, Task
from .config import TrainConfig
from .learner import Learner, Trainer, fit_many
from .teacher_cache import load_teacher, save_teacher

__all__ = [
    "EMA",
    "Callback",
    "Distiller",
    "KeepWeights",
    "Learner",
    "StopAfter",
    "Task",
    "TrainConfig",
    "Trainer",
    "fit_many",
    "load_teacher",
    "save_teacher",
]
