"""``mmap=True``: parameters are the file's own pages."""

import pytest
import torch
from torch import nn

from lightning_efficient_init import deferred_init, load_checkpoint
from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.errors import CheckpointError, CorruptCheckpointError
from lightning_efficient_init.load.mapping import map_entries
from lightning_efficient_init.load.plan import plan_load
from lightning_efficient_init.memory import anonymous_bytes


@pytest.mark.parametrize("context", [torch.enable_grad, deferred_init])
def test_nothing_is_read_or_copied(context, tmp_path, bytes_read):
    source = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])  # 134 MB
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with context():
        model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])
    weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 1.0) if context is torch.enable_grad else None
    before = bytes_read(), anonymous_bytes()
    report = load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    assert bytes_read() - before[0] < 500_000
    assert anonymous_bytes() - before[1] < 20 << 20
    assert report.peak_host_bytes < 20 << 20
    assert model[0].weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    if optimizer is not None:
        assert optimizer.param_groups[0]["params"][0] is weight


def test_writes_do_not_reach_the_file(tmp_path, make_net, bits):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    model = make_net(2)
    load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    assert bits(model) == bits(make_net(1))
    loss = model.layers(model.embed.weight).sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert (tmp_path / "w.pt").read_bytes() == content
    again = make_net(3)
    load_checkpoint(again, tmp_path / "w.pt", mmap=True)
    assert bits(again) == bits(make_net(1))


def test_a_file_that_may_only_be_read_can_be_mapped(tmp_path, make_net, bits):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.pt").chmod(0o444)
    model = make_net(2)
    load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    assert bits(model) == bits(make_net(1))


def test_a_scalar_keeps_its_shape_when_the_file_has_one_element(tmp_path, params):
    torch.save({"t": torch.tensor([2.5])}, tmp_path / "w.pt")
    model = params(t=torch.zeros(()))
    load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    assert model.t.shape == ()
    assert model.t == 2.5


def test_tensors_that_overlap_in_the_file_get_memory_of_their_own(tmp_path, params):
    base = torch.arange(10.0)
    state = {"a": base[:6], "b": base[4:], "c": base[2:8], "d": base[8:], "e": base[:0]}
    torch.save(state, tmp_path / "w.pt")
    model = params(**{name: torch.zeros_like(t) for name, t in state.items()})
    load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    for name in state:
        for other, value in state.items():
            assert torch.equal(getattr(model, other), value if other >= name else torch.full_like(value, -1))
        getattr(model, name).fill_(-1)


def test_what_cannot_be_mapped_is_refused_with_each_reason_and_nothing_changes(tmp_path, params, bits):
    torch.save({"cast": torch.ones(2), "strided": torch.ones(3, 2).t(), "fine": torch.ones(2)}, tmp_path / "w.pt")
    model = params(cast=torch.zeros(2).half(), strided=torch.zeros(2, 3), fine=torch.zeros(2))
    before = bits(model)
    with pytest.raises(CheckpointError, match="2 of 3 tensors") as caught:
        load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    for words in (
        "cast: the model has torch.float16, the checkpoint torch.float32",
        "strided: its elements",
        "mmap=False",
    ):
        assert words in str(caught.value)
    assert bits(model) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_parameters_on_a_gpu_are_refused(tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="the model has it on cuda:0"):
        load_checkpoint(make_net(2).cuda(), tmp_path / "w.pt", mmap=True)


@pytest.mark.parametrize("context", [torch.enable_grad, deferred_init, empty_init])
@pytest.mark.parametrize("show", [lambda weight: weight.detach(), lambda weight: weight[:2], lambda weight: weight.t()])
def test_a_tensor_that_would_be_left_behind_is_refused(show, context, tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].register_buffer("shown", show(model[0].weight), persistent=False)
        return model

    torch.save(make().state_dict(), tmp_path / "w.pt")
    with context():
        model = make()
    with pytest.raises(CheckpointError, match=r"0\.weight: 1\.shown shows its memory"):
        load_checkpoint(model, tmp_path / "w.pt", mmap=True)
    load_checkpoint(model, tmp_path / "w.pt")
    assert torch.equal(model[1].shown, show(model[0].weight))


def test_a_file_that_shrank_after_planning_is_found_before_anything_changes(tmp_path, make_net, bits):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    model = make_net(2)
    plan = plan_load(model, tmp_path / "w.pt")
    writes = {name: (plan.binding.tensors[name], entry) for name, entry in plan.entries.items()}
    with open(tmp_path / "w.pt", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(CorruptCheckpointError, match="ends at 2000"):
        map_entries(model, writes)
    assert bits(model) == bits(make_net(2))
