"""Numbers of config.json: those of real families pass, those of no model are refused before something of their size is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.checkpoint.config_schema import checked_config
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.export.support import SUPPORTED

WHERE = Path("config.json")


@pytest.mark.parametrize("family", SUPPORTED)
def test_what_transformers_writes_passes(family: str) -> None:
    from transformers import CONFIG_MAPPING

    config = json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False))
    assert checked_config(config, WHERE) is config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 10_000_000}, "num_labels is 10000000; expected a number from 1 to 131,072"),
        ({"num_experts": 100_000}, "num_experts is 100000; expected a number from 1 to 4,096"),
        ({"image_size": 3000, "patch_size": 1}, "an image_size of 3000 in patches of 1 is more than 65,536 patches"),
        ({"hidden_size": "64"}, 'hidden_size is "64"; expected a number from 1 to 131,072'),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; expected a number"),
        ({"hidden_size": True}, "hidden_size is true; expected a number"),
        ({"hidden_size": None}, "hidden_size is null; expected a number"),
        ({"num_hidden_layers": [2]}, r"num_hidden_layers is \[2\]; expected a number"),
        ({"pad_token_id": -7}, "pad_token_id is -7"),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity"),
        ({"rope_theta": float("nan")}, "rope_theta is NaN"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": {"factor": float("inf")}}, "rope_scaling is "),
        ({"rope_scaling": {"factor": {}}}, "rope_scaling is "),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"'),
        ({"model_type": ["llama"]}, r'model_type is \["llama"\]'),
        ({"model_type": "[/b]"}, r'model_type is "\[/b\]"'),
        ({"id2label": {str(i): "x" for i in range(200_000)}}, "id2label is "),
    ],
)
def test_numbers_of_no_model(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {message}") as caught:
        checked_config({"model_type": "llama", **change}, WHERE)
    assert len(str(caught.value)) < 300
