"""YAML in which a key that comes twice is an error: the second would silently win."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class OnceLoader(yaml.SafeLoader):
    """For `yaml.load`; raises `yaml.constructor.ConstructorError` at the second of two keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in names:
                where = f"{key.value} is given again in line {key.start_mark.line + 1}"
                raise yaml.constructor.ConstructorError(problem=where, problem_mark=key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)
