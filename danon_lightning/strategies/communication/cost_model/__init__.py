"""What an exchange of gradients costs: links measured, time and bytes predicted.

:func:`probe_links` measures, :func:`predict_exchange` predicts what the communicator will take, and
:func:`best_all_reduce` compares the classic algorithms. :class:`LinkEstimator` keeps up with links that change.
"""

from danon_lightning.strategies.communication.cost_model.coding import (
    CodingCosts,
    agree_on_costs,
    coding_costs,
    forget_costs,
)
from danon_lightning.strategies.communication.cost_model.links import Link, Links
from danon_lightning.strategies.communication.cost_model.prediction import Prediction, predict_exchange
from danon_lightning.strategies.communication.cost_model.probe import probe_links
from danon_lightning.strategies.communication.cost_model.ring_order import ring_order, slowest_link
from danon_lightning.strategies.communication.cost_model.running import LinkEstimator, agree_on_link
from danon_lightning.strategies.communication.cost_model.textbook import ALL_REDUCE, SAFE_ALGORITHM, best_all_reduce
from danon_lightning.strategies.communication.cost_model.traffic import Levels, ddp_buckets

__all__ = [
    "ALL_REDUCE",
    "SAFE_ALGORITHM",
    "CodingCosts",
    "Levels",
    "Link",
    "LinkEstimator",
    "Links",
    "Prediction",
    "agree_on_costs",
    "agree_on_link",
    "best_all_reduce",
    "coding_costs",
    "ddp_buckets",
    "forget_costs",
    "predict_exchange",
    "probe_links",
    "ring_order",
    "slowest_link",
]
