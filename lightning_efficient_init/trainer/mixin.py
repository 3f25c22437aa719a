"""``ConfigureModelMixin``: a ``configure_model`` that can be called as often as Lightning likes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils._device import DeviceContext

from lightning_efficient_init.checkpoint import Entry, index_checkpoint
from lightning_efficient_init.deferred import empty_init, watch
from lightning_efficient_init.init_context import init_context
from lightning_efficient_init.lightning_checkpoint import is_streamable
from lightning_efficient_init.load import load_checkpoint
from lightning_efficient_init.sharding import is_engine, mark_parts

log = logging.getLogger(__name__)

_is_restoring: ContextVar[bool] = ContextVar("is_restoring", default=False)


class ConfigureModelMixin:
    """Lets a LightningModule write ``configure_model`` as Lightning's documentation does, without its traps.

    Lightning calls ``configure_model`` in each of ``fit``, ``validate``, ``test`` and ``predict``, and in
    ``load_from_checkpoint``. A model that is built anew each time loses its weights; here it is built once. Inside a
    Trainer that happens on the device, in the precision and with the sharding that its strategy and plugins ask for.
    ``load_from_checkpoint`` builds it empty and streams the weights: inside ``init_module`` on the device and in the
    dtype of that context, elsewhere on the default device (or ``map_location``) in the dtype of the checkpoint.

    Attributes:
        pretrained: A checkpoint with raw weights, in any format that ``load_checkpoint`` reads, or None. It is loaded
            once, when the model has been built (and sharded, if the strategy does that); not at all if ``ckpt_path`` or
            ``load_from_checkpoint`` brings other weights. ``strict_loading`` applies.

    Args:
        pretrained: Sets the attribute, for modules that hand it on to ``super().__init__``.

    Example:
        >>> class Classifier(ConfigureModelMixin, pl.LightningModule):
        ...     pretrained = None
        ...
        ...     def configure_model(self):
        ...         self.net = torch.nn.Linear(4, 2)
        >>> model = Classifier()
        >>> model.configure_model()
        >>> net = model.net
        >>> model.configure_model()
        >>> model.net is net
        True
    """

    pretrained: str | os.PathLike[str] | None = None
    _is_model_configured = False
    _awaits_pretrained = False

    def __init__(self, *args: Any, pretrained: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pretrained is not None:
            self.pretrained = pretrained

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "configure_model" in vars(cls):
            cls.configure_model = _once(vars(cls)["configure_model"])  # type: ignore[assignment, method-assign]
        if "configure_optimizers" in vars(cls):
            cls.configure_optimizers = _with_weights(vars(cls)["configure_optimizers"])  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Build the model; this is yours to override. Where a class further up does it, that one counts."""
        _once(_call_next)(self)

    def _load_awaited_weights(self) -> None:
        """Load ``pretrained`` now, if that is yet to be done and ``ckpt_path`` has not brought other weights."""
        module: Any = self
        if not module._awaits_pretrained:
            return
        module._awaits_pretrained = False
        if module.trainer.ckpt_path is None:
            wrapped = module.trainer.strategy.model
            assert wrapped is not None
            mark_parts(wrapped)  # of Lightning's own FSDP, whose outermost unit is around the module
            target = wrapped if is_engine(wrapped) and module.trainer.lightning_module is module else module
            log.info("%s", load_checkpoint(target, module.pretrained, strict=module.strict_loading))

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Lightning's; local files stream, and the model is built once, empty."""
        base: Any = super()
        load = functools.partial(
            base.load_from_checkpoint, checkpoint_path, map_location, hparams_file, strict, **kwargs
        )
        options = {} if weights_only is None else {"weights_only": weights_only}
        token = _is_restoring.set(True)
        try:
            if not is_streamable(checkpoint_path):
                return load(**options)
            with _where(checkpoint_path, map_location, weights_only is not False), init_context(empty=True):
                model = load(**options)
        finally:
            _is_restoring.reset(token)
        watch(model)
        return model


def _call_next(module: Any) -> None:
    super(ConfigureModelMixin, module).configure_model()


def _once(configure: Callable[[Any], None]) -> Callable[[Any], None]:
    """Run ``configure`` unless the module is configured already; what it calls in turn runs along with it."""

    @functools.wraps(configure)
    def configure_model(self: Any) -> None:
        if getattr(self, "_is_configuring", False):
            configure(self)
        elif not self._is_model_configured:
            self._is_configuring = True
            try:
                with _awaiting_weights(self):
                    configure(self)
            finally:
                del self._is_configuring
            self._is_model_configured = True
        if self._awaits_pretrained and self._trainer is not None:
            self.trainer.callbacks.insert(0, _LoadsPretrained(self))

    return configure_model


def _with_weights(configure: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Load pretrained weights before ``configure`` looks at them, where a checkpoint has been restored by then."""

    @functools.wraps(configure)
    def configure_optimizers(self: Any) -> Any:
        if self._trainer is not None and _is_whole(self.trainer.strategy):
            self._load_awaited_weights()
        return configure(self)

    return configure_optimizers


@contextmanager
def _awaiting_weights(module: Any) -> Iterator[None]:
    """Have pretrained weights loaded in time; until then parameters may stay empty."""
    trainer = module._trainer
    if module.pretrained is None or _is_restoring.get():
        yield
    elif trainer is None:
        yield
        load_checkpoint(module, module.pretrained, strict=module.strict_loading)
    else:
        with empty_init() if _is_whole(trainer.strategy) else nullcontext():
            yield
        if _is_whole(trainer.strategy):
            watch(module)
        module._awaits_pretrained = True


def _is_whole(strategy: Any) -> bool:
    """Whether each rank has the whole model; strategies that shard have ways of their own to build one."""
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy)


class _LoadsPretrained(pl.Callback):
    """Loads pretrained weights when a checkpoint would have been restored: where strategies shard, as loops start."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if _is_whole(trainer.strategy):
            self._load(trainer, pl_module)

    def _load(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._module is not None:
            self._module._load_awaited_weights()
        self._module = None

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _load


@contextmanager
def _where(path: Any, map_location: Any, weights_only: bool) -> Iterator[None]:
    """Outside of ``init_module``: the device that was asked for, and the dtype of the checkpoint."""
    if any(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack()):
        yield
        return
    is_location = isinstance(map_location, str | torch.device)
    dtype = _common_dtype(path, weights_only)
    with (
        torch.device(map_location if is_location else "cpu"),
        nullcontext() if dtype is None else _DtypeContextManager(dtype),
    ):
        yield


def _common_dtype(path: Any, weights_only: bool) -> torch.dtype | None:
    """The floating-point dtype in which a checkpoint has most of its weights."""
    num_elements: dict[torch.dtype, int] = {}
    for entry in index_checkpoint(path, weights_only=weights_only).weights.values():
        if isinstance(entry, Entry) and entry.dtype in _DEFAULT_DTYPES:
            num_elements[entry.dtype] = num_elements.get(entry.dtype, 0) + entry.numel
    return max(num_elements, key=num_elements.__getitem__) if num_elements else None


_DEFAULT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
