"""Distributed training for PyTorch Lightning, and the DANON attention family.

Importing the package registers its strategies, so that ``Trainer(strategy="danon_hybrid")`` finds them.
"""

from lightning.pytorch.strategies import StrategyRegistry

from danon_lightning.strategies import DanonHybridStrategy

__version__ = "0.1.0"

if DanonHybridStrategy.strategy_name not in StrategyRegistry:
    DanonHybridStrategy.register_strategies(StrategyRegistry)

__all__ = ["DanonHybridStrategy", "__version__"]
