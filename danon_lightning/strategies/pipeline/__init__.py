"""Pipeline parallelism: every stage runs the user's whole step, and what it does not hold is absent.

In the order of use: ``blocks`` finds the body of a module, ``dry_run`` records what its step needs, ``ownership`` says
which stage holds what, and ``stage`` runs a stage on a micro-batch; ``loss_weights`` combines means over micro-batches.
``absent`` has the tensors that are not there.
"""
