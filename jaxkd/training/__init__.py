"""Plans, the train step, the loop, sharding and checkpoints."""

from jaxkd.training.config import apply_overrides, load_config
from jaxkd.training.loop import evaluate, run
from jaxkd.training.network import ApplyFn, Network, from_linen, from_nnx
from jaxkd.training.plan import Plan
from jaxkd.training.schema import ConfigError
from jaxkd.training.setup import Setup, make_setup
from jaxkd.training.signals import StopSignal
from jaxkd.training.stage import Stage
from jaxkd.training.start import init_state
from jaxkd.training.state import TrainState
from jaxkd.training.step import make_eval_step, make_train_step
from jaxkd.training.workdir import Workdir

__all__ = [
    "ApplyFn",
    "ConfigError",
    "Network",
    "Plan",
    "Setup",
    "Stage",
    "StopSignal",
    "TrainState",
    "Workdir",
    "apply_overrides",
    "evaluate",
    "from_linen",
    "from_nnx",
    "init_state",
    "load_config",
    "make_eval_step",
    "make_setup",
    "make_train_step",
    "run",
]
