"""What networks cost and why they decide as they do."""

from jaxkd.analysis.collectives import Collective, Traffic, read_collectives, sum_up
from jaxkd.analysis.costs import Costs, count_costs, network_costs

__all__ = [
    "Collective",
    "Costs",
    "Traffic",
    "count_costs",
    "network_costs",
    "read_collectives",
    "sum_up",
]
