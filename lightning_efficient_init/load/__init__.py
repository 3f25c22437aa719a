"""Loading: plan from headers, read through the pipeline, report."""

from __future__ import annotations

from lightning_efficient_init.load.load import load_checkpoint
from lightning_efficient_init.load.plan import LoadPlan, plan_load
from lightning_efficient_init.load.report import LoadReport

__all__ = ["LoadPlan", "LoadReport", "load_checkpoint", "plan_load"]
