"""What changed in the tree of a run since configs are stored with a number.

Whoever changes a key of a run's config, of any family, appends one line to `CHANGES`, in the same commit. Lines are
never changed or removed: the number of lines is in every stored config, and runs of every schema are read for ever
(`tests/test_old_runs.py`).

    Added("training.ema_decay", 0.0)                       old runs had none
    Renamed("training.precision", "training.compute_type") the value moves
    Removed("training.ema_decay", "use ...", reproduced=(0.0,))

A new default needs no line: stored configs have every key. For another kind of change, write a function from tree to
tree above the list. When two branches append a line each, the later one to be merged comes second; what it wrote before
the merge has the number of another schema and is not to be kept.

Adding a key:

1. The field, in the file of its section: type (numbers from `config.types`), origin and, where a resumed run may change
   it, `FREE` (`config.facts`); a default; its meaning as a docstring under it.
2. Here: `Added("section.key", value)` with the value that computes what runs computed before there was the key. That
   need not be the default.
3. `python -m tools.config_reference` writes docs/configuration.md.
"""

from cola_megatron.config.changes import Added, Change, Removed, Renamed, Tree


def _standard_parametrization(tree: Tree) -> Tree:
    """Every network of every family gets the section: an `Added` would make networks that a family does not have."""
    model = tree.get("model", {})
    for network in ("vae", "dit", "transformer"):
        if isinstance(section := model.get(network), dict):
            section.setdefault("parametrization", {"kind": "standard", "base_width": None, "base_depth": None})
    return tree


CHANGES: tuple[Change, ...] = (
    Added("training.schedule.decay", "cosine"),  # schema 2
    Renamed("training.optimizer.clip", "training.optimizer.max_gradient_norm"),  # schema 3
    Removed("training.evaluation.time_bins", "there are 10; leave it out", reproduced=None),  # schema 4
    Added("training.log.tensorboard", False),  # schema 5
    Added("training.compile_blocks", "never"),  # schema 6
    Added("training.loss_chunk_tokens", 0),  # schema 7
    Added("training.evaluation.texts", 0),  # schema 8
    Added("training.attention_chunk", 0),  # schema 9
    Added("training.start_from", None),  # schema 10
    Added("model.family", "cola"),  # schema 11
    Added("training.schedule.decay_from", None),  # schema 12
    Added("training.checkpoint.at", []),  # schema 13
    _standard_parametrization,  # schema 14
    Added("training.document_kernel", "never"),  # schema 15
    Added("parallel.context_parallel_size", 1),  # schema 16
    Added("training.optimizer.name", "adamw"),  # schema 17
    Added("training.optimizer.momentum", 0.95),  # schema 18
    Added("training.ema_decay", None),  # schema 19
    Added("training.fused_weight_gradients", "never"),  # schema 20
)
