"""Checkpoints from the Hugging Face hub: which files, and what to say when it does not answer."""

from __future__ import annotations

import re
from pathlib import Path

from jaxrl_llm.models.checkpoint import INDEX

# what belongs to a checkpoint beside its weights and config.json
SIDE_FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
WEIGHT_FILES = ("model*.safetensors", INDEX)
# how sentence-transformers says which pooling to use
POOLING_FILES = ("modules.json", "*/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def fetch(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: the path itself, or where a model of the hub has been downloaded to.

    `weights=False` leaves the weights of a hub model where they are.

    Raises:
      ValueError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{str(path)!r} is a file, expected a checkpoint's folder; did you mean {str(path.parent)!r}?")
    hub_id = str(path_or_hub_id)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", hub_id):
        raise ValueError(f"there is no folder {hub_id!r}, and it is no hub id either (those read 'organization/name')")
    import huggingface_hub

    patterns = ["config.json", *SIDE_FILES, *POOLING_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the client's versions use other HTTP libraries, whose errors share no class
        raise hub_error(hub_id, error) from error


def hub_error(hub_id: str, error: Exception) -> ValueError:
    """What to do when the hub does not answer or does not have a model."""
    reason = next(iter(str(error).strip().splitlines()), "")
    return ValueError(
        f"there is no folder {hub_id!r}, and the Hugging Face hub gave no model of that name "
        f"({type(error).__name__}: {reason}). Without a network, download it elsewhere (`hf download {hub_id}`) and "
        "give the path of the folder; for a private or gated model, log in with `hf auth login`"
    )
