"The trainer, its callbacks and its tasks. Written by hand; the modules are exported from nbs/method."

from .callbacks import Callback
from .classification import Distiller
from .config import TrainConfig
from .learner import Learner, Trainer, fit_many

__all__ = ["Callback", "Distiller", "Learner", "TrainConfig", "Trainer", "fit_many"]
