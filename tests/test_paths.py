"""Globs match as they read, and trees keep their shape."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadamax import ConfigError, paths

names = st.lists(st.text("abk_0", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/b", "x/a/b", False),
        ("b", "a/b", True),
        ("b", "a/bb", False),
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("a/**", "a/b/c", True),
        ("a/**", "a", True),
        ("**/c", "a/b/c", True),
        ("**/c", "c", True),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("{a,b}/c", "b/c", True),
        ("{a,b}/c", "ab/c", False),
        ("{a,b*}_x", "bcd_x", True),
        ("a.b", "a.b", True),
        ("a.b", "acb", False),
        ("l?", "l1", True),
        ("a,b", "a,b", True),
    ],
)
def test_globs(pattern, path, matches):
    assert bool(paths.compile_pattern(pattern).fullmatch(path)) == matches


@given(names)
def test_a_path_matches_itself_and_its_last_name(path):
    assert paths.compile_pattern(path).fullmatch(path)
    assert paths.compile_pattern(path.split("/")[-1]).fullmatch(path)
    assert paths.compile_pattern("**").fullmatch(path)
    assert paths.compile_pattern(re.compile(re.escape(path))).fullmatch(path)


@pytest.mark.parametrize("pattern", ["{a,b", "a}{b", "}q{", "a}"])
def test_braces_that_do_not_pair_are_refused(pattern):
    with pytest.raises(ConfigError, match="braces that do not pair"):
        paths.compile_pattern(pattern)


def test_a_leaf_named_value_keeps_its_name_and_two_leaves_never_share_a_path():
    assert list(paths.leaves({"attn": {"query": 1, "value": 2}})) == ["attn/query", "attn/value"]
    for tree in ({"a/b": 1, "a": {"b": 2}}, {"params": {"a": 1}, "a": 2}):
        with pytest.raises(ConfigError, match="two parameters have the path"):
            paths.leaves(tree)


def test_only_the_first_params_key_is_the_collection():
    assert list(paths.leaves({"params": {"params": {"w": 1}}})) == ["params/w"]
    assert list(paths.leaves({"params": 1})) == ["params"]


def test_a_leaf_is_added_beside_its_siblings_without_touching_the_tree():
    tree = {"params": {"a": {"kernel": 1}, "b": {"kernel": 2}}}
    assert paths.add_leaf(tree, "a/bias", 3) == {"params": {"a": {"kernel": 1, "bias": 3}, "b": {"kernel": 2}}}
    assert "bias" not in tree["params"]["a"]
    with pytest.raises(TypeError, match="has a 'kernel'"):
        paths.add_leaf(tree, "a/kernel", 3)
