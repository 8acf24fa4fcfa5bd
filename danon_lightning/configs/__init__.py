"""Hydra configs. Compose with them from any project through ``pkg://danon_lightning.configs``."""
