"""The safetensors format, and pieces of parameters out of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.flax import save_file

from jaxrl_llm.models.checkpoint import (
    INDEX,
    TYPES,
    WEIGHTS,
    Differences,
    Stored,
    Tensor,
    compare,
    read_header,
    read_headers,
    read_piece,
    rename,
    stored_shapes,
    write_file,
)

FLOAT32 = np.dtype(np.float32)


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(path, arrays):
    write_file(path, [(name, array.dtype, array.shape) for name, array in arrays.items()], arrays.__getitem__)


def whole(shape):
    return (slice(None),) * len(shape)


def test_the_library_reads_what_we_write(tmp_path):
    arrays = {
        f"tensor {tag}": np.asarray(draw((3, 5), i)).astype(kind)
        for i, (tag, kind) in enumerate(TYPES.items())
        if tag != "F64"
    }
    arrays |= {"scalar": np.float32(1.5), "empty": np.zeros((0, 4), np.float32), "transposed": draw((4, 6)).T}
    write(tmp_path / "a.safetensors", {name: np.asarray(array) for name, array in arrays.items()})
    with safe_open(tmp_path / "a.safetensors", framework="flax") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file that does not say so
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert found.dtype == array.dtype and np.array_equal(found, array), name


def test_we_read_what_the_library_writes(tmp_path):
    arrays = {"half": jnp.asarray(draw((7, 3)), jnp.float16), "brain": jnp.asarray(draw((2, 5)), jnp.bfloat16)}
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    tensors = read_header(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        found = read_piece(Stored((name,)), tensors, array.shape, whole(array.shape), FLOAT32)
        assert found.dtype == FLOAT32 and np.array_equal(found, array.astype(jnp.float32))


@pytest.fixture(scope="module")
def pieces_file(tmp_path_factory):
    """Four matrices [600, 9], beyond a block of the copy, as a fused one and as experts."""
    path = tmp_path_factory.mktemp("pieces") / WEIGHTS
    arrays = {str(i): draw((600, 9), i) for i in range(4)}
    write(path, arrays)
    return read_header(path), arrays


@given(
    experts=st.integers(1, 4),
    transpose=st.booleans(),
    rows=st.none() | st.tuples(st.integers(0, 299), st.integers(300, 600)),
    data=st.data(),
)
def test_a_piece_is_the_slice_of_the_whole(pieces_file, experts, transpose, rows, data):
    tensors, arrays = pieces_file
    names = tuple(map(str, range(experts)))
    matrices = [arrays[name] if rows is None else arrays[name][slice(*rows)] for name in names]
    matrices = [matrix.T if transpose else matrix for matrix in matrices]
    parameter = np.stack(matrices) if experts > 1 else matrices[0]
    cuts = []
    for size in parameter.shape:
        start = data.draw(st.integers(0, size))
        cuts.append(data.draw(st.sampled_from([slice(None), slice(start, size), slice(None, start)])))
    found = read_piece(Stored(names, transpose, rows), tensors, parameter.shape, tuple(cuts), FLOAT32)
    assert np.array_equal(found, parameter[tuple(cuts)])


def test_shapes_of_fused_and_stacked_tensors():
    stored = {
        "query": Stored(("fused",), True, (0, 8)),
        "key": Stored(("fused",), True, (8, 12)),
        "experts": Stored(("e0", "e1"), True),
        "norm": Stored(("norm",)),
    }
    shapes = {"query": (5, 8), "key": (5, 4), "experts": (2, 5, 7), "norm": (5,)}
    assert stored_shapes(stored, shapes) == {"fused": (12, 5), "e0": (7, 5), "e1": (7, 5), "norm": (5,)}
    with pytest.raises(ValueError, match=r"disagree on 2 parameters: \['norm', 'scale'\]"):
        stored_shapes(stored, {**{k: v for k, v in shapes.items() if k != "norm"}, "scale": (5,)})


def test_renaming(tmp_path):
    tensors = {"bert.a.gamma": Tensor(tmp_path, "F32", (1,), 0), "b": Tensor(tmp_path, "F32", (2,), 0)}
    rules = ((r"^bert\.", ""), (r"gamma$", "weight"))
    assert {name: tensor.shape for name, tensor in rename(tensors, rules).items()} == {"a.weight": (1,), "b": (2,)}
    with pytest.raises(ValueError, match="1 tensors .* same name"):
        rename({**tensors, "a.gamma": tensors["b"]}, rules)


def test_all_differences_at_once(tmp_path):
    expected = {"a": (2, 3), "b": (4,), "c": (5,), "quantized": (6,)}
    shapes = {"a": (3, 2), "b": (4,), "quantized": (6,), "extra": (1,), "lm_head.weight": (1,)}
    shapes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (1,), "pooler.weight": (1,)}
    kinds = {"quantized": "I8"}
    tensors = {name: Tensor(tmp_path, kinds.get(name, "F32"), shape, 0) for name, shape in shapes.items()}
    found = compare(expected, tensors, ignored=(r"pooler\..*",))
    assert found == Differences(
        missing=["c"],
        surplus=["extra"],
        misshapen=["a is [3, 2], expected [2, 3]"],
        unreadable=["quantized is of type I8, expected one of F64, F32, F16, BF16"],
    )
    many = found._replace(missing=[f"m{i}" for i in range(25)])
    assert "25 missing: m0, m1" in many.describe() and "m9, and 15 more; 1 surplus: extra" in many.describe()


@pytest.mark.parametrize("size", [0, 5, 60, 200, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / WEIGHTS
    write(path, {"first": draw((8, 8)), "second": draw((8, 8))})
    content = path.read_bytes()
    assert len(content) > 300
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{path} is cut short"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "header", [b"\x80 no text", b"[1, 2]", b'{"a": {"dtype": "F32"}}', b'{"a": {"data_offsets": 3, "shape": 1}}']
)
def test_a_file_of_another_kind_is_named(tmp_path, header):
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is no safetensors file"):
        read_headers(tmp_path)


def test_a_shape_that_does_not_fit_its_bytes(tmp_path):
    write(tmp_path / WEIGHTS, {"tensor": draw((8, 8))})
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content.replace(b"[8,8]", b"[8,9]"))
    with pytest.raises(ValueError, match=r"the bytes of tensor do not make F32\[8, 9\]"):
        read_headers(tmp_path)


def test_an_index_and_its_shards(tmp_path):
    def write_index(places):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))

    write(tmp_path / "one.safetensors", {"a": draw((2,)), "b": draw((3,))})
    write(tmp_path / "two.safetensors", {"c": draw((4,))})
    write_index({"a": "one.safetensors", "c": "two.safetensors"})
    assert {name: tensor.shape for name, tensor in read_headers(tmp_path).items()} == {"a": (2,), "c": (4,)}
    write_index({"a": "one.safetensors", "c": "three.safetensors", "d": f"../{tmp_path.name}/two.safetensors"})
    with pytest.raises(ValueError, match=r"names 2 of 3 shards .*\.\./.*two.safetensors, three.safetensors"):
        read_headers(tmp_path)
    write_index({"a": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(ValueError, match="1 tensors .* such as c in one.safetensors"):
        read_headers(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_headers(tmp_path)
    (tmp_path / INDEX).write_text("<html>")
    with pytest.raises(ValueError, match=f"{INDEX} is not JSON"):
        read_headers(tmp_path)


def test_no_safetensors(tmp_path):
    with pytest.raises(ValueError, match=f"neither {WEIGHTS} nor {INDEX}"):
        read_headers(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"PyTorch weights only \(pytorch_model.bin\); convert them"):
        read_headers(tmp_path)
