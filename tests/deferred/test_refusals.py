"""What raises, and why: one test for each line of the table in the README."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from lightning_efficient_init.checkpoint import index_checkpoint, lazy_tree
from lightning_efficient_init.deferred import deferred_init, is_deferred, materialize
from lightning_efficient_init.errors import DeferredParameterError, UnrecordableError


@pytest.fixture
def model():
    with deferred_init():
        model = nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    yield model
    assert is_deferred(model)


def unrecordable(match):
    return pytest.raises(UnrecordableError, match=rf"(?s){match}.*eager")


def deferred(match):
    return pytest.raises(DeferredParameterError, match=rf"(?s){match}.*materialize")


@pytest.mark.parametrize("address", [lambda t: t.data_ptr(), lambda t: t.__dlpack__()])
def test_an_address_is_refused(address):
    with unrecordable("no memory"), deferred_init():
        address(nn.Linear(3, 4).weight.detach())


def test_arithmetic_under_autocast_is_refused():
    with deferred_init(), torch.autocast("cpu", torch.bfloat16):
        params = nn.ParameterList([torch.randn(20, 20).clone()])
        nn.init.kaiming_uniform_(params[0].data.t()[:4])
        with unrecordable("autocast"):
            torch.randn(20, 20) @ params[0]
    materialize(params)


def test_autocast_that_is_over_refuses_nothing():
    torch.manual_seed(1)
    expected = torch.randn(20, 20)[[0, 3]]
    torch.manual_seed(1)
    with deferred_init():
        with torch.autocast("cpu", torch.bfloat16):
            whole = torch.randn(20, 20)
        params = nn.ParameterList([whole[[0, 3]]])
    assert torch.equal(materialize(params)[0], expected)


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda p: setattr(p, "grad", torch.zeros_like(p)), r"Tensor\.grad"),
        (lambda p: torch.autograd.grad(p.sum(), p), r"autograd\.grad"),
        (lambda p: p.share_memory_(), r"share_memory_"),
    ],
)
def test_what_needs_memory_is_refused(use, what):
    with deferred_init():
        param = nn.Linear(3, 4).weight
        param.grad = None
        with unrecordable(what):
            use(param)


def test_a_backward_is_refused():
    with deferred_init(), unrecordable(r"Tensor\.backward.*gradients"):
        nn.Linear(3, 1)(torch.ones(2, 3)).sum().backward()


def test_mixing_with_a_meta_tensor_is_refused():
    with unrecordable("on the meta device"), deferred_init():
        nn.Linear(3, 4).weight.data.add_(torch.ones(4, 3, device="meta"))


def test_writing_into_deferred_and_real_tensors_at_once_is_refused():
    with unrecordable("into a real one at once"), deferred_init():
        torch.sort(torch.rand(5), out=(torch.empty(5), torch.zeros(5, dtype=torch.int64)))


def test_exchanging_memory_for_outside_memory_is_refused():
    outside = torch.ones(4, 3)
    with unrecordable("exchanges the memory"), deferred_init():
        nn.Linear(3, 4).weight.data.set_(outside)


def test_numpy_writing_into_memory_that_a_parameter_was_made_of_is_refused():
    with unrecordable("memory that a deferred parameter shares"), deferred_init():
        table = torch.zeros(4)
        nn.Parameter(table)
        table.numpy()[:] = 1


def test_a_new_tensor_of_data_through_a_deferred_one_is_refused():
    with unrecordable("asks a deferred tensor for its type"), deferred_init():
        nn.Linear(3, 4).weight.data.new([1.0])


@pytest.mark.gpu
def test_deferred_running_statistics_are_refused():
    with unrecordable("running statistics"), deferred_init(), torch.device("cuda"):
        functional.batch_norm(torch.rand(3, 4), torch.rand(4), torch.rand(4), training=True)


def test_saving_inside_the_context_is_refused():
    with deferred("saved or pickled"), deferred_init():
        torch.save(nn.Linear(3, 4).state_dict(), io.BytesIO())


def test_a_forward_is_refused(model):
    with deferred("weight of Linear.*used in"):
        model(torch.ones(2, 3))


def test_an_initializer_after_the_context_is_refused(model):
    with deferred("weight of Linear.*used in"):
        nn.init.zeros_(model[0].weight)


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m[1].weight.item(),
        lambda m: float(m[1].weight),
        lambda m: bool(m[1].weight),
        lambda m: m[0].weight.tolist(),
        lambda m: m[0].weight.detach().numpy(),
        lambda m: torch.equal(m[0].weight, m[0].weight),
        lambda m: m[0].weight.nonzero(),
        lambda m: m[0].weight.unique(),
        lambda m: torch.unique(m[0].weight.detach()),
        lambda m: m[0].weight.masked_select(torch.ones(4, 3, device="meta", dtype=torch.bool)),
        lambda m: m[0].weight.T.tolist(),
        lambda m: torch.ones(2, 4) @ m[0].weight.mT.mT,
        lambda m: m[0].weight[m[0].weight > 0],
        lambda m: m[0].weight.detach().__dlpack__(),
        lambda m: np.from_dlpack(m[0].weight.detach()),
        lambda m: parametrizations.weight_norm(m[0]),
    ],
)
def test_reading_values_is_refused(read, model):
    with deferred("weight of"):
        read(model)


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m[0].weight.sum().item(),
        lambda m: float(m[0].weight.norm() * 2),
        lambda m: bool(m[0].weight.detach().max() > 1),
        lambda m: (m[0].weight.mean() / 2).tolist(),
        lambda m: (m[0].weight > 0).all().item(),
        lambda m: bool((m[0].weight + 1).isnan().any()),
        lambda m: (m[0].weight > 0).nonzero(),
        lambda m: torch.allclose(m[0].weight.T @ m[0].weight, torch.eye(3, device="meta")),
        lambda m: parametrizations.orthogonal(m[0]),
    ],
)
def test_reading_a_number_computed_from_a_deferred_parameter_is_refused(read, model):
    with deferred("computed from a deferred parameter"):
        read(model)


def test_what_is_wrong_for_other_reasons_raises_as_ever(model):
    with pytest.raises(RuntimeError, match="shape") as error:
        model[0].weight.view(7)
    assert not isinstance(error.value, DeferredParameterError)
    with pytest.raises(RuntimeError) as error:
        (model[0].weight + 1) @ torch.ones(7, 7, device="meta")
    assert not isinstance(error.value, DeferredParameterError)


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.cuda()])
def test_moving_to_a_device_is_refused(move, model):
    with deferred("weight of Linear"):
        move(model)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_to_empty_which_would_drop_recipes_is_refused(device, model):
    with deferred("weight of Linear.*to_empty"):
        model.to_empty(device=device)


@pytest.mark.parametrize("save", [lambda m, f: torch.save(m.state_dict(), f), torch.save])
def test_saving_is_refused(save, model):
    with deferred("weight of Linear.*saved or pickled"):
        save(model, io.BytesIO())


def test_ddp_is_refused(model):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with deferred("wrapped in DistributedDataParallel"):
            nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


def test_materializing_what_was_computed_from_deferred_parameters_is_refused():
    with deferred_init():
        layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(DeferredParameterError, match=r"weight_mask.*computed from deferred parameters"):
        materialize(layer)


def test_materializing_parameters_of_the_meta_device_is_refused():
    with pytest.raises(DeferredParameterError, match=r"without a recipe.*deferred_init"):
        materialize(nn.Linear(3, 4, device="meta"))


def test_materializing_on_the_meta_device_is_refused(model):
    with pytest.raises(ValueError, match=r"device: expected one with memory, found 'meta'"):
        materialize(model, device="meta")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32"])
def test_materializing_in_what_is_no_floating_point_dtype_is_refused(dtype, model):
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype of floating-point"):
        materialize(model, dtype=dtype)


@pytest.fixture
def lazy(tmp_path):
    """A tensor that a hook gets: it is still in its file."""
    torch.save({"weight": torch.ones(4, 3)}, tmp_path / "weights.pt")
    return lazy_tree(index_checkpoint(tmp_path / "weights.pt").weights)["weight"]


def test_data_that_is_still_in_a_file_is_refused(model, lazy):
    with deferred_init():
        other = nn.Linear(3, 4)
        with pytest.raises(DeferredParameterError, match=r"weight of Linear.*LazyTensor.*clone"):
            other.weight.data = lazy
    with pytest.raises(DeferredParameterError, match=r"weight of Linear.*LazyTensor.*clone"):
        model[0].weight.data = lazy
    other.weight.data = lazy.clone()
    assert torch.equal(other.weight, torch.ones(4, 3))
