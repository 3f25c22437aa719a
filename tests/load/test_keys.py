"""How checkpoint keys find the model's names."""

import pytest
import torch
from torch import nn

from lightning_efficient_init import load_checkpoint, plan_load
from lightning_efficient_init.errors import CheckpointError, StateDictMismatchError
from lightning_efficient_init.load.keys import match_keys, rename_modules


@pytest.fixture
def save(tmp_path, make_net, renamed):
    """Save a net's weights under changed keys."""

    def save(change=lambda key: key, drop=()):
        state = {key: value for key, value in make_net(1).state_dict().items() if key not in drop}
        torch.save(renamed(state, change), tmp_path / "w.pt")
        return tmp_path / "w.pt"

    return save


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.", "a.b.c.", "_forward_module."]
)
def test_a_prefix_in_the_file_is_taken_off(prefix, save, make_net, bits):
    model = make_net(2)
    load_checkpoint(model, save(lambda key: prefix + key))
    assert bits(model) == bits(make_net(1))


@pytest.mark.parametrize("name", ["model", "net", "anything", "_orig_mod"])
def test_a_prefix_in_the_model_is_put_on(name, save, make_net, bits):
    wrapper = nn.Module()
    wrapper.add_module(name, nn.ModuleDict({"inner": make_net(2)}))
    load_checkpoint(wrapper, save())
    assert bits(wrapper.get_submodule(f"{name}.inner")) == bits(make_net(1))


def test_wrapper_segments_in_the_middle_of_names_do_not_count_on_either_side(tmp_path, bits):
    def build(is_compiled):
        model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5)))
        if is_compiled:
            model[1][0] = torch.compile(model[1][0], backend="eager")
        return model

    for saved, loaded in [(False, True), (True, False), (True, True)]:
        source, model = build(saved), build(loaded)
        torch.save(source.state_dict(), tmp_path / "w.pt")
        load_checkpoint(model, tmp_path / "w.pt")
        assert list(bits(model).values()) == list(bits(source).values())
        load_checkpoint(model, tmp_path / "w.pt", key_map=lambda key: key.replace("._orig_mod", ""))


def test_two_prefixes_that_fit_equally_are_an_error_that_names_both(tmp_path):
    torch.save({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, tmp_path / "w.pt")
    model = nn.LayerNorm(2, bias=False)
    with pytest.raises(
        CheckpointError, match=r"several changes of prefix fit: 'a\.' -> '', 'b\.' -> ''.*key_map"
    ) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'w.pt'}: expected names of the model ('weight'), found none")
    report = load_checkpoint(model, tmp_path / "w.pt", key_map={"a.weight": "weight", "b.weight": None})
    assert report.loaded == ("weight",)


def test_a_known_prefix_is_taken_off_if_only_a_part_fits(save, make_net):
    path = save(lambda key: f"model.{key}", drop=["embed.weight"])
    model = make_net(2)
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, path)
    assert caught.value.missing == ("embed.weight",)
    assert caught.value.unexpected == ()
    report = load_checkpoint(model, path, strict=False)
    assert report.missing == ("embed.weight",)
    assert torch.equal(model.layers[0].weight, make_net(1).layers[0].weight)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_which_nothing_fits_is_an_error_in_any_case(strict, save, make_net, bits):
    model = make_net(2)
    with pytest.raises(StateDictMismatchError, match="Not one key fits") as caught:
        load_checkpoint(model, save(lambda key: f"x{key}x"), strict=strict)
    assert set(caught.value.missing) == set(model.state_dict()) - {"layers.1.num_batches_tracked"}  # it can do without
    assert bits(model) == bits(make_net(2))


def test_a_mapping_renames_drops_and_leaves_the_rest(save, make_net, bits):
    model = make_net(2)
    path = save(lambda key: "E" if key == "embed.weight" else "junk" if key == "mask" else key)
    report = load_checkpoint(model, path, key_map={"E": "embed.weight", "junk": None}, strict=False)
    assert report.missing == ("mask",)
    assert report.unexpected == ()
    expected = make_net(1)
    expected.mask = make_net(2).mask
    assert bits(model) == bits(expected)


def test_a_function_renames_and_drops(save, make_net, bits):
    model = make_net(2)
    load_checkpoint(model, save(lambda key: f"old/{key}"), key_map=lambda key: key.removeprefix("old/"))
    assert bits(model) == bits(make_net(1))


def test_unexpected_keys_are_named_as_they_stand_in_the_file(save, make_net):
    path = save(lambda key: f"model.{'embedding.w' if key == 'embed.weight' else key}")
    plan = plan_load(make_net(), path, strict=False)
    assert plan.unexpected == ("model.embedding.w",)
    assert plan.missing == ("embed.weight",)


def test_two_keys_for_one_name_are_an_error_that_names_all_three(save, make_net):
    path = save()
    with pytest.raises(CheckpointError, match="'mask' and 'scalar', which stand for the same one, 'mask'") as caught:
        load_checkpoint(make_net(), path, key_map={"scalar": "mask"})
    assert str(caught.value).startswith(f"{path}: expected one key")
    with pytest.raises(CheckpointError, match=r"w\.pt: .* 'a' and '_orig_mod\.a', which stand for the same one, 'a'"):
        match_keys(["a", "_orig_mod.a"], ["a"], None, path="w.pt")


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        (lambda key: False, "expected a name of the model for the key 'table', or None to drop it; found False"),
        ({"mask": 3}, "for the key 'mask', or None to drop it; found 3"),
        ([("mask", "scalar")], "expected a mapping or a function, found list"),
    ],
)
def test_a_key_map_of_another_kind_is_refused(key_map, message, save, make_net):
    with pytest.raises(TypeError, match=message):
        load_checkpoint(make_net(), save(), key_map=key_map)


def test_arguments_in_the_wrong_order_are_refused(save, make_net):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, found .*Path. The path comes second"):
        load_checkpoint(save(), make_net())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"host_buffer_bytes": "1GiB"}, "host_buffer_bytes must be an integer, in bytes, found '1GiB'"),
        ({"host_buffer_bytes": 1e6}, r"host_buffer_bytes must be an integer, in bytes, found 1000000\.0"),
        ({"num_threads": 1.5}, r"num_threads must be an integer or None, found 1\.5"),
    ],
)
def test_settings_of_another_kind_are_refused(arguments, message, save, make_net):
    with pytest.raises(TypeError, match=message):
        load_checkpoint(make_net(), save(), **arguments)


def test_strange_names_are_kept(tmp_path, bits):
    names = ["wei ght", "größe", "模型", "a/b", "_", "0", "x" * 3000]
    state = {name: torch.randn(3) for name in names}
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in names})
    torch.save(state, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(state)


@pytest.mark.parametrize("key", ["", ".", "..", ".weight", "weight.", "a..weight"])
def test_keys_that_no_module_can_have_are_unexpected(key, tmp_path):
    torch.save({"weight": torch.ones(2), "bias": torch.ones(2), key: torch.ones(2)}, tmp_path / "w.pt")
    assert plan_load(nn.LayerNorm(2), tmp_path / "w.pt", strict=False).unexpected == (key,)


def test_versions_of_modules_follow_the_renaming_of_their_keys():
    metadata = {"": {"version": 9}, "model": {"version": 1}, "model.a.bn": {"version": 2}, "other": {"version": 3}}
    found = rename_modules(metadata, {"model.a.bn.weight": "a.bn.weight", "model.a.bn.bias": "a.bn.bias"})
    assert found == {"": {"version": 1}, "a.bn": {"version": 2}}
    assert rename_modules(None, {"a": "a"}) is None
    assert rename_modules("hostile", {"a": "a"}) is None


def test_a_batch_norm_without_its_counter_is_an_error_under_a_prefix_too(save, make_net):
    path = save(lambda key: f"model.{key}", drop=["layers.1.num_batches_tracked"])
    state = torch.load(path)
    state._metadata = {
        f"model.{key}" if key else "model": value for key, value in make_net().state_dict()._metadata.items()
    }
    torch.save(state, path)
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(make_net(), path)
    assert caught.value.missing == ("layers.1.num_batches_tracked",)
