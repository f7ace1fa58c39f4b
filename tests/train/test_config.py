"""Configs: arms, typed overrides, JSON."""

import pytest
from ml_collections import ConfigDict

from jaxrl_llm.train.config import (
    choose_arm,
    config_difference,
    flatten,
    from_json,
    load_config,
    override,
    parse_overrides,
    to_json,
)


def fresh():
    return ConfigDict(
        {
            "seed": 0,
            "steps": 10,
            "rate": 0.1,
            "flag": True,
            "name": "grpo",
            "limit": None,
            "hops": (1, 2),
            "rates": (0.1, 0.2),
            "names": ("a",),
            "model": {"width": 8, "kind": "none"},
        }
    )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "1e3", 1000),
        ("rate", "3", 3.0),
        ("rate", "1e-6", 1e-6),
        ("flag", "false", False),
        ("flag", "yes", True),
        ("name", "3", "3"),
        ("name", "a=b", "a=b"),
        ("limit", "50", 50),
        ("limit", "text", "text"),
        ("limit", "None", None),
        ("steps", "None", None),
        ("hops", "3", (3,)),
        ("hops", "(1, 2, 3)", (1, 2, 3)),
        ("hops", "()", ()),
        ("rates", "1,2.5", (1.0, 2.5)),
        ("names", "x,'y'", ("x", "y")),
        ("model.width", "16", 16),
        ("model.kind", "none", "none"),
        ("seed", "7", 7),
        ("seed", "0,1,2", (0, 1, 2)),
    ],
)
def test_text_is_read_by_the_type_of_the_default(key, text, value):
    config = fresh()
    override(config, key, text)
    got = flatten(config).get(key, "absent")
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("step", "3", "no key 'step'; the nearest is 'steps'"),
        ("model.widht", 3, "the nearest is 'model.width'"),
        ("model", "3", "config.model is a group; set one of its keys: model.kind, model.width"),
        ("steps", "2.5", "config.steps must be of type int like its default 10, got 2.5"),
        ("steps", "many", "config.steps must be of type int"),
        ("steps", True, "config.steps must be of type int"),
        ("steps", "1,2", "config.steps must be of type int"),
        ("rate", "fast", "config.rate must be of type float"),
        ("flag", "2", "config.flag must be of type bool"),
        ("name", 3, "config.name must be of type str"),
    ],
)
def test_bad_overrides_name_the_key(key, value, words):
    with pytest.raises(ValueError, match=words):
        override(fresh(), key, value)


def test_arms_and_files(tmp_path):
    with pytest.raises(ValueError, match="unknown arm 'huge'; this config has small, tiny"):
        choose_arm(fresh(), "huge", {"small": {}, "tiny": {"steps": 1}})
    base = fresh()
    assert choose_arm(base, "tiny", {"tiny": {"model.width": 1}}).model.width == 1
    assert base.model.width == 8
    path = tmp_path / "x.py"
    with pytest.raises(ValueError, match="no Python file"):
        load_config(str(path))
    path.write_text("a = 1\n")
    with pytest.raises(ValueError, match="defines no get_config"):
        load_config(str(path))
    path.write_text(
        "from ml_collections import ConfigDict\nget_config = lambda arm: ConfigDict({'arm': arm, 'a': {'b': 1}})\n"
    )
    assert load_config(str(path)).arm == "small"
    assert load_config(f"{path}:tiny", {"a.b": "2"}).to_dict() == {"arm": "tiny", "a": {"b": 2}}


def test_command_line_and_json():
    overrides, rest = parse_overrides(["--config.a.b=x=y", "--config=f.py", "slug", "--config.c="])
    assert overrides == {"a.b": "x=y", "c": ""} and rest == ["--config=f.py", "slug"]
    with pytest.raises(ValueError, match="write the override as --config.steps=3|with an equals sign"):
        parse_overrides(["--config.steps", "3"])
    assert from_json(to_json(fresh())).to_dict() == fresh().to_dict()
    other = fresh()
    override(other, "model.width", 9)
    assert config_difference(fresh(), other) == ["model.width: 8 there, 9 now"]
    assert config_difference(fresh(), from_json(to_json(fresh()))) == []
