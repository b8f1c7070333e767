"""What Plaid's steps cost, in the order of its chain."""

from dataclasses import replace

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.costs.part import FLOAT32, Activations, Part, RingUnits, compute_bytes
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families.transformer_costs import TransformerCosts
