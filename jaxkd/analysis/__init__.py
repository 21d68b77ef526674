"""What networks cost and why they decide as they do."""

from jaxkd.analysis.costs import Costs, count_costs, network_costs

__all__ = ["Costs", "count_costs", "network_costs"]
