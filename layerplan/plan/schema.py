"""The published JSON schema of the freeze plan: `python -m layerplan.plan.schema > docs/freeze_plan.schema.json`."""

from __future__ import annotations

import json

from layerplan.plan.freeze_plan import FreezePlan


def render_schema() -> str:
    """The schema as indented JSON; each field's docstring is its description."""
    return json.dumps(FreezePlan.model_json_schema(), indent=2, ensure_ascii=False)


if __name__ == "__main__":
    print(render_schema())
