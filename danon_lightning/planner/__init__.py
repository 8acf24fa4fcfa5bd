"""How to train a model on a cluster: layouts, what they are predicted to cost, and the best of them.

:func:`plan` does it all; ``danon-plan`` is the command.
"""

from danon_lightning.planner.cluster import Cluster
from danon_lightning.planner.layouts import Layout
from danon_lightning.planner.memory import Memory
from danon_lightning.planner.planning import plan, plan_profile
from danon_lightning.planner.plans import Plan, nearest_feasible
from danon_lightning.planner.profile import Profile
from danon_lightning.planner.profiling import measure

__all__ = ["Cluster", "Layout", "Memory", "Plan", "Profile", "measure", "nearest_feasible", "plan", "plan_profile"]
