"""How the weights of a transformers model are named and shaped in its checkpoints.

transformers renames, splits and fuses tensors of a checkpoint while it loads them: all experts of a layer become one
tensor. It undoes that when it saves, for all weights at once; here it is undone for a few at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class CheckpointNames:
    """Knows which tensors of a checkpoint a model's weights become, by transformers' own rules for saving it."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        """Look up `names`, all weights of a transformers model; there may be adapters in its layers."""
        undone = [rule.reverse_transform() for rule in reversed(_rules(model))]
        converters = [rule for rule in undone if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in undone if isinstance(rule, WeightRenaming)]
        self._model = model
        self._converters = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        # Sorted as transformers sorts them: some of its rules hold only once another name has been seen.
        self._found: dict[str, tuple[str, str | None]] = {
            name: rename_source_key(name, renamings, converters, reverse=True)
            for name in sorted(names, key=dot_natural_key)
        }

    def target(self, name: str) -> str:
        """Return what stands for the tensors that a weight becomes; weights that become one tensor share it."""
        return self._found[name][0]

    def stored(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights as a checkpoint holds them: contiguous, and views of the weights where nothing is rearranged.

        Weights that share a target must come together.
        """
        rules: dict[str, Any] = {}
        for name in sorted(weights, key=dot_natural_key):
            target, pattern = self._found[name]
            if pattern is None:
                yield target, weights[name].contiguous()
                continue
            rule = rules.setdefault(target, copy.deepcopy(self._converters[pattern]))
            rule.add_tensor(target, name, pattern, weights[name])
        for target, rule in rules.items():
            for stored, tensor in rule.convert(target, model=self._model, config=self._model.config).items():
                yield stored, (tensor[0] if isinstance(tensor, list) else tensor).contiguous()


def _rules(model: Any) -> list[Any]:
    """The rules by which a model was loaded or, where it was built from a config, those of its class."""
    rules = getattr(model, "_weight_conversions", None)
    if rules is not None:
        return list(rules)
    # A rule on prefixes depends on whether the checkpoint had them, and there is none.
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in found if not isinstance(rule, PrefixChange)]
