"""``EfficientInit``: the precision plugin for Fabric and the Trainer."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.fabric.plugins import precision as fabric_precision
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.plugins import precision as trainer_precision
from torch.nn import Module
from torch.optim import Optimizer

from lightning_efficient_init.first_use import look_at_setup
from lightning_efficient_init.init_context import init_context, is_building_modules, is_empty_requested
from lightning_efficient_init.quantize import QuantizeMode, Quantizer
from lightning_efficient_init.quantize.quantizer import check_choice

PrecisionName = Literal["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed"]

_TRUE_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_COMPUTE_DTYPES = {**_TRUE_DTYPES, "32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class EfficientInit(trainer_precision.Precision):
    """Creates models directly on their device, in their dtype, and streams checkpoints into them.

    Pass it as ``Fabric(plugins=[EfficientInit(...)])`` or ``Trainer(plugins=[EfficientInit(...)])`` and construct
    models inside ``init_module``. Forward, backward and optimizer steps are those of Lightning's own plugin for the
    same precision, to which this one delegates.

    Two things differ from Lightning's own plugins. ``init_module(empty_init=True)`` skips the initializer of every
    parameter, whichever way a module writes it, and what no checkpoint provides afterwards is initialized at first
    use, with one warning, instead of being left as garbage. And buffers that a module built in ``init_module``
    declares in a dtype of their own (rotary frequencies in float32, say) keep it.

    Args:
        precision: ``"32-true"``, ``"bf16-true"``, ``"16-true"``, ``"64-true"``, ``"bf16-mixed"`` or ``"16-mixed"``,
            as Lightning means them. Unlike Lightning, ``"16-mixed"`` is not replaced by ``"bf16-mixed"`` on a CPU.
        quantize: How bitsandbytes quantizes the weights of Linear layers: ``"int8"``, ``"nf4"``, ``"nf4-dq"``,
            ``"fp4"`` or ``"fp4-dq"`` (``-dq``: the statistics are quantized, too), once and for all; or
            ``"int8-training"``, where weights stay in the precision's dtype, are trained, and are quantized in each
            forward. A weight is quantized from the value that the model without quantization would hold: a checkpoint
            is cast to the precision's dtype first (``"bf16-true"`` to bfloat16, the mixed ones to float32) and never
            goes through another. Layers compute in that dtype, too (mixed: in the 16-bit one).
        skip_modules: Paths of modules that are not quantized, nor anything below them, such as ``"lm_head"`` or
            ``"blocks.*.attn"``; ``*`` stands for one whole segment or for a part of one. Paths start at the model.

    Raises:
        ValueError: The precision or the way of quantizing is none of these, or they do not go together.
        ModuleNotFoundError: bitsandbytes is needed and not installed.

    Example:
        >>> import lightning as L
        >>> fabric = L.Fabric(accelerator="cpu", plugins=[EfficientInit("bf16-true")])
        >>> with fabric.init_module():
        ...     layer = torch.nn.Linear(2, 2)
        >>> layer.weight.dtype
        torch.bfloat16
    """

    def __init__(
        self,
        precision: PrecisionName = "32-true",
        *,
        quantize: QuantizeMode | None = None,
        skip_modules: Sequence[str] = (),
    ) -> None:
        if precision not in get_args(PrecisionName):
            raise ValueError(f"precision must be one of {', '.join(get_args(PrecisionName))}; found {precision!r}.")
        self.precision = precision
        self.quantize = quantize
        self._quantizer = _quantizer(precision, quantize, skip_modules)
        self._is_in_trainer = False
        self._delegate: Any = None
        self._module: weakref.ref[Module] | None = None

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of ``"16-mixed"``; ``None`` otherwise."""
        return getattr(self._stock, "scaler", None)

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """The Trainer introduces itself; from here to the end of its run its own precision plugin does the work."""
        self._module = weakref.ref(model)
        self._is_in_trainer = True
        return model, optimizers, lr_schedulers

    def teardown(self) -> None:
        """The Trainer's run has ended: whoever comes next without introducing itself is a Fabric."""
        self._is_in_trainer = False

    @contextmanager
    def tensor_init_context(self) -> Iterator[None]:
        """Tensors are created in the plugin's dtype. The Trainer's ``init_module`` uses this for modules, too."""
        quantizer = self._quantizer if is_building_modules() else None
        with self._dtype_context(), init_context(empty=is_empty_requested(), quantizer=quantizer):
            yield

    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        """Modules are created in the plugin's dtype, quantized if asked for, and empty if Lightning was asked to."""
        with self._dtype_context(), init_context(empty=is_empty_requested(), quantizer=self._quantizer):
            yield

    def convert_module(self, module: Module) -> Module:
        """At setup: cast parameters, and buffers that have no dtype of their own; quantize what is not yet.

        Raises:
            QuantizationError: There is nothing to quantize, or ``skip_modules`` names what is not there.
        """
        self._module = weakref.ref(module)
        if (dtype := _TRUE_DTYPES.get(self.precision)) is not None:
            cast_module(module, dtype)
        if self._quantizer is not None:
            self._quantizer.convert(module)
        look_at_setup(module)
        return module

    def _dtype_context(self) -> AbstractContextManager[Any]:
        dtype = _TRUE_DTYPES.get(self.precision)
        return nullcontext() if dtype is None else _DtypeContextManager(dtype)

    # Everything below is Lightning's own plugin for this precision: Fabric's, or while connected the Trainer's.

    @property
    def _stock(self) -> Any:
        """Made anew, with the state that it has, for the other library, and once the module is on another device."""
        before, device_type = self._delegate, self._device_type()
        is_on_device = getattr(before, "device", device_type) == device_type
        is_of_library = isinstance(before, trainer_precision.Precision) == self._is_in_trainer
        if before is None or not is_on_device or not is_of_library:
            library = trainer_precision if self._is_in_trainer else fabric_precision
            self._delegate = _stock_plugin(library, self.precision, device_type)
            if before is not None and not is_on_device:
                self._delegate.load_state_dict(before.state_dict())
            elif self.precision == "16-mixed" and before is not None:
                self._delegate.scaler = before.scaler
        return self._delegate

    def _device_type(self) -> str:
        """Where the module is by now, or was; autocast and the gradient scaler depend on it."""
        module = self._module() if self._module is not None else None
        parameter = None if module is None else next(module.parameters(), None)
        if parameter is not None:
            return parameter.device.type
        return str(getattr(self._delegate, "device", torch.get_default_device().type))

    def forward_context(self) -> AbstractContextManager[None]:
        """See Lightning's plugin."""
        return self._stock.forward_context()  # type: ignore[no-any-return]

    def convert_input(self, data: Any) -> Any:
        """See Lightning's plugin."""
        return self._stock.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """See Lightning's plugin."""
        return self._stock.convert_output(data)

    # These three are the other plugin's own methods: Fabric refuses ``loss.backward()`` where a precision plugin has
    # others than the base class.

    @property
    def pre_backward(self) -> Callable[..., Any]:
        """See Lightning's plugin."""
        return self._stock.pre_backward  # type: ignore[no-any-return]

    @property
    def backward(self) -> Callable[..., None]:
        """See Lightning's plugin; the Trainer passes the optimizer after the model."""
        return self._stock.backward  # type: ignore[no-any-return]

    @property
    def post_backward(self) -> Callable[..., Any]:
        """See Lightning's plugin."""
        return self._stock.post_backward  # type: ignore[no-any-return]

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """See Lightning's plugin; the Trainer passes the model and a closure."""
        return self._stock.optimizer_step(optimizer, *args, **kwargs)

    def main_params(self, optimizer: Optimizer) -> Any:
        """See Lightning's plugin."""
        return self._stock.main_params(optimizer)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """See Lightning's plugin."""
        self._stock.unscale_gradients(optimizer)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """See Lightning's plugin."""
        self._stock.clip_gradients(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The gradient scaler's state, if there is one."""
        return self._stock.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the gradient scaler's state, if there is one."""
        self._stock.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}


def _quantizer(precision: str, mode: str | None, skip_modules: Sequence[str]) -> Quantizer | None:
    check_choice(precision, mode, skip_modules)
    return None if mode is None else Quantizer(mode, skip_modules, _COMPUTE_DTYPES[precision])


def _stock_plugin(library: Any, precision: str, device_type: str) -> Any:
    """Lightning's plugin for ``precision``, from Fabric's or the Trainer's ``plugins.precision``."""
    if precision == "32-true":
        return library.Precision()
    if precision == "64-true":
        return library.DoublePrecision()
    if precision in _TRUE_DTYPES:
        return library.HalfPrecision(precision)
    return library.MixedPrecision(precision, device_type)


def cast_module(module: Module, dtype: torch.dtype) -> None:
    """Cast a module's floating-point tensors in place, except buffers that have a dtype of their own.

    A module built in ``init_module`` has its parameters in ``dtype`` already. Whatever floating-point buffer, or state
    of a metric, is in another dtype was declared so, and stays. In a module built elsewhere nothing tells a declared
    dtype from the default, and they are cast along with the parameters, as Lightning does.
    """
    was_built_in_dtype = any(parameter.dtype == dtype for parameter in module.parameters())
    for submodule in module.modules():
        own = [p for p in submodule.parameters(recurse=False) if p.is_floating_point()]
        casts_buffers = any(p.dtype != dtype for p in own) if own else not was_built_in_dtype
        _cast_own(submodule, dtype, buffers=casts_buffers)
    _update_properties(module, dtype=dtype)  # of LightningModules, which say what they are in


def _has_states(module: Module) -> bool:
    """Whether it is a metric, whose ``_apply`` knows what else it holds, and always goes on to what is below."""
    apply = type(module)._apply
    return apply is not Module._apply and "recurse" not in inspect.signature(apply).parameters


def _cast_own(module: Module, dtype: torch.dtype, *, buffers: bool) -> None:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if buffers and _has_states(module):
        module._apply(cast)
        return
    kept = {} if buffers else dict(module._buffers)
    if kept:
        module._buffers = dict.fromkeys(kept)
    try:
        Module._apply(module, cast, recurse=False)
    finally:
        if kept:
            module._buffers = kept
