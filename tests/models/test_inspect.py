"""The report on a checkpoint, and the command that prints it."""

import json
import shutil
import types
from pathlib import Path

import huggingface_hub
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models import count_params, inspect
from jaxrl_llm.models.checkpoint import WEIGHTS, read_header
from jaxrl_llm.models.hub import load
from jaxrl_llm.models.inspect import inspect_checkpoint, main

GOLDEN = Path(__file__).parent / "golden"
EXPERTS = GOLDEN / "decoder_qwen3_moe"


def test_a_report(capsys):
    report = inspect_checkpoint(EXPERTS)
    assert report["loads"] and report["problem"] is None and report["family"] == "Qwen3MoeForCausalLM"
    assert report["config"]["num_experts"] == 6 and "num_heads" not in report["config"]  # 4 is the default
    model = load(EXPERTS)
    assert report["parameters"] == count_params(model.params)
    # 2 of 6 experts of three matrices 32 x 12, in each of two layers
    assert report["parameters"] - report["active_parameters"] == 2 * 4 * 3 * 32 * 12
    assert report["bytes"] == {name: report["parameters"] * size for name, size in inspect.ITEM_BYTES.items()}
    assert report["stored"] == {"F32": len(read_header(EXPERTS / WEIGHTS))}
    assert main([str(EXPERTS), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == report["parameters"]


def test_the_table(capsys):
    assert main([str(GOLDEN / "t5")]) == 0
    printed = capsys.readouterr().out
    parameters = count_params(load(GOLDEN / "t5").params)
    assert "T5ForConditionalGeneration" in printed and f"{parameters:,}" in printed and "yes" in printed
    assert "active" not in printed


def test_what_will_not_load(tmp_path, capsys):
    folder = shutil.copytree(EXPERTS, tmp_path / "spoiled")
    tensors = load_file(folder / WEIGHTS)
    tensors["surplus"] = np.zeros(3, np.float32)
    norm = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    save_file(tensors, folder / WEIGHTS)
    report = inspect_checkpoint(folder)
    assert (report["missing"], report["surplus"], report["loads"]) == (["model.norm.weight"], ["surplus"], False)
    assert report["misshapen"] == ["lm_head.weight is [80, 31], expected [80, 32]"]
    assert main([str(folder)]) == 1
    assert "[80, 31], expected [80, 32]" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    del tensors["surplus"]
    save_file({**tensors, "model.norm.weight": norm.astype(np.int8)}, folder / WEIGHTS)
    assert "model.norm.weight is of type I8" in inspect_checkpoint(folder)["problem"]


def test_as_far_as_one_gets(tmp_path):
    """Without weights the sizes are known all the same; without a known architecture nothing is."""
    shutil.copyfile(EXPERTS / "config.json", tmp_path / "config.json")
    report = inspect_checkpoint(tmp_path)
    assert report["parameters"] > 0 and "neither model.safetensors" in report["problem"]
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    report = inspect_checkpoint(tmp_path)
    assert report.keys() == {"path", "problem", "loads"} and "'MambaForCausalLM' is not supported" in report["problem"]


def test_a_hub_id_costs_no_weights(tmp_path, monkeypatch):
    shutil.copyfile(EXPERTS / "config.json", tmp_path / "config.json")
    asked = []

    def download(hub_id, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    def headers(self, hub_id):
        tensors = {
            name: types.SimpleNamespace(dtype=tensor.dtype, shape=list(tensor.shape), data_offsets=(0, 0))
            for name, tensor in read_header(EXPERTS / WEIGHTS).items()
        }
        return types.SimpleNamespace(files_metadata={WEIGHTS: types.SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", headers)
    report = inspect_checkpoint("somebody/experts")
    assert report["loads"] and not [pattern for pattern in asked if "safetensors" in pattern]
    assert {key: value for key, value in report.items() if key != "path"} == {
        key: value for key, value in inspect_checkpoint(EXPERTS).items() if key != "path"
    }

    def refuse(self, hub_id):
        raise ConnectionError("503 busy")

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", refuse)
    assert "ConnectionError: 503 busy" in inspect_checkpoint("somebody/experts")["problem"]
