"""One page per objective, each as its paper writes it; pure torch."""

from gvpo_ray.losses.gvpo import finish, gvpo_loss, gvpo_loss_squared, gvpo_weights

__all__ = ["finish", "gvpo_loss", "gvpo_loss_squared", "gvpo_weights"]
