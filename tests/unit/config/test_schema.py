from __future__ import annotations

import json
import re
from typing import Any

import pytest

from simpletuner.config.flat import SETTINGS
from simpletuner.config.schema import config_schema, datasets_schema
from tests import seeds

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
}


def accepts(schema: Any, value: object, root: dict[str, Any]) -> bool:
    """Whether a value passes the part of JSON Schema that ours are made of."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "if" in schema:
        chosen = "then" if accepts(schema["if"], value, root) else "else"
        return accepts(schema[chosen], value, root)
    if "const" in schema and value != schema["const"]:
        return False
    if "anyOf" in schema and not any(accepts(form, value, root) for form in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema:
        if not isinstance(value, TYPES[schema["type"]]):
            return False
        if isinstance(value, bool) and schema["type"] != "boolean":
            return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, (int, float)) and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value < schema.get("exclusiveMaximum", value + 1)
    ):
        return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        return all(accepts(part(schema, key), item, root) for key, item in value.items()) and all(
            key in value for key in schema.get("required", ())
        )
    return True


def part(schema: dict[str, Any], key: str) -> Any:
    """The schema of one key; one that nothing matches where it is not allowed."""
    if key in schema["properties"]:
        return schema["properties"][key]
    if any(re.search(pattern, key) for pattern in schema.get("patternProperties", ())):
        return {}
    return {"enum": []} if schema.get("additionalProperties") is False else {}


@pytest.mark.parametrize(
    "text",
    [
        seeds.SDXL_CONFIG,
        seeds.SDXL_QUANTISED,
        seeds.PREVIEWS,
        seeds.SD3_CONFIG,
        seeds.SD3_QUANTISED,
        seeds.SKIP_LAYER_GUIDANCE,
    ],
)
def test_the_quickstarts_settings_pass_the_schema(text: str) -> None:
    assert accepts(config_schema(), json.loads(text), config_schema())


@pytest.mark.parametrize("text", [seeds.SDXL_DATASETS, seeds.SD3_DATASETS])
def test_the_quickstarts_datasets_pass_the_schema(text: str) -> None:
    assert accepts(datasets_schema(), json.loads(text), datasets_schema())


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"lora_rank": 0}, False),
        ({"lora_rank": "16"}, True),
        ({"lora_rank": "many"}, False),
        ({"lora_rank": None}, True),
        ({"lerning_rate": 1}, False),
        ({"--learning-rate": 1}, True),
        ({"LEARNING_RATE": 1}, True),
        ({"mixed_precision": "bf32"}, False),
        ({"validation_disable": "false"}, True),
        ({"validation_guidance_skip_layers": [7, 8, 9]}, True),
        ({"$schema": "x"}, True),
    ],
)
def test_the_schema_tells_right_from_wrong(settings: dict[str, object], passes: bool) -> None:
    assert accepts(config_schema(), settings, config_schema()) is passes


def test_every_setting_is_described_and_the_schema_is_json() -> None:
    schema = json.loads(json.dumps(config_schema()))

    for key in SETTINGS:
        assert schema["properties"][key]["description"]
