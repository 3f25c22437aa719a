"""Walking trees that come from files."""

import argparse
import collections

from lightning_efficient_init.checkpoint import map_leaves

Pair = collections.namedtuple("Pair", "first second")


class Leaf:
    def __init__(self, name):
        self.name = name


def names(tree):
    return map_leaves(tree, Leaf, lambda leaf, path: (leaf.name, path))


def test_containers_keep_their_types_and_the_tree_is_left_alone():
    class Attributes(dict):
        pass

    ordered = collections.OrderedDict(a=Leaf("x"))
    ordered._metadata = {"": {"version": 1}}
    tree = {"o": ordered, "p": Pair(Leaf("y"), 1), "l": [Leaf("z")], "t": (1, 2), "d": Attributes(k=Leaf("w")),
            "f": collections.defaultdict(list, k=Leaf("v"))}  # fmt: skip
    result = names(tree)
    assert result["o"] == {"a": ("x", ("o", "a"))}
    assert type(result["o"]) is collections.OrderedDict
    assert result["o"]._metadata == {"": {"version": 1}}
    assert result["p"] == Pair(("y", ("p", 0)), 1)
    assert type(result["p"]) is Pair
    assert result["l"] == [("z", ("l", 0))]
    assert type(result["d"]) is Attributes
    assert result["f"].default_factory is list
    assert result["t"] is tree["t"]
    assert isinstance(tree["o"]["a"], Leaf)
    assert isinstance(tree["d"]["k"], Leaf)


def test_objects_are_copied_only_where_a_leaf_is_below_them():
    tree = [argparse.Namespace(x=Leaf("a")), argparse.Namespace(x=1)]
    result = names(tree)
    assert result[0].x == ("a", (0, "x"))
    assert isinstance(tree[0].x, Leaf)
    assert result[1] is tree[1]


def test_what_is_shared_stays_shared_and_a_leaf_is_replaced_once():
    leaf = Leaf("a")
    shared = [leaf]
    result = names({"x": shared, "y": shared, "z": leaf})
    assert result["x"] is result["y"]
    assert result["x"][0] is result["z"]


def test_a_tree_may_contain_itself():
    tree = {"leaf": Leaf("a")}
    tree["self"] = tree
    thing = argparse.Namespace(leaf=Leaf("b"))
    thing.me = thing
    tree["thing"] = thing
    result = names(tree)
    assert result["self"] is result
    assert result["thing"].me is result["thing"]


def test_a_small_graph_that_spells_out_to_an_enormous_tree_takes_no_time():
    tree = [Leaf("a")]
    pairs = (Leaf("b"),)
    for _ in range(100):
        tree = [tree, tree]
        pairs = (pairs, pairs)
    names({"lists": tree, "tuples": pairs, "in an object": argparse.Namespace(x=tree, y=pairs)})
