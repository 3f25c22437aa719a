"""What Fabric's and the Trainer's single-device strategies share."""

from __future__ import annotations

from typing import Any

import torch


class FollowsAcceleratorDevice:
    """A strategy that is named in the registry and learns its device from the accelerator.

    Lightning hands the accelerator's devices to strategies that have an attribute ``parallel_devices``. Its own
    single-device strategies have none, and stay on the CPU when they are looked up by name.
    """

    _root_device: torch.device
    _is_device_chosen: bool

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The one device, if it is known yet."""
        return [self._root_device] if self._is_device_chosen else []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[Any]) -> None:
        if len(devices) != 1:
            raise ValueError(
                f"{type(self).__name__} runs on one device; the accelerator offers {len(devices)}: "
                f"{', '.join(map(str, devices))}. Pass devices=1 (or the index of one, as in devices=[0]), or choose a "
                "strategy for several devices."
            )
        self._root_device = torch.device(devices[0])
        self._is_device_chosen = True
