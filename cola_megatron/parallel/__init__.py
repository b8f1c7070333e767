"""Process groups, devices and backends. Everything above asks this package where it runs."""

from cola_megatron.parallel.groups import ProcessGroups, initialize_parallel
from cola_megatron.parallel.hang_watch import HangWatch
from cola_megatron.parallel.parameters import (
    gather_state_dict,
    initialize_parameters,
    load_full_state_dict,
    mark_parameter,
    marks_of,
    sum_partial_gradients,
)
from cola_megatron.parallel.peer_watch import PeerWatch, RankLost

__all__ = [
    "HangWatch",
    "PeerWatch",
    "ProcessGroups",
    "RankLost",
    "gather_state_dict",
    "initialize_parallel",
    "initialize_parameters",
    "load_full_state_dict",
    "mark_parameter",
    "marks_of",
    "sum_partial_gradients",
]
