"""The objectives are formulas on groups of completions, with torch alone; each is a file of this room."""

from gvpo_ray.losses.dpo import dpo_loss
from gvpo_ray.losses.epa import epa_loss
from gvpo_ray.losses.gvpo import gvpo_loss
from gvpo_ray.losses.poft import poft_loss
from gvpo_ray.losses.sft import sft_loss

__all__ = ["dpo_loss", "epa_loss", "gvpo_loss", "poft_loss", "sft_loss"]
