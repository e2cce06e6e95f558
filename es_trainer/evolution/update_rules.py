"""How the weights follow the estimate g of an evolution strategy, a class for each `rule`."""

import torch

from ..choices import Rule


class SGD:
    """
    The estimate itself (arXiv 2509.24372).

    Args:
        betas (`tuple[float, float]`):
            Decay rates of the averages that other rules keep.
        eps (`float`):
            Adam's epsilon.
    """

    averages: tuple[str, ...] = ()  # names of the float32 state that is kept for each weight

    def __init__(self, betas: tuple[float, float], eps: float):
        self.betas = betas
        self.eps = eps

    def ascend(self, g: torch.Tensor, averages: list[torch.Tensor], moves: int) -> None:
        """
        Turn the estimate into the direction of the update, in place, and update the averages.

        Args:
            g (`torch.Tensor`):
                The estimate for some of the weights.
            averages (`list[torch.Tensor]`):
                The state of those weights, in the order of the class's `averages`.
            moves (`int`):
                Number of updates, with this one, that moved the weights.
        """


class Momentum(SGD):
    """Heavy-ball momentum: `m = beta1 * m + g`. Keeps 4 bytes a weight."""

    averages = ("exp_avg",)

    def ascend(self, g, averages, moves):
        (average,) = averages
        g.copy_(average.mul_(self.betas[0]).add_(g))


class Adam(SGD):
    """Adam (arXiv 1412.6980) with g as the ascent direction. Keeps 8 bytes a weight."""

    averages = ("exp_avg", "exp_avg_sq")

    def ascend(self, g, averages, moves):
        beta1, beta2 = self.betas
        average, square = averages
        average.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1 = 1 - beta1**moves
        correction2 = 1 - beta2**moves
        denominator = (square / correction2).sqrt_().add_(self.eps)
        torch.div(average / correction1, denominator, out=g)


UPDATE_RULES: dict[Rule, type[SGD]] = {"sgd": SGD, "momentum": Momentum, "adam": Adam}
