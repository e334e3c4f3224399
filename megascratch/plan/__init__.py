"""Plans before a launch: what a schedule costs, and how it looks."""

from megascratch.plan.drawing import Chart, chrome_trace, png, svg
from megascratch.plan.recorded import measured_costs, read_times

__all__ = ["Chart", "chrome_trace", "measured_costs", "png", "read_times", "svg"]
