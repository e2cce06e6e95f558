"""Single numbers that a device has computed, read together."""

from collections.abc import Sequence

import torch


def to_host(scalars: Sequence[torch.Tensor]) -> list[float]:
    """
    The values of tensors with one number each. Each device is waited for once, however many they are: reading one at a
    time, a GPU would stand still after each.

    Args:
        scalars (`Sequence[torch.Tensor]`):
            Floating-point tensors without dimensions.
    """
    places: dict[torch.device, list[int]] = {}
    for place, scalar in enumerate(scalars):
        places.setdefault(scalar.device, []).append(place)
    values = [0.0] * len(scalars)
    for of_device in places.values():
        numbers = torch.stack([scalars[place].double() for place in of_device]).tolist()
        for place, number in zip(of_device, numbers, strict=True):
            values[place] = number
    return values
