"""Checkpoints in and out: what is read and written, in which memory and sharding, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from huggingface_hub import constants
from safetensors.flax import load_file, save_file

from jaxrl_llm.models import hub
from jaxrl_llm.models.checkpoint import INDEX, WEIGHTS
from jaxrl_llm.models.decoder import make_decoder
from jaxrl_llm.models.decoder_config import DecoderConfig
from jaxrl_llm.models.hub import load, save

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
# a plain one; stacked experts; fused rows; tied embeddings; an encoder; two stacks
FOLDERS = ["decoder_llama", "decoder_qwen3_moe", "decoder_phi3", "decoder_gemma2", "bert", "t5"]
TINY = DecoderConfig(vocab_size=30, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=24)


@pytest.fixture(scope="module")
def llama():
    return load(GOLDEN / "decoder_llama")


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint to spoil."""
    return copy("decoder_llama", tmp_path / "llama")


def copy(name, folder):
    """The checkpoint alone, without what the model should give."""
    return Path(shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("expected*")))


def draw(model):
    """Parameters at random, without compiling the draws of `model.init`."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape, np.float32)), shapes)


def rewrite(folder, change):
    """Changes the tensors of a checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def rewrite_config(folder, **changes):
    source = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**source, **changes}))


def assert_same(left, right):
    left, right = flatten_dict(left), flatten_dict(right)
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_as_it_was_read(name, tmp_path):
    """The tensors come back bit by bit, under their names, and the config as it was."""
    model = load(GOLDEN / name)
    save(model, model.params, tmp_path / "saved")
    found, expected = load_file(tmp_path / "saved" / WEIGHTS), load_file(GOLDEN / name / WEIGHTS)
    unread = {key for key in expected if key.startswith(("pooler", "cls", "lm_head")) and key not in found}
    assert found.keys() == expected.keys() - unread
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    source = json.loads((GOLDEN / name / "config.json").read_text())
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == source
    assert (model.family, model.source, model.tokenizer) == (source["architectures"][0], source, None)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
def test_types(llama, folder, stored):
    """Whatever is stored is converted to what is asked for, and written as asked for."""
    save(llama, llama.params, folder, dtype=stored)
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {jnp.dtype(stored)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == jnp.dtype(stored).name
    assert_same(load(folder).params, jax.tree.map(lambda x: x.astype(stored).astype(jnp.float32), llama.params))
    assert_same(load(folder, dtype=stored).params, jax.tree.map(lambda x: x.astype(stored), llama.params))


def test_mixed_types_and_an_odd_number_of_halves(tmp_path):
    """Parameters keep their own type, and the file can be read by the library."""
    model = make_decoder(dataclasses.replace(TINY, vocab_size=31))
    params = draw(model)
    params["embedding"] = params["embedding"].astype(jnp.bfloat16)
    save(model, params, tmp_path / "saved")
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "saved" / WEIGHTS).items()}
    assert kinds.pop("model.embed_tokens.weight") == jnp.bfloat16
    assert set(kinds.values()) == {jnp.dtype(jnp.float32)}


def test_shards(llama, tmp_path):
    save(llama, llama.params, tmp_path / "saved", max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    shards = {file: load_file(tmp_path / "saved" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in shards[file]}
    sizes = {file: sum(tensor.nbytes for tensor in shard.values()) for file, shard in shards.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and max(sizes.values()) <= 30_000
    assert_same(load(tmp_path / "saved").params, llama.params)
    # a whole number of files comes out where every tensor is larger than a shard may be
    save(llama, llama.params, tmp_path / "saved", max_shard_bytes=1)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == len(index["weight_map"])
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        save(llama, llama.params, tmp_path / "saved", max_shard_bytes=0)


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"attention_bias": True, "tie_embeddings": False}, "Qwen2ForCausalLM"),
        ({"qk_norm": "head", "rope_theta": 1e6}, "Qwen3ForCausalLM"),
    ],
)
def test_a_decoder_of_ours_is_saved_as_a_family(changes, architecture, tmp_path):
    model = make_decoder(dataclasses.replace(TINY, **changes))
    params = draw(model)
    save(model, params, tmp_path / "new" / "saved")
    loaded = load(tmp_path / "new" / "saved")
    assert (loaded.family, loaded.config) == (architecture, model.config)
    assert_same(loaded.params, params)


def test_a_decoder_that_no_family_has(tmp_path):
    model = make_decoder(dataclasses.replace(TINY, logit_softcap=5.0))
    with pytest.raises(ValueError, match="no decoder family .*logit_softcap=5.0"):
        save(model, draw(model), tmp_path / "saved")


def test_a_changed_config(llama, tmp_path):
    """A head of its own can be written by the family; a cap of the logits cannot, and nothing appears."""
    wider = make_decoder(dataclasses.replace(llama.config, layer_ropes=None, tie_embeddings=True))
    wider = dataclasses.replace(wider, family=llama.family)
    params = {name: value for name, value in llama.params.items() if name != "head"}
    save(wider, params, tmp_path / "saved")
    assert load(tmp_path / "saved").config == wider.config
    capped = dataclasses.replace(llama, config=dataclasses.replace(llama.config, logit_softcap=5.0))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot express .*logit_softcap=5.0"):
        save(capped, llama.params, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("kind", ["chatml", "llama"])
def test_the_tokenizer_comes_along(kind, folder, tmp_path):
    files = {path.name: path.read_bytes() for path in (GOLDEN / "tokenizers" / kind).iterdir()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model = load(folder)
    text = "Grüße, 世界!  two  spaces"
    ids = model.tokenizer.encode(text)
    save(model, model.params, tmp_path / "saved")
    assert files.items() <= {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}.items()
    shutil.rmtree(folder)
    again = load(tmp_path / "saved")
    assert again.tokenizer.encode(text) == ids and again.tokenizer.chat_template == model.tokenizer.chat_template
    # its files are gone: a fast tokenizer is written from memory, and a SentencePiece model is missed aloud
    if kind == "chatml":
        save(model, model.params, tmp_path / "again")
        written = load(tmp_path / "again").tokenizer
        assert written.encode(text) == ids and written.chat_template == model.tokenizer.chat_template
    else:
        with pytest.warns(UserWarning, match="saved without the tokenizer"):
            save(model, model.params, tmp_path / "again")
        assert_same(load(tmp_path / "again").params, model.params)


def test_harmless_tensors_are_ignored(folder, llama):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(4)}))
    assert_same(load(folder).params, llama.params)
    tied = copy("decoder_gemma2", folder.with_name("tied"))
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "head" not in load(tied).params


def test_all_wrong_tensors_are_listed(folder):
    def spoil(tensors):
        tensors["model.norm.scales"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]

    rewrite(folder, spoil)
    missing, surplus = r"1 missing: model\.norm\.weight", r"1 surplus: model\.norm\.scales"
    misshapen = r"1 misshapen: lm_head\.weight is \[79, 32\], expected \[80, 32\]"
    with pytest.raises(ValueError, match=f"{folder}.*{missing}; {surplus}; {misshapen}"):
        load(folder)


def test_unsupported_architectures(folder):
    rewrite_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match="'MambaForCausalLM' is not supported; supported are .*Qwen2ForCausalLM"):
        load(folder)
    rewrite_config(folder, architectures=None)
    with pytest.raises(ValueError, match="names no architecture; supported are .*LlamaForCausalLM"):
        load(folder)


def test_broken_folders(folder, monkeypatch):
    config = folder / "config.json"
    config.write_text(config.read_text()[:-20])
    with pytest.raises(ValueError, match=f"{config} is not JSON"):
        load(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list, expected an object"):
        load(folder)
    config.unlink()
    with pytest.raises(ValueError, match=f"{folder} has no config.json"):
        load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load(folder)
    shutil.copyfile(GOLDEN / "decoder_llama" / "config.json", config)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    monkeypatch.setattr(hub, "read_piece", pytest.fail)  # nothing is read before all is known to be there
    with pytest.raises(ValueError, match=f"{WEIGHTS} is cut short"):
        load(folder)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int8"):
        load(folder, dtype=jnp.int8)


def test_what_is_neither_a_folder_nor_in_the_hub(folder, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="is a file.*did you mean"):
        load(folder / WEIGHTS)
    for path in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(ValueError, match="there is no folder .* no hub id either"):
            load(path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no folder 'nobody/nothing'.*hf download nobody/nothing.*path of the folder"):
        load("nobody/nothing")


def test_a_hub_id_is_downloaded(folder, llama, monkeypatch):
    asked = {}

    def download(hub_id, allow_patterns):
        asked.update(hub_id=hub_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load("somebody/llama").params, llama.params)
    assert asked["hub_id"] == "somebody/llama"
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json"]
    files += ["tokenizer.model", "pytorch_model.bin", "consolidated.safetensors", "README.md"]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["patterns"]))
    assert kept == files[:6]


def test_save_refuses_what_is_not_the_models(llama, tmp_path):
    params = {**llama.params, "extra": jnp.ones(2), "norm": {"scale": jnp.ones(3)}}
    del params["head"]
    wrong = r"head is missing, extra is not the model's, norm\.scale is \[3\], expected \[32\]; merge adapters"
    with pytest.raises(ValueError, match=wrong):
        save(llama, params, tmp_path / "saved")
    with pytest.raises(ValueError, match="the type int8; give dtype"):
        save(llama, jax.tree.map(lambda x: x.astype(jnp.int8), llama.params), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_save_replaces_checkpoints_and_nothing_else(llama, folder, monkeypatch):
    changed = jax.tree.map(lambda x: x + 1, llama.params)
    with monkeypatch.context() as context:
        context.setattr(hub, "write_file", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            save(llama, changed, folder)
    assert_same(load(folder).params, llama.params)  # as it was
    save(llama, changed, folder)
    assert_same(load(folder).params, changed)
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds notes.txt, so it is not just a checkpoint"):
        save(llama, llama.params, folder)
    (folder / "notes.txt").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"holds {WEIGHTS}, so it is not just a checkpoint"):
        save(llama, llama.params, folder)
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        save(llama, llama.params, folder / WEIGHTS)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["llama"]  # no temporary folder stays


def run(code, **variables):
    """Runs Python code in a process of its own, which prints JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sharded_parameters_equal_plain_ones(tmp_path):
    """On eight devices, each holds its piece: of stacked experts, of fused rows, of replicated norms. Saved from
    there, the files are those of the plain model."""
    found = run(
        f"saved = {str(tmp_path / 'saved')!r}"
        """
import json, jax, numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrl_llm.models.hub import load, save
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
specs = {1: P(), 2: P("y", "x"), 3: P("x", "y")}
pieces = lambda name, shape: NamedSharding(mesh, specs[len(shape)])
same, shapes = {}, {}
for folder in ("decoder_qwen3_moe", "decoder_phi3"):
    path = f"tests/models/golden/{folder}"
    model = load(path, sharding=pieces)
    plain, cut = flatten_dict(load(path).params, sep="."), flatten_dict(model.params, sep=".")
    save(model, model.params, saved)
    back = flatten_dict(load(saved).params, sep=".")
    same[folder] = all(np.array_equal(leaf, other[name]) for name, leaf in plain.items() for other in (cut, back))
    for name in ("embedding", "layers.0.experts.gate", "norm.scale"):
        if name in cut:
            shapes[name] = [cut[name].shape, cut[name].addressable_shards[0].data.shape]
one = load("tests/models/golden/decoder_llama", sharding=NamedSharding(mesh, P()))
spread = {leaf.sharding.spec == P() for leaf in jax.tree.leaves(one.params)}
try:
    load("tests/models/golden/decoder_qwen3_moe", sharding=NamedSharding(mesh, P("y")))
    error = None
except ValueError as e:
    error = str(e)
print(json.dumps({"same": same, "shapes": shapes, "spread": list(spread), "error": error}))
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_PLATFORMS="cpu",
    )
    assert found["same"] == {"decoder_qwen3_moe": True, "decoder_phi3": True}
    assert found["spread"] == [True]
    assert found["shapes"]["layers.0.experts.gate"] == [[6, 32, 12], [3, 8, 12]]
    assert found["shapes"]["embedding"] == [[80, 32], [20, 16]] and found["shapes"]["norm.scale"] == [[32], [32]]
    assert "parameter" in found["error"] and "cannot be laid out as" in found["error"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux reports it")
def test_peak_memory(tmp_path):
    """58 MB in shards of 16 MB: loading, and saving after it, take at most 1.2 shards beyond the parameters. All shards
    at once would take 3.6, and saving from a copy of the model too."""
    model = make_decoder(DecoderConfig(vocab_size=2048, width=512, num_layers=6, num_heads=8, ffn_width=1024))
    save(model, draw(model), tmp_path / "big", max_shard_bytes=16e6)
    found = run(
        f"""
import json, re, jax
from jaxrl_llm.models.hub import load, save
memory = lambda key: 1024 * int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])
load("tests/models/golden/decoder_llama")  # what is imported and compiled on the way is not measured
before = memory("VmRSS")
model = load("{tmp_path}/big")
parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
loading = memory("VmHWM") - before - parameters
save(model, model.params, "{tmp_path}/saved", max_shard_bytes=16e6)
saving = memory("VmHWM") - before - parameters
print(json.dumps({{"parameters": parameters, "loading": loading, "saving": saving}}))
"""
    )
    shards = [path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) == 4 and found["parameters"] > 50e6
    assert 0 < found["loading"] <= 1.2 * max(shards), found
    assert found["saving"] <= 1.2 * max(shards), found
